"""The model in mteb, the lists of tasks, and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mteb
import numpy as np
import pytest
from PIL import Image

from sentence_vipyloqwen import ViPyloQwen, cli
from sentence_vipyloqwen.mteb_tasks.encoder import ViPyloQwenEncoder, task_prompts
from sentence_vipyloqwen.mteb_tasks.offline import OFFLINE_TASKS, CLDRPairSTS, VietnameseDocumentRetrieval
from sentence_vipyloqwen.mteb_tasks.queries import WAYS
from sentence_vipyloqwen.mteb_tasks.run import run
from sentence_vipyloqwen.mteb_tasks.suites import SUITES, find_tasks
from sentence_vipyloqwen.tasks import PROMPTS

SIZES = {"offline": 3, "vn-mteb": 50, "vidore-v1": 10, "xm3600-vi": 2, "mmeb": 11}


@pytest.mark.parametrize(("suite", "count"), SIZES.items())
def test_every_list_has_its_tasks(suite: str, count: int) -> None:
    assert len(find_tasks([suite])) == count


def test_every_list_is_of_what_the_model_reads() -> None:
    for suite in SUITES:
        for task in find_tasks([suite]):
            assert set(task.metadata.modalities) <= {"text", "image"}, task.metadata.name


def test_xm3600_is_asked_in_vietnamese_alone() -> None:
    assert [task.hf_subsets for task in find_tasks(["xm3600-vi"])] == [["vi"], ["vi"]]


def test_a_task_is_run_once_however_often_it_is_named() -> None:
    names = ["STSBenchmark-VN", "vn-mteb", "CLDRPairSTS", "offline"]
    assert len(find_tasks(names)) == SIZES["vn-mteb"] + SIZES["offline"]


def test_an_unknown_task_is_told_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"Unknown task 'STSBenchmark-VM' .*vn-mteb.*CLDRPairSTS.*every task of mteb"):
        find_tasks(["STSBenchmark-VM"])


def test_what_prompts_are_given() -> None:
    tasks = find_tasks(["OKVQAIT2TRetrieval", "vidore-v1", "offline"])
    prompts = task_prompts(tasks)
    assert prompts["STS"] == prompts["PairClassification"] == PROMPTS["text_pair"]
    assert prompts["InstructionRetrieval-query"] == PROMPTS["instr"]
    questions = {"VisionCentricQA-query", "OKVQAIT2TRetrieval-query", "EasyVQARetrieval-query"}
    assert {key for key, prompt in prompts.items() if prompt == PROMPTS["vqa_single"]} == questions
    assert not any(key.startswith(("Vidore", "Vietnamese", "DocumentUnderstanding")) for key in prompts)
    assert mteb.models.abs_encoder.AbsEncoder.validate_task_to_prompt_name(  # mteb knows every key but our own tasks'
        {key: prompt for key, prompt in prompts.items() if not key.startswith("EasyVQA")}
    )


def test_the_revision_follows_the_weights(model: ViPyloQwen) -> None:
    first = ViPyloQwenEncoder(model, "local/a", []).mteb_model_meta
    again = ViPyloQwenEncoder(model, "local/a", []).mteb_model_meta
    model[2].linear.weight.data[0, 0] += 1
    other = ViPyloQwenEncoder(model, "local/a", []).mteb_model_meta
    assert first.revision == again.revision != other.revision
    assert first.modalities == ["text", "image"]
    assert (first.name, first.embed_dim) == ("local/a", 32)


def test_vectors_in_mteb_are_those_of_encode(model: ViPyloQwen, picture: Callable[..., Image.Image]) -> None:
    task = VietnameseDocumentRetrieval(pages=2)
    task.load_data()
    split = task.dataset["vietnamese"]["test"]
    encoder = ViPyloQwenEncoder(model, "local/a", [task])
    options = {
        "task_metadata": task.metadata,
        "hf_split": "test",
        "hf_subset": "vietnamese",
        "show_progress_bar": False,
    }
    for kind, rows in (("document", split["corpus"]), ("query", split["queries"])):
        loader = mteb._create_dataloaders.create_dataloader(
            rows, task_metadata=task.metadata, prompt_type=mteb.types.PromptType(kind), batch_size=4
        )
        vectors = encoder.encode(loader, prompt_type=mteb.types.PromptType(kind), **options)
        inputs = [{"image": image} for image in rows["image"]] if kind == "document" else list(rows["text"])
        np.testing.assert_allclose(vectors, model.encode(inputs), atol=1e-5)


def test_what_the_same_weights_have_reached_is_not_measured_again(model: ViPyloQwen, tmp_path: Path) -> None:
    task = CLDRPairSTS(pairs=8)
    first = run(model, [task], tmp_path, name="someone/tiny")
    file = first.folder / "CLDRPairSTS.json"
    content = json.loads(file.read_text())
    content["scores"]["test"][0]["main_score"] = 0.125
    file.write_text(json.dumps(content))
    assert [score.value for score in run(model, [task], tmp_path, name="someone/tiny").scores] == [0.125]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline tasks, small."""
    small = {
        "VietnameseDocumentRetrieval": lambda: VietnameseDocumentRetrieval(pages=2),
        "CLDRPairSTS": lambda: CLDRPairSTS(pairs=8),
    }
    for name, task in small.items():
        monkeypatch.setitem(OFFLINE_TASKS, name, task)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", "mteb", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_the_command_writes_results(
    few: None,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tasks = ("--task", "VietnameseDocumentRetrieval", "--task", "CLDRPairSTS")
    assert call(monkeypatch, str(folder), *tasks, "--output", str(tmp_path), "--name", "someone/tiny") == 0
    (file,) = tmp_path.glob("results/someone__tiny/*/VietnameseDocumentRetrieval.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [part["hf_subset"] for part in results["scores"]["test"]] == list(WAYS)
    assert {"ndcg_at_5", "recall_at_1", "mrr_at_10"} <= set(results["scores"]["test"][0])
    told = capsys.readouterr().out
    assert "no_diacritics" in told
    assert "cosine_spearman" in told
    assert str(file.parent) in told


def test_the_command_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(SUITES)
    assert lines[0] == "offline: VietnameseDocumentRetrieval, EasyVQARetrieval, CLDRPairSTS"


def test_the_command_needs_a_model_and_known_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert call(monkeypatch) == 1
    assert "needs a model" in capsys.readouterr().err
    assert call(monkeypatch, str(folder), "--task", "nothing") == 1
    assert "Unknown task 'nothing'" in capsys.readouterr().err

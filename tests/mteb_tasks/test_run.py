"""The model in mteb, the lists of tasks, and the command."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import DatasetDict
from mteb.abstasks import AbsTask
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen, cli, files
from sentence_vipyloqwen.cli import benchmarking
from sentence_vipyloqwen.cli.shared import WIDTH_OF_A_PIPE
from sentence_vipyloqwen.fingerprint import fingerprint
from sentence_vipyloqwen.mteb_tasks import encoder
from sentence_vipyloqwen.mteb_tasks.encoder import ViPyloQwenEncoder, revision_of, task_prompts
from sentence_vipyloqwen.mteb_tasks.offline import (
    OFFLINE_TASKS,
    CLDRPairSTS,
    EasyVQARetrieval,
    VietnameseDocumentRetrieval,
)
from sentence_vipyloqwen.mteb_tasks.queries import WAYS
from sentence_vipyloqwen.mteb_tasks.run import Score, run
from sentence_vipyloqwen.mteb_tasks.suites import SUITES, find_tasks
from sentence_vipyloqwen.tasks import PROMPTS

SIZES = {
    "offline": 3,
    "vn-mteb": 50,
    "vidore-v1": 10,
    "vidore-v2": 4,
    "vidore-v3": 10,  # two of them, Telecom and Nuclear, for those who are given access
    "xm3600-vi": 2,
    "mmeb": 11,
}


@pytest.mark.parametrize(("suite", "count"), SIZES.items())
def test_every_list_has_its_tasks(suite: str, count: int) -> None:
    assert len(find_tasks([suite])) == count


def test_every_list_is_counted() -> None:
    assert list(SIZES) == list(SUITES)


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
    model.encode(["xin chào"])
    again = ViPyloQwenEncoder(model, "local/a", [CLDRPairSTS()]).mteb_model_meta
    model[2].linear.weight.data[0, 0] += 1
    other = ViPyloQwenEncoder(model, "local/a", []).mteb_model_meta
    assert first.revision == again.revision != other.revision
    assert first.modalities == ["text", "image"]
    assert (first.name, first.embed_dim) == ("local/a", 32)


def set_template(model: ViPyloQwen) -> None:
    model.tokenizer.chat_template = "{{ messages }}"


CHANGES: dict[str, Callable[[ViPyloQwen], object]] = {
    "prompts": lambda model: model.prompts.update(text_pair="Câu: "),
    "max_pixels": lambda model: setattr(model[0].image_processor.size, "longest_edge", 28 * 28 * 8),
    "max_seq_length": lambda model: setattr(model, "max_seq_length", 16),
    "pooling": lambda model: setattr(model[1], "pooling_mode", "lasttoken"),
    "template": set_template,
    "truncation": lambda model: setattr(model, "truncate_dim", 8),
    "similarity": lambda model: setattr(model, "similarity_fn_name", "dot"),
    "rope": lambda model: model[0].model.config.text_config.rope_parameters.update(rope_theta=5e5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_revision_follows_what_else_changes_scores(
    change: Callable[[ViPyloQwen], object], model: ViPyloQwen, folder: Path
) -> None:
    assert revision_of(model) == revision_of(ViPyloQwen(folder, device="cpu"))
    change(model)
    assert revision_of(model) != revision_of(ViPyloQwen(folder, device="cpu"))


def test_the_revision_follows_the_prompts_of_tasks(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    before = revision_of(model)
    monkeypatch.setattr(encoder, "TYPE_PROMPTS", {**encoder.TYPE_PROMPTS, "STS": "instr"})
    assert revision_of(model) != before


def test_a_plain_model_of_the_same_folder_has_the_same_revision(model: ViPyloQwen, folder: Path) -> None:
    assert revision_of(SentenceTransformer(str(folder), device="cpu")) == revision_of(model)


def test_vectors_in_mteb_are_those_of_encode(model: ViPyloQwen, picture: Callable[..., Image.Image]) -> None:
    task = VietnameseDocumentRetrieval(pages=2)
    task.load_data()
    split = task.dataset["vietnamese"]["test"]
    wrapped = ViPyloQwenEncoder(model, "local/a", [task])
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
        vectors = wrapped.encode(loader, prompt_type=mteb.types.PromptType(kind), **options)
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


def test_what_was_measured_on_other_data_is_measured_again(model: ViPyloQwen, tmp_path: Path) -> None:
    def value(*tasks: AbsTask) -> list[float]:
        return [score.value for score in run(model, tasks, tmp_path, name="someone/tiny").scores]

    (eight,) = value(CLDRPairSTS(pairs=8))
    (twelve,) = value(CLDRPairSTS(pairs=12))
    (other,) = value(CLDRPairSTS(pairs=8, data_seed=1))
    assert len({eight, twelve, other}) == 3
    assert value(CLDRPairSTS(pairs=8), CLDRPairSTS(pairs=12)) == [eight, twelve]
    (file,) = tmp_path.glob("results/*/*/CLDRPairSTS.json")
    assert json.loads(file.read_text())["dataset_revision"] == "2-pairs=12-data_seed=0"


@pytest.mark.parametrize("task", OFFLINE_TASKS.values(), ids=OFFLINE_TASKS)
def test_the_revision_of_a_task_names_its_data(task: type[AbsTask]) -> None:
    (size,) = {"pages", "pictures", "pairs"} & set(inspect.signature(task).parameters)
    drawn = task(**{size: 3}, data_seed=7)
    expected = f"{task.metadata.revision}-{size}=3-data_seed=7"
    assert drawn.metadata.revision == expected
    drawn.load_data()
    drawn.unload_data()  # mteb does so after measuring
    assert drawn.metadata.revision == expected
    assert drawn.metadata.dataset["path"] == "sentence-vipyloqwen"
    assert "=" not in task.metadata.revision


@pytest.mark.filterwarnings("ignore")  # mteb warns of every prompt that is not named as one of its tasks
def test_a_plain_model_scores_in_mteb_as_ours_does(model: ViPyloQwen, folder: Path, tmp_path: Path) -> None:
    """Sentence Transformers loads the folder, and mteb measures it without this package's wrapper."""
    (ours,) = run(model, [CLDRPairSTS(pairs=40)], tmp_path, name="someone/tiny").scores
    plain = SentenceTransformer(str(folder), device="cpu", prompts={"STS": PROMPTS["text_pair"]})
    (result,) = mteb.evaluate(plain, CLDRPairSTS(pairs=40), cache=None, co2_tracker=False).task_results
    (part,) = result.scores["test"]
    assert part["main_score"] == pytest.approx(ours.value, abs=1e-4)
    bare = SentenceTransformer(str(folder), device="cpu", prompts={"STS": ""})
    (result,) = mteb.evaluate(bare, CLDRPairSTS(pairs=40), cache=None, co2_tracker=False).task_results
    assert result.scores["test"][0]["main_score"] != pytest.approx(ours.value, abs=1e-3)


def test_questions_on_pictures_score_as_encode_ranks_them(model: ViPyloQwen, tmp_path: Path) -> None:
    task = EasyVQARetrieval(pictures=20)
    task.load_data()
    split = task.dataset["default"]["test"]
    answers = list(split["corpus"]["text"])
    right = [answers.index(next(iter(split["relevant_docs"][query]))) for query in split["queries"]["id"]]
    rows = zip(split["queries"]["image"], split["queries"]["text"], strict=True)
    asked = [{"image": image, "text": text} for image, text in rows]

    def ranks(**prompt: str) -> np.ndarray:
        scores = model.encode(asked, **prompt) @ model.encode(answers).T  # (60, 13)
        mine = scores[np.arange(60), right]
        return 1 + (scores > mine[:, None]).sum(axis=1)

    by_hand = ranks(prompt_name="vqa_single")
    (score,) = run(model, [task], tmp_path, name="someone/tiny").scores
    (file,) = tmp_path.glob("results/*/*/EasyVQARetrieval.json")
    (part,) = json.loads(file.read_text())["scores"]["test"]
    assert (score.metric, score.value) == ("hit_rate_at_1", pytest.approx((by_hand == 1).mean(), abs=1e-5))
    for depth in (3, 5, 10):
        within = by_hand <= depth
        assert part[f"hit_rate_at_{depth}"] == pytest.approx(within.mean(), abs=1e-5)
        assert part[f"mrr_at_{depth}"] == pytest.approx((within / by_hand).mean(), abs=1e-5)
        assert part[f"ndcg_at_{depth}"] == pytest.approx((within / np.log2(1 + by_hand)).mean(), abs=1e-5)
    without = ranks()
    assert not np.array_equal(without, by_hand)  # so the prefix counts
    assert (1 / by_hand).mean() != pytest.approx((1 / without).mean(), abs=1e-4)


class TwoSplits(CLDRPairSTS):
    """Pairs in two splits, the second of which is the first one's other half."""

    metadata = CLDRPairSTS.metadata.model_copy(update={"name": "TwoSplits", "eval_splits": ["dev", "test"]})

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        super().load_data()
        rows = self.dataset["test"]
        half = len(rows) // 2
        self.dataset = DatasetDict({"dev": rows.select(range(half)), "test": rows.select(range(half, 2 * half))})


def test_every_split_has_its_score(model: ViPyloQwen, tmp_path: Path) -> None:
    scores = run(model, [TwoSplits(pairs=40), CLDRPairSTS(pairs=8)], tmp_path, name="someone/tiny")
    assert [(score.task, score.split) for score in scores.scores] == [
        ("TwoSplits", "dev"),
        ("TwoSplits", "test"),
        ("CLDRPairSTS", "test"),
    ]
    assert scores.scores[0].value != scores.scores[1].value
    written = json.loads(scores.to_json())
    assert (written["weights"], written["revision"]) == (fingerprint(model).weights, revision_of(model))
    told = written["scores"]
    assert [list(score) for score in told] == [["task", "split", "subset", "metric", "value"]] * 3
    assert [score["value"] for score in told] == [score.value for score in scores.scores]


def test_the_table_names_the_split_where_a_task_has_several() -> None:
    one = Score("Pairs", "test", "default", "cosine_spearman", 0.5)
    two = [Score("Pages", split, "default", "ndcg_at_5", value) for split, value in (("dev", 0.25), ("test", 0.75))]
    table = benchmarking._table_of([one])
    assert [column.header for column in table.columns] == ["task", "subset", "metric", "value"]
    table = benchmarking._table_of([one, *two])
    assert [column.header for column in table.columns] == ["task", "split", "subset", "metric", "value"]
    assert list(table.columns[1].cells) == ["", "dev", "test"]
    assert list(table.columns[4].cells) == ["0.5000", "0.2500", "0.7500"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline tasks, small."""
    small = {
        "VietnameseDocumentRetrieval": lambda: VietnameseDocumentRetrieval(pages=2),
        "EasyVQARetrieval": lambda: EasyVQARetrieval(pictures=2),
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
    table = tmp_path / "tables" / "mteb.json"
    places = ("--output", str(tmp_path), "--name", "someone/tiny", "--json", str(table))
    assert call(monkeypatch, str(folder), *places) == 0  # the default list, whole
    (file,) = tmp_path.glob("results/someone__tiny/*/VietnameseDocumentRetrieval.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert [part["hf_subset"] for part in results["scores"]["test"]] == list(WAYS)
    assert {"ndcg_at_5", "recall_at_1", "mrr_at_10"} <= set(results["scores"]["test"][0])
    told = capsys.readouterr().out
    assert "no_diacritics" in told
    assert "cosine_spearman" in told
    assert str(file.parent) in told
    scores = json.loads(table.read_text(encoding="utf-8"))["scores"]
    assert [score["subset"] for score in scores] == [*WAYS, "default", "default"]
    assert [score["task"] for score in scores[len(WAYS) :]] == ["EasyVQARetrieval", "CLDRPairSTS"]
    assert {score["split"] for score in scores} == {"test"}
    assert "split" not in told
    assert [path.name for path in table.parent.iterdir()] == ["mteb.json"]
    assert [(score["task"], score["value"]) for score in scores[: len(WAYS)]] == [
        ("VietnameseDocumentRetrieval", part["main_score"]) for part in results["scores"]["test"]
    ]


def test_the_table_is_written_before_it_is_shown(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise ValueError("the screen is gone")

    monkeypatch.setattr(benchmarking, "make_screen", fail)
    table = tmp_path / "mteb.json"
    places = ("--output", str(tmp_path / "results"), "--json", str(table), "--task", "CLDRPairSTS")
    assert call(monkeypatch, str(folder), *places) == 1
    assert "the screen is gone" in capsys.readouterr().err
    assert [score["task"] for score in json.loads(table.read_text(encoding="utf-8"))["scores"]] == ["CLDRPairSTS"]


def test_a_table_that_was_there_stays_whole_if_it_cannot_be_written(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(draft: Path, path: Path) -> None:
        assert json.loads(Path(draft).read_text(encoding="utf-8"))
        raise ValueError("the disk is gone")

    table = tmp_path / "mteb.json"
    table.write_text("old")
    monkeypatch.setattr(files.os, "replace", fail)
    places = ("--output", str(tmp_path / "results"), "--json", str(table), "--task", "CLDRPairSTS")
    assert call(monkeypatch, str(folder), *places) == 1
    assert table.read_text() == "old"
    assert not list(tmp_path.glob(f"{files.DRAFT}*"))


def test_a_place_for_the_table_that_cannot_be_is_refused_before_the_work(
    few: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for place, named in ((tmp_path / "file" / "mteb.json", tmp_path / "file"), (tmp_path, tmp_path)):
        places = ("--output", str(tmp_path / "results"), "--json", str(place), "--task", "CLDRPairSTS")
        assert call(monkeypatch, str(folder), *places) == 1
        assert str(named) in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "results").exists()


def test_the_command_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--list") == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= WIDTH_OF_A_PIPE
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if line.startswith("│")]
    rows = {suite: (count, network) for suite, count, network, _ in cells if suite}
    assert rows == {suite: (str(size), "no" if suite == "offline" else "yes") for suite, size in SIZES.items()}
    names = " ".join(cell for *_, cell in cells).replace(",", "").split()
    assert names == [task.metadata.name for suite in SUITES for task in find_tasks([suite])]


def test_the_command_needs_a_model_and_known_tasks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert call(monkeypatch) == 1
    assert "No model came; allowed are the folder of a finished model, a Hub id, or --list." in capsys.readouterr().err
    assert call(monkeypatch, str(folder), "--task", "nothing") == 1
    assert "Unknown task 'nothing'" in capsys.readouterr().err

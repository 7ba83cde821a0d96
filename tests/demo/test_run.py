from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console
from typer.testing import CliRunner

from sentence_vipyloqwen.cli import app
from sentence_vipyloqwen.demo import run
from sentence_vipyloqwen.demo.data import DemoSizes
from sentence_vipyloqwen.demo.sources import documents
from sentence_vipyloqwen.fingerprint import fingerprint
from sentence_vipyloqwen.index import VectorIndex
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.train.interruption import ProcessLost, TrainingInterrupted
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.record_lines import read_records

SMALL = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "embedding_dim": 16}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_whole_job_on_a_small_scale(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a folder is given as it would be in a shell
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    sizes = DemoSizes().scaled(0.01)
    result = run.run_demo("demo", sizes=sizes, overrides=SMALL, processes=processes, console=console)
    told = screen.getvalue()
    for step in ("Data", "Base", "Training", "plain SentenceTransformer", "Index and search", "before", "after"):
        assert step in told

    metrics = json.loads(result.metrics_path.read_text(encoding="utf-8"))
    assert metrics["stock_agreement"]["cosine"] > 0.9999
    assert metrics["stock_agreement"]["norm_error"] < 1e-4
    assert set(metrics["before"]["tasks"]) == set(metrics["after"]["tasks"])
    assert metrics["ocr_lines"]["tasks"]["ocr"]["queries"] > 0
    assert metrics["weights"] == fingerprint(ViPyloQwen(result.model_path, device="cpu")).weights
    assert SMALL.items() <= metrics["recipe"].items()
    assert not {"base", "train", "eval", "output"} & metrics["recipe"].keys()
    assert metrics["processes"] == processes

    page = result.page_path.read_text(encoding="utf-8")
    assert page.count("<section") >= 8  # a text, an image, both, and questions of each domain under a prefix
    assert "data:image/" in page
    index = VectorIndex.load("demo/index", ViPyloQwen(result.model_path, device="cpu"))
    kinds = {item["metadata"]["kind"] for item in index.items}
    assert {"picture", "line", "text", "answer"} <= kinds
    card = ModelCard.load(result.model_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("sentence-transformers", "apache-2.0")
    assert "### Curves" in card.text


def test_no_query_is_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = replace(DemoSizes().scaled(0.01), items=8)  # all pages but one are items with their texts
    data, _ = run.prepare_demo("demo", sizes=sizes)
    records = list(read_records(data.eval))
    items = run._items(data, records)
    kinds = [item["metadata"]["kind"] for item in items]
    assert sum(kind.removesuffix("+text") in documents.PAGE_SIZES and "+text" in kind for kind in kinds) == 4

    indexed = [run._content(item) for item in items]
    queries = [query for query, prompt in run._queries(records, items) if prompt is None]
    assert [(bool(query.get("image")), bool(query.get("text"))) for query in queries] == [
        (False, True),
        (True, False),
        (True, True),
    ]
    assert not [query for query in queries if run._content(query) in indexed]


def test_what_a_training_begins_with_is_that_of_the_whole_job(tmp_path: Path) -> None:
    data, base = run.prepare_demo(tmp_path, sizes=DemoSizes().scaled(0.01))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "base"}
    recipe = load_recipe(
        "tiny.yaml", {**SMALL, "base": str(base), "train": [str(data.train)], "output": str(tmp_path / "training")}
    )
    run._train(recipe, 1)
    assert (tmp_path / "training" / "model" / "modules.json").exists()


def test_processes_that_fail_end_the_demo(base: Path, tmp_path: Path) -> None:
    settings = {"base": str(base), "train": [str(tmp_path / "none.jsonl")], "output": str(tmp_path / "training")}
    with pytest.raises(ProcessLost, match="The 2 processes of the training ended with exit code 1"):
        run._train(load_recipe("tiny.yaml", settings), 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_told_of(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import pathlib, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
pathlib.Path("ready").touch()
raise SystemExit(signal.sigwait([{int(number)}]))
"""
    (tmp_path / "program.py").write_text(program)
    before = [signal.getsignal(of) for of in (signal.SIGTERM, signal.SIGINT)]

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = ["sh", "-c", f"cd {tmp_path} && exec {sys.executable} program.py"]
    assert run.run_listening(code, {}) == (number, number)
    sender.join()
    assert [signal.getsignal(of) for of in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_interrupted_demo_ends_as_a_shell_expects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise TrainingInterrupted("Signal 15.", signal.SIGTERM)

    monkeypatch.setattr(run, "run_demo", interrupted)
    assert CliRunner().invoke(app, ["demo", str(tmp_path)]).exit_code == 143


def test_sizes_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[DemoSizes] = []
    monkeypatch.setattr(run, "prepare_demo", lambda output, *, sizes, console: asked.append(sizes))
    monkeypatch.setattr(run, "run_demo", lambda output, *, sizes, **options: asked.append(sizes))
    size = ["--size", "lines=5", "--size", "eval.captions=6"]
    for only in ([], ["--data-only"]):
        assert CliRunner().invoke(app, ["demo", str(tmp_path), *size, *only]).exit_code == 0
    assert asked == [DemoSizes().replaced({"lines": 5, "eval.captions": 6})] * 2


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("lines", "--size 'lines': write it as KEY=VALUE, such as --size text_pairs=3000"),
        ("lines=many", "lines = many: allowed is 1 or more"),
        ("lines=1.5", "lines = 1.5: allowed is 1 or more"),
        ("lines=-1", "lines = -1: allowed is 1 or more"),
    ],
)
def test_a_size_that_is_no_number_is_refused(bad: str, told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "output"), "--size", bad])
    assert told in str(result.exception)
    assert not (tmp_path / "output").exists()


def test_a_size_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", str(tmp_path), "--size", "lines=5", "--size", "lines=6"])
    assert "--size 'lines=6': lines was given before, as 5" in str(result.exception)


def test_a_demo_that_shows_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="setting eval is None"):
        run.run_demo(tmp_path, sizes=DemoSizes().scaled(0.01), overrides={"eval": None})


def test_vectors_that_disagree_stop_the_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.compare_with_stock(folder, [{"text": "a"}, {"text": "<ocr> b"}])["cosine"] > 0.9999
    monkeypatch.setattr(run, "COSINE_FLOOR", 1.1)
    with pytest.raises(RuntimeError, match="gives other vectors: cosine"):
        run.compare_with_stock(folder, [{"text": "a"}])

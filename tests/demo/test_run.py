from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from sentence_vipyloqwen.demo import run
from sentence_vipyloqwen.demo.data import DemoSizes
from sentence_vipyloqwen.index import VectorIndex
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.train.recipe import load_recipe

SMALL = {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "embedding_dim": 16}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_whole_job_on_a_small_scale(tmp_path: Path, processes: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    sizes = DemoSizes().scaled(0.01)
    result = run.run_demo(tmp_path, sizes=sizes, overrides=SMALL, processes=processes, console=console)
    told = screen.getvalue()
    for step in ("Data", "Base", "Training", "plain SentenceTransformer", "Index and search", "before", "after"):
        assert step in told

    metrics = json.loads(result.metrics_path.read_text(encoding="utf-8"))
    assert metrics["stock_agreement"]["cosine"] > 0.9999
    assert metrics["stock_agreement"]["norm_error"] < 1e-4
    assert set(metrics["before"]["tasks"]) == set(metrics["after"]["tasks"])
    assert metrics["ocr_lines"]["tasks"]["ocr"]["queries"] > 0

    page = result.page_path.read_text(encoding="utf-8")
    assert page.count("<section") >= 8  # a text, an image, both, and questions of each domain under a prefix
    assert "data:image/" in page
    index = VectorIndex.load(tmp_path / "index", ViPyloQwen(result.model_path, device="cpu"))
    kinds = {item["metadata"]["kind"] for item in index.items}
    assert {"picture", "line", "text", "answer"} <= kinds
    card = ModelCard.load(result.model_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("sentence-transformers", "apache-2.0")
    assert "### Curves" in card.text


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
    with pytest.raises(RuntimeError, match="The 2 processes of the training ended with exit code 1"):
        run._train(load_recipe("tiny.yaml", settings), 2)


def test_vectors_that_disagree_stop_the_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.compare_with_stock(folder, [{"text": "a"}, {"text": "<ocr> b"}])["cosine"] > 0.9999
    monkeypatch.setattr(run, "COSINE_FLOOR", 1.1)
    with pytest.raises(RuntimeError, match="gives other vectors: cosine"):
        run.compare_with_stock(folder, [{"text": "a"}])

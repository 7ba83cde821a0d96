"""Every example runs as it stands, offline, on a tiny model, and leaves what it says."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import TASKS, VectorIndex, ViPyloQwen, load_tasks

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = ("store_and_query.py", "compare_lists.py", "finetune_jsonl.py", "faiss_by_hand.py")

Run = Callable[[str], str]


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example, its OUTPUT being the test's folder; what it printed."""

    def run_example(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(folder), str(tmp_path)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_is_tested_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(TESTED)


@pytest.mark.parametrize("name", TESTED)
def test_an_example_tells_how_it_is_run(name: str) -> None:
    told = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
    assert told is not None
    assert f"python examples/{name} MODEL [OUTPUT]" in told


def test_store_and_query(run: Run, folder: Path, tmp_path: Path) -> None:
    told = run("store_and_query.py")
    index = VectorIndex.load(tmp_path / "index", ViPyloQwen(folder, device="cpu"))
    assert [item["id"] for item in index.items] == ["text 1", "text 2", "image", "image + description", "ocr", "vqa"]
    assert told.count("  1. ") == 4  # a best hit for each kind of query
    assert "asked as ocr" in told
    assert (tmp_path / "results.html").read_text(encoding="utf-8").count("<section") == 4


def test_compare_lists(run: Run) -> None:
    told = run("compare_lists.py")
    assert told.count("tensor([[") == 2
    assert "Quả táo màu đỏ." in told


def test_finetune_jsonl(run: Run, folder: Path, tmp_path: Path) -> None:
    assert "cosine of stock and ours: 1.0000" in run("finetune_jsonl.py")
    rows = {split: len(data) for split, data in load_tasks(tmp_path / "train.jsonl").items()}
    assert rows == {"text_pair": 2, "instr": 2, "vqa_single.negatives_1": 3, "general": 3}
    trained, before = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "model", folder))
    assert {name: trained.prompts[name] for name in TASKS} == {name: f"<{name}> " for name in TASKS}
    assert not np.allclose(trained.encode("cảm ơn"), before.encode("cảm ơn"))


def test_faiss_by_hand(run: Run, tmp_path: Path) -> None:
    told = run("faiss_by_hand.py")
    index = faiss.read_index(str(tmp_path / "vectors.faiss"))
    assert (index.ntotal, index.d) == (7, 32)
    np.testing.assert_allclose(np.linalg.norm(index.reconstruct_n(0, 7), axis=1), 1, atol=1e-5)
    assert told.splitlines()[0] == "thủ đô"
    assert told.count("\n  ") == 6  # three hits for each of two queries

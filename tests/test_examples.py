"""Every example runs as it stands, offline, on a tiny model, and leaves what it says."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import networkx
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import TASKS, VectorIndex, ViPyloQwen, load_tasks
from sentence_vipyloqwen.index import Hit

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTED = (
    "store_and_query.py",
    "compare_lists.py",
    "finetune_jsonl.py",
    "faiss_by_hand.py",
    "multimodal_rag.py",
    "graph_rag.py",
    "cross_modal_retrieval.py",
    "document_intelligence.py",
    "refine_image_search.py",
)
IN_INTEGRATION = ("encode_with_ray.py", "export_to_qdrant.py")
"""They need heavy packages: tests/integration/test_ecosystem.py runs them."""

Run = Callable[[str], str]


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """An example may import another one: Python puts a script's folder first."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example, its OUTPUT being the test's folder; what it printed."""

    def run_example(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(folder), str(tmp_path)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*TESTED, *IN_INTEGRATION}
    elsewhere = (Path(__file__).parent / "integration" / "test_ecosystem.py").read_text(encoding="utf-8")
    assert all(f'run("{name}"' in elsewhere for name in IN_INTEGRATION)


@pytest.mark.parametrize("name", [*TESTED, *IN_INTEGRATION])
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


def test_multimodal_rag(run: Run, tmp_path: Path) -> None:
    told = run("multimodal_rag.py")
    system, user = json.loads((tmp_path / "messages.json").read_text(encoding="utf-8"))
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"][-1] == {"type": "text", "text": told.splitlines()[0]}
    sources = [part["text"] for part in user["content"][:-1] if part["type"] == "text"]
    assert [text.partition(" ")[0] for text in sources] == ["[1]", "[2]", "[3]"]
    pages = sum("bill, page" in text for text in sources)
    images = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
    assert len(images) == pages
    assert all(image.startswith("data:image/png;base64,") for image in images)


def test_a_language_model_gets_no_more_text_than_is_said() -> None:
    example = runpy.run_path(str(EXAMPLES / "multimodal_rag.py"))
    hits = [Hit(1, name, 1.0, {"text": "ă" * 3000, "image": []}) for name in ("a", "b", "c")]
    *sources, question = example["messages_for"]("q", hits)[1]["content"]
    assert [part["text"].count("ă") for part in sources] == [3000, 1000, 0]
    assert question["text"] == "q"


def test_graph_rag(run: Run, tmp_path: Path) -> None:
    told = run("graph_rag.py")
    graph = networkx.read_graphml(tmp_path / "graph.graphml")
    assert len(graph) == 8
    assert min(dict(graph.degree).values()) >= 3  # each has three neighbours, and is one of others
    assert all(0 <= weight <= 1.0001 for *_, weight in graph.edges(data="weight"))
    assert f"8 nodes, {graph.number_of_edges()} edges" in told
    members = told.splitlines()[1].partition(": ")[2].split(", ")
    assert set(re.findall(r"\d\. .*?  (.*?), linked", told)) <= set(members)


def test_cross_modal_retrieval(run: Run) -> None:
    lines = run("cross_modal_retrieval.py").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["text -> picture", "image -> caption"]
    for line in lines:
        recall, reciprocal, chance = map(float, re.findall(r"\d\.\d{3}", line))
        assert 0 <= recall <= reciprocal <= 1
        assert chance == pytest.approx(1 / 12, abs=1e-3)


def test_document_intelligence(run: Run, tmp_path: Path) -> None:
    told = run("document_intelligence.py")
    pages, fields = (re.findall(rf"  {what} +-?\d\.\d+  (.*)", told) for what in ("page", "field"))
    invoices = runpy.run_path(str(EXAMPLES / "document_intelligence.py"))["INVOICES"]
    assert pages[0] == "invoice-0123"  # the only one of May
    assert len(fields) == 2
    assert all(field in invoices[page].values() for page, field in zip(pages, fields, strict=True))
    assert (tmp_path / "results.html").read_text(encoding="utf-8").count("<section") == 2


def test_refine_image_search(run: Run, tmp_path: Path) -> None:
    told = run("refine_image_search.py")
    assert told.startswith("the image alone: red circle 1.000")
    assert told.count("share of the words") == 3
    assert (tmp_path / "results.html").is_file()


def test_a_mixture_of_vectors_is_of_unit_length() -> None:
    mix = runpy.run_path(str(EXAMPLES / "refine_image_search.py"))["mix"]
    np.testing.assert_allclose(mix(np.array([1.0, 0]), np.array([0, 1.0]), 0.5), [0.5**0.5] * 2)
    np.testing.assert_allclose(mix(np.array([1.0, 0]), np.array([0, 1.0]), 0.25), np.array([3, 1]) / 10**0.5)

"""Other people's tools beside ours: Ray Data, Qdrant, LangChain, LlamaIndex and Haystack, all on this machine alone.

Run by ``make test-integration``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from haystack import Document
from haystack.utils import ComponentDevice
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersDocumentImageEmbedder,
    SentenceTransformersTextEmbedder,
)
from langchain_core.documents import Document as Passage
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from PIL import Image
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions
from sentence_vipyloqwen.index.manifest import read_manifest

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = ["Hóa đơn số 0123, tổng cộng 1.250.000 đ.", "What colour is the shape?", "一个红色的圆形。"]
QUESTION = "Số tiền phải thanh toán là bao nhiêu?"
CLOSE = {"atol": 1e-5}


@pytest.fixture
def pictures(tmp_path: Path, picture: Callable[..., Image.Image]) -> list[Path]:
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        picture(seed=seed).save(path)
    return paths


@pytest.fixture
def expected(model: ViPyloQwen, pictures: list[Path]) -> dict[str, np.ndarray]:
    """What our own model makes of the texts, the question and the pictures."""
    return {
        "texts": model.encode(TEXTS),
        "question": model.encode(QUESTION, prompt_name="ocr"),
        "images": model.encode([{"image": path} for path in pictures]),
    }


def run(name: str, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as the command line does."""
    monkeypatch.setattr(sys, "argv", [name, str(folder), str(output)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


# --- bulk encoding ---


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield
    ray.shutdown()


def content(folder: Path) -> pa.Table:
    """What the shards of an index hold, in order."""
    return pa.concat_tables([pq.read_table(folder / shard.table) for shard in read_manifest(folder).shards])


@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_shards_of_a_plain_build(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("encode_with_ray.py", folder, tmp_path, monkeypatch)
    told = capsys.readouterr().out
    shares = [int(line.split()[2]) for line in told.splitlines() if line.startswith("share ")]
    assert shares == [8, 8, 8, 8, 4, 4]  # ten shards of four items among six shares
    model, items = ViPyloQwen(folder, device="cpu"), tmp_path / "items.jsonl"
    plain = VectorIndex.build(model, items, tmp_path / "plain", EmbedOptions(shard_rows=4))
    assert read_manifest(tmp_path / "index").shards == read_manifest(plain.folder).shards
    of_ray, alone = content(tmp_path / "index"), content(plain.folder)
    assert of_ray.drop_columns("vector") == alone.drop_columns("vector")
    vectors = [np.stack(table["vector"].to_numpy()) for table in (of_ray, alone)]
    np.testing.assert_allclose(*vectors, **CLOSE)
    index = VectorIndex.load(tmp_path / "index", model)
    assert index.verify()["items"] == 40
    assert [hit.id for hit in index.search("Hóa đơn số 7")] == [hit.id for hit in plain.search("Hóa đơn số 7")]


# --- vector databases ---


def test_qdrant_finds_what_the_index_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export_to_qdrant.py", folder, tmp_path, monkeypatch)
    count, theirs, ours = capsys.readouterr().out.splitlines()
    assert count == "15 points"  # one of the sixteen items was removed
    assert theirs.removeprefix("Qdrant: ") == ours.removeprefix("index:  ")
    assert "vi-8" not in ours


def test_an_index_of_several_shards_is_exported_as_it_is_now(
    model: ViPyloQwen, tmp_path: Path, pictures: list[Path]
) -> None:
    example = runpy.run_path(str(EXAMPLES / "export_to_qdrant.py"))
    metadata = [{"lang": "vi" if number % 3 else "en", "page": number, "tags": ["a"]} for number in range(12)]
    items = [
        {"id": f"{number:02}", "text": f"mục {number}", "metadata": facts} for number, facts in enumerate(metadata)
    ]
    items[4]["image"] = [str(path) for path in pictures]
    index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=5))
    index.remove(["07"])
    index.update([{"id": "02", "text": "mới", "metadata": {"lang": "vi", "page": 99}}])

    client = QdrantClient(":memory:")
    export = example["export"]
    assert export(index.folder, client) == export(index.folder, client) == 11  # the same ids again
    found, _ = client.scroll("items", limit=100, with_vectors=True)
    assert {point.payload["id"] for point in found} == {item["id"] for item in index.items}
    for point in found:
        assert point.payload["metadata"] == index.get(point.payload["id"])["metadata"]

    condition = models.Filter(
        must=[models.FieldCondition(key="metadata.lang", match=models.MatchValue(value="vi"))],
        must_not=[models.FieldCondition(key="metadata.page", range=models.Range(lt=4))],
    )
    queries = model.encode(["mục 5", {"image": pictures[0]}, "mới"])
    for query, hits in zip(queries, index.search_vectors(queries, 5, where="lang = 'vi' AND page >= 4"), strict=True):
        theirs = client.query_points("items", query=query.tolist(), query_filter=condition, limit=5).points
        assert [point.payload["id"] for point in theirs] == [hit.id for hit in hits]
        np.testing.assert_allclose([point.score for point in theirs], [hit.score for hit in hits], **CLOSE)


# --- SQL over the shards ---


def test_duckdb_filters_by_keys_of_metadata(model: ViPyloQwen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = runpy.run_path(str(Path(__file__).parents[1] / "index" / "test_other_tools.py"))
    index = guide["build"](model, tmp_path / "my-index")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(guide["snippet"]("duckdb"), found)
    hits = index.search("mục", k=99, where="lang = 'vi' AND page >= 2")
    assert found["ids"] == sorted(hit.id for hit in hits) == ["04", "05", "08", "10", "11"]


# --- frameworks; each loads the portable folder by stock Sentence Transformers ---


def test_langchain(folder: Path, expected: dict[str, np.ndarray]) -> None:
    embeddings = HuggingFaceEmbeddings(
        model_name=str(folder), model_kwargs={"device": "cpu"}, query_encode_kwargs={"prompt_name": "ocr"}
    )
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected["texts"], **CLOSE)
    np.testing.assert_allclose(embeddings.embed_query(QUESTION), expected["question"], **CLOSE)


class MixedEmbeddings(Embeddings):
    """LangChain's passages are texts; where a passage's text is the path of an image, the image is embedded."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        inputs = [{"image": Path(text)} if text.endswith(".png") else {"text": text} for text in texts]
        return self.model.encode(inputs).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def test_langchain_with_images(model: ViPyloQwen, pictures: list[Path], expected: dict[str, np.ndarray]) -> None:
    store = InMemoryVectorStore(MixedEmbeddings(model))
    store.add_documents([Passage(page_content=text) for text in [*TEXTS, *map(str, pictures)]])
    found = store.similarity_search_with_score(str(pictures[1]), k=5)
    cosines = np.concatenate([expected["texts"], expected["images"]]) @ expected["images"][1]
    assert found[0][0].page_content == str(pictures[1])
    np.testing.assert_allclose([score for _, score in found], np.sort(cosines)[::-1], **CLOSE)


def test_llama_index(folder: Path, pictures: list[Path], expected: dict[str, np.ndarray]) -> None:
    embedding = HuggingFaceEmbedding(model_name=str(folder), device="cpu", query_instruction="<ocr> ")
    assert isinstance(embedding, MultiModalEmbedding)
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), expected["texts"], **CLOSE)
    np.testing.assert_allclose(embedding.get_query_embedding(QUESTION), expected["question"], **CLOSE)
    images = embedding.get_image_embedding_batch([str(path) for path in pictures])
    np.testing.assert_allclose(images, expected["images"], **CLOSE)

    retriever = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=embedding).as_retriever()
    (best, *_) = retriever.retrieve(QUESTION)
    cosines = expected["texts"] @ expected["question"]
    assert best.text == TEXTS[int(cosines.argmax())]
    assert best.score == pytest.approx(cosines.max(), abs=1e-5)


def test_haystack(folder: Path, pictures: list[Path], expected: dict[str, np.ndarray]) -> None:
    options = {"model": str(folder), "device": ComponentDevice.from_str("cpu"), "progress_bar": False}
    options |= {"token": None, "local_files_only": True}
    text = SentenceTransformersTextEmbedder(**options, prefix="<ocr> ")
    np.testing.assert_allclose(text.run(QUESTION)["embedding"], expected["question"], **CLOSE)
    documents = SentenceTransformersDocumentEmbedder(**options).run([Document(content=text) for text in TEXTS])
    np.testing.assert_allclose([found.embedding for found in documents["documents"]], expected["texts"], **CLOSE)
    shown = [Document(meta={"file_path": str(path)}) for path in pictures]
    images = SentenceTransformersDocumentImageEmbedder(**options).run(shown)
    np.testing.assert_allclose([found.embedding for found in images["documents"]], expected["images"], **CLOSE)

"""Our tasks of mteb: what they hold, and what models of known vectors reach on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mteb.abstasks import AbsTask
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.demo import data
from sentence_vipyloqwen.demo.data import DemoData, DemoSizes
from sentence_vipyloqwen.mteb_tasks.offline import (
    SPLIT,
    CLDRPairSTS,
    EasyVQARetrieval,
    VietnameseDocumentRetrieval,
)
from sentence_vipyloqwen.mteb_tasks.queries import PLAIN, TYPOS, VIETNAMESE, WAYS, strip_diacritics, write_query
from sentence_vipyloqwen.mteb_tasks.run import run

Known = Callable[[Callable[[str, Any], str]], SentenceTransformer]


@pytest.fixture(scope="module")
def documents() -> VietnameseDocumentRetrieval:
    task = VietnameseDocumentRetrieval(pages=8)
    task.load_data()
    return task


def scores(model: SentenceTransformer, task: AbsTask, folder: Path) -> dict[str, float]:
    return {score.subset: score.value for score in run(model, [task], folder, name="known").scores}


def pixels(image: Any) -> bytes:
    return np.asarray(image.convert("RGB")).tobytes()


def answers(task: VietnameseDocumentRetrieval, subset: str) -> dict[str, str]:
    """Query text -> the page that is relevant to it."""
    split = task.dataset[subset][SPLIT]
    texts = dict(zip(split["queries"]["id"], split["queries"]["text"], strict=True))
    return {texts[query]: next(iter(pages)) for query, pages in split["relevant_docs"].items()}


def test_each_subset_asks_for_the_same_pages(documents: VietnameseDocumentRetrieval) -> None:
    assert list(documents.dataset) == list(WAYS)
    for kind in WAYS:
        split = documents.dataset[kind][SPLIT]
        assert len(split["corpus"]) == len(split["queries"]) == 5 * 8
        assert split["relevant_docs"] == documents.dataset[VIETNAMESE][SPLIT]["relevant_docs"]
        assert all(f"query-{page}" == query for query, pages in split["relevant_docs"].items() for page in pages)
    queries = {kind: documents.dataset[kind][SPLIT]["queries"]["text"] for kind in WAYS}
    assert queries[PLAIN] == [strip_diacritics(text) for text in queries[VIETNAMESE]]
    assert len({text for texts in queries.values() for text in texts}) == 5 * 5 * 8


def test_equal_seeds_give_equal_pages_and_others_do_not(documents: VietnameseDocumentRetrieval) -> None:
    again, other = VietnameseDocumentRetrieval(pages=8), VietnameseDocumentRetrieval(pages=8, data_seed=1)
    for task in (again, other):
        task.load_data()

    def content(task: VietnameseDocumentRetrieval) -> tuple[list[bytes], list[str]]:
        split = task.dataset[TYPOS][SPLIT]
        return [pixels(image) for image in split["corpus"]["image"]], split["queries"]["text"]

    assert content(again) == content(documents)
    assert not set(content(other)[1]) & set(content(documents)[1])


def test_a_model_that_knows_the_answers_reaches_one(
    documents: VietnameseDocumentRetrieval, known: Known, tmp_path: Path
) -> None:
    pages = documents.dataset[VIETNAMESE][SPLIT]["corpus"]
    by_pixels = {pixels(image): page for page, image in zip(pages["id"], pages["image"], strict=True)}
    by_text = {text: page for kind in WAYS for text, page in answers(documents, kind).items()}
    model = known(lambda text, image: by_pixels[pixels(image)] if image else by_text[text])
    assert scores(model, documents, tmp_path) == dict.fromkeys(WAYS, 1.0)


def test_a_model_that_knows_nothing_does_not(
    documents: VietnameseDocumentRetrieval, known: Known, tmp_path: Path
) -> None:
    reached = scores(known(lambda text, image: text or str(pixels(image))), documents, tmp_path)
    assert all(value < 0.35 for value in reached.values())  # by chance about 0.07, each of 40 queries
    assert len(set(reached.values())) > 1


def test_a_model_that_reads_plain_vietnamese_alone_fails_the_other_queries(
    documents: VietnameseDocumentRetrieval, known: Known, tmp_path: Path
) -> None:
    pages = documents.dataset[VIETNAMESE][SPLIT]["corpus"]
    by_pixels = {pixels(image): page for page, image in zip(pages["id"], pages["image"], strict=True)}
    by_text = answers(documents, VIETNAMESE)
    model = known(lambda text, image: by_pixels[pixels(image)] if image else by_text.get(text, text))
    reached = scores(model, documents, tmp_path)
    assert reached.pop(VIETNAMESE) == 1.0
    assert all(value < 0.35 for value in reached.values())


def test_questions_on_pictures_bear_their_prefix_and_their_picture(known: Known, tmp_path: Path) -> None:
    task = EasyVQARetrieval(pictures=20)
    task.load_data()
    split = task.dataset["default"][SPLIT]
    rows = zip(split["queries"]["id"], split["queries"]["text"], split["queries"]["image"], strict=True)
    by_query = {(text, pixels(image)): next(iter(split["relevant_docs"][query])) for query, text, image in rows}
    assert len(by_query) == len(split["queries"]) == 20 * 3
    prefix = "<vqa_single> "
    model = known(lambda text, image: by_query[text.removeprefix(prefix), pixels(image)] if image else text)
    assert scores(model, task, tmp_path) == {"default": 1.0}
    seen = model[0].seen
    assert sum(text.startswith(prefix) for text in seen) == 20 * 3
    assert sorted(text for text in seen if not text.startswith(prefix)) == sorted(split["corpus"]["id"])


def test_graded_pairs_bear_their_prefix_on_both_sides(known: Known, tmp_path: Path) -> None:
    task = CLDRPairSTS(pairs=40)
    model = known(lambda text, image: text)
    assert abs(scores(model, task, tmp_path)["default"]) < 0.6
    assert model[0].seen
    assert all(text.startswith("<text_pair> ") for text in model[0].seen)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """The demo's data of the default sizes, without the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_write_images", lambda *args: None)
        folder = tmp_path_factory.mktemp("demo")
        return data.build_demo_data(folder)


def records_of(path: Path, task: str) -> list[dict[str, Any]]:
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["task"] == task]


def test_graded_pairs_are_held_out_from_the_demo_s_training(demo: DemoData) -> None:
    task = CLDRPairSTS(pairs=600)
    task.load_data()
    rows = task.dataset[SPLIT]
    drawn = set(zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True))
    held_out, trained = (
        {(record["anchor"], record["positive"], record["score"]) for record in records_of(path, "text_pair")}
        for path in (demo.eval, demo.train)
    )
    assert drawn == held_out
    assert len(held_out) == 600
    assert len(trained) > 11_000
    texts = {text for first, second, _ in drawn for text in (first, second)}
    assert texts.isdisjoint(text for first, second, _ in trained for text in (first, second))
    assert texts.isdisjoint(record["positive"] for record in records_of(demo.train, "instr"))
    fewer = CLDRPairSTS()
    fewer.load_data()
    rows = fewer.dataset[SPLIT]
    sample = set(zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True))
    assert len(sample) == 400
    assert sample < drawn


def test_documents_are_held_out_from_the_demo_s_training(demo: DemoData) -> None:
    task = VietnameseDocumentRetrieval(pages=60)
    task.load_data()
    pages = data._draw_split("eval", DemoSizes().eval, 0).pages.values()
    captions = [record["positive"] for record in records_of(demo.eval, "general") if record["domain"] == "document"]
    assert captions == [page.caption for page in pages]  # so they are the pages of the file
    asked = [write_query(page, VIETNAMESE, random.Random(0)) for page in pages]
    assert task.dataset[VIETNAMESE][SPLIT]["queries"]["text"] == asked
    trained = {record["positive"] for record in records_of(demo.train, "ocr") if record["domain"] != "line"}
    assert len(trained) > 1000
    assert trained.isdisjoint(value for page in pages for value in page.keys)
    fewer = VietnameseDocumentRetrieval(pages=2)
    fewer.load_data()
    first_two = [query for place, query in enumerate(asked) if place % 60 < 2]
    assert fewer.dataset[VIETNAMESE][SPLIT]["queries"]["text"] == first_two


@pytest.mark.parametrize(
    ("task", "sizes"), [(CLDRPairSTS, {"pairs": 601}), (VietnameseDocumentRetrieval, {"pages": 61})]
)
def test_no_more_can_be_had_than_is_held_out(task: type[AbsTask], sizes: dict[str, int]) -> None:
    (size,) = sizes.values()
    with pytest.raises(ValueError, match=f"= {size}: allowed is 1 to {size - 1}"):
        task(**sizes)


def test_graded_pairs_are_those_of_the_demo_s_kind() -> None:
    task = CLDRPairSTS(pairs=40)
    task.load_data()
    rows = task.dataset[SPLIT]
    assert len(rows) == 40
    assert 0 == min(rows["score"]) < max(rows["score"]) == 1
    assert all(first != second for first, second in zip(rows["sentence1"], rows["sentence2"], strict=True))

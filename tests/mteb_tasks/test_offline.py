"""Our tasks of mteb: what they hold, and what models of known vectors reach on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mteb.abstasks import AbsTask
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score

from sentence_vipyloqwen.demo import data
from sentence_vipyloqwen.demo.data import DemoData, DemoSizes
from sentence_vipyloqwen.demo.sources.documents import PAGE_SIZES, Page
from sentence_vipyloqwen.mteb_tasks.offline import (
    OFFLINE_TASKS,
    SPLIT,
    CLDRPairSTS,
    EasyVQARetrieval,
    VietnameseDocumentRetrieval,
)
from sentence_vipyloqwen.mteb_tasks.queries import (
    ASKINGS,
    CHINESE,
    ENGLISH,
    PLAIN,
    TYPOS,
    VIETNAMESE,
    WAYS,
    Asking,
    strip_diacritics,
)
from sentence_vipyloqwen.mteb_tasks.run import run

HELD_OUT = DemoSizes().eval
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
        assert all(list(pages) == [query.removeprefix("query-")] for query, pages in split["relevant_docs"].items())
        assert set(split["corpus"]["id"]) == {page for pages in split["relevant_docs"].values() for page in pages}
    queries = {kind: documents.dataset[kind][SPLIT]["queries"]["text"] for kind in WAYS}
    assert queries[PLAIN] == [strip_diacritics(text) for text in queries[VIETNAMESE]]
    assert len({text for texts in queries.values() for text in texts}) == 5 * 5 * 8


def held_out_pages(data_seed: int = 0) -> dict[str, Page]:
    """The pages of the demo's eval split, by the id that the task gives them."""
    drawn = data._draw_split("eval", HELD_OUT, data_seed).pages.values()
    places = (f"{domain}-{place:04d}" for domain in PAGE_SIZES for place in range(HELD_OUT.pages))
    return dict(zip(places, drawn, strict=True))


@pytest.fixture(scope="module")
def every_page() -> VietnameseDocumentRetrieval:
    task = VietnameseDocumentRetrieval(pages=HELD_OUT.pages)
    task.load_data()
    return task


def asked(task: VietnameseDocumentRetrieval, language: str) -> dict[str, str]:
    """Page -> the query that means it."""
    return {page: text for text, page in answers(task, language).items()}


def test_each_subset_asks_each_page_in_the_same_way_and_every_way_is_used(
    every_page: VietnameseDocumentRetrieval,
) -> None:
    pages = held_out_pages()
    ways: dict[str, dict[str, Asking]] = {}
    for language in (VIETNAMESE, ENGLISH, CHINESE):
        texts = asked(every_page, language)
        assert set(texts) == set(pages)  # so no two queries are the same
        ways[language] = {
            of: asking
            for of, page in pages.items()
            for asking in ASKINGS[page.domain]
            if asking.ask(page, language) == texts[of]
        }
        assert set(ways[language]) == set(pages)
    assert ways[VIETNAMESE] == ways[ENGLISH] == ways[CHINESE]
    for domain, askings in ASKINGS.items():
        used = [asking for of, asking in ways[VIETNAMESE].items() if pages[of].domain == domain]
        assert all(used.count(asking) >= HELD_OUT.pages / 10 for asking in askings)


def test_no_query_is_a_caption_and_every_typed_one_has_an_error(every_page: VietnameseDocumentRetrieval) -> None:
    captions = {page.caption for page in held_out_pages().values()}
    plain, typed = asked(every_page, VIETNAMESE), asked(every_page, TYPOS)
    assert captions.isdisjoint(plain.values())
    assert all(plain[of] != typed[of] for of in plain)
    assert len(set(typed.values())) == len(typed)


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
    task = CLDRPairSTS()
    task.load_data()
    rows = task.dataset[SPLIT]
    drawn = set(zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True))
    held_out, trained = (
        {(record["anchor"], record["positive"], record["score"]) for record in records_of(path, "text_pair")}
        for path in (demo.eval, demo.train)
    )
    assert drawn == held_out
    assert len(held_out) == HELD_OUT.text_pairs
    assert len(trained) > 11_000
    texts = {text for first, second, _ in drawn for text in (first, second)}
    assert texts.isdisjoint(text for first, second, _ in trained for text in (first, second))
    assert texts.isdisjoint(record["positive"] for record in records_of(demo.train, "instr"))
    fewer = CLDRPairSTS(pairs=400)
    fewer.load_data()
    rows = fewer.dataset[SPLIT]
    sample = set(zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True))
    assert len(sample) == 400
    assert sample < drawn


def test_documents_are_held_out_from_the_demo_s_training(
    demo: DemoData, every_page: VietnameseDocumentRetrieval
) -> None:
    pages = held_out_pages()
    captions = [record["positive"] for record in records_of(demo.eval, "general") if record["domain"] == "document"]
    assert captions == [page.caption for page in pages.values()]  # so they are the pages of the file
    trained = {record["positive"] for record in records_of(demo.train, "ocr") if record["domain"] != "line"}
    assert len(trained) > 1000
    recurring = {"kind", "paint", "first", "second"}
    named = {domain: {name for asking in ASKINGS[domain] for name in asking.fields} - recurring for domain in ASKINGS}
    assert all(named.values())
    assert trained.isdisjoint(page.values[name] for page in pages.values() for name in named[page.domain])
    assert trained.isdisjoint(value for page in pages.values() for value in page.keys)


def test_fewer_pages_are_the_first_ones_look_the_same_and_are_asked_for_alike(
    every_page: VietnameseDocumentRetrieval,
) -> None:
    fewer = VietnameseDocumentRetrieval(pages=2)
    fewer.load_data()
    first_two = [place for place in range(5 * HELD_OUT.pages) if place % HELD_OUT.pages < 2]
    for kind in WAYS:
        few, every = (task.dataset[kind][SPLIT]["queries"] for task in (fewer, every_page))
        assert few.to_list() == every.select(first_two).to_list()
    few, every = (task.dataset[VIETNAMESE][SPLIT]["corpus"] for task in (fewer, every_page))
    assert few["id"] == every.select(first_two)["id"]
    assert list(map(pixels, few["image"])) == list(map(pixels, every.select(first_two)["image"]))


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6, 40])
def test_the_baseline_of_kinds_is_the_mean_over_every_place_of_the_page(pages: int) -> None:
    scores = -np.arange(pages + 1)[None].repeat(pages, axis=0)  # and one page of another kind behind them
    by_place = ndcg_score(np.eye(pages, pages + 1), scores, k=5)
    assert VietnameseDocumentRetrieval(pages=pages).kind_baseline() == pytest.approx(by_place, abs=1e-12)


def test_a_model_that_sees_kinds_alone_reaches_the_baseline_on_average() -> None:
    task, rng = VietnameseDocumentRetrieval(pages=8), np.random.default_rng(0)
    kinds = np.repeat(np.arange(5), 8)
    same_kind = (kinds[:, None] == kinds).astype(float)
    drawn = [ndcg_score(np.eye(40), same_kind + rng.uniform(0, 0.5, (40, 40)), k=5) for _ in range(400)]
    assert task.kind_baseline() == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / len(drawn) ** 0.5)


def test_licences_and_sources_are_told() -> None:
    told = {name: (task.metadata.license, task.metadata.reference) for name, task in OFFLINE_TASKS.items()}
    assert told == {
        "VietnameseDocumentRetrieval": ("apache-2.0", None),  # ours, made here
        "EasyVQARetrieval": ("mit", "https://github.com/vzhou842/easy-VQA"),
        "CLDRPairSTS": ("https://www.unicode.org/license.txt", "https://cldr.unicode.org/"),
    }


@pytest.mark.parametrize(
    ("task", "size", "held_out"),
    [(CLDRPairSTS, "pairs", HELD_OUT.text_pairs), (VietnameseDocumentRetrieval, "pages", HELD_OUT.pages)],
)
def test_no_more_can_be_had_than_is_held_out(task: type[AbsTask], size: str, held_out: int) -> None:
    with pytest.raises(ValueError, match=f"{size} = {held_out + 1}: allowed is 1 to {held_out}"):
        task(**{size: held_out + 1})


def test_graded_pairs_are_those_of_the_demo_s_kind() -> None:
    task = CLDRPairSTS(pairs=40)
    task.load_data()
    rows = task.dataset[SPLIT]
    assert len(rows) == 40
    assert 0 == min(rows["score"]) < max(rows["score"]) == 1
    assert all(first != second for first, second in zip(rows["sentence1"], rows["sentence2"], strict=True))

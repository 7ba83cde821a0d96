"""Tasks of `mteb` on data that packages ship or that we render: they need no network.

Each is drawn from a seed, so that equal seeds give equal data. All of it is held out from the training of the demo of
that seed and of the default sizes: pages and pairs are what its eval split says, and its train split avoids every
answer, text and content of those; pictures of easy-vqa are of its test split. To a model of the demo they are new data
of kinds that it has seen. The demo's own evaluation reads the same, and chooses nothing by it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from sentence_vipyloqwen.demo.data import EVAL, DemoSizes, generator
from sentence_vipyloqwen.demo.sources import cldr, documents, easy_vqa
from sentence_vipyloqwen.mteb_tasks.queries import (
    CHINESE,
    ENGLISH,
    PLAIN,
    TYPOS,
    VIETNAMESE,
    Asking,
    clear_askings,
    write_query,
)

SPLIT = "test"
DEFAULT = "default"
_PATH = "sentence-vipyloqwen"
"""Where `mteb` would load from."""

_CUTOFF = 5
"""Of the ranks that count in document retrieval."""

_HELD_OUT = DemoSizes().eval
"""How much the demo holds out, which is as much as the tasks can have of it."""

_FACTS: dict[str, Any] = {
    "eval_splits": [SPLIT],
    "date": ("2025-01-01", "2025-12-31"),
    "dialect": [],
    "annotations_creators": "derived",
    "bibtex_citation": "",
}
"""What `mteb` wants to know of a task, and is the same for all of ours; there is no article to cite of any."""


class _Drawn(AbsTask):
    """A task whose data follow from its arguments: its revision names them, so that its results are of the same data.

    The revision of the class is raised by hand whenever equal arguments give other data.
    """

    _drawn_by: tuple[str, ...]
    """The attributes that hold the arguments."""

    def _name_data(self) -> None:
        published = type(self).metadata
        arguments = [f"{name}={getattr(self, name)}" for name in self._drawn_by]
        dataset = {**published.dataset, "revision": "-".join([published.revision, *arguments])}
        self.metadata = published.model_copy(update={"dataset": dataset})

    def unload_data(self) -> None:
        """Free the data; `mteb` also forgets the revision then, which stays that of the arguments."""
        super().unload_data()
        self._name_data()


class VietnameseDocumentRetrieval(_Drawn, AbsTaskRetrieval):
    """Find the rendered Vietnamese page that a query means; a subset for each way of writing the query.

    The pages (invoices, receipts, forms, number plates, contracts) are the same in each subset. They say what the first
    pages of the demo's eval split say: no name, shop, number, sum, day or plate that a query asks for is an answer that
    the demo of the same seed trains on. What recurs are goods, unit prices, the five kinds of contract and the three
    colours of plates.

    Each kind of page is asked for in several ways, by one field or by more, none of which is the caption that the demo
    trains on. Which one is drawn for a page is the same in each subset, and names no other page that is held out.

    English and Chinese queries translate what stands around the values and keep names, days and amounts as the page
    writes them: these subsets measure whether a value is found among foreign words, not whether it is translated.

    Args:
        pages: How many of each kind of page, at most as many as the demo holds out.
        data_seed: The demo's seed; also of how the pages look, of the ways of asking, and of the typing errors.
        **kwargs: As for `mteb`'s tasks.

    Raises:
        ValueError: If more pages are asked for than are held out.
    """

    metadata = TaskMetadata(
        name="VietnameseDocumentRetrieval",
        description="Find the page of a Vietnamese document by what it says: queries in Vietnamese, without "
        "diacritics, with typing errors, in English and in Chinese. Pages are rendered, their contents invented.",
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        dataset={"path": _PATH, "revision": "3"},
        eval_langs={
            VIETNAMESE: ["vie-Latn"],
            PLAIN: ["vie-Latn"],
            TYPOS: ["vie-Latn"],
            ENGLISH: ["eng-Latn"],
            CHINESE: ["zho-Hans"],
        },
        main_score=f"ndcg_at_{_CUTOFF}",
        license="apache-2.0",
        domains=["Financial", "Legal"],
        task_subtypes=["Image Text Retrieval"],
        sample_creation="created",
        **_FACTS,
    )
    _drawn_by = ("pages", "data_seed")

    def __init__(self, *, pages: int = 40, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check("pages", pages, _HELD_OUT.pages)
        self.pages = pages
        self.data_seed = data_seed
        self._name_data()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw and render the pages, and write their queries."""
        if self.data_loaded:
            return
        pages: dict[str, documents.Page] = {}
        askings: dict[str, Asking] = {}
        for domain in documents.PAGE_SIZES:
            held_out = documents.draw_pages(domain, _HELD_OUT.pages, generator(self.data_seed, EVAL, domain))
            for place, clear in enumerate(clear_askings(held_out)[: self.pages]):
                pages[of := f"{domain}-{place:04d}"] = held_out[place]
                askings[of] = self._rng(f"asking/{of}").choice(clear)
        corpus = _with_images({of: documents.render_page(page, self._rng(of)) for of, page in pages.items()})
        relevant = {f"query-{of}": {of: 1} for of in pages}
        self.dataset = {}
        for kind in self.hf_subsets:
            texts = [write_query(page, askings[of], kind, self._rng(f"{kind}/{of}")) for of, page in pages.items()]
            queries = Dataset.from_dict({"id": list(relevant), "text": texts})
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset[kind] = {SPLIT: split}
        self.data_loaded = True

    def kind_baseline(self) -> float:
        """The main score to expect of a model that sees of which kind a page is, and not what it says.

        It ranks the pages of the right kind first, in any order: the page that is meant is equally likely on each of
        the ranks 1 to `pages`, and on rank r it counts 1 / log2(r + 1), up to the rank where the score cuts off.

        >>> round(VietnameseDocumentRetrieval(pages=2).kind_baseline(), 3)
        0.815
        """
        ranks = range(1, min(_CUTOFF, self.pages) + 1)
        return sum(1 / math.log2(rank + 1) for rank in ranks) / self.pages

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self.data_seed}/{what}")


class EasyVQARetrieval(_Drawn, AbsTaskRetrieval):
    """Answer a question on a picture of the `easy-vqa` package's test split, out of its 13 answers.

    Args:
        pictures: How many of the 1,000 pictures.
        data_seed: Of the choice of three questions on each.
        **kwargs: As for `mteb`'s tasks.
    """

    metadata = TaskMetadata(
        name="EasyVQARetrieval",
        description="Find the answer to a question on a picture of one coloured shape, out of 13 answers.",
        type="Any2AnyRetrieval",
        category="it2t",
        modalities=["text", "image"],
        dataset={"path": _PATH, "revision": "1"},
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1",
        reference="https://github.com/vzhou842/easy-VQA",
        license="mit",
        domains=["Constructed"],
        task_subtypes=["Question answering"],
        sample_creation="found",
        **_FACTS,
    )
    _drawn_by = ("pictures", "data_seed")

    def __init__(self, *, pictures: int = 200, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pictures = pictures
        self.data_seed = data_seed
        self._name_data()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the pictures and their questions."""
        if self.data_loaded:
            return
        pictures = easy_vqa.load_pictures("test", self.pictures)
        paths = {picture.name: str(picture.path) for picture in pictures}
        asked = easy_vqa.single_records(pictures, 3, random.Random(self.data_seed))
        answers = [*easy_vqa.SHAPES, *easy_vqa.COLORS, *easy_vqa.TRUTHS]
        queries = {f"query-{place:05d}": record for place, record in enumerate(asked)}
        images = {of: paths[record["anchor"]["image"][0]] for of, record in queries.items()}
        texts = [record["anchor"]["text"] for record in queries.values()]
        split = {
            "corpus": Dataset.from_dict({"id": answers, "text": answers}),
            "queries": _with_images(images).add_column("text", texts),
            "relevant_docs": {of: {record["positive"]: 1} for of, record in queries.items()},
            "top_ranked": None,
        }
        self.dataset = {DEFAULT: {SPLIT: split}}
        self.data_loaded = True


class CLDRPairSTS(_Drawn, AbsTaskSTS):
    """Graded pairs of texts in Vietnamese, English and Chinese, of Unicode's CLDR: lists of names, dates, amounts.

    They are pairs of the demo's eval split, so neither a text nor a content of them is in any text that the demo of the
    same seed trains on.

    Args:
        pairs: How many, at most as many as the demo holds out, which is the default; fewer are a sample of them.
        data_seed: The demo's seed; also of the sample.
        **kwargs: As for `mteb`'s tasks.

    Raises:
        ValueError: If more pairs are asked for than are held out.
    """

    metadata = TaskMetadata(
        name="CLDRPairSTS",
        description="How much of their content two texts share, across Vietnamese, English and Chinese.",
        type="STS",
        category="t2c",
        dataset={"path": _PATH, "revision": "2"},
        eval_langs=["vie-Latn", "eng-Latn", "zho-Hans"],
        main_score="cosine_spearman",
        reference="https://cldr.unicode.org/",
        license="https://www.unicode.org/license.txt",
        domains=["Constructed"],
        task_subtypes=[],
        sample_creation="created",
        **_FACTS,
    )
    min_score = 0
    max_score = 1
    _drawn_by = ("pairs", "data_seed")

    def __init__(self, *, pairs: int = _HELD_OUT.text_pairs, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check("pairs", pairs, _HELD_OUT.text_pairs)
        self.pairs = pairs
        self.data_seed = data_seed
        self._name_data()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw the pairs."""
        if self.data_loaded:
            return
        held_out = cldr.draw_pairs(_HELD_OUT.text_pairs, generator(self.data_seed, EVAL, "text_pair"))
        pairs = random.Random(f"{self.data_seed}/mteb").sample(held_out, self.pairs)
        columns = {
            "sentence1": [pair.anchor for pair in pairs],
            "sentence2": [pair.positive for pair in pairs],
            "score": [pair.score for pair in pairs],
        }
        self.dataset = DatasetDict({SPLIT: Dataset.from_dict(columns)})
        self.data_loaded = True


def _check(name: str, count: int, held_out: int) -> None:
    if not 1 <= count <= held_out:
        raise ValueError(f"{name} = {count}: allowed is 1 to {held_out}, as many as the demo holds out from training")


def _with_images(images: Mapping[str, Any]) -> Dataset:
    features = Features({"id": Value("string"), "image": Image()})
    return Dataset.from_dict({"id": list(images), "image": list(images.values())}, features=features)


OFFLINE_TASKS = {task.metadata.name: task for task in (VietnameseDocumentRetrieval, EasyVQARetrieval, CLDRPairSTS)}
"""Name -> task, of those that `mteb` itself does not have."""

"""Tasks of `mteb` on data that packages ship or that we render: they need no network.

Each is drawn from a seed, so that equal seeds give equal data. Pages and pairs are drawn apart from the demo's training
data and do not avoid them: to a model of the demo they are new pages of kinds that it has seen. Pictures of easy-vqa
are those of its test split, which the demo does not train on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from sentence_vipyloqwen.demo.sources import cldr, documents, easy_vqa
from sentence_vipyloqwen.mteb_tasks.queries import CHINESE, ENGLISH, PLAIN, TYPOS, VIETNAMESE, write_query

SPLIT = "test"
DEFAULT = "default"
_SOURCE = {"path": "sentence-vipyloqwen", "revision": "1"}
"""Where `mteb` would load from; a revision changes whenever the data of a task do."""

_FACTS: dict[str, Any] = {
    "eval_splits": [SPLIT],
    "date": ("2025-01-01", "2025-12-31"),
    "dialect": [],
    "annotations_creators": "derived",
    "bibtex_citation": "",
}
"""What `mteb` wants to know of a task, and is the same for all of ours."""


class VietnameseDocumentRetrieval(AbsTaskRetrieval):
    """Find the rendered Vietnamese page that a query means; a subset for each way of writing the query.

    The pages (invoices, receipts, forms, number plates, contracts) are the same in each subset.

    Args:
        pages: How many of each kind of page.
        data_seed: Of the pages and the typing errors.
        **kwargs: As for `mteb`'s tasks.
    """

    metadata = TaskMetadata(
        name="VietnameseDocumentRetrieval",
        description="Find the page of a Vietnamese document by what it says: queries in Vietnamese, without "
        "diacritics, with typing errors, in English and in Chinese. Pages are rendered, their contents invented.",
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        dataset=_SOURCE,
        eval_langs={
            VIETNAMESE: ["vie-Latn"],
            PLAIN: ["vie-Latn"],
            TYPOS: ["vie-Latn"],
            ENGLISH: ["eng-Latn"],
            CHINESE: ["zho-Hans"],
        },
        main_score="ndcg_at_5",
        license="apache-2.0",
        domains=["Financial", "Legal"],
        task_subtypes=["Image Text Retrieval"],
        sample_creation="created",
        **_FACTS,
    )

    def __init__(self, *, pages: int = 40, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pages = pages
        self.data_seed = data_seed

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw and render the pages, and write their queries."""
        if self.data_loaded:
            return
        drawn = [
            page
            for domain in documents.PAGE_SIZES
            for page in documents.draw_pages(domain, self.pages, self._rng(domain))
        ]
        pages = {f"page-{place:04d}": page for place, page in enumerate(drawn)}
        corpus = _with_images({of: documents.render_page(page, self._rng(of)) for of, page in pages.items()})
        self.dataset = {subset: {SPLIT: self._ask(pages, corpus, subset)} for subset in self.hf_subsets}
        self.data_loaded = True

    def _ask(self, pages: Mapping[str, documents.Page], corpus: Dataset, kind: str) -> dict[str, Any]:
        texts = {of: write_query(page, kind, self._rng(f"{kind}/{of}")) for of, page in pages.items()}
        plain = {of: write_query(page, VIETNAMESE, self._rng(of)) for of, page in pages.items()}
        relevant = {f"query-{of}": {other: 1 for other in pages if plain[other] == plain[of]} for of in pages}
        queries = Dataset.from_dict({"id": list(relevant), "text": list(texts.values())})
        return {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"{self.data_seed}/{what}")


class EasyVQARetrieval(AbsTaskRetrieval):
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
        dataset=_SOURCE,
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1",
        reference="https://github.com/vzhou842/easy-VQA",
        license="mit",
        domains=["Constructed"],
        task_subtypes=["Question answering"],
        sample_creation="found",
        **_FACTS,
    )

    def __init__(self, *, pictures: int = 200, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pictures = pictures
        self.data_seed = data_seed

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


class CLDRPairSTS(AbsTaskSTS):
    """Graded pairs of texts in Vietnamese, English and Chinese, of Unicode's CLDR: lists of names, dates, amounts.

    Args:
        pairs: How many.
        data_seed: Of the pairs.
        **kwargs: As for `mteb`'s tasks.
    """

    metadata = TaskMetadata(
        name="CLDRPairSTS",
        description="How much of their content two texts share, across Vietnamese, English and Chinese.",
        type="STS",
        category="t2c",
        dataset=_SOURCE,
        eval_langs=["vie-Latn", "eng-Latn", "zho-Hans"],
        main_score="cosine_spearman",
        reference="https://cldr.unicode.org",
        license="not specified",
        domains=["Constructed"],
        task_subtypes=[],
        sample_creation="created",
        **_FACTS,
    )
    min_score = 0
    max_score = 1

    def __init__(self, *, pairs: int = 400, data_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs
        self.data_seed = data_seed

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Draw the pairs."""
        if self.data_loaded:
            return
        pairs = cldr.draw_pairs(self.pairs, random.Random(f"{self.data_seed}/mteb"))
        columns = {
            "sentence1": [pair.anchor for pair in pairs],
            "sentence2": [pair.positive for pair in pairs],
            "score": [pair.score for pair in pairs],
        }
        self.dataset = DatasetDict({SPLIT: Dataset.from_dict(columns)})
        self.data_loaded = True


def _with_images(images: Mapping[str, Any]) -> Dataset:
    features = Features({"id": Value("string"), "image": Image()})
    return Dataset.from_dict({"id": list(images), "image": list(images.values())}, features=features)


OFFLINE_TASKS = {task.metadata.name: task for task in (VietnameseDocumentRetrieval, EasyVQARetrieval, CLDRPairSTS)}
"""Name -> task, of those that `mteb` itself does not have."""

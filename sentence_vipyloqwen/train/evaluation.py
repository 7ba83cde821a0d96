"""How well a model does each task of a file of records, in total and by language and domain.

The texts bear their prefix, as in training. All distinct inputs of the file are embedded once. Then, by task:

- **Retrieval** (every task but text_pair). A query is a distinct anchor; the candidates are the task's distinct
  positives, by content: text and image paths. All positives that the file gives an anchor are relevant to it. A
  candidate that is the query itself is left out of its ranking, unless it is relevant. Measures: recall@1, 5 and 10,
  MRR over all candidates, nDCG@10.
- **Closed sets**. Where the candidates are at most `CLOSED_SET_CANDIDATES` and recur, on average, in at least
  `CLOSED_SET_RECURRENCE` records each, the task is also a classification: ``accuracy`` is how often the nearest
  candidate is relevant, beside ``majority_accuracy``, that of always giving the most frequent answer.
- **text_pair**. Spearman and Pearson correlation of the cosine with the record's score.

A breakdown by ``lang`` or ``domain`` averages over the queries of that group, against all candidates of the task.

For a model that was trained for several sizes (Matryoshka), all of it can be measured at each: by the first numbers of
the same embeddings, normalised anew.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import SentenceEvaluator
from torch.nn import functional

from sentence_vipyloqwen.tasks import ALL_TASKS, SCORE_MSE, split_prefix
from sentence_vipyloqwen.train import metrics
from sentence_vipyloqwen.train.record_lines import StrPath, read_records
from sentence_vipyloqwen.train.records import Record, Side

CLOSED_SET_CANDIDATES = 100
CLOSED_SET_RECURRENCE = 5.0

TIE_DECIMALS = 6
TIE_TOLERANCE = 10**-TIE_DECIMALS
"""Cosines this close tie: embeddings that should be equal differ by float32 rounding."""

SIMILARITIES_PER_CHUNK = 1 << 24
BREAKDOWNS = ("lang", "domain")

RETRIEVAL_METRICS: Mapping[str, Callable[[NDArray[np.int64]], float]] = {
    "recall@1": lambda ranks: metrics.recall_at_k(ranks, 1),
    "recall@5": lambda ranks: metrics.recall_at_k(ranks, 5),
    "recall@10": lambda ranks: metrics.recall_at_k(ranks, 10),
    "mrr": metrics.reciprocal_rank,
    "ndcg@10": lambda ranks: metrics.ndcg_at_k(ranks, 10),
}
"""Metric -> its value for one query, from the ranks of the query's relevant candidates."""

COLUMN_TITLES: Mapping[str, str] = {
    "accuracy": "acc",
    "majority_accuracy": "majority",
    "recall@1": "R@1",
    "recall@5": "R@5",
    "recall@10": "R@10",
    "mrr": "MRR",
    "ndcg@10": "nDCG",
    "spearman": "Spearman",
    "pearson": "Pearson",
}
"""Metric -> its column in the table, in this order."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class GroupResult:
    """The measures of some of a task's queries.

    Attributes:
        queries: How many queries (for text_pair: pairs) they are the mean over.
        metrics: Metric -> value; NaN where it is undefined (a correlation with a constant).
    """

    queries: int
    metrics: Metrics


@dataclass(frozen=True)
class TaskResult(GroupResult):
    """The measures of one task.

    Attributes:
        records: How many records the task has.
        candidates: How many candidates each query was compared with; 0 for text_pair.
        closed_set: Whether the positives form a closed set of answers.
        lang: The same measures by language, where records carry one.
        domain: The same measures by domain.
    """

    records: int
    candidates: int
    closed_set: bool
    lang: dict[str, GroupResult]
    domain: dict[str, GroupResult]

    @property
    def headline(self) -> str:
        """The metric that stands for the task: Spearman for scored pairs, accuracy for closed sets, else nDCG@10."""
        return next(name for name in ("spearman", "accuracy", "ndcg@10") if name in self.metrics)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        tasks: Task name -> result, in the order of the task table.
        dims: Fewer dimensions -> what was measured by the first so many numbers of the embeddings, as far as asked for.
    """

    tasks: dict[str, TaskResult]
    dims: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean over the tasks of each one's headline metric; an undefined one (a constant cosine) counts 0."""
        headlines = [result.metrics[result.headline] for result in self.tasks.values()]
        return float(np.mean(np.nan_to_num(headlines)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and numbers, NaN as ``None``."""
        tasks = {name: {**asdict(result), "headline": result.headline} for name, result in self.tasks.items()}
        fewer = {"dims": {str(size): of_size.to_dict() for size, of_size in self.dims.items()}} if self.dims else {}
        return _without_nan({"mean": self.mean, "tasks": tasks, **fewer})

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2, allow_nan=False)

    def flat(self) -> Metrics:
        """The figures that a trainer logs, as ``<task>_<metric>``; see `TasksEvaluator`."""
        measured = {"tasks_mean": self.mean}
        for task, result in self.tasks.items():
            measured.update({f"{task}_{metric}": value for metric, value in result.metrics.items()})
        for size, of_size in self.dims.items():
            measured[f"dim{size}_tasks_mean"] = of_size.mean
            for task, result in of_size.tasks.items():
                measured[f"dim{size}_{task}_{result.headline}"] = result.metrics[result.headline]
        return measured

    def table(self) -> Table:
        """A table for the screen: a row for each task and, below it, for each of its groups and each size."""
        measured = {metric for result in self.tasks.values() for metric in result.metrics}
        columns = [metric for metric in COLUMN_TITLES if metric in measured]
        table = Table(title=f"mean of the headlines (*): {self.mean:.3f}", box=box.SIMPLE, show_edge=False, padding=0)
        table.add_column("task", no_wrap=True)
        for title in ("queries", "cand.", *(COLUMN_TITLES[metric] for metric in columns)):
            table.add_column(title, justify="right", no_wrap=True, min_width=5)  # numbers stay whole
        for name, result in self.tasks.items():
            numbers = _table_numbers(result, columns, result.headline)
            table.add_row(name, str(result.queries), str(result.candidates or ""), *numbers, style="bold")
            for kind in BREAKDOWNS:
                for group, part in getattr(result, kind).items():
                    numbers = _table_numbers(part, columns)
                    table.add_row(f"  {kind} {escape(group)}", str(part.queries), "", *numbers)
            for size, of_size in self.dims.items():
                numbers = _table_numbers(of_size.tasks[name], columns, result.headline)
                table.add_row(f"  {size} dims", str(result.queries), "", *numbers)
        return table


def evaluate(
    model: SentenceTransformer,
    path_or_records: StrPath | Iterable[Record],
    *,
    dims: Iterable[int] = (),
    hidden_prefixes: Collection[str] = (),
    batch_size: int = 64,
    show_progress_bar: bool | None = None,
) -> Evaluation:
    """Measure a model on records, task by task.

    Args:
        model: A `ViPyloQwen`, or any `SentenceTransformer` that takes the records' inputs.
        path_or_records: A JSONL file of records, or the records. They and their embeddings are held in memory.
        dims: Sizes to measure at beside the whole embedding: by its first so many numbers. Its own size is no other.
        hidden_prefixes: Tasks whose prefix is taken off their texts; the task is measured as before.
        batch_size: Passed to `model.encode`.
        show_progress_bar: Passed to `model.encode`.

    Returns:
        The measures of each task that has records.

    Raises:
        RecordError: If the file has a line that is not a record.
        ValueError: If there is no record, an embedding has fewer dimensions than asked for, or one is not finite.
    """
    records = _read(path_or_records, hidden_prefixes)
    inputs = list(dict.fromkeys(side for record in records for side in (record.anchor, record.positive)))
    vectors = model.encode(
        [side.as_input() for side in inputs],
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_numpy=True,
        normalize_embeddings=True,
    )
    if not np.isfinite(vectors).all():
        bad = inputs[int(np.argmin(np.isfinite(vectors).all(axis=1)))]
        raise ValueError(f"the model's embedding of {bad.as_input()!r:.200} is not finite; allowed: numbers")
    width = vectors.shape[1]
    sizes = sorted(set(dims), reverse=True)
    if unfit := [size for size in sizes if not 1 <= size <= width]:
        raise ValueError(f"dims has {unfit}; allowed are sizes from 1 to the embedding's own, {width}.")
    rows = {side: row for row, side in enumerate(inputs)}

    def measure(size: int) -> dict[str, TaskResult]:
        return _evaluate_tasks(records, _Embedded(rows, _cut_to(vectors, size)))

    return Evaluation(measure(width), {size: Evaluation(measure(size)) for size in sizes if size < width})


def _cut_to(vectors: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """The first numbers of each vector, normalised anew as `encode` does it; all of them as they are."""
    if size == vectors.shape[1]:
        return vectors
    return functional.normalize(torch.from_numpy(vectors[:, :size]), dim=1).numpy()


def _evaluate_tasks(records: Sequence[Record], embedded: _Embedded) -> dict[str, TaskResult]:
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record.task.name].append(record)
    return {name: _evaluate_task(by_task[name], embedded) for name in ALL_TASKS if name in by_task}


class TasksEvaluator(SentenceEvaluator):
    """`evaluate` as an evaluator of `SentenceTransformerTrainer`, for ``evaluator=``.

    It returns every task's measures as ``<task>_<metric>``, such as ``ocr_recall@1``, and the mean of the tasks'
    headline metrics as ``tasks_mean``, the primary metric (``metric_for_best_model="eval_tasks_mean"``). At fewer
    dimensions it returns that mean and each task's headline metric: ``dim256_tasks_mean``, ``dim256_ocr_ndcg@10``.

    Args:
        path_or_records: A JSONL file of records, or the records; read once, here.
        name: Put in front of every metric's name, with an underscore.
        dims: Sizes to measure at beside the whole embedding.
        hidden_prefixes: Tasks whose prefix is taken off their texts.
        batch_size: Passed to `model.encode`.
        show_progress_bar: Passed to `model.encode`.

    Raises:
        RecordError: If the file has a line that is not a record.
        ValueError: If there is no record.
    """

    def __init__(
        self,
        path_or_records: StrPath | Iterable[Record],
        *,
        name: str = "",
        dims: Iterable[int] = (),
        hidden_prefixes: Collection[str] = (),
        batch_size: int = 64,
        show_progress_bar: bool | None = False,
    ) -> None:
        super().__init__()
        self.records = _read(path_or_records, hidden_prefixes)
        self.name = name
        self.dims = tuple(dims)
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.primary_metric = "tasks_mean"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate the model; see `evaluate`. Nothing is written to `output_path`."""
        options = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar}
        evaluation = evaluate(model, self.records, dims=self.dims, **options)
        measured = self.prefix_name_to_metrics(evaluation.flat(), self.name)
        self.store_metrics_in_model_card_data(model, measured, epoch, steps)
        return measured

    @property
    def description(self) -> str:
        """The evaluator's title in the model card."""
        return "Prefixed Tasks"


def _read(path_or_records: StrPath | Iterable[Record], hidden_prefixes: Collection[str]) -> list[Record]:
    is_path = isinstance(path_or_records, (str, os.PathLike))
    records = list(read_records(path_or_records) if is_path else path_or_records)
    if not records:
        raise ValueError(f"{path_or_records if is_path else 'records'}: no record to evaluate; allowed: at least one")
    return [_without_prefix(record) if record.task.name in hidden_prefixes else record for record in records]


def _without_prefix(record: Record) -> Record:
    anchor, positive = (replace(side, text=split_prefix(side.text)[1]) for side in (record.anchor, record.positive))
    return replace(record, anchor=anchor, positive=positive)


@dataclass(frozen=True)
class _Embedded:
    """Inputs and their unit vectors."""

    rows: Mapping[Side, int]
    vectors: NDArray[np.float32]

    def __call__(self, sides: Iterable[Side]) -> NDArray[np.float32]:
        return self.vectors[[self.rows[side] for side in sides]]  # (sides, dimension)


def _evaluate_task(records: Sequence[Record], embedded: _Embedded) -> TaskResult:
    scored = SCORE_MSE in records[0].task.weights
    return _evaluate_pairs(records, embedded) if scored else _evaluate_retrieval(records, embedded)


# --- Scored pairs ---


def _evaluate_pairs(records: Sequence[Record], embedded: _Embedded) -> TaskResult:
    anchors, positives = embedded(r.anchor for r in records), embedded(r.positive for r in records)
    cosines = np.einsum("pd,pd->p", anchors, positives).round(TIE_DECIMALS)  # (pairs,)
    scores = np.array([record.score for record in records])

    def measure(pairs: Sequence[int]) -> GroupResult:
        x, y = cosines[pairs], scores[pairs]
        return GroupResult(len(pairs), {"spearman": metrics.spearman(x, y), "pearson": metrics.pearson(x, y)})

    return _task_result(measure, [[record] for record in records], candidates=0, closed_set=False)


# --- Retrieval ---


def _evaluate_retrieval(records: Sequence[Record], embedded: _Embedded) -> TaskResult:
    by_query: dict[Side, list[Record]] = defaultdict(list)
    for record in records:
        by_query[record.anchor].append(record)
    places = {side: place for place, side in enumerate(dict.fromkeys(record.positive for record in records))}
    relevant = [sorted({places[record.positive] for record in of_query}) for of_query in by_query.values()]
    ranks = list(_rank_queries(list(by_query), places, relevant, embedded))
    closed_set = is_closed_set(candidates=len(places), records=len(records))

    def measure(queries: Sequence[int]) -> GroupResult:
        of_group = [ranks[query] for query in queries]
        measured = {name: float(np.mean(list(map(metric, of_group)))) for name, metric in RETRIEVAL_METRICS.items()}
        if closed_set:
            measured["accuracy"] = float(np.mean([metrics.hit_at_k(of_query, 1) for of_query in of_group]))
            measured["majority_accuracy"] = _majority_accuracy([relevant[query] for query in queries])
        return GroupResult(len(queries), measured)

    return _task_result(measure, list(by_query.values()), candidates=len(places), closed_set=closed_set)


def is_closed_set(*, candidates: int, records: int) -> bool:
    """Whether positives are few and recur, so that retrieval is a classification.

    >>> is_closed_set(candidates=13, records=9673), is_closed_set(candidates=200, records=200)
    (True, False)
    """
    return candidates <= CLOSED_SET_CANDIDATES and records >= CLOSED_SET_RECURRENCE * candidates


def _rank_queries(
    queries: Sequence[Side], places: Mapping[Side, int], relevant: Sequence[Sequence[int]], embedded: _Embedded
) -> Iterator[NDArray[np.int64]]:
    """The ranks of each query's relevant candidates, with one chunk of the similarity matrix in memory."""
    candidates = embedded(places)  # (candidates, dimension)
    step = max(1, SIMILARITIES_PER_CHUNK // len(places))
    for start in range(0, len(queries), step):
        chunk = queries[start : start + step]
        similarities = embedded(chunk) @ candidates.T  # (chunk, candidates)
        for query, row, own in zip(chunk, similarities, relevant[start : start + step], strict=True):
            itself = places.get(query)
            if itself is not None and itself not in own:
                row[itself] = -math.inf
            yield metrics.relevant_ranks(row, own, TIE_TOLERANCE)


def _majority_accuracy(relevant: Sequence[Sequence[int]]) -> float:
    answers = Counter(answer for of_query in relevant for answer in of_query)
    return max(answers.values()) / len(relevant)


# --- Groups ---


def _task_result(
    measure: Callable[[Sequence[int]], GroupResult], records_of_queries: Sequence[Sequence[Record]], **counts: Any
) -> TaskResult:
    """Measure all queries, and the queries of each group."""
    whole = measure(range(len(records_of_queries)))
    groups = {kind: _groups(kind, records_of_queries) for kind in BREAKDOWNS}
    parts = {kind: {name: measure(queries) for name, queries in groups[kind].items()} for kind in BREAKDOWNS}
    records = sum(map(len, records_of_queries))
    return TaskResult(whole.queries, whole.metrics, records, **counts, **parts)


def _groups(kind: str, records_of_queries: Sequence[Sequence[Record]]) -> dict[str, list[int]]:
    """Group -> its queries: those with a record of that language or domain."""
    groups: dict[str, list[int]] = defaultdict(list)
    for query, records in enumerate(records_of_queries):
        for group in {getattr(record, kind) for record in records} - {None}:
            groups[group].append(query)
    return dict(sorted(groups.items()))


# --- Output ---


def _table_numbers(result: GroupResult, columns: Sequence[str], headline: str = "") -> list[str]:
    texts = {name: f"{value:.3f}" + ("*" if name == headline else "") for name, value in result.metrics.items()}
    return [texts.get(column, "") for column in columns]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

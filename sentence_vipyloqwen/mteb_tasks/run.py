"""Measuring a model on tasks of `mteb`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mteb
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.mteb_tasks.encoder import ViPyloQwenEncoder


@dataclass(frozen=True)
class Score:
    """What a model reached on a part of a task.

    Attributes:
        task: The task's name.
        split: Of the task's data, such as ``test``.
        subset: The part: ``default``, or one of several, such as a language.
        metric: The task's main metric.
        value: Its value.
    """

    task: str
    split: str
    subset: str
    metric: str
    value: float


@dataclass(frozen=True)
class Scores:
    """What `run` measured.

    Attributes:
        scores: Every task's parts, in order.
        folder: Where `mteb` wrote each task's results, one JSON file a task.
        weights: Hash of the model's weights, as in its :class:`~sentence_vipyloqwen.fingerprint.Fingerprint`.
        revision: Hash of all that decides its scores.
    """

    scores: list[Score]
    folder: Path
    weights: str
    revision: str

    def to_json(self) -> str:
        """``weights``, ``revision`` and ``scores``: each ``{"task", "split", "subset", "metric", "value"}``."""
        scores = [dataclasses.asdict(score) for score in self.scores]
        told = {"weights": self.weights, "revision": self.revision, "scores": scores}
        return json.dumps(told, ensure_ascii=False, indent=1)


def run(
    model: SentenceTransformer,
    tasks: Iterable[AbsTask],
    output: str | Path,
    *,
    name: str,
    batch_size: int = 64,
    show_progress_bar: bool = False,
) -> Scores:
    """Measure a model and write the results as `mteb` files them: ``results/<model>/<revision>/<task>.json``.

    The revision is a hash of the model (:func:`~sentence_vipyloqwen.mteb_tasks.encoder.revision_of`). A task that the
    same model has results of there is not run again, unless they are of other data: `mteb` alone would return those.

    Args:
        model: The model.
        tasks: The tasks; see :func:`~sentence_vipyloqwen.mteb_tasks.suites.find_tasks`.
        output: Folder for the results.
        name: What results are filed under. ``local/`` is put in front of a name without an owner.
        batch_size: Passed to the model's ``encode``.
        show_progress_bar: Whether `mteb` shows how far it is.
    """
    tasks = list(tasks)
    encoder = ViPyloQwenEncoder(model, name if "/" in name else f"local/{name}", tasks)
    cache = ResultCache(output)
    scores: list[Score] = []
    for task in tasks:
        measured = mteb.evaluate(
            encoder,
            [task],
            cache=cache,
            overwrite_strategy="only-missing" if _is_current(cache, encoder, task) else "always",
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
            show_progress_bar=show_progress_bar,
        )
        scores += [
            Score(result.task_name, split, part["hf_subset"], task.metadata.main_score, part["main_score"])
            for result in measured.task_results
            for split, parts in result.scores.items()
            for part in parts
        ]
    folder = cache.get_task_result_path(tasks[0].metadata.name, encoder.mteb_model_meta).parent
    return Scores(scores, folder, encoder.fingerprint.weights, encoder.mteb_model_meta.revision)


def _is_current(cache: ResultCache, encoder: ViPyloQwenEncoder, task: AbsTask) -> bool:
    """Whether no results lie there of other data than the task's."""
    stored = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    return stored is None or stored.is_mergeable(task)

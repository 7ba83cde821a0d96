"""Measuring a model on tasks of `mteb`."""

from __future__ import annotations

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
        subset: The part: ``default``, or one of several, such as a language.
        metric: The task's main metric.
        value: Its value.
    """

    task: str
    subset: str
    metric: str
    value: float


@dataclass(frozen=True)
class Scores:
    """What `run` measured.

    Attributes:
        scores: Every task's parts, in order.
        folder: Where `mteb` wrote each task's results, one JSON file a task.
    """

    scores: list[Score]
    folder: Path


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

    The revision is a hash of the weights: tasks that the same weights have results of there are not run again.

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
    results = mteb.evaluate(
        encoder,
        tasks,
        cache=cache,
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
        show_progress_bar=show_progress_bar,
    )
    metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    scores = [
        Score(result.task_name, part["hf_subset"], metrics[result.task_name], part["main_score"])
        for result in results.task_results
        for parts in result.scores.values()
        for part in parts
    ]
    folder = cache.get_task_result_path(tasks[0].metadata.name, encoder.mteb_model_meta).parent
    return Scores(scores, folder)

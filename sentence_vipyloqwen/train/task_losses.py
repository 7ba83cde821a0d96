"""The losses of each task as they are logged: means over the task's own rows, so that a rare one does not look good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.losses.ranks import of_all_ranks
from sentence_vipyloqwen.losses.rows import task_indices
from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.batches import BatchWatch, SeenBatch

LOSS, ROWS = "loss", "rows"
"""Beside a task's terms: ``ocr/loss``, their sum, and ``ocr/rows``, how many rows they are the mean of."""


class TaskLosses(TrainerCallback):
    """Turns the shares of the loss that a trainer logs into the means of each task over its own rows.

    A term's share of the batch loss is small where the task has few rows in the batch, and 0 where it has none. So:

    1. After each optimiser step, add up term * rows of the batch, and the rows of each task. (The batches of a step on
       all ranks are of one size, as accelerate deals them; else negatives that ranks share would shift the weights.)
    2. Where the trainer logs a loss, add up those sums over the ranks.
    3. Divide: ``ocr/info_nce`` becomes the mean over the OCR rows of all steps and ranks since the entry before, weight
       included; ``ocr/loss`` is the sum of the task's terms, ``ocr/rows`` the number of its rows. A task without rows
       is left out of the entry.

    It changes the entry itself, so it stands before whatever shows one in the trainer's list of callbacks, and before
    what lets go of the watched batches.

    Args:
        watch: Sees the batches.
        control: The task tokens.
    """

    def __init__(self, watch: BatchWatch, control: ControlTokens) -> None:
        self.watch, self.control = watch, control
        self._terms: list[str] = []
        self._sums: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin with nothing."""
        self._sums = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the batches of the step."""
        for batch in self.watch.batches:
            self._terms = task_terms(batch.loss)
            sums = self._sums_of(batch)
            self._sums = sums if self._sums is None else self._sums + sums  # 1

    def _sums_of(self, batch: SeenBatch) -> Tensor:
        """(terms + tasks,): each term times the rows of the batch, and the rows of each task."""
        tasks = torch.bincount(task_indices(batch.columns[0], self.control), minlength=len(ALL_TASKS))
        terms = [batch.loss[name].detach().float() * batch.rows for name in self._terms]
        return torch.cat([torch.stack(terms), tasks]) if terms else tasks.float()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the means in place of the shares; every rank must be told of the entry."""
        if not logs or LOSS not in logs or self._sums is None:
            return
        sums = of_all_ranks(self._sums).double().sum(dim=0).tolist()  # 2
        self._sums = None
        terms = dict(zip(self._terms, sums[: len(self._terms)], strict=True))
        rows = dict(zip(ALL_TASKS, sums[len(self._terms) :], strict=True))
        for name in self._terms:
            logs.pop(name, None)
        logs.update(means_of_rows(terms, rows))  # 3


def task_terms(names: Iterable[str]) -> list[str]:
    """Those of some names that are of a task's term.

    >>> task_terms(["loss", "ocr/triplet", "step"])
    ['ocr/triplet']
    """
    return [name for name in names if "/" in name and name.partition("/")[0] in ALL_TASKS]


def means_of_rows(terms: Mapping[str, float], rows: Mapping[str, float]) -> dict[str, float]:
    """The entries of each task that has rows.

    Args:
        terms: Term, ``ocr/info_nce``, -> its sum over the task's rows.
        rows: Task -> its rows.

    >>> means_of_rows({"ocr/info_nce": 6.0, "ocr/triplet": 1.0, "instr/cosine": 0.0}, {"ocr": 4, "instr": 0})
    {'ocr/loss': 1.75, 'ocr/info_nce': 1.5, 'ocr/triplet': 0.25, 'ocr/rows': 4}
    """
    entries: dict[str, float] = {}
    for task, count in rows.items():
        own = {name: total / count for name, total in terms.items() if count and name.startswith(f"{task}/")}
        if own:
            means = {f"{task}/{LOSS}": sum(own.values()), **own}
            entries |= {name: round(value, 6) for name, value in means.items()} | {f"{task}/{ROWS}": int(count)}
    return entries

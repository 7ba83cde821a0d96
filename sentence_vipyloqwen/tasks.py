"""The task table: which prefix selects which loss terms.

Everything that knows a task by name (the tokenizer, the prompts, the losses, the data loader, the reports) reads it
here, so a task is added or changed in one place.

Source of the method: EraX-AI, viPyloQwen README and paper drafts (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

INFO_NCE = "info_nce"
SCORE_MSE = "score_mse"
COSINE = "cosine"
TRIPLET = "triplet"


@dataclass(frozen=True)
class Task:
    """One way of reading an input, and the loss that trains it.

    Attributes:
        name: The task's name; also its prompt name and its name in records and reports.
        token: The special token that marks the task at the head of an input, or ``None`` for input without a prefix.
        weights: Loss term -> its default weight, in the order in which the terms are reported.
        margin: Margin of the triplet term, in units of cosine similarity; ``None`` for tasks without that term.
        prefix_on_positive: Whether positives and negatives carry the prefix too (otherwise the anchor alone does).
    """

    name: str
    token: str | None
    weights: Mapping[str, float]
    margin: float | None = None
    prefix_on_positive: bool = False

    @property
    def prompt(self) -> str:
        """The text put in front of an input of this task, ``""`` where the task has no token."""
        return f"{self.token} " if self.token else ""


def _task(name: str, margin: float | None = None, prefix_on_positive: bool = False, **weights: float) -> Task:
    return Task(name, f"<{name}>", MappingProxyType(weights), margin, prefix_on_positive)


GENERAL = Task("general", None, MappingProxyType({INFO_NCE: 1.0}))
"""Input without a prefix: documents, captions, general queries."""

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            _task("text_pair", info_nce=1.0, score_mse=1.0, prefix_on_positive=True),
            _task("instr", info_nce=1.0, cosine=1.0),
            _task("ocr", info_nce=1.0, triplet=1.0, margin=0.2),
            _task("vqa_single", info_nce=1.0, triplet=1.0, margin=0.2),
            _task("vqa_multi", info_nce=1.0, triplet=1.5, margin=0.3),
        )
    }
)
"""The five tasks that have a prefix, by name, in the order in which their tokens are added to a tokenizer."""

ALL_TASKS: Mapping[str, Task] = MappingProxyType({**TASKS, GENERAL.name: GENERAL})
"""Every task, the one without a prefix last."""

TASK_TOKENS: tuple[str, ...] = tuple(task.token for task in TASKS.values() if task.token)

PROMPTS: Mapping[str, str] = MappingProxyType({task.name: task.prompt for task in TASKS.values()})
"""Sentence Transformers prompts of every saved model: one for each prefix."""


def split_prefix(text: str) -> tuple[Task, str]:
    """Split a text into the task of its prefix and what follows, as written: the space after a prefix is kept.

    White space before a prefix belongs to it; a text without a prefix is returned whole.

    >>> split_prefix(" <ocr> Tổng cộng?")[0].name, split_prefix(" <ocr> Tổng cộng?")[1]
    ('ocr', ' Tổng cộng?')
    >>> split_prefix("Tổng cộng? <ocr>")[0].name
    'general'
    """
    head = text.lstrip()
    for task in TASKS.values():
        if task.token and head.startswith(task.token):
            return task, head[len(task.token) :]
    return GENERAL, text

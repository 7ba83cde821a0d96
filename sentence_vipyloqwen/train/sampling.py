"""In which order a training sees its rows: batches of one task each, and the tasks in a mix that is kept exactly.

Two samplers that the stock trainer takes, and that depend on nothing but the seed and the epoch::

    arguments = SentenceTransformerTrainingArguments(
        batch_sampler=grouped_batch_sampler(group_images=8),                       # the rows of a split -> batches
        multi_dataset_batch_sampler=task_mix_sampler(curriculum=DRAFT_CURRICULUM),  # the splits -> one sequence
        ...,
    )
    SentenceTransformerTrainer(model, arguments, ..., callbacks=[SamplingCallback()])

**Cycles and epochs.** A split is read in cycles: in each, all its rows in a new order. An epoch is as many batches as
all splits have together, whatever the mix. A split that the mix favours is then read more than once in an epoch; one
that it does not goes on in the next epoch where it stopped, so that no row comes again before its split is through.
With the default mix, proportional to size, a cycle is an epoch. With ``drop_last``, which Sentence Transformers sets
under several ranks, a cycle leaves out the rows that fill no batch: others in each cycle.

**Several ranks.** All draw the same sequence, and accelerate deals its batches out, the first to rank 0, and so on.

**Mixed batches.** A batch is a table, so rows can only meet in one if they have the same columns. `mixed_splits` puts
the splits of equal columns together beforehand; a batch then holds its tasks as chance brings them, by their size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from sentence_transformers.util import get_world_size
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.tasks import ALL_TASKS, split_prefix
from sentence_vipyloqwen.train.split_sampling import SplitBatchSampler, grouped_batch_sampler, has_images

__all__ = [
    "DRAFT_CURRICULUM",
    "MULTIMODAL",
    "PROPORTIONAL",
    "TEXT",
    "Phase",
    "SamplingCallback",
    "TaskMixBatchSampler",
    "grouped_batch_sampler",
    "mixed_splits",
    "task_mix_sampler",
]

logger = logging.getLogger(__name__)

PROPORTIONAL = 1.0
"""The temperature of shares by size, as in Sentence Transformers' own sampler."""

TEXT, MULTIMODAL = "text", "multimodal"
"""In a mix, all tasks of the data in which no row has an image, and all others."""

_HEADS_READ = 32


# --- The mix ---


def _check_mix(name: str, mix: Mapping[str, float]) -> None:
    allowed = (*ALL_TASKS, TEXT, MULTIMODAL)
    for key, weight in mix.items():
        if key not in allowed:
            raise ValueError(f"{name}: got {key!r}; allowed: {', '.join(allowed)}")
        if not (isinstance(weight, (int, float)) and weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{name}: {key} has the weight {weight!r}; allowed: 0 or above")
    if not sum(mix.values()) > 0:
        raise ValueError(f"{name}: got {dict(mix)}; allowed: at least one weight above 0")


@dataclass(frozen=True)
class Phase:
    """A part of a run, and its mix.

    Attributes:
        until: Where it ends, as a share of the run's optimiser steps: above 0, up to 1.
        mix: Task, ``"text"`` or ``"multimodal"`` -> its weight. What is not named gets nothing in this phase.

    Raises:
        ValueError: If one of them is not so.
    """

    until: float
    mix: Mapping[str, float]

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"Phase: until is {self.until!r}; allowed: above 0, up to 1")
        _check_mix(f"Phase until {self.until}", self.mix)


_DRAFT_PHASES = 6
_DRAFT_MULTIMODAL = 2 / 3

DRAFT_CURRICULUM: tuple[Phase, ...] = tuple(
    Phase((number + 1) / _DRAFT_PHASES, {TEXT: 1 - share, MULTIMODAL: share})
    for number in range(_DRAFT_PHASES)
    for share in [_DRAFT_MULTIMODAL * number / (_DRAFT_PHASES - 1)]
)
"""Six phases of equal length, from text alone to two thirds multimodal.

The number of phases and both ends are those of the EraX-AI paper drafts (2025). The steps between (0, 2, 4, 6, 8 and 10
fifteenths) and the equal lengths are ours.
"""


def task_mix_sampler(
    mix: Mapping[str, float] | None = None,
    temperature: float = PROPORTIONAL,
    curriculum: Sequence[Phase] = (),
    *,
    same_task_across_ranks: bool = True,
) -> Callable[..., TaskMixBatchSampler]:
    """How often each task has its turn: for ``multi_dataset_batch_sampler``. By default, as often as it has batches.

    The task of a split is read from the prefix of its anchors. The share of a task is divided over its splits, such as
    ``ocr`` and ``ocr.negatives_1``, by size.

    Args:
        mix: Task, ``"text"`` or ``"multimodal"`` -> its weight; they need not add up to 1. Every task of the data must
            be covered, with 0 where it is to be left out; so too by the phases of a curriculum together.
        temperature: Where neither a mix nor a curriculum says more, the share of a task of n batches is proportional to
            n ** temperature: 1 by size, 0.5 by its square root, 0 the same for all. It also divides the shares of
            ``"text"`` and ``"multimodal"`` over their tasks.
        curriculum: Phases in order, the last until 1, in place of `mix`. Needs `SamplingCallback`.
        same_task_across_ranks: Give all ranks batches of one task at the same time: their work is alike, and negatives
            gathered from them are of the task. A split of fewer batches than ranks then has rows on several of them.
            Without it, ranks differ by chance. No effect on one rank.

    Returns:
        What makes the sampler once the trainer has the data; it can be pickled.

    Raises:
        ValueError: If an argument is not as above.
    """
    if mix is not None:
        _check_mix("mix", mix)
        if curriculum:
            raise ValueError(f"mix is {dict(mix)} and there is a curriculum; allowed: one of them")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature!r}; allowed: 0 or above")
    ends = [phase.until for phase in curriculum]
    if curriculum and (ends != sorted(set(ends)) or ends[-1] != 1):
        raise ValueError(f"curriculum: its phases end at {ends}; allowed: rising, the last 1")
    return partial(
        TaskMixBatchSampler,
        mix=mix,
        temperature=temperature,
        curriculum=tuple(curriculum),
        same_task_across_ranks=same_task_across_ranks,
    )


class TaskMixBatchSampler(MultiDatasetDefaultBatchSampler):
    """Deals the batches of several splits in a mix; see `task_mix_sampler`.

    1. A mix gives each split its share.
    2. At every point of a phase, the turns that each split has had are its share of them, rounded as by Webster's
       method of apportionment: a split's k-th turn (k = 0, 1, ...) is due at (k + 1/2) / share.
    3. Within an epoch, the k-th turn comes somewhere between k / share and (k + 1) / share instead, as the seed has it,
       lest a regular order fall in step with ranks or accumulation.

    So the turns that each of S splits has had are never further from its share of them than 1 + S * share, and at the
    end of an epoch or a phase no further than half of that. Steps 2 and 3 need no walk through what came before: an
    epoch starts at once.

    Attributes:
        epoch: The epoch that the next iteration goes through.
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
        *,
        mix: Mapping[str, float] | None = None,
        temperature: float = PROPORTIONAL,
        curriculum: Sequence[Phase] = (),
        same_task_across_ranks: bool = True,
    ) -> None:
        """Keep the splits, and work out their shares.

        Args:
            dataset: The S splits, one behind the other.
            batch_samplers: One of `grouped_batch_sampler` for each of them.
            generator: Not used: all chance comes from `seed`, the epoch and the cycle.
            seed: Of the sequence; 0 for ``None``.
            mix: See `task_mix_sampler`, as for what follows.
            temperature: Of shares by size.
            curriculum: In place of `mix`.
            same_task_across_ranks: Whether a turn is one batch for every rank, or one batch.

        Raises:
            ValueError: If a batch sampler is another, no split fills a batch, or a mix does not fit the data.
        """
        super().__init__(dataset, list(batch_samplers), generator, seed or 0)
        for sampler in batch_samplers:
            if not isinstance(sampler, SplitBatchSampler):
                raise ValueError(
                    f"batch_sampler: got {type(sampler).__name__}; allowed: grouped_batch_sampler(...), "
                    "which can go on anywhere in a cycle"
                )
        self._batches_per_turn = get_world_size() if same_task_across_ranks else 1
        self._batches = np.array([len(sampler) for sampler in batch_samplers])
        if self._turns == 0:
            raise ValueError(
                f"batches of {self.batch_size} rows: the splits fill {self._batches.tolist()} of them; "
                f"allowed: at least {self._batches_per_turn} in all. Lower the batch size"
            )
        if empty := [len(split) for split, batches in zip(dataset.datasets, self._batches, strict=True) if not batches]:
            logger.warning("Splits of %s rows fill no batch of %d and are not trained on.", empty, self.batch_size)
        self._ends = [phase.until for phase in curriculum]
        mixes = [phase.mix for phase in curriculum] or [mix]
        self._shares = _split_shares(mixes, temperature, dataset.datasets, self._batches)
        self._steps: tuple[int, int] | None = None

    def set_run(self, max_steps: int, accumulation: int) -> None:
        """Tell the sampler how long the run is, which a curriculum divides.

        Args:
            max_steps: Optimiser steps of the whole run.
            accumulation: Batches of a rank for each of them.
        """
        self._steps = (max_steps, accumulation)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the epoch, as places in the concatenated dataset."""
        turns_before, turns = self._plan()
        starts = np.cumsum([0, *map(len, self.dataset.datasets)]).tolist()
        splits = [
            _go_on(sampler, int(before) * self._batches_per_turn)
            for sampler, before in zip(self.batch_samplers, turns_before, strict=True)
        ]
        for split in turns:
            for batch in islice(splits[split], self._batches_per_turn):
                yield [starts[split] + row for row in batch]

    def __len__(self) -> int:
        return self._turns * self._batches_per_turn

    @property
    def _turns(self) -> int:
        """Of an epoch: what would not fill all ranks is left out."""
        return int(self._batches.sum()) // self._batches_per_turn

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """(S,) the turns each split had before the epoch, and (turns,) the splits whose turn it is."""
        begin, end = self.epoch * self._turns, (self.epoch + 1) * self._turns
        rng = np.random.default_rng([self.seed, self.epoch])
        before = np.zeros(len(self._batches), dtype=np.int64)
        turns = []
        for start, stop, shares in self._phases():
            first, last = (apportion(shares, min(max(turn, start), stop) - start) for turn in (begin, end))
            before += first
            turns.append(_interleave(shares, first, last, rng))
        return before, np.concatenate(turns)

    def _phases(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Where each phase starts and stops, in turns from the start of the run, and its (S,) shares.

        The last one stays in force however long the run goes on.
        """
        stops = [*map(self._turn_at, self._ends[:-1]), np.iinfo(np.int64).max]
        return zip([0, *stops], stops, self._shares, strict=False)

    def _turn_at(self, share_of_run: float) -> int:
        """The turn with which the step at this share of the run begins."""
        if self._steps is None:
            raise ValueError(
                "curriculum: the length of the run is not known; allowed: the training data of a trainer with "
                "callbacks=[SamplingCallback()]"
            )
        max_steps, accumulation = self._steps
        ranks = get_world_size()
        epoch, step = divmod(round(share_of_run * max_steps), _steps_in_epoch(len(self) // ranks, accumulation))
        return epoch * self._turns + step * accumulation * ranks // self._batches_per_turn


def _steps_in_epoch(batches: int, accumulation: int) -> int:
    """As the trainer has it: the last step of an epoch may have fewer batches."""
    return max(1, math.ceil(batches / accumulation))


def _go_on(sampler: SplitBatchSampler, position: int) -> Iterator[list[int]]:
    """The batches of a split from this one on, cycle after cycle."""
    cycle, start = divmod(position, max(1, len(sampler)))
    while True:
        yield from sampler.cycle(cycle, start)
        cycle, start = cycle + 1, 0


def apportion(shares: np.ndarray, turns: int) -> np.ndarray:
    """Divide turns by Webster's method: more turns never take one away from a split.

    Args:
        shares: (S,) float64, adding up to 1.
        turns: How many there are.

    Returns:
        (S,) int64, adding up to `turns`; each within rounding of its share.

    >>> apportion(np.array([0.5, 0.3, 0.2]), 10), apportion(np.array([0.5, 0.3, 0.2]), 3)
    (array([5, 3, 2]), array([1, 1, 1]))
    """
    # At t = turns - S / 2, the shares of t, rounded, add up to `turns` at most. Two less, so that no tie is in doubt.
    settled = max(0.0, turns - len(shares) / 2 - 2)
    counts = np.floor(shares * settled + 0.5).astype(np.int64)
    while counts.sum() < turns:
        due = np.divide(counts + 0.5, shares, out=np.full(len(shares), np.inf), where=shares > 0)
        counts[due.argmin()] += 1
    return counts


def _interleave(shares: np.ndarray, first: np.ndarray, last: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(turns,) the splits in the order of their turns `first` up to `last`, each due at random within its time."""
    counts = last - first
    split = np.repeat(np.arange(len(shares)), counts)
    turn = np.arange(len(split)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return split[np.argsort((turn + rng.random(len(split))) / shares[split], kind="stable")]


# --- Shares ---


def _split_shares(
    mixes: Sequence[Mapping[str, float] | None], temperature: float, splits: Sequence[Dataset], batches: np.ndarray
) -> list[np.ndarray]:
    """For each mix, the (S,) shares of the splits."""
    if mixes == [None] and temperature == PROPORTIONAL:  # needs no task: it also holds for a split of several
        return [batches / batches.sum()]
    tasks = [_task_of(split) for split in splits]
    sizes = {task: int(batches[[other == task for other in tasks]].sum()) for task in tasks}
    weights = {task: size**temperature if size else 0.0 for task, size in sizes.items()}
    members = _members(mixes, tasks, splits)
    _check_covered(mixes, members, weights)
    within = np.array([count / max(1, sizes[task]) for task, count in zip(tasks, batches, strict=True)])
    task_shares = [_task_shares(mix, members, weights) for mix in mixes]
    return [np.array([shares.get(task, 0.0) for task in tasks]) * within for shares in task_shares]


def _task_of(split: Dataset) -> str:
    """The task of a split, from the heads of some of its anchors, spread over it."""
    rows = np.linspace(0, len(split) - 1, min(len(split), _HEADS_READ)).astype(int).tolist()
    tasks = {_task_of_row(split[row]) for row in rows}
    if len(tasks) != 1:
        raise ValueError(
            f"split of {len(split)} rows: got the tasks {sorted(tasks)}; allowed where tasks have shares: one a split"
        )
    return tasks.pop()


def _task_of_row(row: Mapping[str, Any]) -> str:
    anchor = next(iter(row.values()))
    text = anchor.get("text") if isinstance(anchor, Mapping) else anchor
    return split_prefix(text if isinstance(text, str) else "")[0].name


def _members(
    mixes: Sequence[Mapping[str, float] | None], tasks: Sequence[str], splits: Sequence[Dataset]
) -> dict[str, list[str]]:
    """The tasks of the data that each name of a mix stands for."""
    members = {task: [task] for task in tasks}
    if any({TEXT, MULTIMODAL} & set(mix or {}) for mix in mixes):  # it takes a look at all rows
        pictured = {task for task, split in zip(tasks, splits, strict=True) if has_images(split)}
        members |= {TEXT: [task for task in members if task not in pictured], MULTIMODAL: sorted(pictured)}
    return members


def _check_covered(
    mixes: Sequence[Mapping[str, float] | None], members: Mapping[str, Sequence[str]], weights: Mapping[str, float]
) -> None:
    for mix in mixes:
        covered = [task for name in mix or {} for task in members.get(name, ())]
        if twice := {task for task in covered if covered.count(task) > 1}:
            raise ValueError(f"mix {dict(mix or {})}: covers {', '.join(sorted(twice))} twice; allowed: once")
        for name, weight in (mix or {}).items():
            if weight and not sum(weights[task] for task in members.get(name, ())):
                filled = ", ".join(task for task, size in weights.items() if size)
                raise ValueError(f"mix: got {name!r}, of which the data fills no batch; allowed here: {filled}")
    named = {task for mix in mixes for name in (weights if mix is None else mix) for task in members.get(name, ())}
    if forgotten := [task for task in weights if task not in named]:
        raise ValueError(f"mix: does not name {', '.join(forgotten)} of the data; give 0 to what is to be left out")


def _task_shares(
    mix: Mapping[str, float] | None, members: Mapping[str, Sequence[str]], weights: Mapping[str, float]
) -> dict[str, float]:
    """Task -> its share; the shares add up to 1."""
    if mix is None:
        return {task: weight / sum(weights.values()) for task, weight in weights.items()}
    shares = {}
    for name, weight in mix.items():
        total = sum(weights[task] for task in members.get(name, ())) or 1.0
        shares |= {task: weight / sum(mix.values()) * weights[task] / total for task in members.get(name, ())}
    return shares


# --- Mixed batches ---


def mixed_splits(splits: DatasetDict) -> DatasetDict:
    """Put splits of equal columns together, so that a batch can hold several tasks. Nothing is copied.

    Records with another number of negatives, or with a score, have other columns: they stay apart.

    Args:
        splits: Split -> dataset, as `load_tasks` gives them.

    Returns:
        The same rows; a split made of several is named after them: ``"instr+ocr"``.
    """
    names: dict[tuple[str, ...], list[str]] = {}
    for name, split in splits.items():
        names.setdefault(tuple(split.column_names), []).append(name)
    return DatasetDict({"+".join(group): concatenate_datasets([splits[n] for n in group]) for group in names.values()})


# --- The trainer ---


class SamplingCallback(TrainerCallback):
    """Tells the samplers of a trainer which epoch begins, and how long the run is.

    A curriculum is divided by the length. As for the epoch: the trainer sets it by itself, except where a run of
    several ranks goes on in the middle of one. There accelerate has wrapped the sampler twice, transformers (5,
    `Trainer._run_epoch`) sees through one wrapper, and the epoch would stay 0.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the sampler, and tell it."""
        loader: DataLoader = kwargs["train_dataloader"]
        sampler = loader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        if isinstance(sampler, TaskMixBatchSampler):
            sampler.set_run(state.max_steps, args.gradient_accumulation_steps)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(state.global_step // _steps_in_epoch(len(loader), args.gradient_accumulation_steps))

"""From raw runs to figures, spreads and differences.

A task's figure is its headline metric (Spearman, accuracy or nDCG@10), one that is undefined counting 0, as in the
average over the tasks. The spread of a figure over the seeds is its standard deviation (n - 1) and its range. A
difference between two variants is taken seed by seed: a seed deals rows and draws the head alike for both, so that the
samples are paired, and the confidence interval is that of Student's t (Student 1908, https://doi.org/10.2307/2331554).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from sentence_vipyloqwen.ablation.variants import VARIANTS, Variant

RESULTS_FILE = "results.json"
MEAN = "mean"
"""Among the figures, the average over the tasks; readers are shown `AVERAGE`."""

AVERAGE = "average"
FEWEST_SEEDS = 2
CONFIDENCE = 0.95
RULE = (
    "A difference counts as significant where the 95 % confidence interval of its mean over the seeds excludes 0: "
    "Student's t, paired, as both sides have the same seeds. With one seed there is no interval, and nothing counts."
)


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds.

    Attributes:
        by_seed: Seed -> value.
    """

    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds (n - 1); ``None`` of a single one.

        >>> Spread({0: 0.1, 1: 0.2, 2: 0.3}).deviation
        0.1
        """
        values = list(self.by_seed.values())
        return round(float(np.std(values, ddof=1)), 12) if len(values) >= FEWEST_SEEDS else None

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return min(self.by_seed.values()), max(self.by_seed.values())


@dataclass(frozen=True)
class Difference:
    """One figure of two variants, over the seeds that both have.

    Attributes:
        own: The variant's.
        other: That of the variant it is compared with.
        by_seed: The differences, own less other.
    """

    own: Spread
    other: Spread
    by_seed: Spread

    @classmethod
    def of(cls, own: Spread, other: Spread) -> Difference | None:
        """The difference of two figures; ``None`` where they share no seed."""
        seeds = [seed for seed in own.by_seed if seed in other.by_seed]
        if not seeds:
            return None
        shared = [{seed: side.by_seed[seed] for seed in seeds} for side in (own, other)]
        return cls(*map(Spread, shared), Spread({seed: shared[0][seed] - shared[1][seed] for seed in seeds}))

    @property
    def interval(self) -> float | None:
        """Half the width of the confidence interval of the mean; ``None`` of a single seed.

        >>> found = Difference.of(Spread({0: 0.1, 1: 0.2, 2: 0.3}), Spread({0: 0.0, 1: 0.0, 2: 0.0}))
        >>> round(found.interval, 3)  # 4.303 x 0.1 / sqrt(3)
        0.248
        """
        deviation, seeds = self.by_seed.deviation, len(self.by_seed.by_seed)
        if deviation is None:
            return None
        return float(student_t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * deviation / seeds**0.5)

    @property
    def counts(self) -> bool:
        """Whether it counts, by `RULE`."""
        return self.interval is not None and abs(self.by_seed.mean) > self.interval + 1e-9  # not by rounding alone


@dataclass(frozen=True)
class VariantResult:
    """What the runs of one variant came to.

    Attributes:
        variant: The variant.
        figures: ``"mean"`` and each task -> its figure over the seeds; empty where every run failed.
        differences: The same -> the difference to the variant it is compared with, as far as there is one.
        curves: Task -> logged step -> its InfoNCE in training, the mean over the seeds; empty of what trains nothing.
        failed: Seeds whose run failed.
        seconds: Of all its runs.
        settings: What its first run was trained by, and how it was evaluated.
    """

    variant: Variant
    figures: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    curves: Mapping[str, Mapping[int, float]]
    failed: Sequence[int]
    seconds: float
    settings: Mapping[str, Any]

    @property
    def main(self) -> str:
        """The figure that its question is about: one task, where it has been measured, else the average."""
        about, only = self.variant.about, self.variant.only
        return about if about and (only or about in self.figures) else MEAN

    @property
    def seeds(self) -> int:
        """How many runs have figures."""
        return max((len(figure.by_seed) for figure in self.figures.values()), default=0)

    @property
    def compared_seeds(self) -> int:
        """How many seeds its differences are taken over."""
        return max((len(found.by_seed.by_seed) for found in self.differences.values()), default=0)


def names_in(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """The average, then the tasks, as far as there is a figure of one; the average alone where there is none."""
    return list(dict.fromkeys(name for of in figures for name in of)) or [MEAN]


def load_results(output: Path) -> list[dict[str, Any]]:
    """The raw runs of an ablation.

    Raises:
        ValueError: If the folder has none.
    """
    runs: list[dict[str, Any]] = _load(output)["runs"]
    return runs


def load_about(output: Path) -> str:
    """What base and data of an ablation are, in the words of who ran it; ``""`` where nothing was said.

    Raises:
        ValueError: If the folder has no results.
    """
    about: str = _load(output).get("about", "")
    return about


def _load(output: Path) -> dict[str, Any]:
    path = output / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"{output} holds no {RESULTS_FILE}: nothing has been run there.")
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[VariantResult]:
    """Mean, spread and differences of every variant that has a run, in the order of the table.

    Runs of a variant that the table does not have are left out; see `unknown_variants`.
    """
    present = [name for name in VARIANTS if any(run["variant"] == name for run in runs)]
    of_variant = {name: [run for run in runs if run["variant"] == name] for name in present}
    figures = {name: _spreads(of, VARIANTS[name].only) for name, of in of_variant.items()}
    return [
        VariantResult(
            variant=VARIANTS[name],
            figures=figures[name],
            differences=_differences(figures[name], figures.get(VARIANTS[name].against or "", {})),
            curves=_curves(of, VARIANTS[name].only),
            failed=[run["seed"] for run in of if run["after"] is None],
            seconds=sum(run["seconds"] for run in of),
            settings=of[0]["settings"],
        )
        for name, of in of_variant.items()
    ]


def unknown_variants(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Variants of the runs that the table does not have: they were renamed, or come from another version."""
    return sorted({run["variant"] for run in runs} - set(VARIANTS))


def figures_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The average and each task's headline metric.

    >>> figures_of({"mean": 0.5, "tasks": {"ocr": {"headline": "ndcg@10", "metrics": {"ndcg@10": 0.5}}}})
    {'mean': 0.5, 'ocr': 0.5}
    """
    tasks = {name: task["metrics"][task["headline"]] or 0.0 for name, task in evaluation["tasks"].items()}
    return {MEAN: evaluation["mean"], **tasks}


def headlines(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Task -> its headline metric."""
    found: dict[str, str] = {}
    for run in runs:
        for name, task in (run["after"] or {"tasks": {}})["tasks"].items():
            found[name] = task["headline"]
    return found


def _spreads(runs: Sequence[Mapping[str, Any]], only: str | None) -> dict[str, Spread]:
    """The figures over the seeds; of a variant that is for one task, that task's only."""
    by_name: dict[str, dict[int, float]] = {}
    for run in runs:
        for name, value in figures_of(run["after"]).items() if run["after"] else ():
            if only in (None, name):
                by_name.setdefault(name, {})[run["seed"]] = value
    return {name: Spread(by_seed) for name, by_seed in by_name.items()}


def _curves(runs: Sequence[Mapping[str, Any]], only: str | None) -> dict[str, dict[int, float]]:
    """What the runs logged; of a variant that is for one task, that task's only."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for task, points in run["curves"].items():
            for step, value in points if only in (None, task) else ():
                found.setdefault(task, {}).setdefault(step, []).append(value)
    return {task: {step: float(np.mean(of)) for step, of in sorted(steps.items())} for task, steps in found.items()}


def _differences(own: Mapping[str, Spread], other: Mapping[str, Spread]) -> dict[str, Difference]:
    found = {name: Difference.of(own[name], other[name]) for name in own if name in other}
    return {name: difference for name, difference in found.items() if difference}

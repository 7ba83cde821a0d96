"""Planning the runs of an ablation: which variant, by which recipe, in which folder.

1. Each variant and seed is a run, with a folder of its own: ``runs/<variant>/seed-<seed>``. A variant that changes the
   evaluation alone has no training: it takes the model that another run has left.
2. All variants have the same budget: the same rows. Where one changes the batch, ``max_steps`` changes with it; one for
   a single task has that task's share of the steps.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sentence_vipyloqwen.ablation.variants import FULL, VARIANTS, Variant, with_needed
from sentence_vipyloqwen.train.recipe import BY_ROWS, Recipe, load_recipe
from sentence_vipyloqwen.train.records import read_records

RUNS_FOLDER = "runs"
SEEDS = 3
_PLACES = ("base", "train", "eval", "output", "vision_cache")
"""Settings that name files: results say what was in these, not where they lay."""

_NO_MATTER = ("resume", "workers", "logging_steps", "keep_checkpoints", "save_steps", "report_to", "ddp_timeout")
"""Settings that change nothing in the figures."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant: What is changed.
        recipe: What it trains by; of a variant without a training, what its model was trained by.
        folder: What the run leaves behind.
    """

    variant: Variant
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant.name}, seed {self.recipe.seed}"

    def leaves_model_of(self, other: Run) -> bool:
        """Whether the other run takes the model that this one trains."""
        return self.variant.name == other.variant.model_of and self.recipe.seed == other.recipe.seed

    def settings(self) -> dict[str, Any]:
        """Everything that its figures depend on, but for the data."""
        settings = yaml.safe_load(self.recipe.to_yaml())
        kept = {name: value for name, value in settings.items() if name not in (*_PLACES, *_NO_MATTER)}
        if self.variant.model_of:
            kept["evaluation"] = {"hidden_prefixes": list(self.variant.hidden_prefixes), "cut": self.variant.cut}
        return kept


def plan(
    recipe: Recipe,
    names: Iterable[str] = (),
    *,
    seeds: int = SEEDS,
    own: Mapping[str, Settings] | None = None,
) -> list[Run]:
    """The runs of an ablation, in the order in which they are done.

    Args:
        recipe: The reference; its ``seed`` is the first one, its ``output`` the folder of the whole ablation.
        names: Variants; by default all, those for a single task as far as the data has that task and the recipe has
            no ``best_metric`` and draws batches by the tasks' rows or by a mix of tasks. The reference and what they
            are compared with come by themselves.
        seeds: How many.
        own: Variant -> settings that replace its own, such as a batch size that the machine can hold.

    Raises:
        ValueError: If a variant or a setting is unknown or out of range, a variant does not differ from what it is
            compared with, or there is nothing to evaluate on.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; allowed is at least 1.")
    if not recipe.eval:
        raise ValueError("An ablation needs held-out records: setting eval is None; allowed is a JSONL file.")
    own, chosen = own or {}, list(names)
    variants = with_needed(chosen or VARIANTS)
    trains = [variant.name for variant in variants if not variant.model_of and variant.name != FULL]
    if unknown := sorted(set(own) - set(trains)):
        raise ValueError(f"Settings are given for the variants {unknown}; among those that train are {trains}.")
    shares = _shares(recipe) if any(variant.only for variant in variants) else {}
    if not chosen:
        variants = [variant for variant in variants if variant.only is None or variant.only in shares]
    trained = {variant.name: variant for variant in variants if not variant.model_of}
    recipes = {name: _recipe_of(variant, recipe, own.get(name, {}), shares) for name, variant in trained.items()}
    for name, variant in trained.items():
        if variant.against and recipes[name] == recipes[variant.against]:
            raise ValueError(
                f"Variant {name} ({variant.change}) is the same as {variant.against} under this recipe: leave it out, "
                "or change the recipe."
            )
    return [_run(variant, recipes, seed) for seed in range(recipe.seed, recipe.seed + seeds) for variant in variants]


def _shares(recipe: Recipe) -> dict[str, float]:
    """Each task of the data, and its share of the rows that the reference sees.

    Empty where a model for one task would be no fair peer: where no mix of tasks tells its share, or where the best
    checkpoint is chosen, which all tasks have a say in.
    """
    if recipe.mixed_batches or recipe.sampling != BY_ROWS or recipe.best_metric:
        return {}
    weights: Mapping[str, float] = Counter(record.task.name for path in recipe.train for record in read_records(path))
    if recipe.mixes_tasks:
        if set(recipe.mix) != set(weights):
            return {}
        weights = recipe.mix
    return {task: weight / sum(weights.values()) for task, weight in weights.items() if weight}


def _recipe_of(variant: Variant, recipe: Recipe, own: Settings, shares: Mapping[str, float]) -> Recipe:
    settings, share = {**variant.settings(recipe), **own}, 1.0
    if variant.only:
        if variant.only not in shares:
            raise ValueError(
                f"Variant {variant.name}: its share of the steps is not known. Allowed are a task of the data, and a "
                "recipe without best_metric whose batches are drawn by the tasks' rows or by a mix of tasks; known are "
                f"the shares of {sorted(shares)}."
            )
        if "mix" in own:
            raise ValueError(f"Variant {variant.name}: its mix is its task alone; got {own['mix']}, allowed is none.")
        settings["mix"], share = {task: float(task == variant.only) for task in shares}, shares[variant.only]
    changed = _replaced(recipe, settings)
    if recipe.max_steps and "max_steps" not in own:
        rows = share * recipe.max_steps * recipe.batch_size * recipe.accumulation
        changed = _replaced(changed, {"max_steps": max(1, round(rows / (changed.batch_size * changed.accumulation)))})
    elif "epochs" not in own:
        changed = _replaced(changed, {"epochs": share * changed.epochs})  # of a mix it is as long as all tasks together
    return changed


def _replaced(recipe: Recipe, settings: Settings) -> Recipe:
    return load_recipe(overrides={**dataclasses.asdict(recipe), **settings})


def _run(variant: Variant, recipes: Mapping[str, Recipe], seed: int) -> Run:
    recipe = recipes[variant.model_of or variant.name]
    runs = Path(recipe.output) / RUNS_FOLDER
    output = _folder(runs, variant.model_of or variant.name, seed)
    return Run(variant, _replaced(recipe, {"seed": seed, "output": str(output)}), _folder(runs, variant.name, seed))


def _folder(runs: Path, name: str, seed: int) -> Path:
    return runs / name / f"seed-{seed}"

"""Planning the runs of an ablation: which variant, by which recipe, in which folder.

1. Each variant and seed is a run, with a folder of its own: ``runs/<variant>/seed-<seed>``. A variant that changes the
   evaluation alone has no training: it takes the model that another run has left.
2. All variants have the same budget: the same rows. Where one changes the batch, ``max_steps`` changes with it; one for
   a single task has that task's share of the steps.
3. Whether a variant applies is known before anything is trained. By default those that do not are left out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sentence_vipyloqwen.ablation.variants import FULL, POOLING, SHORTEST, SIZE, VARIANTS, Variant, with_needed
from sentence_vipyloqwen.model import is_finished_model
from sentence_vipyloqwen.train.recipe import BY_ROWS, Recipe, load_recipe
from sentence_vipyloqwen.train.record_lines import read_records

RUNS_FOLDER = "runs"
SEEDS = 3
_PLACES = ("base", "train", "eval", "output", "vision_cache")
"""Settings that name files: results say what was in these, not where they lay."""

_NO_MATTER = ("resume", "workers", "logging_steps", "keep_checkpoints", "save_steps", "report_to", "ddp_timeout")
"""Settings that change nothing in the figures."""

_OF_A_MODEL = ("embedding_dim", "pooling", "max_seq_length", "min_pixels", "max_pixels")
"""Settings of a new model, which a finished one keeps."""

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
    tell: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """The runs of an ablation, in the order in which they are done.

    Whether a variant applies, `_recipe_of` says. One that is asked for, by its name or by settings of its own, must.

    Args:
        recipe: The reference; its ``seed`` is the first one, its ``output`` the folder of the whole ablation.
        names: Variants; by default all that apply to the recipe, its base and its data. The reference and what they
            are compared with come by themselves.
        seeds: How many.
        own: Variant -> settings that replace its own, such as a batch size that the machine can hold.
        tell: Called with a line for each variant that is left out, and why.

    Raises:
        ValueError: If a variant or a setting is unknown or out of range, a variant that is asked for does not apply, or
            there is nothing to evaluate on.
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
    needs_data = any(variant.about for variant in variants)
    rows = Counter(record.task.name for path in recipe.train for record in read_records(path)) if needs_data else {}
    changes_model = any(variant.family in (POOLING, SIZE) for variant in variants) or any(
        name in _OF_A_MODEL for settings in own.values() for name in settings
    )
    finished = changes_model and is_finished_model(recipe.base)
    recipes, unfit = _recipes_of(variants, recipe, own, rows, finished)
    asked = [variant.name for variant in with_needed(chosen or own)]
    if refused := [f"Variant {name} does not apply: {unfit[name]}" for name in asked if name in unfit]:
        raise ValueError("\n".join(refused))
    for name, reason in unfit.items():
        tell(f"{name} is left out: {reason}")
    applied = [variant for variant in variants if variant.name in recipes]
    return [_run(variant, recipes, seed) for seed in range(recipe.seed, recipe.seed + seeds) for variant in applied]


def _recipes_of(
    variants: Iterable[Variant], recipe: Recipe, own: Mapping[str, Settings], rows: Mapping[str, int], finished: bool
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """What each variant trains by, or its model was trained by; and of those that do not apply, why."""
    recipes: dict[str, Recipe] = {}
    unfit: dict[str, str] = {}
    for variant in variants:
        try:
            recipes[variant.name] = _recipe_of(variant, recipe, own.get(variant.name, {}), rows, finished, recipes)
        except ValueError as error:
            unfit[variant.name] = str(error)
    return recipes, unfit


def _recipe_of(
    variant: Variant,
    recipe: Recipe,
    own: Settings,
    rows: Mapping[str, int],
    finished: bool,
    others: Mapping[str, Recipe],
) -> Recipe:
    """The recipe of a variant.

    Raises:
        ValueError: If the variant does not apply:

            1. What it is compared with, or whose model it takes, does not apply.
            2. The data lacks the task that it is about.
            3. An embedding is too small to be cut, or its size is not known before a model is trained for others.
            4. Its settings are refused by the recipe (`_changed`, `Recipe`), or by a base that is a finished model.
            5. It is the same as what it is compared with.
    """
    for need, name in (("compared with", variant.against), ("given the model of", variant.model_of)):
        if name and name not in others:
            raise ValueError(f"it is {need} {name}, which does not apply.")  # 1
    if variant.about and variant.about not in rows:
        raise ValueError(f"the data has no {variant.about}; it has {sorted(rows)}.")  # 2
    if variant.family == SIZE and "matryoshka_dims" not in own:
        _check_size(recipe, known=not finished or variant.model_of is not None)  # 3
    if variant.model_of:
        same = variant.cut == 1 and set(variant.hidden_prefixes) <= set(recipe.hidden_prefixes)
        made = others[variant.model_of]
    else:
        made = _changed(variant, recipe, own, rows)
        _check_base(recipe, made, finished)  # 4
        same = variant.against is not None and made == others[variant.against]
    if same:
        raise ValueError(f"under this recipe it is the same as {variant.against} ({variant.change}).")  # 5
    return made


def _check_size(recipe: Recipe, known: bool) -> None:
    if recipe.embedding_dim is None and not known:
        raise ValueError("the size of a finished model's embeddings must be given as embedding_dim; got None.")
    if recipe.embedding_dim is not None and recipe.embedding_dim < SHORTEST:
        raise ValueError(f"embedding_dim is {recipe.embedding_dim}; allowed is at least {SHORTEST}.")


def _check_base(recipe: Recipe, made: Recipe, finished: bool) -> None:
    """A finished model keeps its pooling and its sizes, which the training would refuse to change."""
    for name in _OF_A_MODEL:
        if finished and getattr(made, name) != getattr(recipe, name):
            raise ValueError(f"{name} is {getattr(made, name)!r}; the base is a finished model, which keeps its own.")


def _shares(recipe: Recipe, rows: Mapping[str, int]) -> dict[str, float]:
    """Each task of the data, and its share of the rows that the reference sees.

    Empty where a model for one task would be no fair peer: where no mix of tasks tells its share, or where the best
    checkpoint is chosen, which all tasks have a say in.
    """
    if recipe.mixed_batches or recipe.sampling != BY_ROWS or recipe.best_metric:
        return {}
    weights: Mapping[str, float] = rows
    if recipe.mixes_tasks:
        if set(recipe.mix) != set(rows):
            return {}
        weights = recipe.mix
    return {task: weight / sum(weights.values()) for task, weight in weights.items() if weight}


def _changed(variant: Variant, recipe: Recipe, own: Settings, rows: Mapping[str, int]) -> Recipe:
    settings, share = {**variant.settings(recipe), **own}, 1.0
    if variant.only:
        shares = _shares(recipe, rows)
        if variant.only not in shares:
            raise ValueError(
                "its share of the steps is not known. Allowed are a task of the data, and a recipe without best_metric "
                "whose batches are drawn by the tasks' rows or by a mix of tasks; known are the shares of "
                f"{sorted(shares)}."
            )
        if (share := shares[variant.only]) == 1:
            raise ValueError("the reference trains on that task alone.")
        if "mix" in own:
            raise ValueError(f"its mix is its task alone; got {own['mix']}, allowed is none.")
        settings["mix"] = {task: float(task == variant.only) for task in rows}
    changed = _replaced(recipe, settings)
    if recipe.max_steps and "max_steps" not in own:
        seen = share * recipe.max_steps * recipe.batch_size * recipe.accumulation
        steps = max(1, round(seen / (changed.batch_size * changed.accumulation)))
        lines = max(1, round(recipe.logging_steps * steps / recipe.max_steps))  # so that a curve has as many points
        changed = _replaced(changed, {"max_steps": steps, "logging_steps": lines, **own})
    elif "epochs" not in own:
        changed = _replaced(changed, {"epochs": share * changed.epochs})  # of a mix it is as long as all tasks together
    return changed


def _replaced(recipe: Recipe, settings: Settings) -> Recipe:
    return load_recipe(overrides={**dataclasses.asdict(recipe), **settings})


def _run(variant: Variant, recipes: Mapping[str, Recipe], seed: int) -> Run:
    recipe = recipes[variant.name]
    runs = Path(recipe.output) / RUNS_FOLDER
    output = _folder(runs, variant.model_of or variant.name, seed)
    return Run(variant, _replaced(recipe, {"seed": seed, "output": str(output)}), _folder(runs, variant.name, seed))


def _folder(runs: Path, name: str, seed: int) -> Path:
    return runs / name / f"seed-{seed}"

"""The model card of a run: what the trainer told it, and the run's recipe, figures and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import yaml
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.util import get_world_size

from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.model_card import CARD_FILE, Figure, MixPhase, TrainingNotes, ViPyloQwenModelCardData
from sentence_vipyloqwen.train.evaluation import Evaluation, GroupResult, TaskResult, TasksEvaluator
from sentence_vipyloqwen.train.progress import LOG_FILE, read_log
from sentence_vipyloqwen.train.recipe import BY_ROWS, Recipe
from sentence_vipyloqwen.train.report import draw_curves
from sentence_vipyloqwen.train.sampling import MULTIMODAL, PROPORTIONAL, TEXT

_PATHS = ("base", "train", "eval", "vision_cache")


def write_model_card(
    card: ViPyloQwenModelCardData,
    model: ViPyloQwen,
    folder: Path,
    recipe: Recipe,
    *,
    evaluator: TasksEvaluator | None = None,
    before: Evaluation | None = None,
    after: Evaluation | None = None,
) -> None:
    """Write the card of a trained model into its folder, in place of the one that was saved with it.

    Args:
        card: What the trainer has told of the training.
        model: The trained model.
        folder: Its portable folder.
        recipe: The settings of the run.
        evaluator: What measured it.
        before: What the untrained model could do.
        after: What the trained model can do.
    """
    card.register_model(model)
    model.model_card_data = card
    if evaluator and after:
        steps = [entry["step"] for entry in read_log(Path(recipe.output) / LOG_FILE)]
        card.set_evaluation_metrics(evaluator, after.flat(), step=max(steps, default=0))
    mix = _mix(recipe, {split["name"]: split["size"] for split in card.train_datasets})
    card.set_notes(
        TrainingNotes(
            _publishable(recipe),
            figures=_figures(before, after) if after else (),
            sampling=_sampling(recipe),
            mix=mix,
            by_language=_figures_by_language(before, after) if after else (),
            evaluator=evaluator if after else None,
            evaluated=Path(recipe.eval).name if recipe.eval else "",
        )
    )
    card.curves = draw_curves(recipe.output)
    card.save_dir = str(folder)
    card.write_assets(folder)
    (folder / CARD_FILE).write_text(generate_model_card(model), encoding="utf-8")


def _figures(before: Evaluation | None, after: Evaluation) -> list[Figure]:
    earlier = before.tasks if before else {}
    return [_figure(task, result, earlier.get(task), result) for task, result in after.tasks.items()]


def _figures_by_language(before: Evaluation | None, after: Evaluation) -> list[Figure]:
    earlier = {task: result.lang for task, result in before.tasks.items()} if before else {}
    return [
        _figure(task, result, earlier.get(task, {}).get(language), part, language)
        for task, result in after.tasks.items()
        for language, part in result.lang.items()
    ]


def _figure(task: str, of: TaskResult, before: GroupResult | None, after: GroupResult, language: str = "") -> Figure:
    """The headline of a task, of all its queries or of those of a language."""
    was, now = (_defined(result.metrics[of.headline]) if result else None for result in (before, after))
    return Figure(task, of.headline, after.queries, was, now, candidates=of.candidates, language=language)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _sampling(recipe: Recipe) -> str:
    """How batches were drawn: what the tables of rows and shares leave open."""
    weight = "n" if recipe.mix_temperature == PROPORTIONAL else f"n ** {recipe.mix_temperature:g}"
    named = {*recipe.mix, *(name for phase in recipe.phases() for name in phase.mix)}
    if recipe.sampling != BY_ROWS:
        said = "Batches came in turn, one of each, until one had no more, however many rows each has."
    elif recipe.curriculum:
        said = "Batches were drawn by a curriculum: in each phase, up to a share of the run's steps, in these shares."
    elif recipe.mix:
        said = "Batches were drawn in these shares, however many rows each task has."
    elif recipe.mixes_tasks:
        said = f"Batches were drawn in these shares: a task of n batches weighs {weight}."
    else:
        said = "Batches were drawn in proportion to the rows."
    if named & {TEXT, MULTIMODAL}:
        groups = f"`{TEXT}` is every task without an image, `{MULTIMODAL}` every other"
        said += f"\n{groups}; within them, a task of n batches weighs {weight}."
    return said


def _mix(recipe: Recipe, rows: Mapping[str, int]) -> list[MixPhase]:
    """The shares that were in force; none where batches were drawn by rows.

    Args:
        recipe: The settings of the run.
        rows: Split -> how many it has.
    """
    if recipe.sampling != BY_ROWS:
        return [MixPhase(1.0, _shares(dict.fromkeys(rows, 1.0)))]
    if recipe.curriculum:
        return [MixPhase(phase.until, _shares(phase.mix)) for phase in recipe.phases()]
    if recipe.mix:
        return [MixPhase(1.0, _shares(recipe.mix))]
    if recipe.mixes_tasks:
        return [MixPhase(1.0, _shares(_tempered(recipe, rows)))]
    return []


def _tempered(recipe: Recipe, rows: Mapping[str, int]) -> dict[str, float]:
    """Task -> its weight by the number of its batches; of several processes none gets a batch that is not full."""
    round_ = math.floor if get_world_size() > 1 else math.ceil
    batches: dict[str, int] = {}
    for split, size in rows.items():
        task = split.partition(".")[0]
        batches[task] = batches.get(task, 0) + round_(size / recipe.batch_size)
    return {task: count**recipe.mix_temperature if count else 0.0 for task, count in batches.items()}


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _publishable(recipe: Recipe) -> str:
    """The recipe without where things stood on the machine that it ran on."""
    settings = yaml.safe_load(recipe.to_yaml())
    del settings["output"]
    for name in _PATHS:
        settings[name] = _names(settings[name])
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _names(value: str | list[str] | None) -> str | list[str] | None:
    if isinstance(value, list):
        return [Path(path).name for path in value]
    return Path(value).name if value and Path(value).exists() else value

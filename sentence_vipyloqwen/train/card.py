"""The model card of a run: what the trainer told it, and the run's recipe, figures and curves."""

from __future__ import annotations

from pathlib import Path

import yaml
from sentence_transformers.base.model_card import generate_model_card

from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.model_card import CARD_FILE, Figure, TrainingNotes, ViPyloQwenModelCardData
from sentence_vipyloqwen.train.evaluation import Evaluation, TasksEvaluator
from sentence_vipyloqwen.train.progress import LOG_FILE, read_log
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.report import draw_curves

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
    card.notes = TrainingNotes(_publishable(recipe), _figures(before, after) if after else ())
    card.curves = draw_curves(recipe.output)
    card.save_dir = str(folder)
    card.write_assets(folder)
    (folder / CARD_FILE).write_text(generate_model_card(model), encoding="utf-8")


def _figures(before: Evaluation | None, after: Evaluation) -> list[Figure]:
    earlier = before.tasks if before else {}
    return [
        Figure(
            task=name,
            metric=result.headline,
            queries=result.queries,
            before=earlier[name].metrics[result.headline] if name in earlier else None,
            after=result.metrics[result.headline],
        )
        for name, result in after.tasks.items()
    ]


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

"""Training: records, datasets, recipes, runs and evaluation."""

from __future__ import annotations

from sentence_vipyloqwen.train.dataset import load_tasks
from sentence_vipyloqwen.train.evaluation import Evaluation, TasksEvaluator, evaluate
from sentence_vipyloqwen.train.recipe import Recipe, load_recipe
from sentence_vipyloqwen.train.run import TrainingResult, train

__all__ = ["Evaluation", "Recipe", "TasksEvaluator", "TrainingResult", "evaluate", "load_recipe", "load_tasks", "train"]

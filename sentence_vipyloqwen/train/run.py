"""A whole training run from a recipe: data, model, stock trainer, evaluation, saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.model import ViPyloQwen, is_finished_model
from sentence_vipyloqwen.train.dataset import load_tasks
from sentence_vipyloqwen.train.evaluation import Evaluation, TasksEvaluator, evaluate
from sentence_vipyloqwen.train.progress import LOG_FILE, TrainingProgress
from sentence_vipyloqwen.train.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.json"
CHECKPOINTS = "checkpoints"
_MAY_DIFFER_ON_RESUME = {"resume", "workers", "logging_steps", "keep_checkpoints"}


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind.

    Attributes:
        model: The trained model.
        model_path: Its portable folder.
        before: Evaluation of the untrained model; ``None`` without an evaluation file, and for a resumed run.
        after: Evaluation of the trained model; ``None`` without an evaluation file.
    """

    model: ViPyloQwen
    model_path: Path
    before: Evaluation | None
    after: Evaluation | None


def train(recipe: Recipe, *, device: str | None = None) -> TrainingResult:
    """Run a recipe from data to saved model.

    The output folder receives ``recipe.yaml``, ``log.jsonl``, ``checkpoints/``, ``model/`` and ``metrics.json``.

    Args:
        recipe: The settings.
        device: ``"cpu"`` to stay off an accelerator; the best device at hand by default.

    Raises:
        RecordError: If a line of a data file is not a record.
        ValueError: If the output folder holds a run of other settings, or one that is not to be resumed.
    """
    output = Path(recipe.output)
    checkpoint = _find_checkpoint(recipe, output)
    # 1. Data and model.
    dataset = load_tasks(recipe.train)
    evaluator = TasksEvaluator(recipe.eval) if recipe.eval else None
    model = _make_model(recipe, device)
    freeze(model, recipe.frozen)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # 2. What the untrained model can do.
    before = evaluate(model, evaluator.records) if evaluator and not checkpoint else None
    # 3. The stock trainer.
    output.mkdir(parents=True, exist_ok=True)
    (output / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    trainer = SentenceTransformerTrainer(
        model,
        _training_arguments(recipe, output, device),
        train_dataset=dataset,
        loss=_make_loss(recipe, model),
        evaluator=evaluator if recipe.eval_steps else None,
        callbacks=[TrainingProgress(output / LOG_FILE)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    # 4. The portable folder and what the trained model can do.
    model_path = output / "model"
    model.save_pretrained(str(model_path))
    after = evaluate(model, evaluator.records) if evaluator else None
    _write_metrics(output / METRICS_FILE, before=before, after=after)
    return TrainingResult(model, model_path, before, after)


def _make_model(recipe: Recipe, device: str | None) -> ViPyloQwen:
    if is_finished_model(recipe.base):
        options = {"dtype": recipe.dtype, "attn_implementation": recipe.attn_implementation}
        return ViPyloQwen(
            recipe.base, device=device, model_kwargs={key: value for key, value in options.items() if value is not None}
        )
    return ViPyloQwen.create(
        recipe.base,
        recipe.embedding_dim,
        max_seq_length=recipe.max_seq_length,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        seed=recipe.seed,
        device=device,
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of the parameters whose names a regular expression finds.

    Raises:
        ValueError: If one of them finds none.
    """
    for pattern in patterns:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"Setting frozen: no parameter of the model has {pattern!r} in its name.")
        for parameter in found:
            parameter.requires_grad_(False)


def _make_loss(recipe: Recipe, model: ViPyloQwen) -> nn.Module:
    loss = PrefixRoutedLoss(
        model,
        temperature=recipe.temperature,
        weights=recipe.weights,
        margins=recipe.margins,
        negatives=recipe.negatives,
        pair_weight=recipe.pair_weight,
        triplet_scale=recipe.triplet_scale,
    )
    return MatryoshkaLoss(model, loss, list(recipe.matryoshka_dims)) if recipe.matryoshka_dims else loss


def _training_arguments(recipe: Recipe, output: Path, device: str | None) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        learning_rate_mapping=dict(recipe.learning_rates),
        adam_beta2=recipe.adam_beta2,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_ratio,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        multi_dataset_batch_sampler=recipe.sampling,
        eval_strategy="steps" if recipe.eval and recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps or None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        save_total_limit=recipe.keep_checkpoints,
        logging_steps=recipe.logging_steps,
        dataloader_num_workers=recipe.workers,
        seed=recipe.seed,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
    )


def _find_checkpoint(recipe: Recipe, output: Path) -> str | None:
    """The checkpoint to go on from; the output folder must then hold a run of the same settings."""
    folder = output / CHECKPOINTS
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None:
        return None
    if not recipe.resume:
        raise ValueError(
            f"{output} holds the checkpoints of an earlier run: resume it or choose another output folder."
        )
    earlier, now = yaml.safe_load((output / RECIPE_FILE).read_text(encoding="utf-8")), yaml.safe_load(recipe.to_yaml())
    if changed := sorted(key for key in now if now[key] != earlier.get(key) and key not in _MAY_DIFFER_ON_RESUME):
        changes = ", ".join(f"{key}: {earlier.get(key)!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"{output} holds a run of other settings ({changes}): give those again to resume it, "
            "or choose another output folder."
        )
    return checkpoint


def _write_metrics(path: Path, **evaluations: Evaluation | None) -> None:
    measured = {name: evaluation.to_dict() for name, evaluation in evaluations.items() if evaluation}
    if measured:
        path.write_text(json.dumps(measured, ensure_ascii=False, indent=2), encoding="utf-8")

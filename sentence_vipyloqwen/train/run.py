"""A whole training run from a recipe: data, model, stock trainer, evaluation, saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
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
from sentence_vipyloqwen.train.recipe import DTYPE, Recipe
from sentence_vipyloqwen.train.records import Record

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
    # 2. The stock trainer; it knows which of several processes writes.
    progress = TrainingProgress(output / LOG_FILE)
    trainer = SentenceTransformerTrainer(
        model,
        _training_arguments(recipe, output, device),
        train_dataset=dataset,
        loss=_make_loss(recipe, model),
        evaluator=evaluator if recipe.eval_steps else None,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    writes = trainer.is_world_process_zero()
    if writes:
        _start_output(recipe, output, anew=checkpoint is None)
    # 3. What the untrained model can do, and the training.
    records = evaluator.records if evaluator and writes else None
    before = _evaluate(recipe, model, records) if records and not checkpoint else None
    if before:
        _add_metrics(output / METRICS_FILE, before=before)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.stop()
    # 4. The portable folder and what the trained model can do.
    model_path = output / "model"
    if writes:
        model.save_pretrained(str(model_path))
    after = _evaluate(recipe, model, records) if records else None
    if after:
        _add_metrics(output / METRICS_FILE, after=after)
    return TrainingResult(model, model_path, before, after)


def _make_model(recipe: Recipe, device: str | None) -> ViPyloQwen:
    sizes = {name: getattr(recipe, name) for name in ("embedding_dim", "max_seq_length", "min_pixels", "max_pixels")}
    given = {name: value for name, value in sizes.items() if value is not None}
    options = {"dtype": recipe.dtype or DTYPE, "attn_implementation": recipe.attn_implementation}
    if not is_finished_model(recipe.base):
        return ViPyloQwen.create(recipe.base, **given, **options, seed=recipe.seed, device=device)
    model = ViPyloQwen(
        recipe.base, device=device, model_kwargs={key: value for key, value in options.items() if value is not None}
    )
    _check_sizes(given, model, recipe.base)
    return model


def _check_sizes(given: Mapping[str, int], model: ViPyloQwen, base: str) -> None:
    """A finished model keeps its sizes: refuse a setting that names another."""
    pixels = model[0].image_processor.size
    own = {
        "embedding_dim": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
    }
    for name, value in given.items():
        if value != own[name]:
            raise ValueError(f"Setting {name} is {value}; the finished model {base!r} has {own[name]} and keeps it.")


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
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
    )


def _find_checkpoint(recipe: Recipe, output: Path) -> str | None:
    """The checkpoint to go on from; an output folder that holds a run must hold one of the same settings."""
    folder = output / CHECKPOINTS
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None and not (output / RECIPE_FILE).exists():
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


def _start_output(recipe: Recipe, output: Path, *, anew: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
    if anew:
        for name in (LOG_FILE, METRICS_FILE):
            (output / name).unlink(missing_ok=True)


def _evaluate(recipe: Recipe, model: ViPyloQwen, records: Sequence[Record]) -> Evaluation:
    """Compute as in training: FlashAttention 2 takes no float32."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):
        return evaluate(model, records)


def _add_metrics(path: Path, **evaluations: Evaluation) -> None:
    """Add to what the file holds: a resumed run keeps the figures from before its first step."""
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured |= {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    path.write_text(json.dumps(measured, ensure_ascii=False, indent=2, allow_nan=False), encoding="utf-8")

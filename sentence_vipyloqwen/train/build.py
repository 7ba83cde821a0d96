"""From a recipe to the parts of a run: model, loss, training arguments, trackers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from sentence_vipyloqwen.losses import CachedPrefixRoutedLoss, PrefixRoutedLoss
from sentence_vipyloqwen.model import ViPyloQwen, is_finished_model
from sentence_vipyloqwen.modules import AttentionPooling, MeanPooling
from sentence_vipyloqwen.modules.attention_pooling import ATTENTION
from sentence_vipyloqwen.modules.vision_cache import VisionCache
from sentence_vipyloqwen.train.adapters import AdapterTrainer, add_lora, four_bits, save_base
from sentence_vipyloqwen.train.evaluation import Evaluation
from sentence_vipyloqwen.train.recipe import AUTO, BY_ROWS, DTYPE, FULL, MEAN, QLORA, Recipe
from sentence_vipyloqwen.train.sampling import grouped_batch_sampler, task_mix_sampler
from sentence_vipyloqwen.train.trainer import ViPyloQwenTrainer

CHECKPOINTS = "checkpoints"
BASE = "base"
TENSORBOARD, NONE = "tensorboard", "none"

# --- The model ---


def make_model(
    recipe: Recipe, arguments: SentenceTransformerTrainingArguments, output: Path, device: str | None
) -> ViPyloQwen:
    """The model that a recipe begins with, with its adapter and its frozen parts.

    An adapter's folder names its base, so a new model that is to have one is saved first, to ``base/`` in the output.

    Raises:
        ValueError: If a finished model has other sizes than the recipe, nothing in it bears a name to be frozen, or a
            vision tower that is trained is to have its output cached.
    """
    if recipe.tuning == FULL:
        model = _whole_model(recipe, device)
    else:
        with arguments.main_process_first(local=False, desc="saving the base of the adapter"):
            base = recipe.base if is_finished_model(recipe.base) else _saved_base(recipe, output / BASE)
        extra = four_bits(arguments.device) if recipe.tuning == QLORA else {}
        model = ViPyloQwen(base, device=device, model_kwargs={**model_options(recipe), **extra})
        _check_own(recipe, model)
        add_lora(
            model,
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            targets=recipe.lora_targets,
            seed=recipe.seed,
        )
    late = recipe.in_parts or recipe.vision_cache is not None
    model[0].lazy_images = late if recipe.lazy_images is None else recipe.lazy_images
    freeze(model, recipe.frozen)
    if recipe.vision_cache is not None:
        model[0].vision_cache = _open_vision_cache(model, recipe.vision_cache)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _open_vision_cache(model: ViPyloQwen, folder: str) -> VisionCache:
    if not model[0].packed:
        attention = model[0].model.config._attn_implementation
        raise ValueError(f"Setting vision_cache needs packed batches; attn_implementation is {attention!r}.")
    transformer = model[0]
    return VisionCache.of(transformer.model.visual, transformer.image_processor, folder, transformer.jpeg_draft)


def _whole_model(recipe: Recipe, device: str | None) -> ViPyloQwen:
    if is_finished_model(recipe.base):
        model = ViPyloQwen(recipe.base, device=device, model_kwargs=model_options(recipe))
        _check_own(recipe, model)
        return model
    options = {**_given_sizes(recipe), **model_options(recipe)}
    model = ViPyloQwen.create(recipe.base, **options, seed=recipe.seed, device=device)
    if recipe.pooling:
        model[1] = _make_pooling(recipe.pooling, model[1].embedding_dimension).to(model.device, model.dtype)
    return model


def _make_pooling(name: str, width: int) -> nn.Module:
    return AttentionPooling(width) if name == ATTENTION else MeanPooling(width, name)


def _saved_base(recipe: Recipe, folder: Path) -> str:
    folder = folder.absolute()
    if not folder.exists():
        save_base(_whole_model(recipe, "cpu"), folder)
    return str(folder)


def model_options(recipe: Recipe) -> dict[str, Any]:
    """What ``from_pretrained`` is told of the weights."""
    options = {"dtype": recipe.dtype or DTYPE, "attn_implementation": recipe.attn_implementation}
    return {name: value for name, value in options.items() if value is not None}


def _given_sizes(recipe: Recipe) -> dict[str, int]:
    sizes = {name: getattr(recipe, name) for name in ("embedding_dim", "max_seq_length", "min_pixels", "max_pixels")}
    return {name: value for name, value in sizes.items() if value is not None}


def _check_own(recipe: Recipe, model: ViPyloQwen) -> None:
    """A finished model keeps its sizes and its pooling: refuse a setting that names another."""
    given = {**_given_sizes(recipe), **({"pooling": recipe.pooling} if recipe.pooling else {})}
    pixels = model[0].image_processor.size
    own = {
        "embedding_dim": model.get_embedding_dimension(),
        "pooling": model[1].pooling_mode,
        "max_seq_length": model.max_seq_length,
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
    }
    for name, value in given.items():
        if value != own[name]:
            raise ValueError(
                f"Setting {name} is {value}; the finished model {recipe.base!r} has {own[name]} and keeps it."
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


# --- The loss ---


def make_loss(recipe: Recipe, model: ViPyloQwen) -> nn.Module:
    """The prefix-routed loss; computed in parts where the recipe says how large they are."""
    options = {
        "temperature": recipe.temperature,
        "weights": recipe.weights,
        "margins": recipe.margins,
        "negatives": recipe.negatives,
        "pair_weight": recipe.pair_weight,
        "triplet_scale": recipe.triplet_scale,
        "hidden_prefixes": recipe.hidden_prefixes,
        "gather_across_devices": recipe.gather_negatives,
    }
    parts = {"mini_batch_size": recipe.loss_mini_batch_size, "mini_batch_num_tokens": recipe.loss_mini_batch_tokens}
    given = {name: value for name, value in parts.items() if value}
    loss = CachedPrefixRoutedLoss(model, **given, **options) if given else PrefixRoutedLoss(model, **options)
    return MatryoshkaLoss(model, loss, list(recipe.matryoshka_dims)) if recipe.matryoshka_dims else loss


# --- The trainer ---


def make_arguments(recipe: Recipe, output: Path, device: str | None) -> SentenceTransformerTrainingArguments:
    """The recipe in the stock trainer's terms.

    Its own rotation of checkpoints and its trackers are off: `checkpoints` keeps count, and the run adds trackers after
    the progress, whose rates they are to see.
    """
    saves = bool(recipe.save_steps or recipe.best_metric)
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
        **_samplers(recipe),
        eval_strategy="steps" if recipe.eval and recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps or None,
        metric_for_best_model=metric_name(recipe.best_metric) if recipe.best_metric else None,
        greater_is_better=True if recipe.best_metric else None,
        save_strategy="steps" if saves else "no",
        save_steps=recipe.save_steps or recipe.eval_steps or 500,
        save_total_limit=None,
        restore_callback_states_from_checkpoint=True,
        logging_steps=recipe.logging_steps,
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=recipe.workers > 0,  # a fork among gloo's threads may hang: one, not one an epoch
        ddp_timeout=recipe.ddp_timeout,
        ddp_find_unused_parameters=False,  # the vision tower runs in every forward pass
        ddp_broadcast_buffers=False,  # there are none that change
        seed=recipe.seed,
        report_to="none",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        disable_tqdm=True,
    )


def _samplers(recipe: Recipe) -> dict[str, Any]:
    """This package's samplers of rows, which go on anywhere on any number of ranks; round robin deals their batches."""
    mixes = recipe.sampling == BY_ROWS
    mix = task_mix_sampler(recipe.mix or None, recipe.mix_temperature, recipe.phases()) if mixes else recipe.sampling
    return {
        "batch_sampler": grouped_batch_sampler(recipe.group_images, recipe.no_duplicates),
        "multi_dataset_batch_sampler": mix,
    }


def trainer_class(recipe: Recipe, arguments: SentenceTransformerTrainingArguments) -> type[SentenceTransformerTrainer]:
    """The stock trainer, or the child of it that an adapter or several processes need."""
    if recipe.tuning != FULL:
        return AdapterTrainer
    return ViPyloQwenTrainer if arguments.world_size > 1 else SentenceTransformerTrainer


def metric_name(best_metric: str) -> str:
    """A recipe's name of a metric in the evaluator's terms.

    >>> metric_name("ocr/recall@1"), metric_name("mean")
    ('ocr_recall@1', 'tasks_mean')
    """
    return "tasks_mean" if best_metric == MEAN else best_metric.replace("/", "_", 1)


def check_best_metric(recipe: Recipe, evaluation: Evaluation) -> None:
    """Refuse a metric that the held-out records do not give, before hours have passed.

    Raises:
        ValueError: If the evaluation of the untrained model lacks it.
    """
    measured = [f"{task}/{metric}" for task, result in evaluation.tasks.items() for metric in result.metrics]
    if recipe.best_metric not in (None, MEAN, *measured):
        raise ValueError(
            f"Setting best_metric is {recipe.best_metric!r}; the records of {recipe.eval} give {[MEAN, *measured]}."
        )


def make_trackers(names: Sequence[str], output: Path) -> list[TrainerCallback]:
    """Trackers by name, TensorBoard's writing to the output folder.

    Raises:
        ValueError: If transformers knows no such tracker.
        ImportError: If one asked for by name is not installed.
    """
    available = get_available_reporting_integrations()
    wanted = [TENSORBOARD] if tuple(names) == (AUTO,) and TENSORBOARD in available else []
    wanted += [name for name in names if name not in (AUTO, NONE)]
    classes = get_reporting_integration_callbacks(wanted)
    if missing := [name for name in wanted if name not in available]:
        raise ImportError(f"Setting report_to names {missing}, not installed; install with: pip install {missing[0]}")
    trackers = [kind() for kind in classes]
    for name, tracker in zip(wanted, trackers, strict=True):
        if name == TENSORBOARD and tracker.logging_dir is None:
            tracker.logging_dir = str(output / TENSORBOARD)
    return trackers

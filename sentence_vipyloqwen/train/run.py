"""A whole training run from a recipe: data, model, trainer, evaluation, saved model, page."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.util.distributed import distributed_evaluation
from torch import distributed
from transformers import PrinterCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINING_ARGS_NAME

from sentence_vipyloqwen.files import measure, replacing
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.modules.sharding import is_sharded
from sentence_vipyloqwen.train.adapters import merge_adapter
from sentence_vipyloqwen.train.batches import STOPPED_FOLDER, BatchWatch, StopOnNonFinite
from sentence_vipyloqwen.train.build import (
    CHECKPOINTS,
    check_best_metric,
    make_arguments,
    make_loss,
    make_model,
    make_trackers,
    model_options,
    trainer_class,
)
from sentence_vipyloqwen.train.card import write_model_card
from sentence_vipyloqwen.train.checkpoints import (
    CheckpointKeeper,
    EarlyStopping,
    best_of,
    clean,
    complete_checkpoints,
    has_ended,
    step_of,
)
from sentence_vipyloqwen.train.dataset import load_tasks
from sentence_vipyloqwen.train.evaluation import Evaluation, TasksEvaluator, evaluate
from sentence_vipyloqwen.train.interruption import ProcessLost, StopOnSignal, TrainingInterrupted, explaining
from sentence_vipyloqwen.train.memory import MemoryAdvice
from sentence_vipyloqwen.train.progress import LOG_FILE, TrainingProgress, trim_log
from sentence_vipyloqwen.train.recipe import FULL, QLORA, Recipe, load_recipe
from sentence_vipyloqwen.train.report import write_training_report
from sentence_vipyloqwen.train.sampling import SamplingCallback, mixed_splits
from sentence_vipyloqwen.train.task_losses import TaskLosses

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
DATA_FILE = "data.json"
"""What a run began with: hashes of its data files, and the number of its processes."""

METRICS_FILE = "metrics.json"
MODEL, ADAPTER = "model", "adapter"
_MAY_DIFFER_ON_RESUME = {"resume", "workers", "logging_steps", "keep_checkpoints", "report_to", "merge", "ddp_timeout"}
# A vision cache may not: features differ by rounding with the batch they were computed in.


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind.

    Attributes:
        model: The trained model; of the best checkpoint, where the recipe has a metric for it.
        model_path: Its portable folder.
        before: Evaluation of the untrained model; ``None`` without an evaluation file, and for a resumed run. Of
            several processes the first one has it, as it has the other.
        after: Evaluation of the trained model; ``None`` without an evaluation file.
    """

    model: ViPyloQwen
    model_path: Path
    before: Evaluation | None
    after: Evaluation | None


def train(recipe: Recipe, *, device: str | None = None) -> TrainingResult:
    """Run a recipe from data to saved model, or go on with a run that ended early.

    The output folder receives ``recipe.yaml``, ``log.jsonl``, ``checkpoints/``, ``model/``, ``metrics.json`` and
    ``training.html``; with an adapter also ``adapter/`` and, for a new model, its ``base/``.

    Whatever ended a run, the same call goes on from its last complete checkpoint and ends with the same weights.
    SIGTERM and SIGINT end the run after the step under way, with a checkpoint, and after the evaluation due there.

    Args:
        recipe: The settings.
        device: ``"cpu"`` to stay off an accelerator; the best device at hand by default.

    Raises:
        RecordError: If a line of a data file is not a record.
        ValueError: If the output folder holds a run of other settings, or one that is not to be resumed.
        TrainingInterrupted: If a signal ended the run; its ``exit_code`` is the shell's.
        NonFiniteStep: If the loss or the gradients of a step were NaN or infinite; the batch is in ``stopped/``.
        OutOfMemory: If memory does not suffice for a step; the message names its batch and what to change.
        OSError: If the disk is full; what was complete is intact.
    """
    output = Path(recipe.output)
    arguments = make_arguments(recipe, output, device)
    files = _DataFiles(recipe.train)
    checkpoint = _find_checkpoint(recipe, output, files, arguments.world_size)
    # 1. Data and model.
    dataset = load_tasks(recipe.train, on_error=recipe.on_error, show_progress_bar=True)
    options = {"dims": recipe.matryoshka_dims, "hidden_prefixes": recipe.hidden_prefixes}
    evaluator = TasksEvaluator(recipe.eval, **options) if recipe.eval else None
    model = make_model(recipe, arguments, output, device)
    # 2. The trainer; it knows which of several processes writes.
    parts = _make_parts(recipe, arguments, model, dataset, evaluator)
    writes = parts.trainer.is_world_process_zero()
    PartialState().wait_for_everyone()  # all have looked at the folder
    if writes:
        _start_output(recipe, output, checkpoint, files, arguments.world_size)
    # 3. What the untrained model can do, and the training.
    before = _evaluate(recipe, model, evaluator) if evaluator and not checkpoint else None
    if before:
        _add_metrics(output / METRICS_FILE, before=before)
    try:
        if checkpoint is None or not has_ended(checkpoint):
            _train(parts, checkpoint)
        elif not recipe.best_metric:
            parts.trainer._load_from_checkpoint(str(checkpoint))  # the seam of `_load_best`
    finally:
        parts.progress.stop()
        parts.watch.close()
        _close_vision_cache(model)
        if writes:
            _report(output)
    # 4. The portable folder and what the trained model can do.
    if recipe.best_metric:
        _load_best(parts.trainer)
    with explaining(output):
        model_path = _save(recipe, parts.trainer, output)
    PartialState().wait_for_everyone()  # the folder is whole
    # What is measured is what the folder holds: whole weights, and floats where the adapter was trained on 4 bits.
    loads = is_sharded(model) or recipe.tuning == QLORA
    trained = ViPyloQwen(model_path, device=device) if loads else model
    after = _evaluate(recipe, trained, evaluator) if evaluator else None
    if after:
        _add_metrics(output / METRICS_FILE, after=after)
        _report(output)
    if writes:
        figures = {"evaluator": evaluator, "before": before, "after": after}
        write_model_card(model.model_card_data, trained, model_path, recipe, **figures)
    atexit.register(_leave_group)
    return TrainingResult(trained, model_path, before, after)


def _leave_group() -> None:
    """Processes of a group that is never left may wait for each other when they end."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@dataclass(frozen=True)
class _Parts:
    """The trainer, and those of its callbacks that the run itself speaks to."""

    trainer: SentenceTransformerTrainer
    progress: TrainingProgress
    watch: BatchWatch
    stop: StopOnSignal
    memory: MemoryAdvice


def _make_parts(
    recipe: Recipe,
    arguments: SentenceTransformerTrainingArguments,
    model: ViPyloQwen,
    dataset: DatasetDict,
    evaluator: TasksEvaluator | None,
) -> _Parts:
    output = Path(recipe.output)
    loss = make_loss(recipe, model)
    watch, stop, memory = BatchWatch(loss), StopOnSignal(), MemoryAdvice(loss, recipe)
    progress = TrainingProgress(output / LOG_FILE, watch=watch)
    finite = StopOnNonFinite(watch, output / STOPPED_FOLDER, model.tokenizer)
    early = [EarlyStopping(recipe.patience)] if recipe.patience else []
    trackers = make_trackers(recipe.report_to, output)
    trainer = trainer_class(recipe, arguments)(
        model,
        arguments,
        train_dataset=mixed_splits(dataset) if recipe.mixed_batches else dataset,
        loss=loss,
        evaluator=evaluator if recipe.eval_steps else None,
        # In this order: losses and progress count what `finite` lets go of, and trackers see what these two add.
        callbacks=[
            SamplingCallback(),
            TaskLosses(watch, ControlTokens.of(model.tokenizer)),
            progress,
            finite,
            CheckpointKeeper(recipe.keep_checkpoints),
            stop,
            memory,
            *early,
            *trackers,
        ],
    )
    if recipe.vision_cache is not None and (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
        raise ValueError(
            f"Setting vision_cache is {recipe.vision_cache!r}; allowed is none under full sharding, where processes "
            "gather the vision tower's weights together. Replicate the model (accelerate launch --multi_gpu)."
        )
    trainer.remove_callback(PrinterCallback)
    finite.trainer = trainer
    return _Parts(trainer, progress, watch, stop, memory)


def _train(parts: _Parts, checkpoint: Path | None) -> None:
    trainer, stop = parts.trainer, parts.stop
    folder = Path(trainer.args.output_dir)
    try:
        with stop.listening(), explaining(folder), parts.memory.explaining():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if trainer.is_world_process_zero():
            clean(folder)  # half a checkpoint takes room, and is of no use
        if not stop.received or isinstance(error, ProcessLost):
            raise
        raise TrainingInterrupted(f"Signal {stop.received}. {_way_on(folder)} ({error})", stop.received) from error
    if stop.received:
        raise TrainingInterrupted(f"Signal {stop.received}. {_way_on(folder)}", stop.received)


def _way_on(folder: Path) -> str:
    checkpoints = complete_checkpoints(folder)
    if not checkpoints:
        return "There is no checkpoint yet: the same command begins anew."
    return f"Step {step_of(checkpoints[-1])} is saved in {checkpoints[-1]}: the same command goes on from there."


def _close_vision_cache(model: ViPyloQwen) -> None:
    """What follows the training sees each image but once."""
    if cache := model[0].vision_cache:
        model[0].vision_cache = None
        cache.close()


def _load_best(trainer: SentenceTransformerTrainer) -> None:
    """Give the trained model the weights of the best checkpoint."""
    last = complete_checkpoints(Path(trainer.args.output_dir))[-1]
    # A private seam, held by a test of the best checkpoint. The trainer's own way, `_load_best_model`, calls the same,
    # whatever the sharding or the adapter, but only logs what fails.
    if best := best_of(last):
        trainer._load_from_checkpoint(str(best))


# --- What is written ---


def _save(recipe: Recipe, trainer: SentenceTransformerTrainer, output: Path) -> Path:
    """Save the model, all ranks together where each has a part of it; with an adapter also, or only, the adapter."""
    merges = recipe.tuning != FULL and recipe.merge
    with _replacing(output / (ADAPTER if merges else MODEL), trainer.is_world_process_zero()) as draft:
        if is_sharded(trainer.model):
            trainer.save_model(str(draft))
            (draft / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
        elif trainer.is_world_process_zero():
            trainer.model.save_pretrained(str(draft))
    if merges and trainer.is_world_process_zero():
        with _replacing(output / MODEL) as draft:
            merge_adapter(output / ADAPTER, draft, model_options(recipe))
    return output / MODEL


@contextmanager
def _replacing(folder: Path, writes: bool = True) -> Iterator[Path]:
    """A folder to write to, which takes the place of another once it is whole."""
    draft = folder.with_name(f".{folder.name}.new")
    if writes:
        shutil.rmtree(draft, ignore_errors=True)
    yield draft
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def _report(output: Path) -> None:
    """Write the page; a disk too full for it must not hide how the training ended."""
    try:
        write_training_report(output)
    except OSError as error:
        logger.warning("No page of the training was written: %s", error)


def _find_checkpoint(recipe: Recipe, output: Path, files: _DataFiles, processes: int) -> Path | None:
    """The checkpoint to go on from; an output folder that holds a run must hold one of the same settings."""
    checkpoints = complete_checkpoints(output / CHECKPOINTS)
    if not (output / RECIPE_FILE).exists() and not any((output / CHECKPOINTS).glob("*")):
        return None
    if not recipe.resume:
        raise ValueError(
            f"{output} holds the checkpoints of an earlier run: resume it or choose another output folder."
        )
    if not (output / RECIPE_FILE).exists():
        raise ValueError(f"{output / CHECKPOINTS} holds checkpoints of something else: choose another output folder.")
    earlier, now = (_settings_of(of) for of in (load_recipe(output / RECIPE_FILE), recipe))
    if changed := sorted(key for key in now if now[key] != earlier[key] and key not in _MAY_DIFFER_ON_RESUME):
        changes = ", ".join(f"{key}: {earlier[key]!r} -> {now[key]!r}" for key in changed)
        raise ValueError(
            f"{output} holds a run of other settings ({changes}): give those again to resume it, "
            "or choose another output folder."
        )
    _check_origin(output, files, processes if checkpoints else None)
    return checkpoints[-1] if checkpoints else None


def _check_origin(output: Path, files: _DataFiles, processes: int | None) -> None:
    """Records, and the number of processes if it matters, must be those that the run began with."""
    origin = _read_origin(output)
    if origin is None:
        logger.warning(
            "The run in %s began without hashes of its records, as runs of an earlier version did: it is not checked "
            "whether %s are those it began with. If they are not, stop it and choose another output folder.",
            output,
            ", ".join(files.paths),
        )
        return
    if changed := [path for path, digest in files.digests.items() if digest not in origin["digests"]]:
        raise ValueError(
            f"The records of {', '.join(changed)} are not those that the run in {output} began with: it cannot go on "
            "with them: restore them, or choose another output folder."
        )
    began = origin.get("processes", processes)
    if processes is not None and began != processes:
        raise ValueError(
            f"The run in {output} began with {began} process(es); got {processes}. Each keeps its own random numbers, "
            f"and its part of the batches: go on with {began}, or choose another output folder."
        )


def _read_origin(output: Path) -> dict[str, Any] | None:
    """What a run began with; ``None`` of a run that did not write it down."""
    path = output / DATA_FILE
    if not path.exists():
        return None
    origin = json.loads(path.read_text(encoding="utf-8"))
    return origin if isinstance(origin, dict) else {"digests": origin}  # an earlier version wrote a list of these alone


@dataclass(frozen=True)
class _DataFiles:
    """The files of the records. They are hashed once, when that is asked for: gigabytes take a while."""

    paths: tuple[str, ...]

    @cached_property
    def digests(self) -> dict[str, str]:
        """Each of them, and a hash of its content."""
        return {path: measure(Path(path))["xxh3_128"] for path in self.paths}


def _settings_of(recipe: Recipe) -> dict[str, Any]:
    """Its settings as plain data; a path is the same however it is written."""
    settings = yaml.safe_load(recipe.to_yaml())
    settings["output"] = None  # it is where it was found
    for name in ("eval", "base"):
        if settings[name] and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    settings["train"] = [str(Path(path).resolve()) for path in settings["train"]]
    return settings


def _start_output(recipe: Recipe, output: Path, checkpoint: Path | None, files: _DataFiles, processes: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    origin = {"digests": list(files.digests.values()), "processes": processes}
    _write(output / DATA_FILE, json.dumps(origin))
    _write(output / RECIPE_FILE, recipe.to_yaml())
    clean(output / CHECKPOINTS)
    if checkpoint:
        trim_log(output / LOG_FILE, step_of(checkpoint))
    else:
        for name in (LOG_FILE, METRICS_FILE):
            (output / name).unlink(missing_ok=True)


def _evaluate(recipe: Recipe, model: ViPyloQwen, evaluator: TasksEvaluator) -> Evaluation | None:
    """What a model can do. All processes embed, so each must call it with a whole model; the first one gets it.

    It computes as in training: FlashAttention 2 takes no float32.
    """
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16)
    with autocast, distributed_evaluation(model) as measures:
        if not measures:
            return None
        evaluation = evaluate(model, evaluator.records, dims=evaluator.dims)
        check_best_metric(recipe, evaluation)
        return evaluation


def _add_metrics(path: Path, **evaluations: Evaluation) -> None:
    """Add to what the file holds: a resumed run keeps the figures from before its first step."""
    measured: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = {**measured, **{name: evaluation.to_dict() for name, evaluation in evaluations.items()}}
    _write(path, json.dumps(measured, ensure_ascii=False, indent=2, allow_nan=False))


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")

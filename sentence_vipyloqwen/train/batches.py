"""What passes through the loss: the batches of the step under way, seen by torch's forward hooks.

No trainer is overridden for it: a hook on the loss sees the features of every batch of a step, and what became of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.modules.closed_images import CLOSED_IMAGES, ROW_INDEX
from sentence_vipyloqwen.modules.images import describe
from sentence_vipyloqwen.train.interruption import any_rank

Features = Mapping[str, Any]

STOPPED_FOLDER = "stopped"
ROWS_FILE = "rows.json"


class NonFiniteStep(RuntimeError):
    """The loss or the gradients of a step are NaN or infinite."""


@dataclass(frozen=True)
class SeenBatch:
    """A batch and its loss.

    Attributes:
        columns: The features of anchors, positives and negatives.
        labels: (B,) scores, if the batch has some.
        loss: Its loss: term name -> scalar.
    """

    columns: Sequence[Features]
    labels: Tensor | None
    loss: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.columns[0]["input_ids"])

    def tokens(self) -> Tensor:
        """() int64: tokens of all columns, image tokens among them, padding not."""
        return torch.stack([features["attention_mask"].sum() for features in self.columns]).sum()

    def is_finite(self) -> Tensor:
        """() bool: whether every term is a number."""
        return torch.stack([value.detach().isfinite().all() for value in self.loss.values()]).all()


class BatchWatch:
    """Holds the batches of the optimiser step under way.

    The trainer holds them itself until the step is done; they are let go of when the next one begins.

    Args:
        loss: The loss that is trained; its forward passes are watched.
    """

    def __init__(self, loss: nn.Module) -> None:
        self.batches: list[SeenBatch] = []
        self._columns: list[Features] = []
        self._hooks = [loss.register_forward_pre_hook(self._before), loss.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # A copy of each mapping: the model adds its outputs to it, and with them the graph would be kept.
        self._columns = [dict(features) for features in arguments[0]]

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], loss: Any) -> None:
        columns, self._columns = self._columns, []
        if not torch.is_grad_enabled():
            return
        terms = loss if isinstance(loss, Mapping) else {"loss": loss}
        detached = {name: value.detach() for name, value in terms.items()}
        self.batches.append(SeenBatch(columns, (*arguments, None)[1], detached))

    def forget(self) -> None:
        """Let go of the batches."""
        self.batches.clear()

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self.forget()


class StopOnNonFinite(TrainerCallback):
    """Stops before an optimiser step whose loss or gradients are not numbers: the weights are still good then.

    Writes to ``folder``: ``model/`` with the weights of the last good step, and for each rank and batch of the bad step
    its features as safetensors (``anchor.input_ids``, ``positive.pixel_values``, ...) beside ``rows.json``: the terms
    of the loss and each row's text.

    Args:
        watch: Sees the batches.
        folder: Where the evidence goes; made when there is some.
        tokenizer: Turns tokens into the texts of ``rows.json``.
    """

    def __init__(self, watch: BatchWatch, folder: Path, tokenizer: Any) -> None:
        self.watch, self.folder, self.tokenizer = watch, folder, tokenizer
        self.trainer: Trainer | None = None  # it knows how to save what is sharded; set when it is made

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check; on every rank, since one rank's NaN is soon everyone's.

        Raises:
            NonFiniteStep: If one is not a number; the message says where the evidence lies.
        """
        losses = all(bool(batch.is_finite()) for batch in self.watch.batches)
        if not any_rank(not (losses and self._gradients_are_finite(model))):
            return
        step = state.global_step + 1
        folder = self.folder / f"step-{step}"
        for number, batch in enumerate(self.watch.batches):
            save_batch(batch, folder / f"rank-{args.process_index}-batch-{number}", self.tokenizer)
        if self.trainer is not None:
            self.trainer.save_model(str(folder / "model"))
        what = "gradient" if losses else "loss"
        raise NonFiniteStep(
            f"the {what} of step {step} is NaN or infinite, so the step was not taken. The batch is in {folder}, the "
            f"weights of step {state.global_step} in {folder / 'model'}. Where the batch is sound, a lower "
            "learning_rate, a longer warm-up or a lower max_grad_norm helps most, in another output folder."
        )

    def _gradients_are_finite(self, model: nn.Module) -> bool:
        """DeepSpeed has let go of the gradients by now, and left out the step itself if their norm was no number."""
        if engine := getattr(self.trainer, "deepspeed", None):
            return math.isfinite(engine.get_global_grad_norm())
        return gradients_are_finite(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let go of the batches of a good step."""
        self.watch.forget()


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether no gradient of a model, of its own shard where it is sharded, holds NaN or infinity."""
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    local = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    # The largest magnitude of all, since a sum may overflow, and each answer asks the accelerator to wait.
    return bool(nn.utils.get_total_norm([part for part in local if part.numel()], math.inf).isfinite())


def save_batch(batch: SeenBatch, folder: Path, tokenizer: Any) -> None:
    """Write a batch: its tensors as safetensors, what a person wants to read of it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{column}.{name}": value.detach().cpu().contiguous().clone()
        for column, features in zip(_column_names(batch), batch.columns, strict=True)
        for name, value in features.items()
        if isinstance(value, Tensor)
    }
    if batch.labels is not None:
        tensors["labels"] = batch.labels.detach().cpu().contiguous().clone()
    save_file(tensors, folder / "features.safetensors")
    rows = {"loss": {name: repr(float(value)) for name, value in batch.loss.items()}, "rows": _texts(batch, tokenizer)}
    (folder / ROWS_FILE).write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def _texts(batch: SeenBatch, tokenizer: Any) -> list[dict[str, Any]]:
    """Each row's text by column: prefix and words, images as their place-holders; and images that are still closed."""
    columns: dict[str, list[Any]] = {
        name: tokenizer.batch_decode([row[keep.bool()] for row, keep in zip(ids, mask, strict=True)])
        for name, ids, mask in (
            (name, features["input_ids"], features["attention_mask"])
            for name, features in zip(_column_names(batch), batch.columns, strict=True)
        )
    }
    for name, features in zip(list(columns), batch.columns, strict=True):
        if CLOSED_IMAGES in features:
            rows = features[CLOSED_IMAGES].at(features[ROW_INDEX])
            columns[f"{name}.images"] = [[describe(source) for source in row.sources] for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _column_names(batch: SeenBatch) -> list[str]:
    negatives = [f"negative_{number}" for number in range(1, len(batch.columns) - 1)]
    return ["anchor", "positive", *negatives][: len(batch.columns)]

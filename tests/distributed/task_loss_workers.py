"""What the ranks of `test_task_losses.py` do: log the losses of their own batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rank_workers import batch, load
from torch import distributed
from transformers import TrainerControl, TrainerState

from sentence_vipyloqwen import PrefixRoutedLoss
from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.train.batches import BatchWatch
from sentence_vipyloqwen.train.task_losses import TaskLosses


def logged(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The entry after a step, and the rank's own terms; rank 1 has a row of the other's task as well."""
    model, rank = load(folder, packed=True), distributed.get_rank()
    columns = batch(rank) if rank else [column[:2] for column in batch(rank)]
    if rank:
        columns = [[*column[:2], text] for column, text in zip(columns, ("<instr> dịch", "x", "y"), strict=True)]
    loss = PrefixRoutedLoss(model)
    watch = BatchWatch(loss)
    losses = TaskLosses(watch, ControlTokens.of(model.tokenizer))
    terms = loss([model.preprocess(column) for column in columns])
    losses.on_step_end(None, TrainerState(), TrainerControl())
    logs: dict[str, Any] = {"loss": 1.0}
    losses.on_log(SimpleNamespace(), TrainerState(), TrainerControl(), logs)
    return logs, {name: value.item() for name, value in terms.items()}

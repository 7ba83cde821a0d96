"""What is logged of a task is the mean over its own rows, however few of the rows they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.batches import BatchWatch
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train
from sentence_vipyloqwen.train.task_losses import TaskLosses

STATE, CONTROL = TrainerState(), TrainerControl()


def logged(model: ViPyloQwen, loss: torch.nn.Module, batches: list[list[list[str]]]) -> dict[str, Any]:
    """The entry of a step over some batches."""
    watch = BatchWatch(loss)
    losses = TaskLosses(watch, ControlTokens.of(model.tokenizer))
    losses.on_train_begin(None, STATE, CONTROL)
    shares = [loss([model.preprocess(column) for column in columns]) for columns in batches]
    losses.on_step_end(None, STATE, CONTROL)
    watch.close()
    logs = {"loss": 1.0, **{name: shares[0][name].item() for name in shares[0]}}
    losses.on_log(SimpleNamespace(), STATE, CONTROL, logs)
    return logs


RARE = [["<instr> a b", "<instr> c", "<instr> d e f", "<instr> g", "<ocr> h"], ["u v", "w", "x", "y z", "t"]]
FEW = [["<instr> i", "<instr> j k"], ["p", "q r"]]


@pytest.mark.parametrize("kind", [PrefixRoutedLoss, CachedPrefixRoutedLoss])
def test_a_rare_task_is_told_by_its_own_rows(model: ViPyloQwen, kind: type) -> None:
    logs = logged(model, kind(model, negatives="all"), [RARE, FEW])
    terms = [PrefixRoutedLoss(model, negatives="all")([model.preprocess(c) for c in batch]) for batch in (RARE, FEW)]
    assert logs["ocr/rows"] == 1
    assert logs["ocr/info_nce"] == pytest.approx(5 * terms[0]["ocr/info_nce"].item(), abs=1e-5)
    assert logs["instr/rows"] == 6
    for name in ("instr/info_nce", "instr/cosine"):
        assert logs[name] == pytest.approx((5 * terms[0][name] + 2 * terms[1][name]).item() / 6, abs=1e-5)
    assert logs["ocr/loss"] == pytest.approx(logs["ocr/info_nce"] + logs["ocr/triplet"], abs=2e-6)
    assert {name.partition("/")[0] for name in logs if "/" in name} == {"ocr", "instr"}  # no entry without rows
    assert logs["loss"] == 1.0


def test_an_entry_begins_where_the_one_before_ended(model: ViPyloQwen) -> None:
    loss = PrefixRoutedLoss(model)
    watch = BatchWatch(loss)
    losses = TaskLosses(watch, ControlTokens.of(model.tokenizer))
    for rows in (2, 1):
        watch.forget()
        loss([model.preprocess(column[:rows]) for column in FEW])
        losses.on_step_end(None, STATE, CONTROL)
        logs: dict[str, Any] = {"loss": 1.0}
        losses.on_log(SimpleNamespace(), STATE, CONTROL, logs)
        assert logs["instr/rows"] == rows
    unchanged: dict[str, Any] = {"eval_tasks_mean": 0.5}
    losses.on_log(SimpleNamespace(), STATE, CONTROL, unchanged)
    assert unchanged == {"eval_tasks_mean": 0.5}


def test_another_loss_is_logged_as_it_was(model: ViPyloQwen) -> None:
    class Plain(torch.nn.Module):
        def forward(self, features: Any, labels: Any = None) -> torch.Tensor:
            return model(features[0])["sentence_embedding"].sum()

    watch = BatchWatch(loss := Plain())
    losses = TaskLosses(watch, ControlTokens.of(model.tokenizer))
    loss([model.preprocess(column) for column in FEW])
    losses.on_step_end(None, STATE, CONTROL)
    logs: dict[str, Any] = {"loss": 1.0}
    losses.on_log(SimpleNamespace(), STATE, CONTROL, logs)
    assert logs == {"loss": 1.0}


@pytest.mark.parametrize("settings", [{}, {"loss_mini_batch_size": 1}, {"matryoshka_dims": [16, 8]}])
def test_the_log_of_a_run_tells_the_loss_by_task(
    recipe: Callable[..., Recipe], data: Path, settings: dict[str, Any]
) -> None:
    """Means and row counts of the tasks give the loss of all rows back."""
    train(recipe(max_steps=6, logging_steps=3, accumulation=2, **settings), device="cpu")
    log = [json.loads(line) for line in (data / "run" / "log.jsonl").read_text().splitlines()]
    entries = [entry for entry in log if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        tasks = {name.partition("/")[0] for name in entry if "/" in name}
        assert tasks < set(ALL_TASKS)
        rows = {task: entry[f"{task}/rows"] for task in tasks}
        assert sum(rows.values()) == 3 * 2 * 2
        mean = sum(rows[task] * entry[f"{task}/loss"] for task in tasks) / sum(rows.values())
        assert mean == pytest.approx(entry["loss"], abs=1e-4)
    told = (data / "run" / "training.html").read_text(encoding="utf-8")
    assert "Means over the task" in told

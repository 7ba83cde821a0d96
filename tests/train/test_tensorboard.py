"""A training leaves event files that TensorBoard itself reads: the loss, and each task's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train


def test_tensorboard_reads_what_the_log_says(recipe: Callable[..., Recipe], data: Path) -> None:
    train(recipe(eval=str(data / "train.jsonl"), eval_steps=3, logging_steps=2), device="cpu")
    events = EventAccumulator(str(data / "run" / "tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (data / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    tasks = {name for entry in losses for name in entry if name.endswith("/loss")}
    assert len(losses) == 3
    assert tasks
    for name in ("loss", "rows_per_second", *tasks):
        found = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in losses if name in entry]
    measured = [entry["eval_tasks_mean"] for entry in log if "eval_tasks_mean" in entry]
    assert [scalar.value for scalar in events.Scalars("eval/tasks_mean")] == pytest.approx(measured)

from __future__ import annotations

import errno
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState

from sentence_vipyloqwen.train.batches import SeenBatch
from sentence_vipyloqwen.train.progress import TrainingProgress, read_log, trim_log


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def batch(rows: int, tokens: int) -> SeenBatch:
    """An anchor and a positive column, each of so many rows of so many tokens, one more row position being padding."""
    mask = torch.ones(rows, tokens + 1, dtype=torch.int64)
    mask[:, -1] = 0
    column = {"input_ids": mask, "attention_mask": mask}
    return SeenBatch([column, column], None, {"loss": torch.tensor(1.0)})


def log(progress: TrainingProgress, state: TrainerState, ranks: int = 1, **logs: Any) -> dict[str, Any]:
    progress.on_log(SimpleNamespace(world_size=ranks), state, TrainerControl(), logs)
    return read_log(progress.log_path)[-1]


def test_rates_count_steps_and_leave_evaluations_out(tmp_path: Path) -> None:
    clock, watch = Clock(), SimpleNamespace(batches=[batch(4, 10)])
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(quiet=True), watch, clock)
    state = TrainerState(is_world_process_zero=True, max_steps=9)
    progress.on_train_begin(None, state, None)
    for step in (1, 2):  # two steps of 2 s; an evaluation of 100 s after the second
        control = TrainerControl(should_evaluate=step == 2)
        progress.on_step_begin(None, state, control)
        clock.now += 2
        state.global_step = step
        progress.on_step_end(None, state, control)
    entry = log(progress, state, loss=1.5)
    assert (entry["rows_per_second"], entry["tokens_per_second"]) == (2.0, 2 * 2 * 4 * 10 / 4)
    clock.now += 100
    progress.on_step_begin(None, state, TrainerControl())
    clock.now += 1
    progress.on_step_end(None, state, TrainerControl())
    assert log(progress, state, ranks=4, loss=1.0)["rows_per_second"] == 16.0
    clock.now += 1
    assert "rows_per_second" not in log(progress, state, loss=1.0)  # nothing was done since
    assert "memory_gb" not in log(progress, state, eval_tasks_mean=0.5)


def test_a_rank_that_writes_no_log_keeps_no_counts(tmp_path: Path) -> None:
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(quiet=True), SimpleNamespace(batches=[batch(4, 10)]))
    state = TrainerState(is_world_process_zero=False, max_steps=9)
    progress.on_train_begin(None, state, None)
    progress.on_step_begin(None, state, TrainerControl())
    progress.on_step_end(None, state, TrainerControl())
    assert (progress.rates.rows, progress.rates.tokens) == (0, [])


def test_memory_is_the_most_that_was_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(quiet=True))
    state = TrainerState(is_world_process_zero=True, max_steps=1)
    progress.on_train_begin(None, state, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    used = psutil.Process().memory_info().rss / 1e9
    held = b"\1" * 400_000_000
    del held  # what was used once counts
    most = log(progress, state, loss=1.0)["memory_gb"]
    assert used + 0.39 <= most <= psutil.virtual_memory().total / 1e9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_500_000_000)
    assert log(progress, state, loss=1.0)["memory_gb"] == 3.5


def test_trackers_after_it_see_the_rates(tmp_path: Path) -> None:
    watch = SimpleNamespace(batches=[batch(4, 10)])
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(quiet=True), watch)
    state, logs = TrainerState(is_world_process_zero=True, max_steps=1), {"loss": 1.0}
    progress.on_train_begin(None, state, None)
    progress.on_step_begin(None, state, TrainerControl())
    progress.on_step_end(None, state, TrainerControl())
    progress.on_log(SimpleNamespace(world_size=1), state, TrainerControl(), logs)
    assert {"rows_per_second", "tokens_per_second", "memory_gb"} <= set(logs)


@pytest.mark.parametrize("terminal", [True, False])
def test_rates_stand_beside_the_bar_or_at_the_end_of_the_line(tmp_path: Path, terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200)
    progress = TrainingProgress(tmp_path / "log.jsonl", console, SimpleNamespace(batches=[batch(4, 10)]))
    state = TrainerState(is_world_process_zero=True, max_steps=7)
    progress.on_train_begin(None, state, None)
    progress.on_step_begin(None, state, TrainerControl())
    progress.on_step_end(None, state, TrainerControl())
    log(progress, state, loss=1.5, **{"ocr/loss": 1.5})
    log(progress, state, eval_tasks_mean=0.25)
    told = str(progress.bar.tasks[0].description)
    progress.stop()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())  # without colours
    assert "loss 1.500  ocr 1.500" in lines
    assert "evaluation: mean 0.250" in lines
    assert ("rows/s" in told and "loss 1.500" in told) is terminal
    if not terminal:
        assert "rows/s" in lines


def test_a_log_is_cut_to_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    trim_log(path, 4)
    assert read_log(path) == []
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "lo')
    assert [entry["step"] for entry in read_log(path)] == [2, 4, 6]
    trim_log(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_a_disk_too_full_to_cut_a_log_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(whole := "".join(json.dumps({"step": step}) + "\n" for step in range(9)))

    def fill(draft: Path, text: str, **kwargs: Any) -> None:
        with draft.open("w") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left"):
        trim_log(path, 4)
    assert path.read_text() == whole and list(tmp_path.iterdir()) == [path]

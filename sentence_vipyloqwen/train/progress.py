"""What a person sees while a model trains, and the log that stays."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG_FILE = "log.jsonl"


class TrainingProgress(TrainerCallback):
    """A progress bar, a line on screen for each entry of the log, and every entry in a JSONL file.

    Args:
        log_path: The file, one JSON object a line: ``step``, ``loss``, each term's share of it, ``learning_rate``, ...
        console: Where the bar and the lines go; standard error by default.
    """

    def __init__(self, log_path: Path, console: Console | None = None) -> None:
        self.log_path = log_path
        self.console = console or Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(TextColumn("Training"), *columns, console=self.console, transient=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        if state.is_world_process_zero:
            self.row = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            if self.console.is_terminal:
                self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self.bar.update(self.row, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the losses and keep the entry."""
        if not state.is_world_process_zero or not logs:
            return
        with self.log_path.open("a", encoding="utf-8") as file:
            entry = {"step": state.global_step, **{name: _finite(value) for name, value in logs.items()}}
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        if "loss" in logs:
            self.bar.console.print(
                f"step {state.global_step:>6}/{state.max_steps}  {describe_losses(logs)}", soft_wrap=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.stop()

    def stop(self) -> None:
        """Stop the bar, if it runs; for a training that raised, which ends without ``on_train_end``."""
        if self.bar.live.is_started:
            self.bar.stop()


def _finite(value: Any) -> Any:
    """The value, or ``None`` for NaN and infinity, which JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_losses(logs: Mapping[str, Any]) -> str:
    """The loss and each task's share of it in one line.

    >>> describe_losses({"loss": 2.0, "ocr/info_nce": 1.0, "ocr/triplet": 0.5, "instr/cosine": 0.5, "instr/x": 0.0})
    'loss 2.000  ocr 1.500  instr 0.500'
    """
    shares: dict[str, float] = defaultdict(float)
    for name, value in logs.items():
        task, slash, _ = name.partition("/")
        if slash:
            shares[task] += float(value)
    parts = [f"{task} {share:.3f}" for task, share in shares.items() if share]
    return "  ".join([f"loss {float(logs['loss']):.3f}", *parts])

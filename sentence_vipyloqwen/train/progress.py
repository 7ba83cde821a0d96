"""What a person sees while a model trains, and the log that stays."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.train.batches import BatchWatch
from sentence_vipyloqwen.train.task_losses import LOSS

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
ROWS_RATE, TOKENS_RATE, MEMORY = "rows_per_second", "tokens_per_second", "memory_gb"


class TrainingProgress(TrainerCallback):
    """A progress bar, a line on screen for each entry of the log, and every entry in a JSONL file.

    To each entry with a loss it adds ``rows_per_second`` and ``tokens_per_second`` since the entry before (all columns'
    tokens, images included; this rank's times the ranks; evaluations and checkpoints left out) and ``memory_gb``, the
    most that this process has used so far: of the accelerator, or without one its resident memory. Trackers that come
    after it in the trainer's list of callbacks see them too.

    Args:
        log_path: The file, one JSON object a line: ``step``, ``loss``, ``ocr/loss`` and other means by task, ...
        console: Where the bar and the lines go; standard error by default.
        watch: Sees the batches; no rates without it.
        clock: Seconds.
    """

    def __init__(
        self,
        log_path: Path,
        console: Console | None = None,
        watch: BatchWatch | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.log_path = log_path
        self.console = console or Console(stderr=True)
        self.rates = _Rates(watch, clock)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        told = TextColumn("{task.description}", style="dim")
        self.bar = Progress(TextColumn("Training"), *columns, told, console=self.console, transient=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        if state.is_world_process_zero:
            self.row = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            if self.console.is_terminal:
                self.bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, where it stands."""
        self.rates.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step's rows and tokens, and move the bar; the rank that writes the log alone does."""
        if not state.is_world_process_zero:
            return
        self.rates.count()
        if control.should_evaluate or control.should_save:
            self.rates.pause()
        self.bar.update(self.row, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the losses and keep the entry."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            logs.update(self.rates.take(args.world_size if args else 1))
            logs[MEMORY] = round(memory_gigabytes(), 3)
        with self.log_path.open("a", encoding="utf-8") as file:
            entry = {"step": state.global_step, **{name: _finite(value) for name, value in logs.items()}}
            file.write(json.dumps(entry, allow_nan=False) + "\n")
        if "loss" in logs:
            beside_bar = f"loss {float(logs['loss']):.3f}  {describe_rates(logs)}"
            self._tell(f"step {state.global_step:>6}/{state.max_steps}  {describe_losses(logs)}", beside_bar)
        elif measured := describe_metrics(logs):
            self._tell(f"step {state.global_step:>6}/{state.max_steps}  {measured}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.stop()

    def stop(self) -> None:
        """Stop the bar, if it runs; for a training that raised, which ends without ``on_train_end``."""
        if self.bar.live.is_started:
            self.bar.stop()

    def _tell(self, line: str, rates: str | None = None) -> None:
        """A line that stays; the rates beside the bar where there is one, else at the end of the line."""
        if rates and self.bar.live.is_started:
            self.bar.update(self.row, description=rates)
        elif rates:
            line = f"{line}  {rates}"
        self.bar.console.print(line, soft_wrap=True)


class _Rates:
    """Rows and tokens since the last entry of the log, and the time that the steps took."""

    def __init__(self, watch: BatchWatch | None, clock: Callable[[], float]) -> None:
        self.watch, self.clock = watch, clock
        self.begun: float | None = None
        self.seconds, self.rows = 0.0, 0
        self.tokens: list[torch.Tensor] = []  # read when a rate is asked for: an accelerator need not wait before

    def start(self) -> None:
        if self.begun is None:
            self.begun = self.clock()

    def pause(self) -> None:
        if self.begun is not None:
            self.seconds, self.begun = self.seconds + self.clock() - self.begun, None

    def count(self) -> None:
        for batch in self.watch.batches if self.watch else ():
            self.rows += batch.rows
            self.tokens.append(batch.tokens())

    def take(self, ranks: int) -> dict[str, float]:
        """The rates since the last call, of all ranks."""
        running = self.begun is not None
        self.pause()
        seconds, rows, tokens = self.seconds, self.rows, sum(int(count) for count in self.tokens)
        self.seconds, self.rows, self.tokens = 0.0, 0, []
        if running:
            self.start()
        if not rows or not seconds:
            return {}
        return {ROWS_RATE: round(ranks * rows / seconds, 2), TOKENS_RATE: round(ranks * tokens / seconds, 1)}


def memory_gigabytes() -> float:
    """The most memory that this process has used so far, in 1e9 bytes: of the accelerator, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, kibibytes elsewhere
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; none where there is no file. A last line that a kill cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            logger.warning("%s: left out a line that is not JSON.", path)
    return entries


def trim_log(path: Path, step: int) -> None:
    """Drop the entries after a step: a run resumed there writes them anew."""
    if path.exists():
        kept = [json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= step]
        with replacing(path) as draft:
            draft.write_text("".join(kept), encoding="utf-8")


def _finite(value: Any) -> Any:
    """The value, or ``None`` for NaN and infinity, which JSON has not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_losses(logs: Mapping[str, Any]) -> str:
    """The loss, and each task's mean over its own rows, in one line.

    >>> describe_losses({"loss": 2.0, "ocr/loss": 1.5, "ocr/triplet": 0.5, "ocr/rows": 8, "instr/loss": 3.0})
    'loss 2.000  ocr 1.500  instr 3.000'
    """
    parts = [f"{task} {value:.3f}" for task, value in losses_by_task(logs).items()]
    return "  ".join([f"loss {float(logs['loss']):.3f}", *parts])


def losses_by_task(logs: Mapping[str, Any]) -> dict[str, float]:
    """Each task's mean loss over its own rows, of the tasks that have some.

    >>> losses_by_task({"loss": 2.0, "ocr/loss": 1.5, "ocr/triplet": 0.5, "ocr/rows": 8})
    {'ocr': 1.5}
    """
    suffix = f"/{LOSS}"
    named = {name: value for name, value in logs.items() if name.endswith(suffix) and value is not None}
    return {name.removesuffix(suffix): float(value) for name, value in named.items()}


def describe_rates(logs: Mapping[str, Any]) -> str:
    """Rates and memory in one line, as far as they are known.

    >>> describe_rates({"rows_per_second": 12.34, "tokens_per_second": 5678.9, "memory_gb": 1.5})
    '12.3 rows/s  5,679 tokens/s  1.5 GB'
    """
    parts = ((ROWS_RATE, ",.1f", "rows/s"), (TOKENS_RATE, ",.0f", "tokens/s"), (MEMORY, ".1f", "GB"))
    return "  ".join(f"{logs[name]:{form}} {unit}" for name, form, unit in parts if name in logs)


def describe_metrics(logs: Mapping[str, Any]) -> str:
    """What an evaluation measured, in one line: the mean of the tasks.

    >>> describe_metrics({"eval_tasks_mean": 0.5, "eval_ocr_recall@1": 0.25})
    'evaluation: mean 0.500'
    """
    return f"evaluation: mean {logs['eval_tasks_mean']:.3f}" if "eval_tasks_mean" in logs else ""

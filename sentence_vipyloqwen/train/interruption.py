"""Ends of a training that is not over: a signal that asks for one, a disk that is full, a process that is lost."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.errors import first_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)
WORKER_GRACE = 60
"""Seconds that a process which prepares batches goes on after SIGTERM, so that the step under way can end."""

_FULL_DISK = ("No space left on device", "StorageFull", "Disk quota exceeded", "QuotaExceeded")
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "Timed out waiting")
_CUT_SHORT = ("PytorchStreamWriter failed writing", "unexpected pos")
"""What torch says where a file could not be written to its end: it swallows the number of the error."""


class TrainingInterrupted(RuntimeError):
    """A signal ended a training; a complete checkpoint is there unless the message says otherwise.

    Attributes:
        exit_code: What a shell expects of a process that this signal ended: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ProcessLost(RuntimeError):
    """Another process of a distributed training ended, and this one cannot go on alone."""


class StopOnSignal(TrainerCallback):
    """Has a signal end the training after the step under way, with a checkpoint.

    The loss of the steps since the last entry of the log is logged, and an evaluation that is due there is made first:
    the best checkpoint and the curves are those of an undisturbed run.
    Signals are heard within :meth:`listening` alone. SIGINT after the first ends the process at once; SIGTERM does not,
    as a scheduler's reaches a rank twice, once by way of the launcher. Ranks ask each other after each step, so that a
    signal to one of them stops all, at the same step.

    Attributes:
        received: The number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM and SIGINT for a while. Outside the main thread Python allows no handlers: nothing changes.

        Where another process is lost, SIGTERM is not heeded any more: the launcher sends it to those that are left, at
        any moment, and would cut off what this one has to say. It is about to end anyhow.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:  # a worker, forked with this handler; a shell or scheduler signals the whole group
                _outlive_the_step(number)
                return
            self.received = self.received or number
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        for number in SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        except ProcessLost:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        except BaseException:
            restore()
            raise
        restore()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a signal came during the step."""
        self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if a signal came during the evaluation, which may last longer than a step."""
        self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        if any_rank(bool(self.received)):
            self.received = self.received or signal.SIGTERM
            control.should_log = control.should_save = control.should_training_stop = True


def _outlive_the_step(number: int) -> None:
    if number == signal.SIGTERM:
        signal.alarm(WORKER_GRACE)


def any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank; every rank must ask."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    return bool(gather(torch.tensor([flag], device=state.device)).any())


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turn the many shapes of a full disk, and of a lost process, into one error each that says what to do.

    Args:
        folder: What was being written to.

    Raises:
        OSError: With ``errno.ENOSPC``, if the block fails for want of space.
        ProcessLost: If the block fails for want of an answer from another process.
    """
    try:
        yield
    except Exception as error:
        if is_process_lost(error):
            raise ProcessLost(
                "another process of this training ended, and this one with it. Its own message, above, says why; where "
                "it has none, it was killed, as by a lack of memory. The same command goes on from the last complete "
                f"checkpoint in {folder}. ({first_line(error)})"
            ) from error
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full or its quota used up, {folder} takes no more ({error}). The checkpoints that were "
            "complete are intact: make room and run the same command, and the training goes on from the last of them. "
            "(keep_checkpoints says how many are kept; one more is on the disk while it is written.)",
        ) from error


def is_process_lost(error: BaseException) -> bool:
    """Whether an error came of another process that answers no more."""
    known = getattr(torch.distributed, "DistError", ())  # torch built without distributed has none
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST))


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that caused it, came of a full disk or an exhausted quota."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(seen) for words in (*_FULL_DISK, *_CUT_SHORT)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False

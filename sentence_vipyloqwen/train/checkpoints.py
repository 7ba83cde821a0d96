"""Checkpoints that are whole or do not count.

The trainer writes ``checkpoint-N`` file by file; a kill may end that anywhere. So, at public seams of transformers
alone (the trainer's own rotation is off, its callback ``on_save`` comes after its last file):

1. When every rank has written its files, they are flushed to the disk.
2. ``complete.json``, which lists every file with its size, is written beside its place and moved there: from then on
   the checkpoint is complete. A folder without it, or whose files differ from it, is never resumed nor counted.
3. Only then are the oldest checkpoints beyond the number to be kept deleted, ``complete.json`` first.
4. The next run deletes what a kill left half-written.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sentence_vipyloqwen.files import replacing, sync

logger = logging.getLogger(__name__)

MARKER = "complete.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the one of the fewest steps first; none where there is no folder."""
    return [path for path in _checkpoints(folder) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: it has ``complete.json``, and every file that it lists."""
    try:
        sizes: Mapping[str, int] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps done at a checkpoint.

    >>> step_of(Path("run/checkpoints/checkpoint-1500"))
    1500
    """
    match = _NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete; its files are on the disk before."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in [*files, *(folder for folder in checkpoint.rglob("*") if folder.is_dir())]:
        sync(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    with replacing(checkpoint / MARKER) as draft:
        draft.write_text(json.dumps({"step": step_of(checkpoint), "files": sizes}, indent=1), encoding="utf-8")


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill meanwhile leaves an incomplete one, not a complete one that lacks files."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def clean(folder: Path) -> list[Path]:
    """Delete the incomplete checkpoints of a folder; each is named in the log. Returns what was deleted."""
    debris = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in debris:
        logger.warning("Deleting %s: it was not written to its end.", path)
        delete(path)
    return debris


def rotate(folder: Path, keep: int, best: Path | None = None) -> None:
    """Delete the oldest complete checkpoints beyond ``keep``, the best one and the last one excepted."""
    checkpoints = complete_checkpoints(folder)
    protected = {checkpoints[-1].name, best.name if best else None} if checkpoints else set()
    spare = [path for path in checkpoints if path.name not in protected]
    for path in spare[: max(0, len(checkpoints) - max(keep, len(checkpoints) - len(spare)))]:
        delete(path)


class CheckpointKeeper(TrainerCallback):
    """Seals what the trainer saved, and keeps the newest few and the best.

    With a metric for the best model, every evaluation that is the best so far is followed by a checkpoint, whatever
    the steps between checkpoints. Every rank must have this callback: the first one waits for the others' files.

    Args:
        keep: How many checkpoints are kept, the best one among them.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Ask for a checkpoint where the evaluation is the best so far."""
        if args.metric_for_best_model is None:
            return
        value = (metrics or {}).get(f"eval_{args.metric_for_best_model}")
        if value is not None and (state.best_metric is None or value > state.best_metric):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written, then delete what is beyond the number to keep."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        seal(folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        rotate(folder, self.keep, Path(state.best_model_checkpoint) if state.best_model_checkpoint else None)


class EarlyStopping(EarlyStoppingCallback):
    """Ends the training after ``early_stopping_patience`` evaluations without a better one, with a checkpoint."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe has been checked, and :func:`~sentence_vipyloqwen.train.run.train` loads the best."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count, and where the patience ends, save and stop."""
        super().on_evaluate(args, state, control, **kwargs)
        control.should_save |= control.should_training_stop


def has_ended(checkpoint: Path) -> bool:
    """Whether the run that wrote a checkpoint had no step left to take; the trainer would take one more."""
    state = _state(checkpoint)
    return state["global_step"] >= state["max_steps"] or stopped_early(checkpoint)


def stopped_early(checkpoint: Path) -> bool:
    """Whether the run that wrote a checkpoint ended there for want of patience."""
    state = _state(checkpoint)["stateful_callbacks"].get(EarlyStopping.__name__)
    if state is None:
        return False
    return bool(
        state["attributes"]["early_stopping_patience_counter"] >= state["args"]["early_stopping_patience"],
    )


def best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint as of another; beside it, wherever the folder was moved. None without a best metric."""
    best = _state(checkpoint)["best_model_checkpoint"]
    return checkpoint.parent / Path(best).name if best else None


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return state


def _checkpoints(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if path.is_dir() and _NAME.fullmatch(path.name)), key=step_of)

"""The check of a whole file of records: good lines counted by task, bad ones named, and either written if asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.record_lines import RecordError, StrPath, check_records, image_root, report_line

MAX_ERRORS_KEPT = 1000
"""How many messages a `ValidationReport` holds; errors beyond are counted only."""


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found.

    Attributes:
        path: The file.
        records: How many good records it has.
        tasks: Good records by task, in the order of the task table.
        error_count: How many lines are bad.
        errors: The messages of the first `MAX_ERRORS_KEPT` bad lines.
    """

    path: str
    records: int
    tasks: dict[str, int]
    error_count: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the file can be trained on as it is: at least one record and no bad line."""
        return self.records > 0 and self.error_count == 0


def validate(
    path: StrPath,
    *,
    decode_images: bool = False,
    write_good: StrPath | None = None,
    write_report: StrPath | None = None,
    show_progress_bar: bool = False,
) -> ValidationReport:
    """Check every line of a file, images included: each must exist and have a readable header.

    Args:
        path: The file of records.
        decode_images: Decode every image to its end, as training does: slower by far, and the only way to find one
            that was cut off.
        write_good: Where to write the good lines, byte for byte, atomically. It must be another file in the same
            folder, as image paths are relative to the file.
        write_report: Where to write all bad lines as JSON, one a line: ``file``, ``line``, ``reason``, and for a broken
            image ``image`` and the record's ``id``; atomically. Another file than the others.
        show_progress_bar: Show the progress through the file on standard error.

    Returns:
        Counts by task, and every bad line up to `MAX_ERRORS_KEPT`.

    Raises:
        ValueError: If `write_good` is the file itself or lies in another folder, or `write_report` is one of the two.
    """
    _check_targets(path, write_good, write_report)
    counts: Counter[str] = Counter()
    errors: list[str] = []
    error_count = 0
    with written(write_good) as good, written(write_report) as report:
        for checked in check_records(path, decode_images=decode_images, show_progress_bar=show_progress_bar):
            if isinstance(checked.outcome, RecordError):
                error_count += 1
                report.write(report_line(checked.outcome))
                if len(errors) < MAX_ERRORS_KEPT:
                    errors.append(str(checked.outcome))
            else:
                counts[checked.outcome.task.name] += 1
                good.write(checked.line if checked.line.endswith(b"\n") else checked.line + b"\n")
    tasks = {name: counts[name] for name in ALL_TASKS if counts[name]}
    return ValidationReport(os.fspath(path), counts.total(), tasks, error_count, tuple(errors))


@contextmanager
def written(path: StrPath | None) -> Iterator[BinaryIO]:
    """A file to write to, moved to its place on success only; the null device where none is wanted."""
    if path is None:
        with open(os.devnull, "wb") as file:
            yield file
        return
    with replacing(Path(path)) as draft, draft.open("wb") as file:
        yield file


def _check_targets(path: StrPath, write_good: StrPath | None, write_report: StrPath | None) -> None:
    taken = [os.path.realpath(path)]
    if write_good is not None:
        if image_root(write_good) != image_root(path) or os.path.realpath(write_good) in taken:
            raise ValueError(
                f"write_good: got {os.fspath(write_good)}; allowed: another file in {image_root(path)}, "
                "since image paths are relative to the file"
            )
        taken.append(os.path.realpath(write_good))
    if write_report is not None and os.path.realpath(write_report) in taken:
        raise ValueError(f"write_report: got {os.fspath(write_report)}; allowed: another file than {', '.join(taken)}")

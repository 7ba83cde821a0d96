"""Files of records, line by line: each line is a record, or an error that names ``file:line``.

`read_records` opens no image and stops at the first fault. `check_records` looks at images, too, and goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rich.console import Console
from rich.progress import Progress

from sentence_vipyloqwen.modules.images import describe, image_size, open_image
from sentence_vipyloqwen.train.records import Record, parse_record

LINES_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 24
"""Lines whose images are looked at together; either bound ends them, so that data URIs do not fill the memory."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors put it first."""

StrPath: TypeAlias = str | os.PathLike[str]


class RecordError(ValueError):
    """A line that is not a training record; the message reads ``file:line: what came, what is allowed``.

    Attributes:
        path: The file, as the caller named it.
        line: The line's number, from 1.
        reason: The message without file and line.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(path, line, reason)
        self.path, self.line, self.reason = path, line, reason

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """The error as a line of a report.

        >>> RecordError("train.jsonl", 3, "not JSON").as_dict()
        {'file': 'train.jsonl', 'line': 3, 'reason': 'not JSON'}
        """
        return {"file": self.path, "line": self.line, "reason": self.reason}


class ImageError(RecordError):
    """A line that is a training record, but for an image that cannot be opened.

    Attributes:
        image: The image's absolute path, or its data URI cut short.
        id: The record's own name, if it has one.
    """

    def __init__(self, path: str, line: int, reason: str, image: str, id: str | None = None) -> None:
        super().__init__(path, line, reason)
        self.args = (path, line, reason, image, id)  # what it is made of again after pickling
        self.image, self.id = image, id

    def as_dict(self) -> dict[str, Any]:
        """The error as a line of a report, with the image and, if it has one, the record's ``id``."""
        name = {} if self.id is None else {"id": self.id}
        return {"file": self.path, "line": self.line, **name, "image": self.image, "reason": self.reason}


@dataclass(frozen=True)
class CheckedLine:
    """A line of a file of records, and what it is.

    Attributes:
        line: The line as it stands there, with its end.
        outcome: Its record, or what is wrong with it.
    """

    line: bytes
    outcome: Record | RecordError


def read_records(path: StrPath, *, show_progress_bar: bool = False) -> Iterator[Record]:
    """Read a file of records, one at a time. Blank lines are skipped; images are not opened.

    Args:
        path: A JSONL file in UTF-8.
        show_progress_bar: Show the progress through the file on standard error.

    Yields:
        The records in the order of the file.

    Raises:
        RecordError: At the first line that is not a record.
    """
    root = image_root(path)
    with open(path, "rb") as file:
        for number, line in _with_progress(file, show_progress_bar):
            outcome = _outcome(line, root, path, number)
            if isinstance(outcome, RecordError):
                raise outcome
            yield outcome


def check_records(
    path: StrPath, *, decode_images: bool = False, show_progress_bar: bool = False
) -> Iterator[CheckedLine]:
    """Read a file of records and look at its images, a thousand lines at a time; a fault does not stop it.

    Images are read by as many threads as this process may use cores, an image of neighbouring lines once.

    Args:
        path: A JSONL file in UTF-8.
        decode_images: Decode every image to its end, as training does. By default its header is read, which finds what
            is missing, of another kind or too large, but not what was cut off.
        show_progress_bar: Show the progress through the file on standard error.

    Yields:
        Every line that is not blank, in the order of the file. Of a record with several broken images the first one is
        named.
    """
    root = image_root(path)
    fault_of = _fault_finder(decode_images)
    with open(path, "rb") as file, ThreadPoolExecutor(_cores()) as threads:
        for lines in _batches(_with_progress(file, show_progress_bar)):
            outcomes = [_outcome(line, root, path, number) for number, line in lines]
            records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
            sources = list(dict.fromkeys(source for record in records for source in _images_of(record)))
            faults = dict(zip(sources, threads.map(fault_of, sources), strict=True))
            for (number, line), outcome in zip(lines, outcomes, strict=True):
                yield CheckedLine(line, _with_images(outcome, faults, path, number))


def report_line(error: RecordError) -> bytes:
    """An error as a line of a report file: one JSON object."""
    # A file name that is not UTF-8 comes out as \udcXX, which is how JSON writes it.
    return json.dumps(error.as_dict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def image_root(path: StrPath) -> str:
    """The folder that image paths in a file are relative to."""
    return os.path.realpath(os.path.dirname(path))


# --- Lines ---


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Each line that is not blank: its number from 1, the byte at which it begins, and itself."""
    begin = 0
    for number, whole in enumerate(file, start=1):
        line = whole.removeprefix(_BYTE_ORDER_MARK) if number == 1 else whole
        if line.strip():
            yield number, begin + len(whole) - len(line), line
        begin += len(whole)


def _with_progress(file: BinaryIO, show: bool, every: int = 1000) -> Iterator[tuple[int, bytes]]:
    with Progress(console=Console(stderr=True), disable=not show) as progress:
        bar = progress.add_task(f"Reading {file.name}", total=os.fstat(file.fileno()).st_size)
        for number, _, line in numbered_lines(file):
            if show and number % every == 0:
                progress.update(bar, completed=file.tell())
            yield number, line


def _batches(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    batch, size = [], 0
    for number, line in lines:
        batch.append((number, line))
        size += len(line)
        if len(batch) >= LINES_AT_ONCE or size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _outcome(line: bytes, root: str, path: StrPath, number: int) -> Record | RecordError:
    try:
        return parse_record(line, root)
    except ValueError as error:
        return RecordError(os.fspath(path), number, str(error))


# --- Images ---


def _images_of(record: Record) -> Iterator[str]:
    return (source for side in record.sides for source in side.images)


def _with_images(
    outcome: Record | RecordError, faults: dict[str, str | None], path: StrPath, number: int
) -> Record | RecordError:
    """What a line is, once its images are known."""
    if isinstance(outcome, RecordError):
        return outcome
    for source in _images_of(outcome):
        if (fault := faults[source]) is not None:
            shown = describe(source)[1:-1] if source.startswith("data:") else source
            return ImageError(os.fspath(path), number, fault, shown, outcome.id)
    return outcome


def _fault_finder(decode: bool) -> Callable[[str], str | None]:
    """What tells what is wrong with an image; it remembers files, as many records share an image."""
    look = _decode if decode else image_size
    of_file = lru_cache(maxsize=1 << 16)(lambda path: _fault(look, Path(path)))
    return lambda source: _fault(look, source) if source.startswith("data:") else of_file(source)


def _fault(look: Callable[[Any], object], source: str | Path) -> str | None:
    try:
        look(source)
    except ValueError as error:
        return str(error)
    return None


def _decode(source: str | Path) -> None:
    """Open an image as training does: it takes room by what the header says, then decodes."""
    expected, size = image_size(source), open_image(source).size
    if size != expected:
        raise ValueError(f"the image {describe(source)} measures {size}, not {expected} as its header says")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

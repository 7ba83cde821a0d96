"""A file of records too large for memory: what mining notes of its rows, and a copy of it with negatives."""

from __future__ import annotations

import json
import os
from array import array
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.progress import Progress

from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.tasks import ALL_TASKS, SCORE_MSE
from sentence_vipyloqwen.train.record_lines import RecordError, StrPath, image_root, numbered_lines
from sentence_vipyloqwen.train.records import Record, Side, parse_record

TASK_NAMES = tuple(ALL_TASKS)
LINES_PER_UPDATE = 1000
SIDES_REMEMBERED = 1 << 12

OPEN, KEPT, SCORED = range(3)
"""A row's state: it is to get negatives, it has them, or it bears a score."""


class RecordFile:
    """A file of records, read in order or a line at a time.

    Args:
        path: A JSONL file; it must not change as long as this object is used.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = os.fspath(path)
        self.root = image_root(path)
        self._file = open(path, "rb")  # noqa: SIM115  (`close` closes it)
        self._state = self._stat()

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """See `numbered_lines`."""
        with open(self.path, "rb") as file:
            yield from numbered_lines(file)

    def line_at(self, offset: int) -> bytes:
        """The line that begins at a byte."""
        self._file.seek(offset)
        return self._file.readline()

    def record_at(self, offset: int) -> Record:
        """The record whose line begins at a byte."""
        return parse_record(self.line_at(offset), self.root)

    def check_unchanged(self) -> None:
        """Compare size and time with those at the start.

        Raises:
            ValueError: If the file changed.
        """
        if self._stat() != self._state:
            raise ValueError(f"{self.path}: changed while being read; start again (embeddings are kept)")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._state[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _stat(self) -> tuple[int, int]:
        state = os.stat(self.path)
        return state.st_size, state.st_mtime_ns


# --- What is noted of the rows --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What is known of R records; 26 bytes each.

    Attributes:
        offsets: (R,) int64, the byte at which a row's line begins.
        tasks: (R,) uint8, places in the task table.
        states: (R,) uint8: `OPEN`, `KEPT` or `SCORED`.
        anchors: (R,) uint64 content keys.
        positives: (R,) uint64 content keys.
    """

    offsets: NDArray[np.int64]
    tasks: NDArray[np.uint8]
    states: NDArray[np.uint8]
    anchors: NDArray[np.uint64]
    positives: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offsets)

    def pools(self, all_tasks: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each pool of candidates: the rows that are to get negatives of it, and those whose positives are in it.

        Args:
            all_tasks: One pool for all tasks rather than one for each.
        """
        groups = np.zeros_like(self.tasks) if all_tasks else self.tasks
        for group in np.unique(groups[self.states == OPEN]):
            members = groups == group
            yield np.flatnonzero(members & (self.states == OPEN)), np.flatnonzero(members & (self.states != SCORED))


def read_rows(file: RecordFile, progress: Progress, *, replace: bool = False, takes_images: bool = True) -> Rows:
    """Check every line of a file and note what mining needs.

    Args:
        file: The file.
        progress: Gets a bar.
        replace: Whether rows that have negatives are to get new ones.
        takes_images: Whether records with images are allowed.

    Raises:
        RecordError: At the first line that is not a record, names an image that cannot be read, or has an image where
            none is allowed.
        ValueError: If there is no record.
    """
    columns = tuple(map(array, "qBBQQ"))  # one for each field of `Rows`
    bar = progress.add_task("Reading", total=file.size)
    for number, offset, line in file.lines():
        try:
            notes = _notes(parse_record(line, file.root), replace, takes_images)
        except ValueError as error:
            raise RecordError(file.path, number, str(error)) from error
        for column, value in zip(columns, (offset, *notes), strict=True):
            column.append(value)
        if number % LINES_PER_UPDATE == 0:
            progress.update(bar, completed=offset)
    if not columns[0]:
        raise ValueError(f"{file.path}: no record; allowed: at least one")
    progress.update(bar, completed=file.size)
    return Rows(*(np.frombuffer(column, column.typecode) for column in columns))


def _notes(record: Record, replace: bool, takes_images: bool) -> tuple[int, int, int, int]:
    """Task, state, anchor key and positive key."""
    state = KEPT if record.negatives and not replace else OPEN
    if SCORE_MSE in record.task.weights:
        state = SCORED
    elif not takes_images and (record.anchor.images or record.positive.images):
        raise ValueError("the record has an image, and the model takes text alone; allowed: records of text")
    return TASK_NAMES.index(record.task.name), state, content_key(record.anchor), content_key(record.positive)


def content_key(side: Side) -> int:
    """A 64-bit key of a side's content: its text and the bytes of its images.

    Two of 22 million contents differ and share a key with a chance of 1 in 75,000.

    Raises:
        ValueError: If an image cannot be read; it is not decoded.

    >>> content_key(Side("một con mèo")) == content_key(Side("một con mèo"))
    True
    """
    digest = xxhash.xxh3_64(bytes([len(side.images)]))
    for source in side.images:
        digest.update(_data_digest(source) if source.startswith("data:") else _image_digest(source))
    digest.update(side.text.encode())
    return digest.intdigest()


def forget_images() -> None:
    """Forget the hashes of image files, which may have changed since."""
    _image_digest.cache_clear()


@lru_cache(maxsize=1 << 16)
def _image_digest(path: str) -> bytes:
    """Hash of an image file; remembered, as many records share an image."""
    try:
        return xxhash.xxh3_128_digest(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the image {path!r}: {error.strerror}") from error


def _data_digest(uri: str) -> bytes:
    try:
        return xxhash.xxh3_128_digest(b64decode(uri.partition(",")[2], validate=True))
    except ValueError as error:
        raise ValueError(f"cannot read the image '{uri[:60]}...': {error}") from error


# --- A copy with negatives ------------------------------------------------------------------------------------------


def write_negatives(
    file: RecordFile, rows: Rows, chosen: NDArray[np.integer], output: StrPath, progress: Progress
) -> None:
    """Copy a file of records, in the same order, some of them with new negatives.

    The copy appears when all of it is written. Image paths in it are relative to its own folder; what else a record
    holds stays, and a line to which nothing has to be done stays byte for byte.

    Args:
        file: The file.
        rows: What `read_rows` noted of it.
        chosen: (R, N) the rows whose positives are a row's negatives; -1 for none.
        output: Another file.
        progress: Gets a bar.

    Raises:
        ValueError: If the file changed since it was opened.
    """
    relocation = _Relocation(file.root, image_root(output))

    @lru_cache(maxsize=SIDES_REMEMBERED)
    def positive_of(row: int) -> Any:
        return relocation.side(json.loads(file.line_at(rows.offsets[row]))["positive"])

    bar = progress.add_task("Writing", total=len(rows))
    file.check_unchanged()
    with replacing(Path(output)) as draft, draft.open("w", encoding="utf-8", newline="\n") as copy:
        for place, ((_, _, line), others) in enumerate(zip(file.lines(), chosen, strict=True)):
            copy.write(_copied(line, [positive_of(row) for row in others.tolist() if row >= 0], relocation) + "\n")
            if place % LINES_PER_UPDATE == 0:
                progress.update(bar, completed=place)
        file.check_unchanged()
    progress.update(bar, completed=len(rows))


def _copied(line: bytes, negatives: list[Any], relocation: _Relocation) -> str:
    if not negatives and not relocation.moves:
        return line.decode().rstrip("\r\n")
    record = relocation.record(json.loads(line))
    return json.dumps({**record, "negative": negatives} if negatives else record, ensure_ascii=False)


@dataclass(frozen=True)
class _Relocation:
    """Rewrites image paths that are relative to one folder as relative to another."""

    old: str
    new: str

    @property
    def moves(self) -> bool:
        return self.old != self.new

    def record(self, raw: dict[str, Any]) -> dict[str, Any]:
        sides = {key: raw[key] for key in ("anchor", "positive", "negative") if raw.get(key) is not None}
        return {**raw, **{key: _each(self.side, value) for key, value in sides.items()}}

    def side(self, raw: Any) -> Any:
        if not self.moves or not isinstance(raw, dict) or raw.get("image") is None:
            return raw
        return {**raw, "image": _each(self._source, raw["image"])}

    def _source(self, raw: str) -> str:
        if raw.startswith("data:") or os.path.isabs(raw):
            return raw
        return os.path.relpath(os.path.join(self.old, raw), self.new)


def _each(function: Any, value: Any) -> Any:
    """Apply a function to a value, or to each of a list."""
    return [function(item) for item in value] if isinstance(value, list) else function(value)

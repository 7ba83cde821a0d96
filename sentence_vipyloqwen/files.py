"""Files that are seen whole or not at all, and checksums that tell whether they still are."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

CHUNK_BYTES = 1 << 20
DRAFT = ".draft-"
"""What the name of a file begins with while it is written."""

_STORED = re.compile(rf"[0-9a-f]{{32}}(\.[^/\\]*)?|{re.escape(DRAFT)}.*")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its place, bring it to the disk, and move it there in one step.

    Yields:
        The path to write to. Where the caller fails, it goes and ``path`` stays as it was.
    """
    draft = path.with_name(f"{DRAFT}{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def is_stored(name: str) -> bool:
    """Whether a file's name is one that we give: made of its content, or that of a draft.

    >>> is_stored("1fa3" * 8 + ".png"), is_stored("holiday.png"), is_stored("2024.png")
    (True, False, False)
    """
    return _STORED.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def measure(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, ``{"bytes": ..., "xxh3_128": ...}``."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def check(folder: Path, name: str, expected: Mapping[str, Any], *, checksum: bool, way_out: str) -> None:
    """Compare a file with what is known of it.

    Args:
        folder: Where it lies.
        name: Its name there.
        expected: What :func:`measure` found when it was written.
        checksum: Whether to read all of it; its size alone otherwise.
        way_out: What to do about it, for the message.

    Raises:
        ValueError: If it is missing, cut short, or altered.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing. {way_out}.")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise ValueError(f"{path} has {size:,} bytes, {expected['bytes']:,} were written: it is cut short. {way_out}.")
    if checksum and measure(path) != expected:
        raise ValueError(f"{path} was altered after it was written: its checksum differs. {way_out}.")

"""Bytes that are kept until they are needed: few in memory, many on disk."""

from __future__ import annotations

import tempfile
import weakref
from threading import Lock

SPOOL_BYTES = 8 * 2**20
"""How many a spool holds in memory."""


class Spool:
    """Keeps bytes one behind the other, up to :data:`SPOOL_BYTES` in memory, beyond that in one temporary file.

    The file has no name; it is closed, and so gone, with the last who holds the spool.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115
        self._lock = Lock()  # of the place in the file
        weakref.finalize(self, self._file.close)

    def keep(self, data: bytes) -> tuple[int, int]:
        """Keep some bytes; return their start and their length."""
        with self._lock:
            start = self._file.seek(0, 2)  # the end
            self._file.write(data)
        return start, len(data)

    def read(self, start: int, length: int) -> bytes:
        """The bytes that were kept there."""
        with self._lock:
            self._file.seek(start)
            return self._file.read(length)

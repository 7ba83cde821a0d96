"""What a spool keeps can be read again, from several threads; its file goes with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sentence_vipyloqwen.modules import spool
from sentence_vipyloqwen.modules.spool import Spool


@pytest.mark.parametrize("limit", [10**6, 10], ids=["memory", "disk"])
def test_bytes_come_back(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(spool, "SPOOL_BYTES", limit)
    kept, contents = Spool(), [bytes([number]) * number for number in range(100)]
    with ThreadPoolExecutor(4) as threads:
        spans = list(threads.map(kept.keep, contents))
        assert list(threads.map(lambda span: kept.read(*span), spans * 3)) == contents * 3
    assert kept._file._rolled == (limit == 10)


def test_its_file_goes_with_it() -> None:
    kept = Spool()
    kept.keep(b"a")
    file = kept._file
    del kept
    assert file.closed

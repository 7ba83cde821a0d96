"""Changes and checks of an index that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sentence_vipyloqwen.index import verification, writing
from sentence_vipyloqwen.index.manifest import Manifest, read_manifest
from sentence_vipyloqwen.index.shards import read_items


def remove_items(folder: str | Path, ids: Sequence[str]) -> int:
    """Remove items by id, all of them or none.

    Returns:
        How many.

    Raises:
        ValueError: If the index has no item of such an id, or another process is writing.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    with writing.locked(folder, "remove"):
        manifest = read_manifest(folder)
        alive = np.flatnonzero(~writing.deleted_rows(folder, manifest))
        known = read_items(folder, manifest.shards)["id"].to_pylist()
        rows = find_rows({known[row]: row for row in alive.tolist()}, ids)
        writing.commit(folder, manifest, writing.delete_rows(folder, manifest, rows))
    return len(rows)


def compact_index(folder: str | Path) -> Manifest:
    """Take removed items off the disk, join small shards, and drop what killed runs left behind.

    Returns:
        What the index is then.

    Raises:
        ValueError: If there is no index, or another process is writing.
    """
    folder = Path(folder).resolve()
    read_manifest(folder)
    with writing.locked(folder, "compact"):
        return writing.compact(folder, read_manifest(folder))


def verify_index(folder: str | Path) -> dict[str, int]:
    """Read everything and compare it; see :func:`verification.verify`.

    Raises:
        ValueError: If something is wrong; the message names it.
    """
    folder = Path(folder).resolve()
    return verification.verify(folder, read_manifest(folder))


def find_rows(places: dict[str, int], ids: Sequence[str]) -> np.ndarray:
    """(n,) int64: the rows of some ids, rising.

    Raises:
        ValueError: If an id is not among the places.
    """
    if isinstance(ids, str):
        raise ValueError(f"ids is the str {ids!r}; allowed is a list of ids.")
    if missing := [id for id in ids if id not in places]:
        raise ValueError(f"The index has no items with the ids {missing[:9]} ({len(missing)} of {len(ids)}).")
    return np.array(sorted({places[id] for id in ids}), dtype=np.int64)

"""Changing an index: every change adds files, then replaces ``index.json``, then drops what it no longer names."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from sentence_vipyloqwen.files import DRAFT, is_stored, measure, replacing
from sentence_vipyloqwen.index import kinds
from sentence_vipyloqwen.index.items import IMAGES_FOLDER
from sentence_vipyloqwen.index.manifest import MANIFEST_FILE, Approximate, Manifest, Shard, write_manifest
from sentence_vipyloqwen.index.shards import ShardContent, items_of, map_vectors, read_items, vectors_of, write_shard

logger = logging.getLogger(__name__)

LOCK_FILE, HOLDER_FILE = ".lock", ".lock.json"
SHARE_LOCK = ".share-{}.lock"
SHARE_PATIENCE = 60
"""Seconds that a share waits for others, which begin at the same moment."""

MOST_SHARDS = 64
"""More shards than that are joined at the end of a change: each costs a query some time."""

JOINED_ROWS = 65_536
"""Rows of a joined shard."""

STALE_SHARE = 0.25
"""An approximate index is made anew when this share of its rows stands behind it, where every vector is compared."""

_FOLDERS = ("shards", "vectors", "deleted", "search", IMAGES_FOLDER)


@contextmanager
def locked(folder: Path, what: str, patience: float = 0) -> Iterator[None]:
    """Keep other writers out; readers are never in the way.

    Args:
        folder: The index folder.
        what: What is done, for the message that others get.
        patience: Seconds to wait for another writer to end.

    Raises:
        ValueError: If another process is writing; the message says which.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=patience)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} is being written by {_holder(folder)}; an index has one writer at a time, so try again later."
        ) from error
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "what": what}
        (folder / HOLDER_FILE).write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


@contextmanager
def sharing(folder: Path, number: int) -> Iterator[None]:
    """Keep :func:`compact` from dropping what a share writes, which no manifest names yet; shares run side by side.

    Args:
        folder: The index folder.
        number: Of the share.

    Raises:
        ValueError: If another process is writing the index, or embeds the same share.
    """
    lock = FileLock(folder / SHARE_LOCK.format(number), timeout=0)
    with locked(folder, f"begin share {number}", patience=SHARE_PATIENCE):
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"Share {number} of {folder} is being embedded by another process.") from error
    try:
        yield
    finally:
        lock.release()


def _check_no_share(folder: Path) -> None:
    for path in sorted(folder.glob(SHARE_LOCK.format("*"))):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout as error:
            raise ValueError(
                f"Shares of {folder} are being embedded ({path.name}), and compacting would drop them: try again later."
            ) from error
        path.unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_bytes())
        return f"process {holder['pid']} on {holder['host']} ({holder['what']})"
    except (OSError, ValueError, KeyError):  # it is just beginning or ending
        return "another process"


# --- changes ---


def commit(folder: Path, old: Manifest | None, new: Manifest, *, measure_all: bool = False) -> Manifest:
    """Make an index what a manifest says.

    1. Join shards where there are many.
    2. Make the approximate index anew where the kind has one and the old one no longer serves.
    3. Measure what is new.
    4. Replace ``index.json``.
    5. Drop the files that only the old manifest named.

    Args:
        folder: The index folder, locked.
        old: What it is now; ``None`` for a new one.
        new: What it shall be; ``approximate`` and ``files`` are seen to here.
        measure_all: Whether files that the old manifest names may have been written anew.

    Returns:
        The manifest as written.
    """
    if len(new.shards) > MOST_SHARDS:
        new = _joined(folder, new, deleted_rows(folder, new))  # 1
    new = _with_approximate(folder, new)  # 2
    new = _with_files(folder, new, {} if old is None or measure_all else old.files)  # 3
    write_manifest(folder, new)  # 4
    for name in set(old.files if old else ()) - set(new.files):
        (folder / name).unlink(missing_ok=True)  # 5
    return new


def delete_rows(folder: Path, manifest: Manifest, rows: np.ndarray) -> Manifest:
    """The manifest of an index without some rows; their ids and numbers are written to a file.

    Args:
        folder: The index folder.
        manifest: What it is now.
        rows: (n,) rows that can be found so far.
    """
    gone = np.union1d(np.flatnonzero(deleted_rows(folder, manifest)), rows)
    ids = read_items(folder, manifest.shards)["id"].take(pa.array(gone))
    facts = [[shard.name for shard in manifest.shards], gone.tolist()]
    name = f"deleted/{xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())}.parquet"
    (folder / "deleted").mkdir(exist_ok=True)
    with replacing(folder / name) as draft:
        pq.write_table(pa.table({"id": ids, "row": pa.array(gone)}), draft)
    return replace(manifest, deleted=name, count=manifest.rows - len(gone))


def compact(folder: Path, manifest: Manifest) -> Manifest:
    """Rewrite an index without its removed rows, in few shards, and drop what killed runs left behind.

    Args:
        folder: The index folder, locked.
        manifest: What it is now.

    Raises:
        ValueError: If shares of it are being embedded.
    """
    _check_no_share(folder)
    new = _joined(folder, manifest, deleted_rows(folder, manifest))
    written = commit(folder, manifest, replace(new, approximate=None))
    images = {path for row in read_items(folder, written.shards)["image"].to_pylist() for path in row}
    named = {folder / name for name in (*written.files, *images)}
    for path in (path for part in _FOLDERS for path in (folder / part).glob("*")):
        if path not in named and (path.parent.name != IMAGES_FOLDER or is_stored(path.name)):
            path.unlink()
    for draft in folder.glob(f"{DRAFT}*"):
        draft.unlink()
    return written


def deleted_rows(folder: Path, manifest: Manifest) -> np.ndarray:
    """(rows,) bool, which were removed."""
    mask = np.zeros(manifest.rows, dtype=bool)
    if manifest.deleted:
        mask[pq.read_table(folder / manifest.deleted, columns=["row"])["row"].to_numpy()] = True
    return mask


# --- the steps of a commit ---


def _joined(folder: Path, manifest: Manifest, deleted: np.ndarray) -> Manifest:
    """The manifest with shards joined, without removed rows. A shard that is large and whole stays."""
    shards: list[Shard] = []
    waiting: list[tuple[Shard, np.ndarray]] = []
    start = 0
    for shard in manifest.shards:
        gone = deleted[start : start + shard.rows]
        start += shard.rows
        if shard.rows >= JOINED_ROWS and not gone.any():
            shards += [*_join(folder, waiting), shard]
            waiting = []
            continue
        waiting.append((shard, gone))
        if sum(len(of) - of.sum() for _, of in waiting) >= JOINED_ROWS:
            shards += _join(folder, waiting)
            waiting = []
    shards += _join(folder, waiting)
    return replace(manifest, shards=tuple(shards), deleted=None, approximate=None, count=sum(s.rows for s in shards))


def _join(folder: Path, parts: Sequence[tuple[Shard, np.ndarray]]) -> list[Shard]:
    if len(parts) == 1 and not parts[0][1].any():
        return [parts[0][0]]
    tables = [pq.read_table(folder / shard.table).filter(pa.array(~gone)) for shard, gone in parts]
    table = pa.concat_tables(tables) if tables else None
    if table is None or not table.num_rows:
        return []
    facts = [[shard.name, np.flatnonzero(gone).tolist()] for shard, gone in parts]
    name = xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
    return [write_shard(folder, name, ShardContent(items_of(table), vectors_of(table)))]


def _with_approximate(folder: Path, manifest: Manifest) -> Manifest:
    factory = kinds.resolve(manifest.kind, manifest.rows, manifest.fingerprint.dim)
    old = manifest.approximate
    if factory is None:
        return replace(manifest, approximate=None)
    if old and manifest.rows - old.rows <= STALE_SHARE * old.rows:
        return manifest
    logger.info("Making an approximate index %s over %d vectors.", factory, manifest.rows)
    parts = [map_vectors(folder / shard.vectors, shard, manifest.dim) for shard in manifest.shards]
    facts = [factory, [shard.name for shard in manifest.shards]]
    name = xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
    approximate = Approximate(f"search/{name}.faiss", factory, manifest.rows)
    (folder / "search").mkdir(exist_ok=True)
    with replacing(folder / approximate.file) as draft:
        faiss.write_index(kinds.build(factory, parts, manifest.dim), str(draft))
    return replace(manifest, approximate=approximate)


def _with_files(folder: Path, manifest: Manifest, known: Mapping[str, Mapping[str, Any]]) -> Manifest:
    names = [name for shard in manifest.shards for name in (shard.table, shard.vectors)]
    names += [manifest.deleted] if manifest.deleted else []
    names += [manifest.approximate.file] if manifest.approximate else []
    return replace(manifest, files={name: known[name] if name in known else measure(folder / name) for name in names})


def check_free(folder: Path) -> None:
    """See to it that an index may be made in a folder that holds none: it is new, empty, or a build's that was killed.

    Raises:
        ValueError: If it is something else.
    """
    if folder.exists() and not (folder.is_dir() and (is_index(folder) or is_unfinished(folder))):
        raise ValueError(f"{folder} exists and is no index: choose another folder.")


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index."""
    return (folder / MANIFEST_FILE).is_file()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is empty but for what a build leaves that was killed before its end.

    The names of folders do not say so: a user's own folder may be called ``images``.
    """
    parts = [path for path in folder.iterdir() if path.name in _FOLDERS and path.is_dir()]
    others = [path for path in folder.iterdir() if path not in parts]
    return all(
        path.name in (LOCK_FILE, HOLDER_FILE) or path.match(SHARE_LOCK.format("*")) or is_stored(path.name)
        for path in (*others, *(path for part in parts for path in part.iterdir()))
    )

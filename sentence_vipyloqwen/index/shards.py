"""Shards: some thousand items and their vectors, in a Parquet file and as FAISS maps them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.index.manifest import Shard

ITEM_COLUMNS = ("id", "text", "image", "metadata")
_KEY = b"sentence-vipyloqwen"
_IN_MEMORY = pa.schema(
    [(name, pa.large_list(pa.large_string()) if name == "image" else pa.large_string()) for name in ITEM_COLUMNS]
)
"""Large, for one piece of a column may exceed 2 GB."""

_COMPRESSION = {"id": "zstd", "text": "zstd", "image.list.element": "zstd", "metadata": "zstd", "vector": "none"}


@dataclass(frozen=True)
class Skipped:
    """An item that could not be embedded.

    Attributes:
        where: ``file:line``, or its position.
        reason: What is wrong with it.
        id: Its id, where it is known.
    """

    where: str
    reason: str
    id: str | None = None


@dataclass(frozen=True)
class ShardContent:
    """What a shard holds.

    Attributes:
        items: Items with all of their keys, image paths as they are stored.
        vectors: (n, dim) float32, of unit length.
        skipped: Items that were to be in it.
    """

    items: Sequence[Mapping[str, Any]]
    vectors: np.ndarray
    skipped: Sequence[Skipped] = field(default=())


def write_shard(folder: Path, name: str, content: ShardContent) -> Shard:
    """Write a shard's files, each whole or not at all; the Parquet file, which makes the shard one, last.

    Args:
        folder: The index.
        name: Of the shard.
        content: What it holds.
    """
    shard = Shard(name, len(content.items))
    write_vectors(folder / shard.vectors, content.vectors)
    facts = {"vectors": _digest(content.vectors), "skipped": [vars(skipped) for skipped in content.skipped]}
    table = to_table(content.items, content.vectors).replace_schema_metadata({_KEY: json.dumps(facts)})
    (folder / shard.table).parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder / shard.table) as draft:
        pq.write_table(table, draft, compression=_COMPRESSION, use_dictionary=False)
    return shard


def find_shard(folder: Path, name: str) -> tuple[Shard, list[Skipped]] | None:
    """A shard that an earlier run wrote, and what it had to leave out; ``None`` where there is none that is whole.

    Its FAISS file is written anew, as it costs little and nothing else says whether it is whole.
    """
    path = folder / Shard(name, 0).table
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        vectors = vectors_of(table)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # not there, or cut short
        return None
    if facts.get("vectors") != _digest(vectors):
        return None
    shard = Shard(name, table.num_rows)
    write_vectors(folder / shard.vectors, vectors)
    return shard, [Skipped(**skipped) for skipped in facts["skipped"]]


def to_table(items: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> pa.Table:
    """Items and their vectors as columns; metadata as JSON, so that it comes back as it was."""
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    columns = {
        "id": pa.array([item["id"] for item in items], pa.string()),
        "text": pa.array([item["text"] for item in items], pa.string()),
        "image": pa.array([item["image"] for item in items], pa.list_(pa.string())),
        "metadata": pa.array([json.dumps(item["metadata"], ensure_ascii=False) for item in items], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    return pa.table(columns)


def vectors_of(table: pa.Table) -> np.ndarray:
    """(n, dim) float32: the column ``vector``."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def items_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of the item columns as items, image paths as they are stored."""
    rows = table.select(ITEM_COLUMNS).to_pylist()
    return [{**row, "metadata": json.loads(row["metadata"])} for row in rows]


def read_items(folder: Path, shards: Iterable[Shard]) -> pa.Table:
    """The item columns of several shards, one behind the other."""
    tables = [pq.read_table(folder / shard.table, columns=list(ITEM_COLUMNS)) for shard in shards]
    none = to_table([], np.empty((0, 1), np.float32)).select(ITEM_COLUMNS)
    table = pa.concat_tables([none, *tables]).replace_schema_metadata(None)
    # In one piece: to take a few rows of many pieces, pyarrow joins them all, at every query.
    return table.cast(_IN_MEMORY).combine_chunks()


def write_vectors(path: Path, vectors: np.ndarray) -> None:
    """Write vectors as FAISS maps them into memory."""
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        faiss.write_index(index, str(draft))


def map_vectors(path: Path, shard: Shard, dim: int) -> faiss.IndexFlat:
    """Map a shard's vectors into memory.

    Raises:
        ValueError: If the file does not hold the shard's vectors.
    """
    index = map_index(path)
    if (index.ntotal, index.d) != (shard.rows, dim):
        raise ValueError(
            f"{path} holds {index.ntotal} vectors of {index.d} dimensions; expected are {shard.rows} of {dim}"
        )
    return index


def map_index(path: Path) -> faiss.Index:
    """Map a FAISS index into memory.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _digest(vectors: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(vectors, dtype="<f4"))

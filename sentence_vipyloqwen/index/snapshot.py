"""An index as it is at one moment: opened, and searched by vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sentence_vipyloqwen.index import maintenance, writing
from sentence_vipyloqwen.index.filters import Where, matching, metadata_table
from sentence_vipyloqwen.index.items import with_absolute_images
from sentence_vipyloqwen.index.manifest import Manifest, check_files, read_manifest
from sentence_vipyloqwen.index.nearest import Candidates, NearestRows
from sentence_vipyloqwen.index.shards import items_of, map_index, map_vectors, read_items

READ_ATTEMPTS = 50
"""A reader whose files a writer has just dropped reads ``index.json`` again, so many times."""

NORM_TOLERANCE = 1e-3
"""How far from 1 the length of a query's vector may be: half precision rounds it."""


@dataclass(frozen=True)
class Hit:
    """One result of a query.

    Attributes:
        rank: 1 for the best.
        id: The item's id.
        score: Cosine of query and item, -1 to 1.
        item: The item: ``id``, ``text`` (str), ``image`` (list of absolute paths), ``metadata`` (dict).
    """

    rank: int
    id: str
    score: float
    item: Mapping[str, Any]


class Snapshot:
    """What a manifest names, opened: vectors are mapped into memory, items are read.

    It never changes: whoever holds it sees one state of the index, whatever is written meanwhile.

    Args:
        folder: The index.
        manifest: What it is.

    Attributes:
        manifest: What it is.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._folder = folder
        parts = [map_vectors(folder / shard.vectors, shard, manifest.dim) for shard in manifest.shards]
        approximate, factory = None, ""
        if manifest.approximate:
            approximate, factory = map_index(folder / manifest.approximate.file), manifest.approximate.factory
        deleted = writing.deleted_rows(folder, manifest)
        self._items = read_items(folder, manifest.shards)
        self._nearest = NearestRows(parts, approximate, factory)
        self._alive = ~deleted if deleted.any() else None

    @classmethod
    def latest(cls, folder: Path, accept: Callable[[Manifest], None], *, checksum: bool) -> Snapshot:
        """Open an index as it is now, while others may be changing it.

        Args:
            folder: The index.
            accept: Raises where the manifest is not one that may be opened.
            checksum: Whether to read every file; their sizes are compared anyway.

        Raises:
            ValueError: If a file of the index is missing or damaged.
        """
        for attempt in range(READ_ATTEMPTS):
            manifest = read_manifest(folder)
            accept(manifest)
            try:
                check_files(folder, manifest, checksum=checksum)
                return cls(folder, manifest)
            except (ValueError, OSError):
                if attempt == READ_ATTEMPTS - 1 or read_manifest(folder) == manifest:
                    raise  # it is not that a writer has dropped the file meanwhile
        raise AssertionError("unreachable")

    def search(
        self, vectors: np.ndarray, k: int, *, where: Where | None = None, exact: bool = False, effort: int | None = None
    ) -> list[list[Hit]]:
        """Find the items nearest to some queries; see :meth:`VectorIndex.search_vectors`."""
        check_k(k)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.manifest.dim or not np.isfinite(vectors).all():
            raise ValueError(
                f"vectors have the shape {vectors.shape}; allowed is (Q, {self.manifest.dim}), all finite."
            )
        norms = np.linalg.norm(vectors, axis=1)
        if (off := np.flatnonzero(abs(norms - 1) > NORM_TOLERANCE)).size:
            raise ValueError(
                f"vectors[{off[0]}] is {norms[off[0]]:.4g} long ({len(off)} of {len(vectors)} are not of length 1); "
                "scores are cosines, so allowed are unit vectors: divide each by its length."
            )
        if not self.manifest.count:
            return [[] for _ in vectors]
        allowed = self._alive
        if where is not None:
            found = matching(self._metadata, where)
            allowed = found if allowed is None else found & allowed
        exact = exact or where is not None
        batches = self._nearest.find(vectors, int(k), allowed, exact=exact, effort=effort)
        return [hits for batch in batches for hits in self._hits(batch, int(k))]

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items, in the order they came in; read at each call."""
        table = self._items if self._alive is None else self._items.filter(pa.array(self._alive))
        return self._absolute(table)

    def get(self, id: str) -> dict[str, Any]:
        """An item by its id.

        Raises:
            ValueError: If there is none.
        """
        return self._absolute(self._items.take(self.rows_of([id])))[0]

    @cached_property
    def places(self) -> dict[str, int]:
        """Id -> row, of the items that can be found."""
        rows = range(self._items.num_rows) if self._alive is None else np.flatnonzero(self._alive).tolist()
        ids = self._items["id"].to_pylist()
        return {ids[row]: row for row in rows}

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """(n,) int64: the rows of some ids, rising.

        Raises:
            ValueError: If there is no item of such an id.
        """
        return maintenance.find_rows(self.places, ids)

    @cached_property
    def _metadata(self) -> pa.Table:
        return metadata_table(self._items)

    def _hits(self, batch: Candidates, k: int) -> list[list[Hit]]:
        """The best k of each query: by score, then by id."""
        flat = batch.rows[batch.rows >= 0]
        ids = np.full(batch.rows.shape, "", dtype=object)
        ids[batch.rows >= 0] = self._items["id"].take(pa.array(flat)).to_pylist()
        orders = [
            sorted((place for place in range(len(row)) if row[place] >= 0), key=lambda p: (-scores[p], names[p]))[:k]
            for row, scores, names in zip(batch.rows, batch.cosines, ids, strict=True)
        ]
        chosen = [row[order] for row, order in zip(batch.rows, orders, strict=True)]
        items = iter(self._absolute(self._items.take(pa.array(np.concatenate(chosen)))))
        return [
            [Hit(rank, names[p], float(scores[p]), next(items)) for rank, p in enumerate(order, 1)]
            for order, scores, names in zip(orders, batch.cosines, ids, strict=True)
        ]

    def _absolute(self, table: pa.Table) -> list[dict[str, Any]]:
        return [with_absolute_images(item, self._folder) for item in items_of(table)]


def check_k(k: Any) -> None:
    """See to it that k is a number of results.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k is {k!r}; allowed is a whole number from 1.")

"""Nearest-neighbour search by cosine over texts, images and mixed items, kept in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import pyarrow as pa
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.index import kinds, maintenance, writing
from sentence_vipyloqwen.index.embedding import SHARD_ROWS, Embedded, EmbedOptions, embed, embed_items
from sentence_vipyloqwen.index.filters import Where, matching, metadata_table
from sentence_vipyloqwen.index.fingerprint import fingerprint
from sentence_vipyloqwen.index.items import Source, query_input, with_absolute_images
from sentence_vipyloqwen.index.manifest import REBUILD, Manifest, check_files, read_manifest
from sentence_vipyloqwen.index.nearest import Candidates, NearestRows
from sentence_vipyloqwen.index.shards import Skipped, items_of, map_index, map_vectors, read_items

Query: TypeAlias = str | Path | Image.Image | np.ndarray | Mapping[str, Any]

READ_ATTEMPTS = 50
"""A reader whose files a writer has just dropped reads ``index.json`` again, so many times."""


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


class VectorIndex:
    """Items in one embedding space, searched by any of them.

    Made by :meth:`build` or :meth:`load`. The folder remembers which model it belongs to and opens for no other.
    Changes (:meth:`add`, :meth:`remove`, :meth:`update`, :meth:`compact`) are on the disk when they return; one that is
    killed leaves the index as it was, and what it had embedded is used by the next. There is one writer at a time, and
    readers are never in its way: an index that is open elsewhere shows the change once it is loaded again.

    Attributes:
        folder: Where it lies on disk.
        skipped: What the last change left out, with ``on_error="skip"``.

    Example::

        index = VectorIndex.build(model, [{"id": "a", "text": "hóa đơn tiền điện"}], "folder")
        index.search("electricity bill", k=1)[0].id  # "a"
    """

    def __init__(self, model: SentenceTransformer, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.skipped: tuple[Skipped, ...] = ()
        self._model = model
        self._open(manifest)

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        items: Source,
        folder: str | Path,
        *,
        kind: str = kinds.AUTO,
        batch_size: int = 32,
        prompt_name: str | None = None,
        overwrite: bool = False,
        on_error: str = "raise",
        shard_rows: int = SHARD_ROWS,
        show_progress_bar: bool = False,
    ) -> VectorIndex:
        """Embed items and write an index.

        The index appears, or takes the place of an old one, in the last step. After a kill the same call goes on:
        shards that were written are used again, also where the items have changed in other places.

        Args:
            model: A ``ViPyloQwen`` or any ``SentenceTransformer`` that takes ``{"text": ..., "image": ...}``.
            items: Path of a JSONL file, of a folder of images, texts and PDFs, or of a PDF; a ``datasets`` dataset; or
                dicts ``{"id", "text", "image", "metadata"}``, all but a text or an image optional. An item without id
                gets its position as id. Image paths are relative to the JSONL file, else to the working directory;
                images that are no files are stored in the index. See :mod:`sentence_vipyloqwen.index.sources`.
            folder: Where the index goes.
            kind: How it is searched: ``"auto"`` compares every vector up to 200,000 items and makes an ``IVF,SQ8``
                beyond; ``"Flat"``, ``"HNSW"``, ``"IVF,SQ8"``, ``"IVF,PQ"``, ``"binary"``, ``"MRL256"``, or a FAISS
                factory string: see :mod:`sentence_vipyloqwen.index.kinds`.
            batch_size: Items in one forward pass.
            prompt_name: Prompt the items are embedded with; documents usually have none.
            overwrite: Whether an index in ``folder`` may be replaced.
            on_error: What an item does that is not allowed or cannot be embedded: ``"raise"``, or ``"skip"``, which
                leaves it out and lists it in :attr:`skipped`.
            shard_rows: Items written at once, and so the most that a kill can lose.
            show_progress_bar: Whether to show how far it is, at what rate, and the time left.

        Raises:
            ValueError: If there are no items, one is not allowed or names an image whose header is unreadable
                (``file:line`` or position), an id occurs twice, an item's vector is not finite, ``folder`` is taken,
                another process is writing, or there is no such kind.
        """
        options = EmbedOptions(
            batch_size=batch_size,
            prompt_name=prompt_name,
            on_error=on_error,
            shard_rows=shard_rows,
            show_progress_bar=show_progress_bar,
        )
        known = fingerprint(model)
        kinds.resolve(kind, 1_000_000, known.dim)
        folder = Path(folder).resolve()
        with _new_folder(folder, overwrite), writing.locked(folder, "build"):
            old = _manifest_or_none(folder)
            embedded = embed_items(model, known, items, folder, options)
            manifest = Manifest(known, known.dim, len(embedded.ids), prompt_name, kind, embedded.shards)
            index = cls(model, folder, writing.commit(folder, old, manifest, measure_all=True))
        index.skipped = embedded.skipped
        return index

    @classmethod
    def load(cls, folder: str | Path, model: SentenceTransformer, *, checksum: bool = True) -> VectorIndex:
        """Open an index. Vectors are mapped into memory, not read; items are read.

        Args:
            folder: What :meth:`build` wrote.
            model: The model the index was built with, or the same one with or without ``quantize``.
            checksum: Whether to read every file once to see that it is as it was written, a second for some gigabytes;
                their sizes are compared anyway.

        Raises:
            ValueError: If the model is another one (weights, dimension, prompts, processing), or if a file of the index
                is missing or damaged.
        """
        folder = Path(folder).resolve()
        for attempt in range(READ_ATTEMPTS):
            manifest = read_manifest(folder)
            _check_model(manifest, model, folder)
            try:
                check_files(folder, manifest, checksum=checksum)
                return cls(model, folder, manifest)
            except (ValueError, OSError):
                if attempt == READ_ATTEMPTS - 1 or read_manifest(folder) == manifest:
                    raise  # it is not that a writer has dropped the file meanwhile
        raise AssertionError("unreachable")

    # --- changes ---

    def add(
        self,
        items: Source,
        *,
        batch_size: int = 32,
        on_error: str = "raise",
        shard_rows: int = SHARD_ROWS,
        show_progress_bar: bool = False,
    ) -> int:
        """Embed more items, with the prompt of the first.

        Args:
            items: As for :meth:`build`; ids that the index has are an error.
            batch_size: Items in one forward pass.
            on_error: As for :meth:`build`.
            shard_rows: As for :meth:`build`.
            show_progress_bar: As for :meth:`build`.

        Returns:
            How many were added.

        Raises:
            ValueError: As for :meth:`build`.
        """
        options = EmbedOptions(
            batch_size=batch_size, on_error=on_error, shard_rows=shard_rows, show_progress_bar=show_progress_bar
        )
        return self._add(items, options, replaces=False)

    def update(
        self,
        items: Source,
        *,
        batch_size: int = 32,
        on_error: str = "raise",
        shard_rows: int = SHARD_ROWS,
        show_progress_bar: bool = False,
    ) -> int:
        """Add items; one whose id the index has takes that item's place, in the same step.

        Args:
            items: As for :meth:`build`; they need ids of their own, or their positions are their ids.
            batch_size: Items in one forward pass.
            on_error: As for :meth:`build`.
            shard_rows: As for :meth:`build`.
            show_progress_bar: As for :meth:`build`.

        Returns:
            How many were added or replaced.

        Raises:
            ValueError: As for :meth:`build`.
        """
        options = EmbedOptions(
            batch_size=batch_size, on_error=on_error, shard_rows=shard_rows, show_progress_bar=show_progress_bar
        )
        return self._add(items, options, replaces=True)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove items. They are found no more; :meth:`compact` takes them off the disk.

        Args:
            ids: Of the items.

        Returns:
            How many were removed.

        Raises:
            ValueError: If the index has no item of such an id; then none is removed.
        """
        count = maintenance.remove_items(self.folder, ids)
        self._open(read_manifest(self.folder))
        return count

    def compact(self) -> None:
        """Take removed items off the disk, join small shards, and drop what killed runs left behind."""
        self._open(maintenance.compact_index(self.folder))

    def verify(self) -> dict[str, int]:
        """Read everything and compare it.

        1. Every file has the size and the checksum it was written with.
        2. Every shard's FAISS file holds the vectors of its Parquet file, finite and of unit length.
        3. No two items have the same id, and images kept in the index are as they were.

        Returns:
            What was looked at: ``files``, ``items``, ``vectors``, ``images``.

        Raises:
            ValueError: If something is wrong; the message names it.
        """
        return maintenance.verify_index(self.folder)

    # --- searching ---

    @overload
    def search(
        self,
        queries: Query,
        k: int = ...,
        prompt_name: str | None = ...,
        *,
        where: Where | None = ...,
        exact: bool = ...,
        effort: int | None = ...,
    ) -> list[Hit]: ...

    @overload
    def search(
        self,
        queries: list[Query] | tuple[Query, ...],
        k: int = ...,
        prompt_name: str | None = ...,
        *,
        where: Where | None = ...,
        exact: bool = ...,
        effort: int | None = ...,
    ) -> list[list[Hit]]: ...

    def search(
        self,
        queries: Query | Sequence[Query],
        k: int = 10,
        prompt_name: str | None = None,
        *,
        where: Where | None = None,
        exact: bool = False,
        effort: int | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """Find the items nearest to a query, or to each of several.

        Args:
            queries: One query, or a list or tuple of them. A query is a str (always text), a path of an image, a PIL
                image, an array, or ``{"text": str, "image": one or a list}``.
            k: Most hits for a query; fewer come back where the index has fewer items.
            prompt_name: Prompt of the queries, e.g. ``"ocr"``.
            where: Only items whose metadata satisfy this: ``"lang = 'vi' AND year >= 2024"``, or a
                ``pyarrow.compute.Expression``. All that do are compared, whatever the kind of the index.
            exact: Whether to compare every vector, whatever the kind.
            effort: How far an approximate index looks: lists of an IVF, nodes of an HNSW.

        Returns:
            Hits for one query, or a list of them for each of several: best first, equal scores by id.

        Raises:
            ValueError: If ``k`` < 1, a query is empty or of no allowed kind, or ``where`` is no condition.
        """
        _check_k(k)
        several = isinstance(queries, (list, tuple))
        inputs = [query_input(query, position) for position, query in enumerate(queries if several else [queries])]
        if not inputs:
            return []
        names = [f"query {position}" for position in range(len(inputs))]
        vectors = embed(self._model, inputs, names, prompt_name=prompt_name)
        hits = self.search_vectors(vectors, k, where=where, exact=exact, effort=effort)
        return hits if several else hits[0]

    def search_vectors(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        where: Where | None = None,
        exact: bool = False,
        effort: int | None = None,
    ) -> list[list[Hit]]:
        """Find the items nearest to queries that are embedded already.

        Args:
            vectors: (Q, dim) float32, of unit length.
            k: As for :meth:`search`.
            where: As for :meth:`search`.
            exact: As for :meth:`search`.
            effort: As for :meth:`search`.

        Returns:
            Hits for each of them.

        Raises:
            ValueError: As for :meth:`search`, or if the vectors are of another shape or not finite.
        """
        _check_k(k)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self._manifest.dim or not np.isfinite(vectors).all():
            raise ValueError(
                f"vectors have the shape {vectors.shape}; allowed is (Q, {self._manifest.dim}), all finite."
            )
        if not len(self):
            return [[] for _ in vectors]
        allowed = self._alive
        if where is not None:
            found = matching(self._metadata, where)
            allowed = found if allowed is None else found & allowed
        exact = exact or where is not None
        batches = self._nearest.find(vectors, int(k), allowed, exact=exact, effort=effort)
        return [hits for batch in batches for hits in self._hits(batch, int(k))]

    def info(self) -> dict[str, Any]:
        """What ``index.json`` holds, and where: ``folder``, ``count``, ``dim``, ``metric``, ``fingerprint``, ..."""
        return {"folder": str(self.folder), **self._manifest.to_dict()}

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
        return self._absolute(self._items.take(self._rows_of([id])))[0]

    def __len__(self) -> int:
        return self._manifest.count

    def __repr__(self) -> str:
        return f"VectorIndex({str(self.folder)!r}, {len(self)} items, {self._manifest.dim} dimensions)"

    # --- inside ---

    def _open(self, manifest: Manifest) -> None:
        parts = [map_vectors(self.folder / shard.vectors, shard, manifest.dim) for shard in manifest.shards]
        approximate, factory = None, ""
        if manifest.approximate:
            approximate, factory = map_index(self.folder / manifest.approximate.file), manifest.approximate.factory
        deleted = writing.deleted_rows(self.folder, manifest)
        self._manifest = manifest
        self._items = read_items(self.folder, manifest.shards)
        self._nearest = NearestRows(parts, approximate, factory)
        self._alive = ~deleted if deleted.any() else None
        for name in ("_metadata", "_places"):
            self.__dict__.pop(name, None)

    @cached_property
    def _metadata(self) -> pa.Table:
        return metadata_table(self._items)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Id -> row, of the items that can be found."""
        rows = range(self._items.num_rows) if self._alive is None else np.flatnonzero(self._alive).tolist()
        ids = self._items["id"].to_pylist()
        return {ids[row]: row for row in rows}

    def _rows_of(self, ids: Sequence[str]) -> np.ndarray:
        return maintenance.find_rows(self._places, ids)

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Lock the index, and change it from what it is now: another process may have changed it since."""
        with writing.locked(self.folder, what):
            manifest = read_manifest(self.folder)
            if manifest != self._manifest:
                _check_model(manifest, self._model, self.folder)
                self._open(manifest)
            yield

    def _add(self, items: Source, options: EmbedOptions, *, replaces: bool) -> int:
        with self._changing("update" if replaces else "add"):
            manifest = self._manifest
            _check_same(manifest, self._model, self.folder)
            options = replace(options, prompt_name=manifest.prompt_name)
            taken = frozenset() if replaces else self._places.keys()
            embedded = embed_items(self._model, manifest.fingerprint, items, self.folder, options, taken)
            self._commit(self._grown(manifest, embedded))
        self.skipped = embedded.skipped
        return len(embedded.ids)

    def _grown(self, manifest: Manifest, embedded: Embedded) -> Manifest:
        """The manifest with more shards, and without the items whose ids they bring."""
        if again := [id for id in embedded.ids if id in self._places]:
            manifest = writing.delete_rows(self.folder, manifest, self._rows_of(again))
        count = manifest.count + len(embedded.ids)
        return replace(manifest, shards=(*manifest.shards, *embedded.shards), count=count)

    def _commit(self, manifest: Manifest) -> None:
        self._open(writing.commit(self.folder, self._manifest, manifest))

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
        return [with_absolute_images(item, self.folder) for item in items_of(table)]


def _check_k(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k is {k!r}; allowed is a whole number from 1.")


def _manifest_or_none(folder: Path) -> Manifest | None:
    """What is there; an index that cannot be read is replaced whole, so nothing of it is kept."""
    try:
        return read_manifest(folder)
    except ValueError:
        return None


@contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """A folder to build in; where the build fails before anything was embedded, it goes as it came."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} exists and is no index: choose another folder.")
    if writing.is_index(folder):
        if not overwrite:
            raise ValueError(f"There is an index at {folder} already: pass overwrite=True to replace it.")
    elif folder.exists() and not writing.is_unfinished(folder):
        raise ValueError(f"{folder} exists and is no index: choose another folder.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made and not any((folder / "shards").glob("*.parquet")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_model(manifest: Manifest, model: SentenceTransformer, folder: Path) -> None:
    built_with, given = manifest.fingerprint, fingerprint(model)
    if not given.may_query(built_with):
        raise ValueError(
            f"The index {folder} was built with the model {built_with}; the model given is {given}. They differ in: "
            f"{', '.join(built_with.differences(given))}. Load the model the index was built with, or use this one: "
            f"{REBUILD[0].lower()}{REBUILD[1:]}."
        )


def _check_same(manifest: Manifest, model: SentenceTransformer, folder: Path) -> None:
    """A quantised model may query the index of its float model, but not write into it: scores would be of two kinds."""
    if differences := manifest.fingerprint.differences(fingerprint(model)):
        raise ValueError(
            f"The model given may query {folder}, but its vectors differ a little from those in it "
            f"({', '.join(differences)}): add items with the model as the index was built."
        )

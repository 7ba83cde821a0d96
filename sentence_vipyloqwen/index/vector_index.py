"""Nearest-neighbour search by cosine over texts, images and mixed items, kept in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.fingerprint import Fingerprint, fingerprint
from sentence_vipyloqwen.index import kinds, maintenance, writing
from sentence_vipyloqwen.index.embedding import Embedded, EmbedOptions, embed, embed_items
from sentence_vipyloqwen.index.filters import Where
from sentence_vipyloqwen.index.items import Source, query_input
from sentence_vipyloqwen.index.manifest import REBUILD, Manifest, read_manifest
from sentence_vipyloqwen.index.origin import load_origin, origin_of, place_of
from sentence_vipyloqwen.index.shards import Skipped
from sentence_vipyloqwen.index.snapshot import Hit, Snapshot, check_k

Query: TypeAlias = str | Path | Image.Image | np.ndarray | Mapping[str, Any]


class VectorIndex:
    """Items in one embedding space, searched by any of them.

    Made by :meth:`build` or :meth:`load`. The folder remembers which model it belongs to, and opens for no other; and
    where that model came from, so that it opens without being given one.
    Changes (:meth:`add`, :meth:`remove`, :meth:`update`, :meth:`compact`) are on the disk when they return; one that is
    killed leaves the index as it was, and what it had embedded is used by the next. There is one writer at a time, and
    readers are never in its way: an index that is open elsewhere stays as it was opened, until :meth:`refresh`.

    Attributes:
        folder: Where it lies on disk.
        skipped: What the last change left out, with ``on_error="skip"``.

    Example::

        index = VectorIndex.build(model, [{"id": "a", "text": "hóa đơn tiền điện"}], "folder")
        index.search("electricity bill", k=1)[0].id  # "a"
    """

    def __init__(self, model: SentenceTransformer, known: Fingerprint, folder: Path, snapshot: Snapshot) -> None:
        self.folder = folder
        self.skipped: tuple[Skipped, ...] = ()
        self._model = model
        self._known = known
        self._now = snapshot

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        items: Source,
        folder: str | Path,
        options: EmbedOptions | None = None,
        *,
        kind: str = kinds.AUTO,
        overwrite: bool = False,
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
            options: How the items are embedded; with ``on_error="skip"``, :attr:`skipped` lists those left out.
            kind: How it is searched: ``"auto"`` compares every vector up to 200,000 items and makes an ``IVF,SQ8``
                beyond; ``"Flat"``, ``"HNSW"``, ``"IVF,SQ8"``, ``"IVF,PQ"``, ``"binary"``, ``"MRL256"``, or a FAISS
                factory string: see :mod:`sentence_vipyloqwen.index.kinds`.
            overwrite: Whether an index in ``folder`` may be replaced.

        Raises:
            ValueError: If there are no items, one is not allowed or names an image whose header is unreadable
                (``file:line`` or position), an id occurs twice, an item's vector is not finite, ``folder`` is taken,
                another process is writing, or there is no such kind.
        """
        options = options or EmbedOptions()
        known = fingerprint(model)
        kinds.resolve(kind, 1_000_000, known.dim)
        folder = Path(folder).resolve()
        with _new_folder(folder, overwrite), writing.locked(folder, "build"):
            old = _manifest_or_none(folder)
            embedded = embed_items(model, known, items, folder, options)
            manifest = Manifest(known, known.dim, len(embedded.ids), options.prompt_name, kind, embedded.shards)
            manifest = replace(manifest, model=origin_of(model, folder))
            written = writing.commit(folder, old, manifest, measure_all=True)
            index = cls(model, known, folder, Snapshot(folder, written))
        index.skipped = embedded.skipped
        return index

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: SentenceTransformer | None = None,
        *,
        device: str | None = None,
        checksum: bool = True,
    ) -> VectorIndex:
        """Open an index. Vectors are mapped into memory, not read; items are read.

        Args:
            folder: What :meth:`build` wrote.
            model: The model the index was built with, or the same one with or without ``quantize``. By default the
                ``ViPyloQwen`` that the index remembers: see :mod:`sentence_vipyloqwen.index.origin`.
            device: Where the remembered model goes; by default the best at hand.
            checksum: Whether to read every file once to see that it is as it was written, a second for some gigabytes;
                their sizes are compared anyway.

        Raises:
            ValueError: If the model is another one (weights, dimension, prompts, processing), if none is given and the
                index remembers none or one that is gone, or if a file of the index is missing or damaged.
        """
        folder, named = Path(folder).resolve(), "the model given"
        if model is None:
            manifest = read_manifest(folder)
            model = load_origin(manifest.model, folder, manifest.dim, device)
            named = (
                f"the model at {place_of(manifest.model, folder)}, from which that one was loaded (it may have been "
                "trained on, or loaded with other options, such as a dtype),"
            )
        elif device is not None:
            raise ValueError(f"device is {device!r}, but a model was given: allowed is one of the two.")
        known = fingerprint(model)
        return cls(model, known, folder, _open(folder, known, checksum=checksum, named=named))

    def refresh(self) -> bool:
        """Open what the folder holds now, where another process has changed it; costs little where none has.

        Returns:
            Whether it has been changed.

        Raises:
            ValueError: As :meth:`load`; the index then stays as it was opened.
        """
        if read_manifest(self.folder) == self._now.manifest:
            return False
        self._now = _open(self.folder, self._known, checksum=False)
        return True

    # --- changes ---

    def add(self, items: Source, options: EmbedOptions | None = None) -> int:
        """Embed more items, with the prompt of the first.

        Args:
            items: As for :meth:`build`; ids that the index has are an error.
            options: As for :meth:`build`; the prompt is that of the index.

        Returns:
            How many were added.

        Raises:
            ValueError: As for :meth:`build`.
        """
        return self._add(items, options or EmbedOptions(), replaces=False)

    def update(self, items: Source, options: EmbedOptions | None = None) -> int:
        """Add items; one whose id the index has takes that item's place, in the same step.

        Args:
            items: As for :meth:`build`; they need ids of their own, or their positions are their ids.
            options: As for :meth:`build`; the prompt is that of the index.

        Returns:
            How many were added or replaced.

        Raises:
            ValueError: As for :meth:`build`.
        """
        return self._add(items, options or EmbedOptions(), replaces=True)

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
        self.refresh()
        return count

    def compact(self) -> None:
        """Take removed items off the disk, join small shards, and drop what killed runs left behind."""
        maintenance.compact_index(self.folder)
        self.refresh()

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
        check_k(k)  # before anything is embedded
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
            ValueError: As for :meth:`search`, or if the vectors are of another shape or length, or not finite.
        """
        return self._now.search(vectors, k, where=where, exact=exact, effort=effort)

    def info(self) -> dict[str, Any]:
        """What ``index.json`` holds, and where: ``folder``, ``count``, ``dim``, ``metric``, ``fingerprint``, ..."""
        return {"folder": str(self.folder), **self._now.manifest.to_dict()}

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items, in the order they came in; read at each call."""
        return self._now.items

    def get(self, id: str) -> dict[str, Any]:
        """An item by its id.

        Raises:
            ValueError: If there is none.
        """
        return self._now.get(id)

    def __len__(self) -> int:
        return self._now.manifest.count

    def __repr__(self) -> str:
        return f"VectorIndex({str(self.folder)!r}, {len(self)} items, {self._now.manifest.dim} dimensions)"

    # --- inside ---

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Lock the index, and change it from what it is now: another process may have changed it since."""
        with writing.locked(self.folder, what):
            self.refresh()
            yield

    def _add(self, items: Source, options: EmbedOptions, *, replaces: bool) -> int:
        with self._changing("update" if replaces else "add"):
            manifest = self._now.manifest
            _check_same(manifest, self._model, self.folder)
            options = _with_prompt(options, manifest.prompt_name)
            taken = frozenset() if replaces else self._now.places.keys()
            embedded = embed_items(self._model, manifest.fingerprint, items, self.folder, options, taken=taken)
            self._commit(self._grown(manifest, embedded))
        self.skipped = embedded.skipped
        return len(embedded.ids)

    def _grown(self, manifest: Manifest, embedded: Embedded) -> Manifest:
        """The manifest with more shards, and without the items whose ids they bring."""
        if again := [id for id in embedded.ids if id in self._now.places]:
            manifest = writing.delete_rows(self.folder, manifest, self._now.rows_of(again))
        shards, count = (*manifest.shards, *embedded.shards), manifest.count + len(embedded.ids)
        origin = origin_of(self._model, self.folder) or manifest.model
        return replace(manifest, shards=shards, count=count, model=origin)

    def _commit(self, manifest: Manifest) -> None:
        self._now = Snapshot(self.folder, writing.commit(self.folder, self._now.manifest, manifest))


def _with_prompt(options: EmbedOptions, prompt_name: str | None) -> EmbedOptions:
    if options.prompt_name not in (None, prompt_name):
        raise ValueError(f"prompt_name is {options.prompt_name!r}; the items of this index have {prompt_name!r}.")
    return replace(options, prompt_name=prompt_name)


def _manifest_or_none(folder: Path) -> Manifest | None:
    """What is there; an index that cannot be read is replaced whole, so nothing of it is kept."""
    try:
        return read_manifest(folder)
    except ValueError:
        return None


@contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """A folder to build in; where the build fails before anything was embedded, it goes as it came."""
    writing.check_free(folder)
    if writing.is_index(folder) and not overwrite:
        raise ValueError(f"There is an index at {folder} already: pass overwrite=True to replace it.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made and not any((folder / "shards").glob("*.parquet")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _open(folder: Path, known: Fingerprint, *, checksum: bool, named: str = "the model given") -> Snapshot:
    return Snapshot.latest(folder, lambda manifest: _check_model(manifest, known, folder, named), checksum=checksum)


def _check_model(manifest: Manifest, given: Fingerprint, folder: Path, named: str) -> None:
    built_with = manifest.fingerprint
    if not given.may_query(built_with):
        raise ValueError(
            f"The index {folder} was built with the model {built_with}; {named} is {given}. They differ in: "
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

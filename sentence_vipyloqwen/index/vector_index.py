"""Exact nearest-neighbour search by cosine over texts, images and mixed items, kept in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import faiss
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.index import store
from sentence_vipyloqwen.index.fingerprint import fingerprint
from sentence_vipyloqwen.index.items import Item, item_input, query_input, read_items
from sentence_vipyloqwen.index.store import Manifest

Query: TypeAlias = str | Path | Image.Image | np.ndarray | Mapping[str, Any]

SCORE_DECIMALS = 6
"""Scores are rounded to what a float32 cosine can tell apart, so equal vectors have equal scores."""

_TIE = 2 * 10.0**-SCORE_DECIMALS


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

    Attributes:
        folder: Where it lies on disk.
        items: The items, in the order of their vectors.

    Example::

        index = VectorIndex.build(model, [{"id": "a", "text": "hóa đơn tiền điện"}], "folder")
        index.search("electricity bill", k=1)[0].id  # "a"
    """

    def __init__(
        self,
        model: SentenceTransformer,
        vectors: faiss.Index,
        items: Sequence[Mapping[str, Any]],
        manifest: Manifest,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.items = items
        self._model = model
        self._vectors = vectors
        self._manifest = manifest

    @classmethod
    def build(
        cls,
        model: SentenceTransformer,
        items: str | Path | Iterable[Item],
        folder: str | Path,
        *,
        batch_size: int = 32,
        prompt_name: str | None = None,
        overwrite: bool = False,
        show_progress_bar: bool | None = None,
    ) -> VectorIndex:
        """Embed items and write an index.

        The folder appears when all of it is written, and an old index goes only then.

        Args:
            model: A ``ViPyloQwen`` or any ``SentenceTransformer`` that takes ``{"text": ..., "image": ...}``.
            items: Path of a JSONL file, or dicts ``{"id", "text", "image", "metadata"}``, all but a text or an image
                optional. An item without an id gets its position as id. Image paths are relative to the JSONL file
                (to the working directory for dicts); images that are no files are stored in the index.
            folder: Where the index goes.
            batch_size: Items in one forward pass.
            prompt_name: Prompt the items are embedded with; documents usually have none.
            overwrite: Whether an index in ``folder`` may be replaced.
            show_progress_bar: Of the encoding; by default as Sentence Transformers decides.

        Raises:
            ValueError: If there are no items, one is not allowed or names an image whose header is unreadable
                (``file:line`` or position), an id occurs twice, an item's vector is not finite, or ``folder`` is taken.
        """
        folder = Path(folder).resolve()
        with store.replacing(folder, overwrite=overwrite) as draft:
            rows = read_items(items, folder, draft)
            inputs = [item_input(store.with_absolute_images(row, draft)) for row in rows]
            names = [f"item {row['id']!r}" for row in rows]
            vectors = _embed(model, inputs, names, batch_size, prompt_name, show_progress_bar)
            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
            known = Manifest(fingerprint(model), dim=vectors.shape[1], count=len(rows), prompt_name=prompt_name)
            manifest = store.write(draft, index, rows, known)
        return cls(model, index, [store.with_absolute_images(row, folder) for row in rows], manifest, folder)

    @classmethod
    def load(cls, folder: str | Path, model: SentenceTransformer) -> VectorIndex:
        """Open an index.

        Args:
            folder: What :meth:`build` wrote.
            model: The model the index was built with, or the same one with or without ``quantize``.

        Raises:
            ValueError: If the model is another one (weights, dimension, prompts, processing), or if a file of the index
                is missing or damaged.
        """
        folder = store.readable(Path(folder).resolve())
        manifest = store.read_manifest(folder)
        _check_model(manifest, model, folder)
        return cls(model, store.read_vectors(folder, manifest), store.read_items(folder, manifest), manifest, folder)

    @overload
    def search(self, queries: Query, k: int = ..., prompt_name: str | None = ...) -> list[Hit]: ...

    @overload
    def search(
        self, queries: list[Query] | tuple[Query, ...], k: int = ..., prompt_name: str | None = ...
    ) -> list[list[Hit]]: ...

    def search(
        self, queries: Query | Sequence[Query], k: int = 10, prompt_name: str | None = None
    ) -> list[Hit] | list[list[Hit]]:
        """Find the items nearest to a query, or to each of several.

        Args:
            queries: One query, or a list or tuple of them. A query is a str (always text), a path of an image, a PIL
                image, an array, or ``{"text": str, "image": one or a list}``.
            k: Most hits for a query; fewer come back where the index has fewer items.
            prompt_name: Prompt of the queries, e.g. ``"ocr"``.

        Returns:
            Hits for one query, or a list of them for each of several: best first, equal scores by id.

        Raises:
            ValueError: If ``k`` < 1, or a query is empty or of no allowed kind.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k is {k!r}; allowed is a whole number from 1.")
        several = isinstance(queries, (list, tuple))
        inputs = [query_input(query, position) for position, query in enumerate(queries if several else [queries])]
        if not inputs:
            return []
        names = [f"query {position}" for position in range(len(inputs))]
        vectors = _embed(self._model, inputs, names, batch_size=32, prompt_name=prompt_name, show_progress_bar=False)
        hits = self._nearest(vectors, min(int(k), len(self)))
        return hits if several else hits[0]

    def info(self) -> dict[str, Any]:
        """What ``index.json`` holds, and where: ``folder``, ``count``, ``dim``, ``metric``, ``fingerprint``, ..."""
        return {"folder": str(self.folder), **self._manifest.to_dict()}

    def __len__(self) -> int:
        return self._manifest.count

    def __repr__(self) -> str:
        return f"VectorIndex({str(self.folder)!r}, {len(self)} items, {self._manifest.dim} dimensions)"

    def _nearest(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        return [self._rank(query, rows, k) for query, rows in zip(queries, self._candidates(queries, k), strict=True)]

    def _candidates(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Rows that may be among the best k, (queries, >= k) int64: those that tie with the k-th included."""
        count, fetch = len(self), k
        while True:
            fetch = min(fetch + 1, count)
            scores, rows = self._vectors.search(queries, fetch)
            if fetch == count or np.all(scores[:, k - 1] - scores[:, -1] > _TIE):
                return rows
            fetch *= 2

    def _rank(self, query: np.ndarray, rows: np.ndarray, k: int) -> list[Hit]:
        # A matrix product adds a row's terms in an order that depends on its place; the sum over an axis does not.
        stored = self._vectors.reconstruct_batch(rows).astype(np.float64)  # (n, dim)
        cosines = (stored * query.astype(np.float64)).sum(axis=1).clip(-1, 1).round(SCORE_DECIMALS)  # (n,)
        found = [(float(score), self.items[row]) for score, row in zip(cosines, rows, strict=True)]
        found.sort(key=lambda pair: (-pair[0], pair[1]["id"]))
        return [Hit(rank, item["id"], score, item) for rank, (score, item) in enumerate(found[:k], 1)]


def _embed(
    model: SentenceTransformer,
    inputs: list[dict[str, Any]],
    names: Sequence[str],
    batch_size: int,
    prompt_name: str | None,
    show_progress_bar: bool | None,
) -> np.ndarray:
    """Unit vectors (inputs, dim) float32, every one of them finite."""
    encoded = model.encode(
        inputs,
        prompt_name=prompt_name,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        convert_to_numpy=True,
        normalize_embeddings=True,
    )
    vectors = np.ascontiguousarray(encoded, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # (inputs, 1)
    if bad := [name for name, norm in zip(names, norms[:, 0], strict=True) if not (np.isfinite(norm) and norm > 0)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"A vector has NaN or infinite values, or is all zeros: {', '.join(bad[:5])}{more}.")
    return vectors / norms  # half precision leaves them a little off 1


def _check_model(manifest: Manifest, model: SentenceTransformer, folder: Path) -> None:
    built_with, given = manifest.fingerprint, fingerprint(model)
    if not given.may_query(built_with):
        raise ValueError(
            f"The index {folder} was built with the model {built_with}; the model given is {given}. They differ in: "
            f"{', '.join(built_with.differences(given))}. Load the model the index was built with, or build the index "
            "again with this one and overwrite=True."
        )

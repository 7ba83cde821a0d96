"""Nearest rows by cosine: candidates from FAISS, compared again by their whole vectors, ties in a stable order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from sentence_vipyloqwen.index import kinds

SCORE_DECIMALS = 6
"""Scores are rounded to what a float32 cosine can tell apart, so equal vectors have equal scores."""

QUERIES_AT_ONCE = 256
"""Queries whose candidates are compared together: bounds the memory that their vectors take."""

SPARE = 8
"""Rows fetched beyond the k-th: were the last of them part of a tie with it, all would be scanned again."""

_TIE = 2 * 10.0**-SCORE_DECIMALS

_FLOAT32_ERROR = 1e-5
"""More than a float32 inner product of unit vectors is off by."""

_PAIRS_AT_ONCE = 16_384
"""Pairs of a query and a row that are compared in float64 together, for the same reason."""


@dataclass(frozen=True)
class Candidates:
    """Rows that may be among the best of some queries.

    Attributes:
        rows: (Q, n) int64; -1 where there are fewer.
        cosines: (Q, n) float64, rounded; -inf there.
    """

    rows: np.ndarray
    cosines: np.ndarray


class NearestRows:
    """The vectors of an index, row by row through its shards.

    Args:
        parts: The shards' vectors.
        approximate: An index over the first rows, ``None`` where every vector is compared.
        factory: What it was made by.
    """

    def __init__(
        self, parts: Sequence[faiss.IndexFlat], approximate: faiss.Index | None = None, factory: str = ""
    ) -> None:
        self.parts = parts
        self.ends = np.cumsum([0, *(part.ntotal for part in parts)])
        self.approximate = approximate
        self.factory = factory

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(
        self,
        queries: np.ndarray,
        k: int,
        allowed: np.ndarray | None = None,
        *,
        exact: bool = False,
        effort: int | None = None,
    ) -> list[Candidates]:
        """The rows nearest to each query: at least the best k, and with exact search all that tie with the k-th.

        Args:
            queries: (Q, dim) float32 of unit length.
            k: Rows wanted.
            allowed: (rows,) bool, which rows may be found; ``None`` for all.
            exact: Whether to compare every vector, whatever approximate index there is.
            effort: How far the approximate index looks; see :func:`kinds.set_effort`.

        Returns:
            Candidates of up to :data:`QUERIES_AT_ONCE` queries each, in order.
        """
        found = []
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = queries[start : start + QUERIES_AT_ONCE]
            if self.approximate is None or exact:
                rows = self._compare_all(some, k, allowed)
            else:
                rows = self._shortlist(some, k, allowed, effort)
            rows = self._finalists(some, rows, k)
            found.append(Candidates(rows, self._cosines(some, rows)))
        return found

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n, dim) float32: the vectors of some rows."""
        result = np.empty((len(rows), self.parts[0].d), dtype=np.float32)
        part_of = np.searchsorted(self.ends, rows, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            result[here] = self.parts[part].reconstruct_batch(rows[here] - self.ends[part])
        return result

    def _compare_all(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> np.ndarray:
        """Every allowed row compared; those that tie with the k-th are among the result."""
        count = len(self) if allowed is None else int(allowed.sum())
        k = fetch = min(k, count)
        if not k:
            return np.empty((len(queries), 0), dtype=np.int64)
        while True:
            fetch = min(fetch + SPARE, count)
            scores, rows = self._scan(queries, range(len(self.parts)), fetch, allowed)
            if fetch == count or np.all(scores[:, k - 1] - scores[:, -1] > _TIE):
                return rows
            fetch *= 2

    def _scan(
        self, queries: np.ndarray, parts: Sequence[int], fetch: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inner products and rows of the best of some parts, (Q, fetch) each; -inf and -1 where there are fewer."""
        found = [self._scan_part(queries, part, fetch, allowed) for part in parts]
        if len(found) == 1:
            return found[0]
        scores, rows = (np.concatenate(of, axis=1) for of in zip(*found, strict=True))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :fetch]
        return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)

    def _scan_part(
        self, queries: np.ndarray, part: int, fetch: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        vectors, start, stop = self.parts[part], self.ends[part], self.ends[part + 1]
        parameters = None
        if allowed is not None and not allowed[start:stop].all():
            selector = faiss.IDSelectorBitmap(np.packbits(allowed[start:stop], bitorder="little"))
            parameters = faiss.SearchParameters(sel=selector)
        scores, rows = vectors.search(queries, int(min(fetch, stop - start)), params=parameters)
        return np.where(rows < 0, -np.inf, scores), np.where(rows < 0, -1, rows + start)

    def _shortlist(self, queries: np.ndarray, k: int, allowed: np.ndarray | None, effort: int | None) -> np.ndarray:
        """Candidates of the approximate index, and the best of the rows behind it; rows not allowed are passed over."""
        covered = self.approximate.ntotal
        behind = [part for part in range(len(self.parts)) if self.ends[part] >= covered]
        wanted = min(k, covered if allowed is None else int(allowed[:covered].sum()))
        fetch = kinds.candidates(self.factory, k)
        while fetch < covered:
            kinds.set_effort(self.approximate, fetch, effort)
            _, rows = self.approximate.search(queries, fetch)
            if allowed is not None:
                rows = np.where((rows >= 0) & allowed[rows], rows, -1)
            if ((rows >= 0).sum(axis=1) >= wanted).all():
                break
            fetch *= 4
        else:  # it does not find enough, or would have to find everything
            return self._compare_all(queries, k, allowed)
        if not behind:
            return rows
        return np.concatenate([rows, self._scan(queries, behind, k, allowed)[1]], axis=1)

    def _finalists(self, queries: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
        """(Q, n): the rows that may be among a query's best k, -1 in place of the others; by float32 products."""
        if rows.shape[1] <= k:
            return rows
        products = self._products(queries, rows)
        kth = np.partition(products, -k, axis=1)[:, -k, None]  # (Q, 1)
        return np.where(products >= kth - _FLOAT32_ERROR - _TIE, rows, -1)

    def _products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(Q, n) float32 inner products, -inf where there is no row; no vector is copied."""
        result = np.full(rows.shape, -np.inf, dtype=np.float32)
        of_part = np.empty_like(result)
        for part, start, stop in zip(self.parts, self.ends, self.ends[1:], strict=False):
            here = np.where((rows >= start) & (rows < stop), rows - start, -1)
            if (here < 0).all():
                continue
            arrays = (faiss.swig_ptr(array) for array in (of_part, queries))
            sizes = part.d, *rows.shape
            faiss.fvec_inner_products_by_idx(*arrays, part.get_xb(), faiss.swig_ptr(here), *sizes)  # -inf for -1
            np.maximum(result, of_part, out=result)
        return result

    def _cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(Q, n) float64, -inf where there is no row."""
        cosines = np.full(rows.shape, -np.inf)
        pairs = np.argwhere(rows >= 0)
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            query, place = pairs[start : start + _PAIRS_AT_ONCE].T
            # A matrix product adds a row's terms in an order that depends on its place; the sum over an axis does not.
            products = self.vectors(rows[query, place]).astype(np.float64) * queries[query]  # (pairs, dim)
            cosines[query, place] = products.sum(axis=1).clip(-1, 1).round(SCORE_DECIMALS)
        return cosines

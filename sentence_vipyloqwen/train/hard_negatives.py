"""Which of a row's candidates become its hard negatives: pure functions of arrays.

R rows, K candidates looked at for each; a content is known by a 64-bit key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

RELATIVE_MARGIN = 0.05

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Bools = NDArray[np.bool_]

_PAIR_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; makes one 64-bit key of two, which are well mixed themselves


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """Which candidates become negatives.

    Attributes:
        negatives: How many a row gets; it gets all of them or none.
        skip_top: How many of the nearest candidates are passed over.
        top: How many of the nearest candidates are looked at, those passed over included.
        sample: Take random ones of those that qualify, not the nearest.
        seed: Of `sample`; a row's draw depends on it and on the row's place in the file alone.
        relative_margin: A negative's cosine is at most ``positive - relative_margin * abs(positive)``, where positive
            is the cosine of the row's own positive; ``None`` for no such bound.
        absolute_margin: A negative's cosine is at most ``positive - absolute_margin``; ``None`` for no such bound.
        all_tasks: Take candidates from all tasks, not from the row's own.
        replace: Mine for rows that have negatives too; those that find too few keep theirs.

    Raises:
        ValueError: If a number is out of range.
    """

    negatives: int = 1
    skip_top: int = 0
    top: int = 50
    sample: bool = False
    seed: int = 0
    relative_margin: float | None = RELATIVE_MARGIN
    absolute_margin: float | None = None
    all_tasks: bool = False
    replace: bool = False

    def __post_init__(self) -> None:
        for name, least in (("negatives", 1), ("skip_top", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is a whole number from {least}.")
        if self.top < self.skip_top + self.negatives:
            raise ValueError(
                f"top is {self.top}: with skip_top={self.skip_top} and negatives={self.negatives}, allowed is a whole "
                f"number from {self.skip_top + self.negatives}."
            )
        for name in ("relative_margin", "absolute_margin"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; allowed is a number from 0, or None for no margin.")


class Belongings:
    """Which contents are positives of which anchors, over all rows of a file; about 24 bytes a row.

    Args:
        anchors: (rows,) key of each row's anchor.
        positives: (rows,) key of each row's positive.
    """

    def __init__(self, anchors: Keys, positives: Keys) -> None:
        self._pairs, first = np.unique(_pair(anchors, positives), return_index=True)
        self._anchors, self._counts = np.unique(anchors[first], return_counts=True)

    def count(self, anchors: Keys) -> Ints:
        """How many distinct positives each anchor has; 0 for what is the anchor of no row."""
        place = np.searchsorted(self._anchors, anchors).clip(max=len(self._anchors) - 1)
        return np.where(self._anchors[place] == anchors, self._counts[place], 0)

    def __call__(self, anchors: Keys, positives: Keys, candidates: Keys) -> Bools:
        """Which candidates belong to their row, and so are no negatives of it.

        They are the row's anchor, all positives of its anchor, and all positives of what is its positive.

        Args:
            anchors: (R,) keys.
            positives: (R,) keys.
            candidates: (R, K) keys.

        Returns:
            (R, K).
        """
        own = candidates == anchors[:, None]
        return own | self._holds(anchors, candidates) | self._holds(positives, candidates)

    def _holds(self, anchors: Keys, candidates: Keys) -> Bools:
        pairs = _pair(anchors[:, None], candidates)
        place = np.searchsorted(self._pairs, pairs).clip(max=len(self._pairs) - 1)
        return self._pairs[place] == pairs


def _pair(anchors: Keys, positives: Keys) -> Keys:
    return anchors * _PAIR_FACTOR + positives  # arrays wrap


def nearest(queries: Floats, blocks: Iterable[Floats], count: int) -> tuple[Floats, Ints]:
    """The nearest candidates to each query, exactly, with one block of candidates in memory.

    Args:
        queries: (Q, D).
        blocks: The C candidates, each block (some of them, D).
        count: How many; at most C.

    Returns:
        Scores (Q, count), best first, equal ones in the order of the candidates; and the candidates' places (Q, count).

    >>> nearest(np.eye(2, dtype="f4"), [np.array([[0, 1]], "f4"), np.array([[1, 0]], "f4")], 1)[1].tolist()
    [[1], [0]]
    """
    best, places = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    begin = 0
    for block in blocks:
        scores, found = faiss.knn(queries, block, min(count, len(block)), faiss.METRIC_INNER_PRODUCT)
        best, places = np.hstack([best, scores]), np.hstack([places, found + begin])  # (Q, up to 2 * count)
        order = np.lexsort((places, -best), axis=1)[:, :count]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
        begin += len(block)
    return best, places


def highest_cosines(positives: Floats, options: MiningOptions) -> Floats:
    """The highest cosine that a negative of each row may have, (R,).

    Args:
        positives: (R,) cosines of the rows' own positives.
        options: The margins.

    >>> highest_cosines(np.array([0.8, -0.4]), MiningOptions(relative_margin=0.25, absolute_margin=0.1))
    array([ 0.6, -0.5])
    """
    ceilings = np.full_like(positives, np.inf)
    if options.relative_margin is not None:
        ceilings = np.minimum(ceilings, positives - options.relative_margin * np.abs(positives))
    if options.absolute_margin is not None:
        ceilings = np.minimum(ceilings, positives - options.absolute_margin)
    return ceilings


def choose(scores: Floats, belongs: Bools, ceilings: Floats, rows: Ints, options: MiningOptions) -> tuple[Ints, Bools]:
    """Choose the negatives of R rows from their K nearest candidates.

    Args:
        scores: (R, K) cosines, best first.
        belongs: (R, K) whether a candidate belongs to the row.
        ceilings: (R,) the highest cosine allowed.
        rows: (R,) the rows' places in the file, for the draw of ``options.sample``.
        options: Which candidates become negatives.

    Returns:
        Places among the K, (R, negatives), the nearest first; and (R,) whether the row has enough of them: where not,
        its places mean nothing.

    >>> belongs = np.array([[True, False, False, False]])
    >>> choose(np.array([[0.9, 0.8, 0.7, 0.6]]), belongs, np.array([0.75]), np.array([0]), MiningOptions(negatives=2))
    (array([[2, 3]]), array([ True]))
    """
    if scores.shape[1] < options.negatives:
        return np.zeros((len(rows), options.negatives), np.int64), np.zeros(len(rows), bool)
    ranks = np.cumsum(~belongs, axis=1) - 1  # from 0, among those that do not belong to the row
    fits = ~belongs & (ranks >= options.skip_top) & (ranks < options.top) & (scores <= ceilings[:, None])
    order = _draw(rows, scores.shape[1], options.seed) if options.sample else np.arange(scores.shape[1])
    places = np.where(fits, order, np.inf).argsort(axis=1, kind="stable")[:, : options.negatives]
    return np.sort(places, axis=1), fits.sum(axis=1) >= options.negatives


def _draw(rows: Ints, count: int, seed: int) -> NDArray[np.float64]:
    """Numbers (R, count) in [0, 1); more of them begin with the same ones, so it matters not how many are looked at."""
    return np.stack([np.random.default_rng((seed, row)).random(count) for row in rows])

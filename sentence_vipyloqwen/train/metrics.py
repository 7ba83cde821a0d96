"""Measures of retrieval and of correlation, as pure functions of numpy arrays.

Retrieval measures are functions of one query's *ranks*: the places, from 1, of its relevant candidates when all
candidates are sorted by similarity. Where similarities tie, a relevant candidate is placed after every irrelevant one
that ties with it. So the ranks do not depend on the order of the candidates, the measures are a lower bound over all
ways to break the ties, and a model that maps everything to one point scores as the worst model, not as a lucky one.
(The alternative, the expectation over all ways to break ties: McSherry and Najork, "Computing Information Retrieval
Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008.)

Every query has at least one relevant candidate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


def relevant_ranks(similarities: ArrayLike, relevant: ArrayLike, tolerance: float = 0.0) -> NDArray[np.int64]:
    """Ranks of one query's relevant candidates, best first.

    Args:
        similarities: (candidates,) similarity of the query to each candidate.
        relevant: (relevant,) positions of the relevant candidates, each once.
        tolerance: Similarities this close tie; for what rounding does to equal embeddings.

    Returns:
        (relevant,) ranks from 1, strictly increasing.

    >>> relevant_ranks([0.9, 0.5, 0.7, 0.5], [0, 1])  # the second ties with the last, and is placed after it
    array([1, 4])
    """
    scores = np.asarray(similarities)
    own = np.sort(scores[np.asarray(relevant)])[::-1]  # (relevant,) best first
    irrelevant = np.sort(np.delete(scores, relevant))  # (irrelevant,) worst first
    below = np.searchsorted(irrelevant, own - tolerance, side="left")  # (relevant,) irrelevant ones below each
    return len(irrelevant) - below + np.arange(1, len(own) + 1)


def hit_at_k(ranks: ArrayLike, k: int) -> float:
    """Whether any relevant candidate is among the first `k`: 1 or 0. Its mean at k = 1 is the accuracy.

    >>> hit_at_k([2, 4], k=1), hit_at_k([2, 4], k=2)
    (0.0, 1.0)
    """
    return float(np.min(ranks) <= k)


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """The fraction of the relevant candidates that are among the first `k`.

    >>> recall_at_k([2, 4], k=3)
    0.5
    """
    return float(np.mean(np.asarray(ranks) <= k))


def reciprocal_rank(ranks: ArrayLike) -> float:
    """One over the rank of the first relevant candidate, over all candidates. Its mean is the MRR.

    >>> reciprocal_rank([2, 4])
    0.5
    """
    return 1.0 / float(np.min(ranks))


def ndcg_at_k(ranks: ArrayLike, k: int) -> float:
    """Normalised discounted cumulative gain with binary relevance: DCG@k over that of the best possible order.

    The gain at rank r is 1 / log2(1 + r) (Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques",
    ACM TOIS 20(4), 2002, in the form that trec_eval and MTEB use).

    >>> ndcg_at_k([3], k=10)
    0.5
    """
    places = np.asarray(ranks)
    ideal = np.arange(1, min(k, len(places)) + 1)
    return float(np.sum(1 / np.log2(1 + places[places <= k])) / np.sum(1 / np.log2(1 + ideal)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN for fewer than two pairs or where one side is constant.

    >>> round(spearman([1, 2, 3], [1, 4, 9]), 6)
    1.0
    """
    return float(stats.spearmanr(x, y).statistic) if _varies(x) and _varies(y) else float("nan")


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's linear correlation; NaN for fewer than two pairs or where one side is constant.

    >>> round(pearson([1, 2, 3], [2, 4, 6]), 6)
    1.0
    """
    return float(stats.pearsonr(x, y).statistic) if _varies(x) and _varies(y) else float("nan")


def _varies(x: ArrayLike) -> bool:
    return bool(np.ptp(x) > 0) if np.size(x) > 1 else False

"""Candidates against plain float64 cosines of every pair."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from sentence_vipyloqwen.index import nearest
from sentence_vipyloqwen.index.nearest import NearestRows

DIM = 64


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def vectors() -> np.ndarray:
    """(90, 64); the first seven stand again in the second and in the third part, one of them a hair away."""
    rng = np.random.default_rng(0)
    drawn = unit(rng.standard_normal((90, DIM)))
    drawn[30:37] = drawn[60:67] = drawn[:7]
    drawn[60] = unit(drawn[:1] + 1e-8)[0]
    return drawn


def parts_of(vectors: np.ndarray, sizes: tuple[int, ...] = (30, 30, 30)) -> list[faiss.IndexFlat]:
    parts = []
    for some in np.split(vectors, np.cumsum(sizes)[:-1]):
        part = faiss.IndexFlatIP(DIM)
        part.add(some)
        parts.append(part)
    return parts


@pytest.mark.parametrize("k", [1, 2, 3, 10, 90, 200])
@pytest.mark.parametrize("exact", [True, False])
def test_the_best_k_are_found_with_all_that_tie_with_the_last(vectors: np.ndarray, k: int, exact: bool) -> None:
    """An approximate index that finds everything: what is left out then, comparing leaves out."""
    everything = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    everything.hnsw.efConstruction = everything.hnsw.efSearch = 200
    everything.add(vectors)
    rows = NearestRows(parts_of(vectors), everything, "SQ8")
    queries = np.concatenate([vectors[:7], unit(np.random.default_rng(1).standard_normal((3, DIM)))])
    (found,) = rows.find(queries, k, exact=exact)
    cosines = (queries.astype(np.float64) @ vectors.astype(np.float64).T).round(nearest.SCORE_DECIMALS)
    for of_query, rows_found, scores in zip(cosines, found.rows, found.cosines, strict=True):
        real = rows_found >= 0
        assert scores[real].tolist() == of_query[rows_found[real]].tolist() and (scores[~real] == -np.inf).all()
        best = np.sort(of_query)[::-1][:k]
        wanted = np.flatnonzero(of_query >= best[-1]) if exact else np.flatnonzero(of_query > best[-1])
        assert set(wanted) <= set(rows_found[real])
        assert np.sort(scores)[::-1][:k].tolist() == best.tolist()


def test_only_those_that_may_be_among_the_best_are_compared_again(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = NearestRows(parts_of(vectors))
    compared: list[int] = []
    monkeypatch.setattr(rows, "vectors", lambda of: compared.extend(of.tolist()) or NearestRows.vectors(rows, of))
    rows.find(vectors[:1], 2, exact=True)
    assert sorted(compared) == [0, 30, 60]


def test_pairs_are_compared_in_parts(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = NearestRows(parts_of(vectors, (50, 40)))
    (whole,) = rows.find(vectors[:9], 20)
    monkeypatch.setattr(nearest, "_PAIRS_AT_ONCE", 7)
    (in_parts,) = rows.find(vectors[:9], 20)
    assert np.array_equal(whole.rows, in_parts.rows) and np.array_equal(whole.cosines, in_parts.cosines)

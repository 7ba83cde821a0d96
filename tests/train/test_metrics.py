from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sentence_vipyloqwen.train.metrics import (
    hit_at_k,
    ndcg_at_k,
    pearson,
    recall_at_k,
    reciprocal_rank,
    relevant_ranks,
    spearman,
)

# Few distinct values, so that ties are common.
similarities = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6)


@st.composite
def queries(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    scores = draw(similarities)
    relevant = draw(st.sets(st.integers(0, len(scores) - 1), min_size=1))
    return scores, sorted(relevant)


def test_ranks_without_ties_are_places_in_the_sorted_list():
    assert relevant_ranks([0.1, 0.9, 0.5, 0.7], [2]).tolist() == [3]
    assert relevant_ranks([0.1, 0.9, 0.5, 0.7], [0, 1]).tolist() == [1, 4]


def test_a_tie_with_an_irrelevant_candidate_counts_against_the_relevant_one():
    assert relevant_ranks([0.5, 0.5, 0.5], [0]).tolist() == [3]
    assert relevant_ranks([0.5, 0.5, 0.5], [2]).tolist() == [3]


def test_relevant_candidates_that_tie_among_themselves_take_consecutive_ranks():
    assert relevant_ranks([0.5, 0.5, 0.1], [0, 1]).tolist() == [1, 2]


def test_similarities_within_the_tolerance_tie():
    scores = np.float32([0.5, 0.5 - 1e-7, 0.4])
    assert relevant_ranks(scores, [0]).tolist() == [1]
    assert relevant_ranks(scores, [0], tolerance=1e-6).tolist() == [2]


@settings(deadline=None)
@given(queries())
def test_ranks_are_those_of_the_worst_order_among_ties(query: tuple[list[float], list[int]]):
    scores, relevant = query
    sorted_orders = (
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:], strict=False))
    )
    worst = max(sorted(order.index(place) + 1 for place in relevant) for order in sorted_orders)
    assert relevant_ranks(scores, relevant).tolist() == worst


@settings(deadline=None)
@given(queries(), st.randoms())
def test_ranks_do_not_depend_on_the_order_of_the_candidates(query, random):
    scores, relevant = query
    order = list(range(len(scores)))
    random.shuffle(order)
    moved = relevant_ranks([scores[place] for place in order], [order.index(place) for place in relevant])
    assert moved.tolist() == relevant_ranks(scores, relevant).tolist()


def test_measures_in_closed_form():
    ranks = np.array([2, 5])
    assert (hit_at_k(ranks, 1), hit_at_k(ranks, 2)) == (0, 1)
    assert (recall_at_k(ranks, 1), recall_at_k(ranks, 2), recall_at_k(ranks, 5)) == (0, 0.5, 1)
    assert reciprocal_rank(ranks) == 0.5
    ideal = 1 + 1 / math.log2(3)
    assert ndcg_at_k(ranks, 10) == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / ideal)
    assert ndcg_at_k(ranks, 2) == pytest.approx(1 / math.log2(3) / ideal)
    assert ndcg_at_k(ranks, 1) == 0


def test_the_ideal_of_ndcg_is_cut_at_k():
    assert ndcg_at_k(np.arange(1, 21), 10) == 1


@settings(deadline=None)
@given(st.sets(st.integers(1, 30), min_size=1), st.integers(1, 29))
def test_measures_lie_in_0_1_and_grow_with_k(places: set[int], k: int):
    ranks = sorted(places)
    assert 0 <= recall_at_k(ranks, k) <= recall_at_k(ranks, k + 1) <= 1
    assert 0 <= hit_at_k(ranks, k) <= hit_at_k(ranks, k + 1) <= 1
    assert 0 <= ndcg_at_k(ranks, k) <= 1 + 1e-12
    assert recall_at_k(ranks, k) <= hit_at_k(ranks, k)


def test_correlations_in_closed_form():
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([0, 1, 2], [0, 1, 5]) == pytest.approx(5 / math.sqrt(28))
    # Mean ranks for the tie: (1, 2.5, 2.5, 4) against (1, 2, 3, 4).
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


@pytest.mark.parametrize("correlation", [spearman, pearson])
@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [1.0]), ([1.0, 1.0], [0.0, 1.0]), ([0.0, 1.0], [2.0, 2.0])])
def test_an_undefined_correlation_is_nan_without_a_warning(correlation, x, y, recwarn):
    assert math.isnan(correlation(x, y))
    assert not recwarn

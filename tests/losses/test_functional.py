"""Closed-form values and gradients of each term."""

from __future__ import annotations

import math

import pytest
import torch

from sentence_vipyloqwen.losses import functional as L

NEVER = -torch.inf


def test_info_nce_of_equal_similarities_is_log_of_the_candidates() -> None:
    forward = torch.zeros(2, 3)
    backward = torch.tensor([[NEVER, 0.0], [0.0, NEVER]])
    expected = (math.log(4) + math.log(2)) / 2
    torch.testing.assert_close(L.info_nce(forward, backward, torch.zeros(2), 0.07), torch.full((2,), expected))


def test_info_nce_is_the_cross_entropy_it_says() -> None:
    forward, backward, positive = torch.tensor([[0.1, -0.4]]), torch.tensor([[0.2]]), torch.tensor([0.6])
    to_candidates = -math.log(math.exp(6) / (math.exp(6) + math.exp(1) + math.exp(-4)))
    to_anchors = -math.log(math.exp(6) / (math.exp(6) + math.exp(2)))
    expected = (to_candidates + to_anchors) / 2
    assert L.info_nce(forward, backward, positive, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_without_negatives_is_zero() -> None:
    assert L.info_nce(torch.full((1, 3), NEVER), torch.full((1, 1), NEVER), torch.tensor([0.3]), 0.07).item() == 0


def test_score_mse() -> None:
    values = L.score_mse(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 0.5, math.nan]))
    assert values.tolist() == [0, 0.25, 0]


def test_cosine_distance() -> None:
    torch.testing.assert_close(L.cosine_distance(torch.tensor([1.0, -1.0, 0.25])), torch.tensor([0.0, 2.0, 0.75]))


def test_triplet_margin() -> None:
    positive, negative = torch.tensor([0.9, 0.5, 0.5, 0.5]), torch.tensor([0.1, 0.4, 0.6, NEVER])
    torch.testing.assert_close(L.triplet_margin(positive, negative, 0.2), torch.tensor([0.0, 0.1, 0.3, 0.0]))


def test_the_published_triplet_divides_similarities_by_the_temperature() -> None:
    value = L.triplet_margin(torch.tensor([0.5]), torch.tensor([0.51]), 0.2, scale=1 / 0.05)
    assert value.item() == pytest.approx(0.2 + 0.01 / 0.05, rel=1e-4)


def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    forward, backward = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positive, negative = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scores = torch.tensor([0.1, math.nan, 1.0, 0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, b, p: L.info_nce(f, b, p, 0.3), (forward, backward, positive))
    assert torch.autograd.gradcheck(lambda p: L.score_mse(p, scores), positive)
    assert torch.autograd.gradcheck(L.cosine_distance, positive)
    assert torch.autograd.gradcheck(lambda p, n: L.triplet_margin(p, n, 0.2, 1.7), (positive, negative))


def test_masked_candidates_leave_finite_gradients() -> None:
    positive = torch.tensor([0.1, 0.2], requires_grad=True)
    forward = torch.tensor([[NEVER, NEVER], [0.3, NEVER]])
    negative = torch.tensor([NEVER, 0.3])
    total = L.info_nce(forward, forward, positive, 0.07).sum() + L.triplet_margin(positive, negative, 0.2).sum()
    total.backward()
    assert positive.grad is not None
    assert positive.grad.isfinite().all()
    assert positive.grad[0] == 0

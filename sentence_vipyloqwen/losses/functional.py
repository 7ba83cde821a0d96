"""The terms of the routed loss as pure tensor functions: one value a row, no reduction, no model.

B rows, M candidates (positives first, then any explicit negatives), N rows that may be negatives. Similarities are
cosines.

Source of the method: EraX-AI, viPyloQwen README and paper drafts (2025). InfoNCE: van den Oord et al. 2018,
https://arxiv.org/abs/1807.03748; its symmetric form: Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = float("-inf")


def info_nce(forward: Tensor, backward: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE of each row: the mean of anchor-to-candidates and positive-to-anchors cross entropy.

    Args:
        forward: (B, M) similarities of each anchor to its negatives, ``-inf`` where a candidate is not its negative.
        backward: (B, N) similarities of each positive to the other anchors, ``-inf`` likewise.
        positive: (B,) similarity of each anchor to its own positive.
        temperature: Divides the similarities.

    Returns:
        (B,) losses; 0 for a row without negatives.

    >>> forward, positive = torch.tensor([[float("-inf"), 0.0]]), torch.tensor([0.0])
    >>> info_nce(forward, forward, positive, 0.07)  # one negative as near as the positive: log 2
    tensor([0.6931])
    """
    losses = [_cross_entropy(negatives, positive, temperature) for negatives in (forward, backward)]
    return (losses[0] + losses[1]) / 2


def _cross_entropy(negatives: Tensor, positive: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([positive[:, None], negatives], dim=1) / temperature  # (B, 1 + M)
    return logits.logsumexp(dim=1) - logits[:, 0]


def score_mse(positive: Tensor, scores: Tensor) -> Tensor:
    """Squared error of (cos + 1) / 2 against the score of a pair.

    Args:
        positive: (B,) similarity of each anchor to its positive.
        scores: (B,) scores in [0, 1], NaN where there is none.

    Returns:
        (B,) losses; 0 for a row without a score.

    >>> score_mse(torch.tensor([0.0, 1.0]), torch.tensor([0.5, float("nan")]))
    tensor([0., 0.])
    """
    known = ~scores.isnan()
    return ((positive + 1) / 2 - scores.where(known, 0)).square() * known


def cosine_distance(positive: Tensor) -> Tensor:
    """1 - cos of each anchor to its positive, (B,)."""
    return 1 - positive


def triplet_margin(positive: Tensor, negative: Tensor, margin: Tensor | float, scale: float = 1.0) -> Tensor:
    """max(0, margin - scale * (cos to the positive - cos to the negative)).

    Args:
        positive: (B,) similarity of each anchor to its positive.
        negative: (B,) similarity of each anchor to its negative, ``-inf`` where it has none.
        margin: A margin, or one for each row (B,).
        scale: 1 for plain cosine; 1 / temperature for the published variant.

    Returns:
        (B,) losses; 0 for a row without a negative.

    >>> triplet_margin(torch.tensor([0.5, 0.5]), torch.tensor([0.4, float("-inf")]), 0.2)
    tensor([0.1000, 0.0000])
    """
    exists = negative > _NEVER
    violation = margin - scale * (positive - negative.where(exists, 0))
    return violation.relu() * exists

"""The terms of the routed loss as pure tensor functions: one value a row, no reduction, no model.

B rows, M candidates (the B positives first, then any explicit negatives). Similarities are cosines.

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
        backward: (B, B) similarities of each positive to the other anchors, ``-inf`` likewise.
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


def negatives_mask(
    tasks: Tensor, anchor_keys: Tensor, positive_keys: Tensor, negative_keys: Tensor, same_task: bool
) -> tuple[Tensor, Tensor]:
    """Which candidates are true negatives of which rows.

    Two rows whose anchors are equal, whose positives are equal, or where one's anchor is the other's positive, are
    never each other's negatives; nor is a candidate that equals the row's anchor, or a positive of any row whose anchor
    is the same.

    Args:
        tasks: (B,) task of each row.
        anchor_keys: (B,) content keys of the anchors.
        positive_keys: (B,) content keys of the positives.
        negative_keys: (B, N) content keys of the explicit negatives.
        same_task: Whether rows of other tasks are left out; a row's own explicit negatives always count.

    Returns:
        (B, B) mask of anchors over the rows' positives, and (B, N * B) mask of anchors over explicit negatives, those
        of column 0 first.
    """
    comparable = tasks[:, None] == tasks[None, :] if same_task else torch.ones_like(tasks[:, None] == tasks[None, :])
    same_anchor = anchor_keys[:, None] == anchor_keys[None, :]
    crossed = anchor_keys[:, None] == positive_keys[None, :]
    equal = same_anchor | (positive_keys[:, None] == positive_keys[None, :]) | crossed | crossed.T
    candidates = torch.cat([positive_keys, negative_keys.T.reshape(-1)])  # (B + N * B,)
    is_positive_of = positive_keys[:, None] == candidates  # (B, B + N * B)
    known = (same_anchor.float() @ is_positive_of.float() > 0) | (candidates == anchor_keys[:, None])
    rows = len(tasks)
    return comparable & ~equal & ~known[:, :rows], comparable.repeat(1, negative_keys.shape[1]) & ~known[:, rows:]

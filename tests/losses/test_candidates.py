"""Who is whose negative, and how the rows of several ranks lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sentence_vipyloqwen.losses.candidates import Candidates, Layout
from sentence_vipyloqwen.losses.rows import BatchRows


def candidates(
    tasks: Sequence[int], anchors: Sequence[int], positives: Sequence[int], negatives: Sequence[Sequence[int]] = ()
) -> Candidates:
    """Rows of one process; negatives a list for each row."""
    rows = len(tasks)
    negative_keys = torch.tensor(negatives).view(rows, -1) if negatives else torch.empty(rows, 0, dtype=torch.long)
    of_rows = BatchRows(
        torch.tensor(tasks), torch.tensor(anchors), torch.tensor(positives), negative_keys, torch.zeros(rows)
    )
    return Candidates.of(of_rows, Layout(((rows, 2 + negative_keys.shape[1]),), 0))


def test_equal_content_is_never_a_negative() -> None:
    rows = candidates([0] * 5, [1, 1, 2, 3, 9], [11, 12, 12, 2, 13])
    forward, _, backward = rows.masks(same_task=True)
    expected = torch.ones(5, 5, dtype=torch.bool)
    expected.fill_diagonal_(False)
    for left, right in (
        (0, 1),
        (1, 2),
        (2, 3),
    ):  # equal anchors; equal positives; anchor of one = positive of the other
        expected[left, right] = expected[right, left] = False
    expected[0, 2] = False  # row 2's positive is, in row 1, a positive of row 0's anchor
    assert torch.equal(forward, expected)
    assert torch.equal(backward, expected.T)


def test_rows_of_another_task_are_negatives_only_on_request() -> None:
    rows = candidates([0, 0, 1], [1, 2, 3], [11, 12, 13])
    assert rows.masks(same_task=True)[0].sum(1).tolist() == [1, 1, 0]
    assert rows.masks(same_task=False)[0].sum(1).tolist() == [2, 2, 2]


def test_an_explicit_negative_equal_to_the_rows_own_content_is_left_out() -> None:
    # Row 0's first equals its positive; row 1's second is row 0's anchor.
    rows = candidates([0, 0], [1, 2], [11, 12], [[11, 20], [21, 1]])
    assert rows.masks(same_task=True)[1].tolist() == [[False, True, True, False], [True, True, True, True]]
    assert rows.belongs().tolist() == [[True, False, True, False], [False, True, False, True]]


def test_an_explicit_negative_that_is_a_positive_of_an_equal_anchor_is_left_out() -> None:
    rows = candidates([0] * 3, [1, 1, 2], [11, 12, 13], [[20], [21], [12]])  # row 2's is row 1's positive, so row 0's
    assert rows.masks(same_task=True)[1].tolist() == [[True, True, False], [True, True, False], [True, True, True]]


def test_keys_of_any_size_are_told_apart() -> None:
    large = 2**62
    rows = candidates([0, 0], [large, -large], [large + 1, 1 - large])
    assert rows.masks(same_task=True)[0].tolist() == [[False, True], [True, False]]


def test_each_rank_sees_the_masks_of_one_process() -> None:
    """Two ranks, of 2 rows and of 1 row; the second has explicit negatives."""
    whole = candidates([0, 0, 0], [1, 2, 1], [11, 12, 13])
    negatives = torch.tensor([20, 12]), torch.tensor([2, 2])
    forward, explicit, backward = ([], [], [])
    for own in (slice(0, 2), slice(2, 3)):
        seen = Candidates(whole.tasks, whole.anchor_keys, whole.positive_keys, *negatives, own)
        for parts, mask in zip((forward, explicit, backward), seen.masks(same_task=True), strict=True):
            parts.append(mask)
    expected = whole.masks(same_task=True)
    assert torch.equal(torch.cat(forward), expected[0])
    assert torch.equal(torch.cat(backward), expected[2])
    assert torch.cat(explicit).tolist() == [[True, True], [True, False], [True, True]]


def test_a_layout_of_unlike_ranks() -> None:
    layout = Layout(((2, 2), (1, 4)), rank=1)
    assert layout.own == slice(2, 3)
    assert layout.rows_per_rank == 1.5
    assert layout.negative_rows == [2, 2]


def test_a_process_by_itself_gathers_its_own() -> None:
    columns: list[Tensor] = [torch.arange(4.0).view(2, 2) + 10 * column for column in range(4)]
    layout = Layout.of(columns, gather=True)
    anchors, positives, negatives = layout.gather(columns)
    assert torch.equal(anchors, columns[0])
    assert torch.equal(positives, columns[1])
    assert torch.equal(negatives, torch.cat(columns[2:]))
    assert layout.negative_rows == [0, 1, 0, 1]

"""Whom a row is contrasted with: the rows and explicit negatives of this process, or of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor
from torch.nn import functional as F

from sentence_vipyloqwen.losses.ranks import of_all_ranks
from sentence_vipyloqwen.losses.rows import BatchRows

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Layout:
    """How the columns of all ranks lie when each rank lays its own one behind the other.

    Ranks may differ in rows and in columns: one has explicit negatives, another has none. One tensor a rank is
    exchanged, padded to the longest, so that every rank takes part in the same collectives, forward and backward.

    Attributes:
        sizes: Rows and columns of each rank.
        rank: Which of them this process is.
    """

    sizes: tuple[tuple[int, int], ...]
    rank: int

    @classmethod
    def of(cls, columns: Sequence[Tensor], gather: bool) -> Layout:
        """The layout of (B, ...) columns; with ``gather`` that of all ranks, which all must ask for it."""
        size = (len(columns[0]), len(columns))
        if not gather:
            return cls((size,), 0)
        sizes = of_all_ranks(torch.tensor(size, device=columns[0].device))
        return cls(tuple((rows, count) for rows, count in sizes.tolist()), get_rank())

    @property
    def own(self) -> slice:
        """This rank's rows among those of all."""
        start = sum(rows for rows, _ in self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank][0])

    @property
    def rows_per_rank(self) -> float:
        """Rows of a rank on average. A rank's sum over its own rows, divided by this, is its loss: the mean of those
        over the ranks, and so the mean of their gradients, is that of one process with all rows."""
        return sum(rows for rows, _ in self.sizes) / len(self.sizes)

    @property
    def negative_rows(self) -> list[int]:
        """(M,) for each explicit negative, the row that it belongs to."""
        places, start = [], 0
        for rows, columns in self.sizes:
            places += list(range(start, start + rows)) * (columns - 2)
            start += rows
        return places

    def gather(self, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The anchors, positives and explicit negatives of all ranks, with gradients where they are floats.

        Args:
            columns: This rank's columns, (B, ...) each.

        Returns:
            (N, ...) anchors, (N, ...) positives and (M, ...) negatives; of a rank, those of its first column first.
        """
        parts = self._exchange(torch.cat(list(columns)))
        ranks = [
            part[: rows * count].unflatten(0, (count, rows))  # (columns, rows, ...)
            for part, (rows, count) in zip(parts, self.sizes, strict=True)
        ]
        anchors, positives = (torch.cat([rank[column] for rank in ranks]) for column in (0, 1))
        return anchors, positives, torch.cat([rank[2:].flatten(0, 1) for rank in ranks])

    def _exchange(self, own: Tensor) -> Sequence[Tensor]:
        if len(self.sizes) == 1:
            return [own]
        longest = max(rows * count for rows, count in self.sizes)
        padded = F.pad(own, (0, 0) * (own.ndim - 1) + (0, longest - len(own)))
        gather = all_gather_with_grad if own.is_floating_point() else all_gather
        return gather(padded.contiguous()).split(longest)


@dataclass(frozen=True)
class Candidates:
    """What is known of N rows and M explicit negatives beside their embeddings.

    Attributes:
        tasks: (N,) position of each row's task in ``ALL_TASKS``.
        anchor_keys: (N,) content keys.
        positive_keys: (N,) content keys.
        negative_keys: (M,) content keys.
        negative_rows: (M,) the row that each explicit negative belongs to.
        own: The B rows whose losses are asked for.
    """

    tasks: Tensor
    anchor_keys: Tensor
    positive_keys: Tensor
    negative_keys: Tensor
    negative_rows: Tensor
    own: slice

    @classmethod
    def of(cls, rows: BatchRows, layout: Layout) -> Candidates:
        """Those of a layout; ``rows`` are this rank's own."""
        keys = [rows.anchor_keys, rows.positive_keys, *rows.negative_keys.T]
        described = [torch.stack([column, rows.tasks], dim=1) for column in keys]  # (B, 2) each
        anchors, positives, negatives = layout.gather(described)
        owners = torch.tensor(layout.negative_rows, dtype=torch.int64, device=anchors.device)
        return cls(anchors[:, 1], anchors[:, 0], positives[:, 0], negatives[:, 0], owners, layout.own)

    def masks(self, same_task: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Which candidates are true negatives of which own rows.

        Two rows whose anchors are equal, whose positives are equal, or where one's anchor is the other's positive, are
        never each other's negatives; nor is a candidate that equals the row's anchor, or a positive of any row whose
        anchor is the same.

        Args:
            same_task: Whether rows of other tasks are left out; a row's own explicit negatives always count.

        Returns:
            Masks of own anchors over all positives (B, N), of own anchors over all explicit negatives (B, M), and of
            own positives over all anchors (B, N).
        """
        # Dense numbers for keys, so that (anchor, positive) pairs are numbers as well.
        keys = torch.cat([self.anchor_keys, self.positive_keys, self.negative_keys])
        known, dense = keys.unique(return_inverse=True)
        rows = len(self.tasks)
        anchors, positives, negatives = dense.split([rows, rows, len(self.negative_keys)])
        own_anchors, own_positives = anchors[self.own, None], positives[self.own, None]  # (B, 1)
        pairs = anchors * len(known) + positives

        def is_positive(anchor: Tensor, candidate: Tensor) -> Tensor:
            return torch.isin(anchor * len(known) + candidate, pairs)

        comparable = self._comparable(same_task)
        equal = (own_anchors == anchors) | (own_positives == positives)
        equal |= (own_anchors == positives) | (own_positives == anchors)
        forward = comparable & ~equal & ~is_positive(own_anchors, positives)
        backward = comparable & ~equal & ~is_positive(anchors, own_positives)
        explicit = comparable[:, self.negative_rows] & ~is_positive(own_anchors, negatives) & (own_anchors != negatives)
        return forward, explicit, backward

    def _comparable(self, same_task: bool) -> Tensor:
        same = self.tasks[self.own, None] == self.tasks  # (B, N)
        return same if same_task else torch.ones_like(same)

    def belongs(self) -> Tensor:
        """(B, M) which explicit negatives are whose own."""
        own = torch.arange(self.own.start, self.own.stop, device=self.tasks.device)
        return own[:, None] == self.negative_rows

"""Named loss terms that can be scaled and added, as loss modifiers such as ``MatryoshkaLoss`` do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LossTerms(dict[str, Tensor]):
    """Term name -> scalar; the loss is the sum of the values.

    >>> import torch
    >>> terms = LossTerms({"ocr/info_nce": torch.tensor(1.0)})
    >>> (0.0 + 2 * terms) + terms
    {'ocr/info_nce': tensor(3.)}
    """

    def __mul__(self, factor: float | Tensor) -> LossTerms:
        return LossTerms({name: value * factor for name, value in self.items()})

    __rmul__ = __mul__

    def __add__(self, other: LossTerms | float) -> LossTerms:
        if not isinstance(other, LossTerms):
            if other != 0:
                raise ValueError(f"Loss terms can be added to loss terms of the same names, not to {other!r}.")
            return self
        if other.keys() != self.keys():
            raise ValueError(f"Loss terms differ in their names: {sorted(self)} and {sorted(other)}.")
        return LossTerms({name: value + other[name] for name, value in self.items()})

    __radd__ = __add__

    def with_idle(self, idle: Sequence[Tensor]) -> LossTerms:
        """The same values on a graph that has these embeddings too: they take part in the backward, with gradient 0."""
        if not idle:
            return self
        name, value = next(iter(self.items()))
        nothing = torch.stack([embedding.sum() for embedding in idle]).sum() * 0
        return LossTerms({**self, name: value + nothing})

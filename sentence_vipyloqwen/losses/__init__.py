"""The prefix-routed composite loss."""

from __future__ import annotations

from sentence_vipyloqwen.losses.prefix_routed import PrefixRoutedLoss

__all__ = ["PrefixRoutedLoss"]

"""The prefix-routed composite loss, plain and by gradient caching."""

from __future__ import annotations

from sentence_vipyloqwen.losses.cached_prefix_routed import CachedPrefixRoutedLoss
from sentence_vipyloqwen.losses.prefix_routed import PrefixRoutedLoss

__all__ = ["CachedPrefixRoutedLoss", "PrefixRoutedLoss"]

"""Qwen2-VL's patch embedding as a matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Module):
    """Stands in for transformers' ``PatchEmbed`` in the vision tower, over the same parameters under the same name.

    A convolution whose stride is its kernel is a product of flattened patches with flattened filters. Of a still image
    both frames of a patch are equal, so W0 x + W1 x = (W0 + W1) x: half the arithmetic, and no frame is stored twice.
    The sum is taken and multiplied in float32 at least, for rounded to half precision it would be less exact than the
    convolution.

    Where another module stands in the convolution's place, such as peft's adapter of it, that one is called, with the
    frame repeated.

    Args:
        proj: The convolution: (E, C, frames, side, side), no overlap.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches.

        Args:
            patches: (P, C * side * side) one frame each, or (P, C * frames * side * side) as transformers stores them.

        Returns:
            (P, E), of the dtype of the filters, or of autocast.
        """
        weight = self.proj.weight  # (E, C, frames, side, side)
        if type(self.proj) is not nn.Conv3d:
            frames = patches.unflatten(1, (weight.shape[1], -1, *weight.shape[3:]))  # (P, C, 1 or frames, side, side)
            return self.proj(frames.expand(-1, -1, weight.shape[2], -1, -1).to(weight.dtype)).flatten(1)
        if patches.shape[1] * weight.shape[2] == weight[0].numel():
            return self._embed_still(patches)
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)

    def _embed_still(self, patches: Tensor) -> Tensor:
        weight, bias, device = self.proj.weight, self.proj.bias, patches.device.type
        wide = torch.promote_types(weight.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            summed = weight.to(wide).sum(dim=2).flatten(1)  # (E, C * side * side)
            return F.linear(patches.to(wide), summed, None if bias is None else bias.to(wide)).to(dtype)

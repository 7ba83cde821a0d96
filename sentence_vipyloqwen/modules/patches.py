"""From an upright RGB image to uint8 patches, and from those to what Qwen2-VL's vision tower reads.

An image stays bytes until it is on the device: (P, 588) uint8 in place of transformers' (P, 1176) float32 is an eighth
of the memory. Every number (patch size, pixel budget, mean, ...) is the image processor's own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

# The other module that has it imports torchvision.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sentence_vipyloqwen.modules.images import source_identity
from sentence_vipyloqwen.modules.inputs import AnySource

CHANNELS = 3
SPARE_BYTES = 64 * 2**20
"""What a cache holds beyond the last batch: 22 images of the largest size by default."""

Grid = tuple[int, int]
"""Patch rows and patch columns of an image after resizing."""


def grid_of(size: tuple[int, int], processor: Qwen2VLImageProcessorPil) -> Grid:
    """Patch rows and columns that an image will have.

    Args:
        size: Width and height of the upright image in pixels.
        processor: The image processor; its ``size`` is the pixel budget.

    Raises:
        ValueError: If the processor does not resize and the size does not suit it.
    """
    width, height = size
    factor = processor.patch_size * processor.merge_size
    if processor.do_resize:
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        height, width = smart_resize(height, width, factor, min_pixels=low, max_pixels=high)
    elif height % factor or width % factor:
        raise ValueError(f"an image measures {width}x{height}; without resizing, multiples of {factor} are allowed")
    return height // processor.patch_size, width // processor.patch_size


def resized_size(grid: Grid, processor: Qwen2VLImageProcessorPil) -> tuple[int, int]:
    """Width and height in pixels of an image with this grid."""
    return grid[1] * processor.patch_size, grid[0] * processor.patch_size


def cut(image: Image.Image, grid: Grid, processor: Qwen2VLImageProcessorPil) -> Tensor:
    """Resize an image to a grid and cut it into patches.

    Args:
        image: An upright RGB image.
        grid: What :func:`grid_of` says of it.
        processor: The image processor.

    Returns:
        (rows * columns, 3 * 14 * 14) uint8, not normalised; a patch is channels, then rows, then columns of pixels. The
        patches of a block of 2 x 2, which the model merges to one token, stand next to each other.
    """
    size = resized_size(grid, processor)
    if image.size != size:
        image = image.resize(size, resample=processor.resample)
    (rows, columns), patch, merge = grid, processor.patch_size, processor.merge_size
    pixels = np.asarray(image).reshape(rows // merge, merge, patch, columns // merge, merge, patch, CHANNELS)
    blocks = pixels.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, 2, 2, channel, 14, 14
    return torch.from_numpy(np.ascontiguousarray(blocks).reshape(rows * columns, -1))


def to_pixel_values(patches: Tensor, processor: Qwen2VLImageProcessorPil, frames: int | None = None) -> Tensor:
    """Turn uint8 patches into the image processor's ``pixel_values``, on the patches' own device.

    Args:
        patches: (P, 588) uint8, as :func:`cut` gives them.
        processor: The image processor.
        frames: How often each frame stands in the result; by default as often as the vision tower reads it, twice.

    Returns:
        (P, frames * 588) float32, rescaled and normalised.
    """
    values = patches.view(len(patches), CHANNELS, -1).float()
    if processor.do_rescale:
        values /= 1 / processor.rescale_factor  # 255 is exact in float32, 1 / 255 is not
    if processor.do_normalize:
        values -= _by_channel(processor.image_mean, values)
        values /= _by_channel(processor.image_std, values)
    repeated = values.unsqueeze(2).expand(-1, -1, frames or processor.temporal_patch_size, -1)  # (P, 3, frames, 196)
    return repeated.reshape(len(patches), -1)


def _by_channel(numbers: float | list[float], values: Tensor) -> Tensor:
    return torch.tensor(numbers, device=values.device, dtype=values.dtype).reshape(-1, 1)  # (3, 1), or (1, 1)


@dataclass(frozen=True)
class CutImage:
    """An image, ready for a batch.

    Attributes:
        source: Where it came from; held, so that no other object takes its ``id()``.
        key: Content key of its pixels before resizing; never 0.
        patches: (P, 588) uint8.
    """

    source: AnySource
    key: int
    patches: Tensor


class ImagePatchCache:
    """The images of the last batch and some from before, so that a later one need not open them again.

    Whatever the number of batches, it holds one batch's images at most, and of earlier ones those used last. One cache
    serves one pass over inputs that do not change meanwhile: an image is known by its path or its ``id()``, not by its
    content.

    Args:
        spare_bytes: The most that images from before the last batch may take.
    """

    def __init__(self, spare_bytes: int = SPARE_BYTES) -> None:
        self.spare_bytes = spare_bytes
        self._images: OrderedDict[str | int, CutImage] = OrderedDict()  # the one used last stands last
        self._bytes = 0

    def get(self, source: AnySource) -> CutImage | None:
        """An image that is still here, or ``None``."""
        return self._images.get(source_identity(source))

    def keep(self, images: Mapping[str | int, CutImage]) -> None:
        """Keep a batch's images, by :func:`source_identity`, and of those before it what there is room for."""
        for identity, image in images.items():
            if identity in self._images:
                self._bytes -= self._images.pop(identity).patches.nbytes
            self._images[identity] = image
        of_batch = sum(image.patches.nbytes for image in images.values())
        self._bytes += of_batch
        while self._bytes > self.spare_bytes + of_batch:
            self._bytes -= self._images.popitem(last=False)[1].patches.nbytes

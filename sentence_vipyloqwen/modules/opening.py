"""The images of a batch, each looked at once: fetched and measured for the rows, opened and cut for the features.

Those of a batch that keeps them closed are known by their grids until :func:`opened_patches` is asked for some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from sentence_vipyloqwen.modules.closed_images import CLOSED_IMAGES, ROW_INDEX, ClosedImages, RowImages
from sentence_vipyloqwen.modules.features import named_image, of_images
from sentence_vipyloqwen.modules.images import describe, fetch, image_key, image_size, open_image, source_identity
from sentence_vipyloqwen.modules.inputs import AnySource, ParsedInput
from sentence_vipyloqwen.modules.patches import CutImage, Grid, ImagePatchCache, cut, grid_of, resized_size
from sentence_vipyloqwen.modules.spool import Spool


def measured(
    inputs: Sequence[ParsedInput], processor: Qwen2VLImageProcessorPil, allow_urls: bool
) -> tuple[list[ParsedInput], list[tuple[Grid, ...]]]:
    """Find the grid of each image of each input, once for each image of a batch, and fetch what is a URL.

    Args:
        inputs: Parsed inputs.
        processor: The image processor; its ``size`` is the pixel budget.
        allow_urls: Whether images of URLs are fetched; they are an error otherwise.

    Returns:
        The inputs, URLs replaced by what was fetched, and the grids of each one's images. None is decoded.

    Raises:
        ValueError: If an image cannot be fetched or its header not be read; the message names its input and position.
    """
    known: dict[str | int, tuple[AnySource, Grid]] = {}
    spool = Spool()
    for item in inputs:
        for position, source in enumerate(item.images):
            if (identity := source_identity(source)) not in known:
                with named_image(item, position):
                    fetched = fetch(source, allow_urls=allow_urls, spool=spool)
                    known[identity] = fetched, grid_of(image_size(fetched), processor)
    found = [[known[source_identity(source)] for source in item.images] for item in inputs]
    grids = [tuple(grid for _, grid in images) for images in found]
    sources = [tuple(source for source, _ in images) for images in found]
    return [replace(item, images=images) for item, images in zip(inputs, sources, strict=True)], grids


def cut_image(source: AnySource, grid: Grid, processor: Qwen2VLImageProcessorPil, jpeg_draft: bool) -> CutImage:
    """Open an image, resize it and cut it.

    Args:
        source: Where it comes from.
        grid: Its patch rows and patch columns, by its header.
        processor: The image processor.
        jpeg_draft: Whether a JPEG far larger than the grid is decoded at a fraction of its size; see
            :func:`~sentence_vipyloqwen.modules.images.open_image`.

    Raises:
        ValueError: If it cannot be decoded, or is not of the size that its header said.
    """
    draft_size = resized_size(grid, processor) if jpeg_draft else None
    image = open_image(source, draft_size=draft_size)
    if draft_size is None and grid_of(image.size, processor) != grid:
        width, height = image.size
        raise ValueError(f"the image {describe(source)} measures {width}x{height}, not what its header said before")
    return CutImage(source, image_key(image), cut(image, grid, processor))


def cut_rows(
    rows: Sequence[RowImages], cut_one: Callable[[AnySource, Grid], CutImage], opened: ImagePatchCache | None
) -> list[list[CutImage]]:
    """Cut the images of a batch, each once.

    Args:
        rows: The images of B rows.
        cut_one: Opens an image and cuts it to a grid.
        opened: Images of the batch before, which need not be opened again; receives this batch's.

    Raises:
        ValueError: If an image cannot be decoded; the message names its input and position.
    """
    cache = opened if opened is not None else ImagePatchCache()
    images = of_images(rows, lambda source, grid: cache.get(source) or cut_one(source, grid))
    cache.keep({source_identity(image.source): image for row in images for image in row})
    return images


def closed_sizes(features: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is known of closed images: how many each row has, and their grids.

    Args:
        features: A batch, or a part of one, with ``closed_images``.
    """
    rows = features[CLOSED_IMAGES].at(features[ROW_INDEX])
    grids = [(1, *grid) for row in rows for grid in row.grids]
    if not grids:  # a part of a batch whose images all stand in other rows
        return {}
    sizes = {"image_grid_thw": grids, "num_images_per_sample": [len(row.grids) for row in rows]}
    return {name: torch.tensor(value, device=features["input_ids"].device) for name, value in sizes.items()}


def opened_patches(
    features: Mapping[str, Any], images: Sequence[int], cut_closed: Callable[[RowImages, int], Tensor]
) -> Tensor:
    """The patches of some closed images.

    Args:
        features: A batch, or a part of one, with ``closed_images``.
        images: Their places among the images of all rows.
        cut_closed: Opens an image of a row that was not opened beforehand, and gives its patches.

    Returns:
        (P, 588) uint8, on the device of the batch.
    """
    closed: ClosedImages = features[CLOSED_IMAGES]
    rows = closed.at(features[ROW_INDEX])
    shown = [(row, position) for row in rows for position in range(len(row.sources))]
    parts = []
    for row, position in (shown[image] for image in images):
        known = closed.opened.get(row.name(position))
        parts.append(cut_closed(row, position) if known is None else known)
    return torch.cat(parts).to(features["input_ids"].device)

"""The features of a batch, from rendered rows and their opened images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sentence_vipyloqwen.modules.closed_images import RowImages
from sentence_vipyloqwen.modules.images import source_identity
from sentence_vipyloqwen.modules.inputs import MAX_IMAGES, AnySource, ParsedInput
from sentence_vipyloqwen.modules.patches import CutImage, Grid
from sentence_vipyloqwen.modules.rendering import ControlTokens, RenderedInput

Made = TypeVar("Made")


@contextmanager
def named_image(item: ParsedInput | RowImages, position: int) -> Iterator[None]:
    """Say in an error which image of which input it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Input {item.index}, image {position}: {error}") from error


def of_images(rows: Sequence[RowImages], make: Callable[[AnySource, Grid], Made]) -> list[list[Made]]:
    """What is made of each image of each row; of a source that occurs twice, once."""
    made: dict[str | int, Made] = {}
    for row in rows:
        for position, source in enumerate(row.sources):
            if (identity := source_identity(source)) not in made:
                with named_image(row, position):
                    made[identity] = make(source, row.grids[position])
    return [[made[source_identity(source)] for source in row.sources] for row in rows]


def text_features(rows: Sequence[RenderedInput], control: ControlTokens, padding: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``mm_token_type_ids``, (B, L) int64, padded on the right.

    Args:
        rows: B rows.
        control: The ids of control tokens.
        padding: The id that pads.
    """
    lengths = np.array([len(row.token_ids) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]  # (B, L)
    ids = np.full(real.shape, padding, dtype=np.int64)
    ids[real] = np.concatenate([row.token_ids for row in rows])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "mm_token_type_ids": torch.from_numpy((ids == control.image_pad).astype(np.int64)),
    }


def image_features(rows: Sequence[RowImages], images: Sequence[Sequence[CutImage]]) -> dict[str, Tensor]:
    """``image_keys`` (B, 5), and with I > 0 images ``image_grid_thw`` (I, 3) and ``num_images_per_sample`` (B,), int64.

    Args:
        rows: The images of B rows, with their grids.
        images: The same, opened.
    """
    keys = key_table([[image.key for image in row] for row in images])
    if not any(images):
        return {"image_keys": keys}
    return {
        "image_keys": keys,
        "image_grid_thw": torch.tensor([(1, *grid) for row in rows for grid in row.grids]),
        "num_images_per_sample": torch.tensor([len(row) for row in images]),
    }


def patch_features(images: Sequence[Sequence[CutImage]], places: Sequence[int] | None = None) -> dict[str, Tensor]:
    """``pixel_values`` (P, 588) uint8: the patches of the images of all rows, or of those at some places among them."""
    in_order = [image.patches for row in images for image in row]
    chosen = in_order if places is None else [in_order[place] for place in places]
    return {"pixel_values": torch.cat(chosen)} if chosen else {}


def key_table(keys: Sequence[Sequence[int]]) -> Tensor:
    """(B, 5) int64: the keys of each row's images, 0 where it has no more."""
    table = torch.zeros(len(keys), MAX_IMAGES, dtype=torch.int64)
    for index, row in enumerate(keys):
        table[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return table

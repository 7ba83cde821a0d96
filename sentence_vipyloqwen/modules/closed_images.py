"""Images that stay closed until the rows that show them run, so that a step by mini-batches holds those of one alone.

A column's features then have, in place of pixels, the places of their rows (a tensor, which whoever slices a batch
slices with it) and the rows' images (which are passed on whole).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from torch import Tensor

from sentence_vipyloqwen.modules.images import describe, image_key, open_image
from sentence_vipyloqwen.modules.inputs import AnySource
from sentence_vipyloqwen.modules.patches import Grid
from sentence_vipyloqwen.modules.rendering import RenderedInput

CLOSED_IMAGES, ROW_INDEX = "closed_images", "row_index"
"""Features: a `ClosedImages`, and (B,) int64 which of its rows these are."""


@dataclass(frozen=True, eq=False)
class RowImages:
    """The images of a row, known by name and size.

    Attributes:
        sources: The images, unopened.
        grids: Patch rows and patch columns of each after resizing.
        index: The input's place among those the caller passed; named in errors.
    """

    sources: tuple[AnySource, ...]
    grids: tuple[Grid, ...]
    index: int

    @classmethod
    def of(cls, row: RenderedInput) -> RowImages:
        """Those of a rendered row."""
        return cls(row.source.images, row.grids, row.source.index)


@dataclass(frozen=True, eq=False)
class ClosedImages:
    """The images of a column. Data loader workers can send it.

    Attributes:
        rows: Those of each row.
    """

    rows: tuple[RowImages, ...]

    def at(self, places: Tensor) -> Sequence[RowImages]:
        """Those of some rows, by the feature ``row_index``."""
        return [self.rows[place] for place in places.tolist()]


def closed_key(source: AnySource) -> int:
    """A 64-bit key of an image that is to stay closed; never 0.

    That of a file is a hash of its bytes, so that nothing is decoded: the same picture saved in two ways has two keys.
    Any other source is opened for it, and let go. How far keys can be trusted: see :func:`image_key`.

    Raises:
        ValueError: If the source cannot be read.
    """
    if not isinstance(source, Path) and (not isinstance(source, str) or source.startswith("data:")):
        return image_key(open_image(source))
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the image {describe(source)}: {error}") from error
    return xxhash.xxh3_64(content).intdigest() - 2**63 or 1  # unsigned to the range of int64

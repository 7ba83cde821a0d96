"""Images that stay closed until the rows that show them run, so that a step by mini-batches holds those of one alone.

A column's features then have, in place of pixels, the places of their rows (a tensor, which whoever slices a batch
slices with it) and the rows' images (which are passed on whole). Who runs a batch by mini-batches may open the images
of the next one beforehand, through :class:`OpenedOnce`, and hand them over with the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from sentence_vipyloqwen.modules.images import describe, image_key, open_image, source_identity
from sentence_vipyloqwen.modules.inputs import AnySource
from sentence_vipyloqwen.modules.patches import Grid
from sentence_vipyloqwen.modules.rendering import RenderedInput
from sentence_vipyloqwen.modules.spool import Spool

CLOSED_IMAGES, ROW_INDEX = "closed_images", "row_index"
"""Features: a `ClosedImages`, and (B,) int64 which of its rows these are."""

ImageName = tuple[str | int, Grid]
"""An image among those of a step: what :func:`source_identity` says of it, and its grid."""


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

    def name(self, position: int) -> ImageName:
        """What one of them has in common with the same image in other rows."""
        return source_identity(self.sources[position]), self.grids[position]


@dataclass(frozen=True, eq=False)
class ClosedImages:
    """The images of a column. Data loader workers can send it.

    Attributes:
        rows: Those of each row.
        opened: The patches of those that were opened beforehand.
    """

    rows: tuple[RowImages, ...]
    opened: Mapping[ImageName, Tensor] = field(default_factory=dict)

    def at(self, places: Tensor) -> Sequence[RowImages]:
        """Those of some rows, by the feature ``row_index``."""
        return [self.rows[place] for place in places.tolist()]


class OpenedOnce:
    """Opens and cuts each image once, however often it is asked for: its patches are kept in a :class:`Spool`.

    Memory holds what is asked for and the spool's share, whatever the number of images; the rest lies in a temporary
    file, which goes with this object.

    Args:
        cut: Opens one image of a row and gives its (P, 588) uint8 patches.
    """

    def __init__(self, cut: Callable[[RowImages, int], Tensor]) -> None:
        self._cut = cut
        self._spool = Spool()
        self._spans: dict[ImageName, tuple[int, int]] = {}

    def patches(self, rows: Sequence[RowImages]) -> dict[ImageName, Tensor]:
        """The patches of the different images of some rows. One thread may ask at a time.

        Raises:
            ValueError: If an image cannot be opened.
        """
        found: dict[ImageName, Tensor] = {}
        for row in rows:
            for position in range(len(row.sources)):
                if (name := row.name(position)) not in found:
                    found[name] = self._kept(name) if name in self._spans else self._open(row, position)
        return found

    def _open(self, row: RowImages, position: int) -> Tensor:
        patches = self._cut(row, position)
        self._spans[row.name(position)] = self._spool.keep(patches.numpy().tobytes())
        return patches

    def _kept(self, name: ImageName) -> Tensor:
        data = bytearray(self._spool.read(*self._spans[name]))  # torch wants memory that may be written to
        (down, across) = name[1]
        return torch.frombuffer(data, dtype=torch.uint8).view(down * across, -1)


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

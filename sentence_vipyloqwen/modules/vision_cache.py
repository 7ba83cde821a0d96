"""The output of a frozen vision tower, kept on disk: an image goes through the tower once, not once an epoch.

One LMDB environment for each tower, named by its weights and by how it is shown pixels:

```
folder/<digest>/     image key, patch rows and columns, dtype of the computation -> its merged tokens
```

A transaction is written whole or not at all, so a kill loses at most the batch under way. Several processes of one
machine may share a folder; LMDB's locks do not work over a network.
"""

from __future__ import annotations

import errno
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.hashing import hash_tensors
from sentence_vipyloqwen.modules.packing import NO_KEY
from sentence_vipyloqwen.modules.patches import Grid
from sentence_vipyloqwen.modules.sharding import is_sharded

FORMAT_VERSION = 1
"""Part of the digest; raised when the same entry would mean something else."""

EXTRA = "vision-cache"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ENTRY = struct.Struct("<qIIB")
_PROCESSING = (
    *("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)


@dataclass(frozen=True)
class ShownImage:
    """An image as the tower sees it.

    Attributes:
        key: Its content key; 0 where there is none, and then it is never kept.
        grid: Its patch rows and patch columns.
    """

    key: int
    grid: Grid


class VisionCache:
    """Features of images for one frozen tower.

    An image's features are those of the batch it was first computed in, to the bit; in another batch they would differ
    by rounding, about 1e-6. On disk a merged token takes its width in numbers: 3 KB in bfloat16 at 1536, so 4 MB for an
    image of a million pixels.

    Args:
        folder: Where the environment lies; made if it is not there.
        merge_size: Patches a side that make one merged token.

    Raises:
        ImportError: If lmdb is not installed.
    """

    def __init__(self, folder: Path, merge_size: int) -> None:
        lmdb = require("lmdb", EXTRA)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._merged = merge_size**2
        self._full = lmdb.MapFullError
        # The map is address space, not room: as large as the disk, so that the disk is what fills up.
        self._environment = lmdb.open(str(folder), map_size=shutil.disk_usage(folder).total, metasync=False)

    @classmethod
    def of(cls, tower: nn.Module, image_processor: Any, parent: str | Path, jpeg_draft: bool = False) -> VisionCache:
        """The cache of a tower: a folder of its own, named by its weights and by how pixels become patches.

        Args:
            tower: The vision tower, frozen.
            image_processor: What the tower's images are cut by.
            parent: The folder of all caches.
            jpeg_draft: Whether photographs are decoded at a fraction of their size.

        Raises:
            ValueError: If a parameter of the tower is trained.
        """
        check_frozen(tower)
        processing = {name: getattr(image_processor, name) for name in _PROCESSING}
        facts = [FORMAT_VERSION, hash_tensors(tower.state_dict().items()), processing, jpeg_draft]
        digest = xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())
        return cls(Path(parent) / digest, image_processor.merge_size)

    def __len__(self) -> int:
        """How many images it holds."""
        return self._environment.stat()["entries"]

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a model has no cache: the files are open once."""

    def close(self) -> None:
        """Let go of the files; a process may open them once at a time."""
        self._environment.close()

    def features(
        self, images: Sequence[ShownImage], compute: Callable[[list[int]], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Features of some images, computed where they are not held.

        1. Read what is held.
        2. Compute what is not, in one call, and keep it.
        3. Join them in order.

        Args:
            images: The images.
            compute: From places among them to their features (tokens, hidden), one image behind the other.
            dtype: In which the tower computes: what one precision gave is not used for another.

        Returns:
            (tokens, hidden), on the CPU what was read, so the caller moves it; without gradients.

        Raises:
            OSError: If the disk is full.
        """
        entries = [_ENTRY.pack(image.key, *image.grid, _DTYPES.index(dtype)) for image in images]
        parts = self._read(images, entries)  # 1
        if missing := [place for place, part in enumerate(parts) if part is None]:
            with torch.no_grad():
                computed = compute(missing).split([self._tokens(images[place]) for place in missing])
            parts = dict(enumerate(parts)) | dict(zip(missing, computed, strict=True))
            self._write({entries[place]: parts[place] for place in missing if images[place].key != NO_KEY})  # 2
            device = computed[0].device
            return torch.cat([parts[place].to(device) for place in range(len(images))])  # 3
        return torch.cat(parts)

    def _tokens(self, image: ShownImage) -> int:
        return image.grid[0] * image.grid[1] // self._merged

    def _read(self, images: Sequence[ShownImage], entries: Sequence[bytes]) -> list[Tensor | None]:
        pairs = list(zip(images, entries, strict=True))
        with self._environment.begin(buffers=True) as transaction:
            values = [transaction.get(entry) if image.key != NO_KEY else None for image, entry in pairs]
            return [
                value if value is None else _from_bytes(value, self._tokens(image))
                for image, value in zip(images, values, strict=True)
            ]

    def _write(self, parts: dict[bytes, Tensor]) -> None:
        try:
            with self._environment.begin(write=True) as transaction:
                for entry, part in parts.items():
                    transaction.put(entry, _to_bytes(part))
        except self._full as error:
            raise OSError(errno.ENOSPC, f"the vision cache has filled the disk: {error}", str(self.folder)) from error


def check_frozen(tower: nn.Module) -> None:
    """Refuse a tower whose output may change, or is computed by several ranks together.

    Raises:
        ValueError: If a parameter is trained, or each rank holds a part of the tower alone.
    """
    if trained := next((name for name, parameter in tower.named_parameters() if parameter.requires_grad), None):
        raise ValueError(
            f"A vision cache needs a frozen vision tower; {trained!r} of it is trained. Freeze it: frozen: [visual]."
        )
    if is_sharded(tower):
        raise ValueError(
            "A vision cache needs the whole vision tower in each process; this one is sharded, and ranks gather its "
            "weights together. Use DDP, or train without the cache."
        )


def _to_bytes(features: Tensor) -> bytes:
    raw = features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return bytes([_DTYPES.index(features.dtype)]) + raw


def _from_bytes(value: memoryview, tokens: int) -> Tensor:
    # The copy stands on its own when the transaction ends.
    return torch.frombuffer(bytearray(value[1:]), dtype=_DTYPES[value[0]]).view(tokens, -1)

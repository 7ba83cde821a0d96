"""Reading a whole index and comparing what it says of itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sentence_vipyloqwen.index.items import IMAGES_FOLDER
from sentence_vipyloqwen.index.manifest import REBUILD, Manifest, Shard, check_files
from sentence_vipyloqwen.index.shards import map_vectors, read_items, vectors_of
from sentence_vipyloqwen.index.writing import deleted_rows

UNIT_TOLERANCE = 1e-5


def verify(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Look at everything; see :meth:`VectorIndex.verify`.

    Raises:
        ValueError: If something is wrong; the message names it.
    """
    check_files(folder, manifest, checksum=True)  # 1
    for shard in manifest.shards:
        _check_vectors(folder, shard, manifest.dim)  # 2
    items = read_items(folder, manifest.shards).filter(pa.array(~deleted_rows(folder, manifest)))
    counts = Counter(items["id"].to_pylist())
    if twice := [id for id, count in counts.items() if count > 1]:
        raise ValueError(f"{folder}: the ids {twice[:9]} occur twice. {REBUILD}.")
    if items.num_rows != manifest.count:
        raise ValueError(f"{folder} has {items.num_rows} items, index.json says {manifest.count}. {REBUILD}.")
    images = {path for paths in items["image"].to_pylist() for path in paths}
    kept = [path for path in images if path.startswith(f"{IMAGES_FOLDER}/")]
    for path in kept:
        _check_image(folder / path)  # 3
    return {"files": len(manifest.files), "items": items.num_rows, "vectors": manifest.rows, "images": len(kept)}


def _check_vectors(folder: Path, shard: Shard, dim: int) -> None:
    written = vectors_of(pq.read_table(folder / shard.table, columns=["vector"]))
    mapped = map_vectors(folder / shard.vectors, shard, dim)
    if not np.array_equal(written, mapped.reconstruct_n(0, shard.rows)):
        raise ValueError(f"{folder / shard.vectors} does not hold the vectors of {shard.table}. {REBUILD}.")
    off = np.abs(np.linalg.norm(written, axis=1) - 1)
    if not (off <= UNIT_TOLERANCE).all():  # NaN is not
        row = int(np.argmax(~(off <= UNIT_TOLERANCE)))
        raise ValueError(f"{folder / shard.table}: the vector of row {row} is not of unit length. {REBUILD}.")


def _check_image(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing. {REBUILD}.")
    if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem:
        raise ValueError(f"{path} was altered after it was written: its checksum differs. {REBUILD}.")

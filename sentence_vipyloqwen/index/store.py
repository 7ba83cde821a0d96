"""An index on disk: which files it has, and how a new one takes the place of an old one.

```
folder/index.json     format version, metric, dimension, count, the model's fingerprint, size and checksum of the others
folder/index.faiss    the vectors, unit length, float32; row i belongs to line i of items.jsonl
folder/items.jsonl    the items: {"id": "...", "text": "...", "image": ["..."], "metadata": {...}}
folder/images/        images that came as pixels, arrays or data URIs, as PNG named by their content
```

An image path in ``items.jsonl`` is absolute, or relative to the index folder where the image lies inside it. So the
index may be moved, and the images outside it must stay where they are.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import faiss
import xxhash
from PIL import Image

from sentence_vipyloqwen.index.fingerprint import Fingerprint

FORMAT = "sentence-vipyloqwen-index"
FORMAT_VERSION = 1
METRIC = "cosine"

MANIFEST_FILE = "index.json"
VECTORS_FILE = "index.faiss"
ITEMS_FILE = "items.jsonl"
IMAGES_FOLDER = "images"

_REBUILD = "Build the index again with overwrite=True"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What ``index.json`` holds.

    Attributes:
        fingerprint: Of the model that embedded the items.
        dim: Dimensions of a vector.
        count: Number of items.
        prompt_name: Prompt the items were embedded with, ``None`` for none.
        files: File name -> ``{"bytes": size, "xxh3_128": checksum}``.
        metric: What a score is.
        format: Says that this is one of our indexes.
        format_version: Raised whenever an older release could no longer read the folder.
    """

    fingerprint: Fingerprint
    dim: int
    count: int
    prompt_name: str | None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metric: str = METRIC
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If it is no index, of another format version, without items, or has other fields.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"'format' is {data.get('format')!r}, allowed is {FORMAT!r}")
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {data.get('format_version')!r}, this release reads {FORMAT_VERSION}")
        allowed = {item.name for item in fields(cls)}
        if set(data) != allowed:
            raise ValueError(f"its fields are {sorted(data)}, allowed are {sorted(allowed)}")
        if not data["count"]:
            raise ValueError("the index is empty: 'count' is 0")
        return cls(**{**data, "fingerprint": Fingerprint.from_dict(data["fingerprint"])})


# --- one index takes the place of another ---------------------------------------------------------------------------


@contextmanager
def replacing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Write a folder so that it is seen whole or not at all.

    1. Refuse an existing folder unless ``overwrite``.
    2. Yield an empty draft folder beside it, for the caller to fill.
    3. Bring the draft to the disk, move the old folder aside, the draft into its place, and delete the old one.

    Whatever fails before the end of step 3, the old folder stays; a process killed between the two moves leaves it
    under the name that :func:`readable` knows.

    Args:
        folder: Where the new folder shall be; a resolved path.
        overwrite: Whether an existing index may be replaced.

    Raises:
        ValueError: If the folder exists and ``overwrite`` is false, or if it holds something else than an index.
    """
    _restore(folder)
    _check_free(folder, overwrite)  # 1
    draft = _sibling(folder, f"new-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    try:
        yield draft  # 2
        _flush(draft)
        _swap(draft, folder)  # 3
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def readable(folder: Path) -> Path:
    """The folder to read: the old index where a replacement was killed halfway, else ``folder`` itself.

    Raises:
        ValueError: If there is no such folder.
    """
    for candidate in (folder, _sibling(folder, "old")):
        if candidate.is_dir():
            return candidate
    raise ValueError(f"There is no index at {folder}: no such folder.")


def _sibling(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _restore(folder: Path) -> None:
    """Clean up behind a process that was killed in the middle of :func:`_swap`."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST_FILE).is_file():
        raise ValueError(f"{folder} exists and is no index (it has no {MANIFEST_FILE}): choose another folder.")
    if not overwrite:
        raise ValueError(f"There is an index at {folder} already: pass overwrite=True to replace it.")


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _swap(draft: Path, folder: Path) -> None:
    old = _sibling(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        with suppress(FileNotFoundError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, vectors: faiss.Index, items: Sequence[Mapping[str, Any]], manifest: Manifest) -> Manifest:
    """Write an index into a folder.

    Args:
        folder: An existing folder; images that the items name relative to it must be there already.
        vectors: FAISS index whose row i belongs to ``items[i]``.
        items: Items with all of their keys.
        manifest: What is known of the index; sizes and checksums are added here.

    Returns:
        The manifest as written.
    """
    faiss.write_index(vectors, str(folder / VECTORS_FILE))
    with (folder / ITEMS_FILE).open("wb") as file:
        file.writelines(encode_item(item) for item in items)
    files = {name: _measure(folder / name) for name in (VECTORS_FILE, ITEMS_FILE)}
    manifest = Manifest(**{**vars(manifest), "files": files})
    text = json.dumps(manifest.to_dict(), ensure_ascii=False, indent=2)
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return manifest


def encode_item(item: Mapping[str, Any]) -> bytes:
    """An item as a line of ``items.jsonl``.

    Raises:
        ValueError: If it holds what JSON or UTF-8 cannot.
    """
    try:
        return json.dumps(item, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ValueError(f"cannot be written as JSON: {error}; allowed are finite numbers, str, list, dict") from error


def save_image(image: Image.Image, folder: Path) -> str:
    """Write an image into an index folder, once for each content.

    Returns:
        Its path relative to the folder.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    name = f"{IMAGES_FOLDER}/{xxhash.xxh3_128_hexdigest(buffer.getbuffer())}.png"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getbuffer())
    return name


def copy_image(path: Path, folder: Path) -> str:
    """Copy an image file into an index folder, once for each content.

    Returns:
        Its path relative to the folder.
    """
    name = f"{IMAGES_FOLDER}/{_measure(path)['xxh3_128']}{path.suffix}"
    (folder / IMAGES_FOLDER).mkdir(exist_ok=True)
    if not (folder / name).exists():
        shutil.copyfile(path, folder / name)
    return name


def _measure(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Read ``index.json``: what an index is, without loading it.

    Raises:
        ValueError: If the file is missing, damaged, or of a format that this release does not read.
    """
    path = folder / MANIFEST_FILE
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__}, allowed is an object")
        return Manifest.from_dict(data)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {folder} is no index.") from error
    except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} cannot be read: {error}. {_REBUILD}.") from error


def read_vectors(folder: Path, manifest: Manifest) -> faiss.Index:
    """Read ``index.faiss``.

    Raises:
        ValueError: If the file is missing, not as it was written, or does not fit the manifest.
    """
    path = _unaltered(folder, VECTORS_FILE, manifest)
    try:
        vectors = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {error}. {_REBUILD}.") from error
    if (vectors.ntotal, vectors.d) != (manifest.count, manifest.dim):
        raise ValueError(
            f"{path} holds {vectors.ntotal} vectors of {vectors.d} dimensions, {MANIFEST_FILE} says "
            f"{manifest.count} of {manifest.dim}. {_REBUILD}."
        )
    return vectors


def read_items(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Read ``items.jsonl``, image paths made absolute.

    Raises:
        ValueError: If the file is missing, not as it was written, or does not fit the manifest.
    """
    path = _unaltered(folder, ITEMS_FILE, manifest)
    with path.open("rb") as lines:
        items = [with_absolute_images(json.loads(line), folder) for line in lines]
    if len(items) != manifest.count:
        raise ValueError(f"{path} holds {len(items)} items, {MANIFEST_FILE} says {manifest.count}. {_REBUILD}.")
    return items


def with_absolute_images(item: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of an item whose image paths no longer depend on the index folder."""
    return {**item, "image": [str(folder / path) for path in item["image"]]}


def _unaltered(folder: Path, name: str, manifest: Manifest) -> Path:
    path, expected = folder / name, manifest.files.get(name)
    if not path.is_file():
        raise ValueError(f"{path} is missing. {_REBUILD}.")
    size = path.stat().st_size
    if expected is None or size != expected["bytes"]:
        raise ValueError(f"{path} has {size:,} bytes, {MANIFEST_FILE} says {expected}: it is cut short. {_REBUILD}.")
    if _measure(path) != expected:
        raise ValueError(f"{path} was altered after it was written: its checksum differs. {_REBUILD}.")
    return path

"""What a caller may index or ask, read into the one form that ``encode`` takes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from sentence_vipyloqwen.files import is_stored, replacing
from sentence_vipyloqwen.index.shards import Skipped
from sentence_vipyloqwen.index.sources import ITEM_KEYS, Item, Source, base_folder, located
from sentence_vipyloqwen.modules.images import describe, image_size, open_image
from sentence_vipyloqwen.modules.inputs import ALLOWED_IMAGES, ALLOWED_INPUTS, INPUT_KEYS, MAX_IMAGES

IMAGES_FOLDER = "images"
_PIXELS = (Image.Image, np.ndarray, torch.Tensor)
_ALLOWED_ITEM = f"an item is a dict of some of {list(ITEM_KEYS)}, with a text, an image, or both"


def read_items(
    source: Source,
    folder: Path,
    known: Collection[str] = frozenset(),
    on_bad: Callable[[Skipped], None] | None = None,
    max_pixels: int | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read items one by one and see to it that their images can be found again.

    Args:
        source: Where they come from. Image paths of a JSONL file are relative to it, others to the working directory.
        folder: The index folder; receives images that are not files, and a copy of those inside it.
        known: Ids that are taken.
        on_bad: Called with an item that is not allowed, which is then left out; by default that is an error.
        max_pixels: Pixels of an image that the model looks at: pages of PDFs are rendered with as many.

    Yields:
        Where the item stands, and the item with all of the keys ``id`` (str, unique), ``text`` (str), ``image`` (list
        of str, absolute or relative to the index folder) and ``metadata`` (dict).

    Raises:
        ValueError: If an item is not allowed; the message begins with ``file:line`` or its position.
    """
    seen: dict[str, str] = {}
    base = base_folder(source)
    for position, (where, read) in enumerate(located(source, folder, max_pixels)):
        try:
            item = _read_item(read(), position)
            encode_item(item | {"image": []})
            if taken := seen.get(item["id"], "the index" if item["id"] in known else None):
                raise ValueError(f"id {item['id']!r} is taken by {taken}; an id must be unique")
            item["image"] = [_keep(image, base, folder) for image in item["image"]]
            encode_item(item)
        except ValueError as error:
            if on_bad is None:
                raise ValueError(f"{where}: {error}") from error
            on_bad(Skipped(where, str(error)))
            continue
        seen[item["id"]] = where
        yield where, item


def encode_item(item: Mapping[str, Any]) -> bytes:
    """An item as a line of JSON.

    Raises:
        ValueError: If it holds what JSON or UTF-8 cannot.
    """
    try:
        return json.dumps(item, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise ValueError(f"cannot be written as JSON: {error}; allowed are finite numbers, str, list, dict") from error


def with_absolute_images(item: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of an item whose image paths no longer depend on the index folder.

    Raises:
        ValueError: If one is relative and leads out of the index's images: somebody has tampered with it.
    """
    return {**item, "image": [_absolute(path, folder) for path in item["image"]]}


def _absolute(image: str, folder: Path) -> str:
    if not os.path.isabs(image) and (os.path.dirname(image) != IMAGES_FOLDER or not is_stored(os.path.basename(image))):
        raise ValueError(f"an item of {folder} has the image {image!r}, which leads out of its {IMAGES_FOLDER}/.")
    return str(folder / image)


def item_input(item: Item) -> dict[str, Any]:
    """What of an item is embedded: its text and its images, in the form that ``encode`` takes."""
    return _drop_empty({key: item[key] for key in INPUT_KEYS})


def query_input(query: Any, position: int = 0) -> dict[str, Any]:
    """A query in the form that ``encode`` takes, that of stock Sentence Transformers too.

    There, a bare string that looks like a path would be opened as an image, and a ``Path`` refused.

    Args:
        query: A str (always text), a path, a PIL image, an array, or ``{"text": ..., "image": one or a list}``.
        position: Of the query, for the message.

    Raises:
        ValueError: If it is empty or of no allowed kind.
    """
    if isinstance(query, str):
        query = {"text": query}
    elif isinstance(query, (Path, *_PIXELS)):
        query = {"image": query}
    if not isinstance(query, Mapping) or set(query) - set(INPUT_KEYS):
        came = f"the keys {list(query)}" if isinstance(query, Mapping) else f"a {type(query).__name__}"
        raise ValueError(f"Query {position}: got {came}; allowed is {ALLOWED_INPUTS}.")
    images = [str(image) if isinstance(image, Path) else image for image in _as_list(query.get("image"))]
    result = _drop_empty({"text": query.get("text") or "", "image": images})
    if not result:
        raise ValueError(f"Query {position} is empty: {query!r}; it needs some text, an image, or both.")
    return result


def _read_item(raw: Any, position: int) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"got a {type(raw).__name__}; {_ALLOWED_ITEM}")
    if unknown := [key for key in raw if key not in ITEM_KEYS]:
        raise ValueError(f"unknown keys {unknown}; {_ALLOWED_ITEM}; other facts go into 'metadata'")
    text, images = raw.get("text") or "", _as_list(raw.get("image"))
    if not isinstance(text, str):
        raise ValueError(f"'text' is a {type(text).__name__}; allowed is a str")
    if not text.strip() and not images:
        raise ValueError(f"nothing to embed; {_ALLOWED_ITEM}")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} images; at most {MAX_IMAGES} are allowed")
    metadata = {} if raw.get("metadata") is None else raw["metadata"]
    if not isinstance(metadata, Mapping):
        raise ValueError(f"'metadata' is a {type(metadata).__name__}; allowed is a dict")
    return {"id": _read_id(raw.get("id"), position), "text": text, "image": images, "metadata": dict(metadata)}


def _read_id(value: Any, position: int) -> str:
    if value is None:
        return str(position)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"'id' is {value!r}; allowed is a non-empty str or an int, or none for the item's position")
    return str(value)


def _keep(image: Any, base: Path, folder: Path) -> str:
    """Path under which the index finds an image again."""
    if isinstance(image, _PIXELS) or (isinstance(image, str) and image.startswith("data:")):
        return _store_pixels(open_image(image), folder)
    if not isinstance(image, (str, Path)):
        raise ValueError(f"an image is a {type(image).__name__}; allowed is {ALLOWED_IMAGES}")
    if str(image).startswith(("http://", "https://")):
        raise ValueError(f"the image {describe(image)} is a URL; an index keeps files: download it first")
    path = Path(os.path.abspath(base / image))
    if not path.is_file():
        raise ValueError(f"there is no image file {describe(path)}")
    image_size(path)
    return _store_copy(path, folder) if path.resolve().is_relative_to(folder) else str(path)


def _store_pixels(image: Image.Image, folder: Path) -> str:
    """Write an image into an index folder, once for each content; its path relative to the folder."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return _store(buffer.getvalue(), ".png", folder)


def _store_copy(path: Path, folder: Path) -> str:
    """Copy an image file into an index folder, once for each content; its path relative to the folder."""
    return _store(path.read_bytes(), path.suffix, folder)


def _store(content: bytes, suffix: str, folder: Path) -> str:
    name = f"{IMAGES_FOLDER}/{xxhash.xxh3_128_hexdigest(content)}{suffix}"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_bytes(content)
    return name


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _drop_empty(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in value.items() if part}

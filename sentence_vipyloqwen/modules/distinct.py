"""Which inputs are equal, and which images: each is to be opened and computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import ExifTags, Image

from sentence_vipyloqwen.modules.images import describe, is_decoded
from sentence_vipyloqwen.modules.inputs import ImageSource, ParsedInput

_UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError)
"""What a closed or broken picture, or a tensor without values, raises."""


@dataclass(frozen=True)
class DistinctInputs:
    """Inputs without repetition.

    Attributes:
        inputs: U inputs, as they first occur; among them, equal images are one object.
        image_keys: For each of the U, the keys of its images: see :func:`source_key`.
        places: For each of the caller's inputs, its place among the U.
    """

    inputs: list[ParsedInput] = field(default_factory=list)
    image_keys: list[tuple[str, ...]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def distinct_inputs(inputs: Sequence[ParsedInput]) -> DistinctInputs:
    """Merge the inputs of equal images, task, text and prompt; no file is opened, no picture decoded.

    Raises:
        ValueError: If the pixels of a picture in memory cannot be read; the message names the input's position.
    """
    found = DistinctInputs()
    by_id: dict[int, str] = {}
    first_of: dict[str, ImageSource] = {}
    place_of: dict[tuple[object, ...], int] = {}
    for item in inputs:
        keys = _image_keys(item, by_id)
        content = keys, item.task.name, item.text, item.prompt, item.text_first
        place = place_of.setdefault(content, len(place_of))
        found.places.append(place)
        if place == len(found.inputs):
            images = tuple(first_of.setdefault(key, image) for key, image in zip(keys, item.images, strict=True))
            found.inputs.append(replace(item, images=images))
            found.image_keys.append(keys)
    return found


def source_key(source: ImageSource) -> str:
    """Name an image source so that equal names are equal images.

    A path or a data URI is its own name. Pixels in memory go by a 128-bit hash of them and of what says how to read
    them; a picture that Pillow has not decoded yet goes by the object that it is.
    """
    if isinstance(source, (str, Path)):
        return str(source)
    return f"\0{_digest(source) or id(source)}"  # no path has a zero byte


def _image_keys(item: ParsedInput, by_id: dict[int, str]) -> tuple[str, ...]:
    for position, source in enumerate(item.images):
        if id(source) in by_id:
            continue
        try:
            by_id[id(source)] = source_key(source)
        except _UNREADABLE as error:
            raise ValueError(
                f"Input {item.index}, image {position}: cannot read the image {describe(source)}: {error}"
            ) from error
    return tuple(by_id[id(source)] for source in item.images)


def _digest(source: Image.Image | np.ndarray | torch.Tensor) -> str | None:
    if isinstance(source, torch.Tensor):
        pixels = source.detach().cpu().flatten().view(torch.uint8).numpy()
        return _hash(pixels, source.dtype, tuple(source.shape))
    if isinstance(source, np.ndarray):
        return _hash(np.ascontiguousarray(source), source.dtype, source.shape)
    if not is_decoded(source):
        return None
    colours = source.getpalette("RGBA"), source.info.get("transparency")
    return _hash(source.tobytes(), source.mode, source.size, colours, source.getexif().get(ExifTags.Base.Orientation))


def _hash(pixels: bytes | np.ndarray, *reading: object) -> str:
    digest = xxhash.xxh3_128(repr(reading).encode())
    digest.update(pixels)
    return digest.hexdigest()

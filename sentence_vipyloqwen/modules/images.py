"""From an image source to upright 8-bit RGB, and from pixels to a content key.

Every failure is a ``ValueError`` that says which source failed and why; nothing is replaced by a placeholder.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import Image, ImageOps

from sentence_vipyloqwen.modules.inputs import ALLOWED_IMAGES, ImageSource

MAX_ASPECT_RATIO = 200
MAX_SOURCE_PIXELS = 178_956_970
"""Pixels of an image before resizing, about 13,400 x 13,400; a larger one is taken for a decompression bomb."""

URL_TIMEOUT_SECONDS = 20
_URL_SCHEMES = ("http://", "https://")
_SIXTEEN_BIT_TO_EIGHT = 257  # 65535 / 255
_BROKEN = (OSError, SyntaxError, EOFError, struct.error, RuntimeError)
"""What Pillow's decoders raise on broken data."""


def open_image(source: ImageSource, *, allow_urls: bool = False) -> Image.Image:
    """Open an image as upright RGB.

    EXIF rotation is applied; transparent pixels lie on white; palette, grey, CMYK and 16-bit images become 8-bit RGB.

    Args:
        source: A PIL image, an array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with 1, 3 or 4 channels (integers 0-255
            or floats 0-1), a path, or a ``data:image/...`` URI.
        allow_urls: Whether an ``http(s)`` URL is fetched.

    Raises:
        ValueError: If the source is unreadable, of no allowed kind, beyond 200 in aspect ratio, or too large.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        image = _from_array(source)
        _check_size(image.size, source)
        return image
    if isinstance(source, Image.Image):
        _check_size(source.size, source)
        return _decode(source, source)
    with _opened(source, allow_urls) as image:
        return _decode(image, source)


def image_size(source: Path | str) -> tuple[int, int]:
    """Width and height of an image, read from its header: nothing is decoded.

    Args:
        source: A path or a ``data:image/...`` URI.

    Raises:
        ValueError: As :func:`open_image` for what the header shows.
    """
    with _opened(source, allow_urls=False) as image:
        return image.size


def image_key(image: Image.Image) -> int:
    """A 64-bit content hash of an RGB image's size and pixels; never 0, which stands for no image."""
    digest = xxhash.xxh3_64(repr(image.size).encode())
    digest.update(image.tobytes())
    key = digest.intdigest() - 2**63  # unsigned to the range of int64
    return key or 1


def describe(source: ImageSource) -> str:
    """Name an image source in an error message, short enough to read."""
    if isinstance(source, Image.Image):
        return f"<PIL image {source.size[0]}x{source.size[1]} {source.mode}>"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"<array {tuple(source.shape)} {source.dtype}>"
    text = str(source)
    return repr(text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)")


@contextmanager
def _opened(source: Path | str, allow_urls: bool) -> Iterator[Image.Image]:
    try:
        with Image.open(_readable(source, allow_urls)) as image:
            _check_size(image.size, source)
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image {describe(source)} is too large: {error}") from error
    except (*_BROKEN, binascii.Error, HTTPException) as error:
        raise ValueError(f"cannot read the image {describe(source)}: {error}; allowed is {ALLOWED_IMAGES}") from error


def _decode(image: Image.Image, source: ImageSource) -> Image.Image:
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise ValueError(f"cannot decode the image {describe(source)}: {error}") from error


def _readable(source: Path | str, allow_urls: bool) -> Path | io.BytesIO:
    if isinstance(source, Path):
        return source
    if source.startswith("data:"):
        head, comma, payload = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise OSError("a data URI must read data:image/<type>;base64,<data>")
        return io.BytesIO(base64.b64decode(payload, validate=True))
    if source.startswith(_URL_SCHEMES):
        if not allow_urls:
            raise OSError("URLs are fetched only where allow_urls=True")
        with urllib.request.urlopen(source, timeout=URL_TIMEOUT_SECONDS) as response:
            return io.BytesIO(response.read())
    return Path(source)


def _check_size(size: tuple[int, int], source: ImageSource) -> None:
    short, long = min(size), max(size)
    if short == 0 or long / short > MAX_ASPECT_RATIO:
        raise ValueError(
            f"the image {describe(source)} measures {size[0]}x{size[1]}; "
            f"the aspect ratio must be at most {MAX_ASPECT_RATIO}"
        )
    if size[0] * size[1] > MAX_SOURCE_PIXELS:
        raise ValueError(
            f"the image {describe(source)} has {size[0] * size[1]:,} pixels; at most {MAX_SOURCE_PIXELS:,} are allowed"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // _SIXTEEN_BIT_TO_EIGHT).astype(np.uint8))
    elif image.mode == "I":  # 32-bit container: how some decoders hand out 16-bit grey
        values = np.asarray(image)
        values = values // _SIXTEEN_BIT_TO_EIGHT if values.max() > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    if isinstance(array, torch.Tensor):
        values = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    else:
        values = array
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)  # (C, H, W) -> (H, W, C)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or values.size == 0:
        raise ValueError(f"{describe(array)}: an array must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    return _to_rgb(Image.fromarray(_to_bytes(values, array)))


def _to_bytes(values: np.ndarray, array: np.ndarray | torch.Tensor) -> np.ndarray:
    allowed = "allowed are integers 0-255 or floats 0-1"
    if values.dtype.kind not in "fui":
        raise ValueError(f"{describe(array)}: dtype {values.dtype}; {allowed}")
    top = 1 if values.dtype.kind == "f" else 255
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ValueError(f"{describe(array)}: values from {low} to {high}; {allowed}")
    return (values * 255).round().astype(np.uint8) if top == 1 else values.astype(np.uint8)

"""From an image source to its size, to upright 8-bit RGB, and from pixels to a content key.

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
from typing import IO

import numpy as np
import torch
import xxhash
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from sentence_vipyloqwen.modules.inputs import ALLOWED_IMAGES, AnySource, FetchedImage, ImageSource
from sentence_vipyloqwen.modules.spool import Spool

MAX_ASPECT_RATIO = 200
MAX_SOURCE_PIXELS = 178_956_970
"""Pixels of an image before resizing, about 13,400 x 13,400; a larger one is taken for a decompression bomb."""

URL_TIMEOUT_SECONDS = 20
_URL_SCHEMES = ("http://", "https://")
_SIXTEEN_BIT_TO_EIGHT = 257  # 65535 / 255
_CHANNELS = (1, 3, 4)
_QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

_METADATA_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_CHUNK_HEAD = struct.Struct(">I4s")  # length of the content, type
_CHECKSUM_BYTES = 4

_BROKEN = (OSError, SyntaxError, EOFError, struct.error, RuntimeError)
"""What Pillow's decoders raise on broken data."""


def open_image(
    source: AnySource, *, allow_urls: bool = False, draft_size: tuple[int, int] | None = None
) -> Image.Image:
    """Open an image as upright RGB.

    EXIF rotation is applied; transparent pixels lie on white; palette, grey, CMYK and 16-bit images become 8-bit RGB.

    A picture that Pillow has opened and not decoded stays so, where its file can be read once more.

    Args:
        source: A PIL image, an array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)`` with 1, 3 or 4 channels (integers 0-255
            or floats 0-1), a path, a ``data:image/...`` URI, or what :func:`fetch` returned.
        allow_urls: Whether an ``http(s)`` URL is fetched.
        draft_size: Width and height to which the image will be resized, upright. A JPEG that is at least four times as
            large is then decoded at a half, a quarter or an eighth of its size, still at least twice as large as this.
            Faster, but not exact: on made photographs of 4 to 16 megapixels (gradients, grain, text) decoding took
            about half the time, and the bytes of the patches moved by 0.3 to 0.7 on average, at most 22 of 255.

    Raises:
        ValueError: If the source is unreadable, of no allowed kind, beyond 200 in aspect ratio, or too large.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, source)
        with _naming(source), _apart(source) as image:
            return _decode(image, source)
    with _opened(source, allow_urls) as image:
        if draft_size is not None:
            _draft(image, draft_size)
        return _decode(image, source)


def image_size(source: AnySource) -> tuple[int, int]:
    """Width and height of an image as :func:`open_image` gives it, upright.

    No pixel is decoded, but of a PNG whose metadata stand behind its pixels: only so does Pillow find a rotation there.

    Args:
        source: As for :func:`open_image`, URLs excepted: :func:`fetch` them before.

    Raises:
        ValueError: As :func:`open_image` for what the header shows.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _array_size(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, source)
        with _naming(source), _apart(source) as image:
            return _upright_size(image)
    with _opened(source, allow_urls=False) as image:
        return _upright_size(image)


def fetch(source: ImageSource, *, allow_urls: bool, spool: Spool) -> AnySource:
    """Fetch the image of an ``http(s)`` URL; any other source is returned as it is.

    Args:
        source: The source.
        allow_urls: Whether a URL is fetched.
        spool: What keeps the bytes fetched.

    Raises:
        ValueError: If it cannot be fetched, or ``allow_urls`` is false.
    """
    if not isinstance(source, str) or not source.startswith(_URL_SCHEMES):
        return source
    with _naming(source):
        return FetchedImage.of(source, _download(source, allow_urls), spool)


def is_decoded(image: Image.Image) -> bool:
    """Whether a picture's pixels are in memory, rather than in a file that Pillow has opened."""
    if not isinstance(image, ImageFile.ImageFile) or image.fp is None and not image.tile:
        return True
    return not image.tile and image.format != "WEBP"  # which has no tiles before it is decoded


def source_identity(source: AnySource) -> str | int:
    """What tells one source from another without opening it: a path or data URI itself, else the object's ``id()``.

    An ``id()`` names an object for as long as the object lives.
    """
    return str(source) if isinstance(source, (str, Path)) else id(source)


def image_key(image: Image.Image) -> int:
    """A 64-bit content hash of an RGB image's size and pixels; never 0, which stands for no image.

    Images of one key and one patch grid are embedded as one, the first of the batch. By chance two different ones meet
    with a probability of about n² / 2⁶⁵ among n; xxh3 is no cryptographic hash, so whoever may choose images can make
    two that meet. Do not embed images of people who must not affect each other in one call.
    """
    digest = xxhash.xxh3_64(repr(image.size).encode())
    digest.update(image.tobytes())
    key = digest.intdigest() - 2**63  # unsigned to the range of int64
    return key or 1


def describe(source: AnySource) -> str:
    """Name an image source in an error message, short enough to read."""
    if isinstance(source, Image.Image):
        return f"<PIL image {source.size[0]}x{source.size[1]} {source.mode}>"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"<array {tuple(source.shape)} {source.dtype}>"
    text = source.url if isinstance(source, FetchedImage) else str(source)
    return repr(text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)")


@contextmanager
def _naming(source: AnySource) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image {describe(source)} is too large: {error}") from error
    except (*_BROKEN, binascii.Error, HTTPException) as error:
        raise ValueError(f"cannot read the image {describe(source)}: {error}; allowed is {ALLOWED_IMAGES}") from error


@contextmanager
def _opened(source: Path | str | FetchedImage, allow_urls: bool) -> Iterator[Image.Image]:
    with _naming(source), Image.open(_readable(source, allow_urls)) as image:
        _check_size(image.size, source)
        yield image


@contextmanager
def _apart(source: Image.Image) -> Iterator[Image.Image]:
    """A picture to decode in place of the caller's: the same file opened again, if that is not decoded yet.

    So the caller's stays as it is, and the pixels are let go of with ours. A file that cannot be read twice, and what
    was changed since it was opened, is decoded in the caller's own object.
    """
    file = None if is_decoded(source) else source.fp
    if file is None or not getattr(file, "seekable", bool)():
        yield source
        return
    place = file.tell()
    try:
        with Image.open(file) as again:
            again.seek(source.tell())
            if same := _is_same(again, source):
                yield again
    finally:
        file.seek(place)
    if not same:
        yield source


def _is_same(again: Image.Image, source: Image.Image) -> bool:
    if (again.mode, again.size, again.info) != (source.mode, source.size, source.info):
        return False
    late = isinstance(again, PngImagePlugin.PngImageFile) and _has_late_metadata(again)
    return late or _exif(again).get(ExifTags.Base.Orientation) == _exif(source).get(ExifTags.Base.Orientation)


def _decode(image: Image.Image, source: AnySource) -> Image.Image:
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise ValueError(f"cannot decode the image {describe(source)}: {error}") from error


def _readable(source: Path | str | FetchedImage, allow_urls: bool) -> Path | io.BytesIO:
    if isinstance(source, Path):
        return source
    if isinstance(source, FetchedImage):
        return io.BytesIO(source.data)
    if source.startswith("data:"):
        head, comma, payload = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise OSError("a data URI must read data:image/<type>;base64,<data>")
        return io.BytesIO(base64.b64decode(payload, validate=True))
    if source.startswith(_URL_SCHEMES):
        return io.BytesIO(_download(source, allow_urls))
    return Path(source)


def _download(url: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise OSError("URLs are fetched only where allow_urls=True")
    with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as response:
        return response.read()


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    stored = size[::-1] if _is_turned(image) else size
    image.draft(None, (2 * stored[0], 2 * stored[1]))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if not _is_turned(image):
        return image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # some releases of Pillow tell its upright size already
        return image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
    return image.size[::-1]


def _is_turned(image: Image.Image) -> bool:
    return _exif(image).get(ExifTags.Base.Orientation) in _QUARTER_TURNS


def _exif(image: Image.Image) -> Image.Exif:
    """An image's EXIF data, without the decoding by which Pillow looks for them behind a PNG's pixels."""
    if isinstance(image, PngImagePlugin.PngImageFile) and not _has_late_metadata(image):
        return Image.Image.getexif(image)
    return image.getexif()


def _has_late_metadata(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether a PNG not decoded yet has metadata behind its pixels, as ExifTool writes them."""
    if not image.tile or image.fp is None:
        return False
    place = image.fp.tell()
    try:
        return any(kind in _METADATA_CHUNKS for kind in _chunks(image.fp, image.tile[0][2] - _CHUNK_HEAD.size))
    finally:
        image.fp.seek(place)


def _chunks(file: IO[bytes], place: int) -> Iterator[bytes]:
    """The types of a PNG's chunks from a place on; their content is skipped."""
    while len(head := _read_at(file, place, _CHUNK_HEAD.size)) == _CHUNK_HEAD.size:
        length, kind = _CHUNK_HEAD.unpack(head)
        yield kind
        place += _CHUNK_HEAD.size + length + _CHECKSUM_BYTES


def _read_at(file: IO[bytes], place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _check_size(size: tuple[int, int], source: AnySource) -> None:
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


def _array_size(array: np.ndarray | torch.Tensor) -> tuple[int, int]:
    shape = tuple(array.shape)
    if _is_channels_first(shape):
        shape = (*shape[1:], shape[0])
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in _CHANNELS) or 0 in shape:
        raise ValueError(f"{describe(array)}: an array must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    size = (shape[1], shape[0])
    _check_size(size, array)
    return size


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[2] not in _CHANNELS and shape[0] in _CHANNELS


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    _array_size(array)  # refuses other shapes
    if isinstance(array, torch.Tensor):
        values = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    else:
        values = array
    if _is_channels_first(values.shape):
        values = np.moveaxis(values, 0, 2)  # (C, H, W) -> (H, W, C)
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

"""What a caller may pass, read into one form: the images, the task of the prefix, and the text.

Nothing is opened here. A bad input raises a ``ValueError`` that names its position, what came and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from sentence_vipyloqwen.modules.spool import Spool
from sentence_vipyloqwen.tasks import GENERAL, Task, split_prefix

MAX_IMAGES = 5
IMAGE_PLACEHOLDER = "<image>"
INPUT_KEYS = ("text", "image")

ALLOWED_IMAGES = "a PIL image, an array, a path, or a data URI"
ALLOWED_INPUTS = (
    "a str (always text), a PIL image, an array, a pathlib.Path, or "
    f"{{'text': str, 'image': one image or a list of up to {MAX_IMAGES}}}, where an image is {ALLOWED_IMAGES}"
)

ImageSource: TypeAlias = Image.Image | np.ndarray | torch.Tensor | Path | str


@dataclass(frozen=True, eq=False)
class FetchedImage:
    """The image of a URL, once it is fetched. Data loader workers can send it.

    Attributes:
        url: Where it came from; named in errors.
        spool: What keeps the file's bytes.
        span: Where they stand there: start and length.
    """

    url: str
    spool: Spool = field(repr=False)
    span: tuple[int, int]

    @classmethod
    def of(cls, url: str, data: bytes, spool: Spool) -> FetchedImage:
        """Keep a file's bytes."""
        return cls(url, spool, spool.keep(data))

    @property
    def data(self) -> bytes:
        """The file's bytes."""
        return self.spool.read(*self.span)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.url, self.data)


def _received(url: str, data: bytes) -> FetchedImage:
    return FetchedImage.of(url, data, Spool())


AnySource: TypeAlias = ImageSource | FetchedImage


@dataclass(frozen=True)
class ParsedInput:
    """One input in the order in which the model reads it: images, prefix, text.

    For a model with a chat template of its own it says what that template is told: the text as it was written, the
    prompt apart from it, and which the caller named first.

    Attributes:
        images: Up to five image sources, unopened; URLs become fetched images when the input is rendered.
        task: The task whose prefix heads the text; ``GENERAL`` where there is none.
        text: What follows the prefix, as it was written, without ``<image>`` placeholders.
        index: The input's place among those the caller passed; named in errors.
        prompt: The prompt, where it stands apart.
        text_first: Whether the text comes before the images.
    """

    images: tuple[AnySource, ...]
    task: Task
    text: str
    index: int = field(compare=False)
    prompt: str = ""
    text_first: bool = False


def parse_inputs(inputs: Sequence[Any], prompt: str | None = None, as_written: bool = False) -> list[ParsedInput]:
    """Read a batch of inputs.

    Args:
        inputs: The inputs, each of a kind that :data:`ALLOWED_INPUTS` lists; what is parsed already is kept as it is.
        prompt: Text put in front of each input's own text; a prefix at its head selects the task.
        as_written: For a model with a chat template of its own: prefixes and placeholders are plain text.

    Raises:
        ValueError: If an input is empty, has more than five images, or is of no allowed kind.
    """
    return [
        item if isinstance(item, ParsedInput) else _parse(item, index, prompt or "", as_written)
        for index, item in enumerate(inputs)
    ]


def _parse(item: Any, index: int, prompt: str, as_written: bool) -> ParsedInput:
    images, text = _split(item, index)
    text = text if as_written else text.replace(IMAGE_PLACEHOLDER, "")
    if not images and not text.strip():
        raise ValueError(f"Input {index} is empty: got {item!r}; an input needs some text, an image, or both.")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"Input {index} has {len(images)} images; at most {MAX_IMAGES} are allowed.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Input {index}: its text is not valid Unicode: {error}.") from error
    if as_written:
        text_first = isinstance(item, Mapping) and next(iter(item)) == "text"
        return ParsedInput(images, GENERAL, text, index, prompt, text_first)
    task, rest = split_prefix(prompt + _without_prefix_of(prompt, text, index))
    return ParsedInput(images, task, rest, index)


def _without_prefix_of(prompt: str, text: str, index: int) -> str:
    """Take the prefix off a text where the prompt brings the same one."""
    asked, (own, rest) = split_prefix(prompt)[0], split_prefix(text)
    if asked.token is None or own.token is None:
        return text
    if own is not asked:
        raise ValueError(
            f"Input {index} bears the prefix {own.token}, but its prompt is {asked.token}; allowed is one."
        )
    return rest.lstrip()  # the prompt brings a space of its own


def _split(item: Any, index: int) -> tuple[tuple[ImageSource, ...], str]:
    if isinstance(item, str):
        return (), item
    if isinstance(item, Mapping):
        return _split_mapping(item, index)
    if isinstance(item, (Image.Image, np.ndarray, torch.Tensor, Path)):
        return (item,), ""
    raise ValueError(f"Input {index} is of type {type(item).__name__}; allowed is {ALLOWED_INPUTS}.")


def _split_mapping(item: Mapping[str, Any], index: int) -> tuple[tuple[ImageSource, ...], str]:
    if unknown := [key for key in item if key not in INPUT_KEYS]:
        raise ValueError(f"Input {index} has the keys {unknown}; allowed are {list(INPUT_KEYS)}.")
    text = item.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"Input {index}: 'text' is of type {type(text).__name__}; allowed is one str.")
    images = item.get("image")
    if images is None:
        images = ()
    elif not isinstance(images, (list, tuple)):
        images = (images,)
    for position, image in enumerate(images):
        if not isinstance(image, (Image.Image, np.ndarray, torch.Tensor, Path, str)):
            raise ValueError(
                f"Input {index}, image {position} is of type {type(image).__name__}; allowed is {ALLOWED_IMAGES}."
            )
    return tuple(images), text or ""

"""Where items come from.

| source | an item is | its id |
|---|---|---|
| a JSONL file | a line, ``{"id", "text", "image", "metadata"}`` | ``id``, or its position |
| a folder | an image, a text (``.txt``, ``.md``), a page of a PDF or TIFF | ``bills/may.pdf#page=3`` |
| a PDF | a page | ``may.pdf#page=3`` |
| a dataset | a row; columns of other names are metadata | ``id``, or its position |
| dicts | as a line | ``id``, or its position |

A folder is read with its subfolders, in the order of names; a `Folder` says how pages are rendered. A dataset is a
``datasets.Dataset`` or ``IterableDataset``, or the folder of one that ``save_to_disk`` wrote.

Files bear the metadata ``{"kind": "image" | "text" | "page", "file": ...}``, pages ``page`` and ``text`` as well. The
text of a PDF's page is metadata: it can be shown, filtered by and handed to a language model, but what is embedded is
the page as it looks. So a scan and a page that has a text layer lie in one space, and no page costs twice its tokens.

Nothing is read before its turn. Files and folders whose names begin with a dot are passed over; a file of any other
kind is an item that cannot be read, and is named.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from PIL import Image, ImageSequence

from sentence_vipyloqwen.extras import require

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

ITEM_KEYS = ("id", "text", "image", "metadata")

Item: TypeAlias = Mapping[str, Any]
"""``{"id": "...", "text": "...", "image": one or a list, "metadata": {...}}``; a text or an image is needed."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff")
TEXT_SUFFIXES = (".txt", ".md")
PDF_SUFFIX = ".pdf"
FILE_SUFFIXES = (*IMAGE_SUFFIXES, *TIFF_SUFFIXES, *TEXT_SUFFIXES, PDF_SUFFIX)

POINTS_PER_INCH = 72
MOST_DPI = 200
"""Of a page where nothing is asked for: finer print than that is rare."""

MOST_PAGE_PIXELS = 50_000_000
"""Of a page, whatever is asked for: a page may say that it is a kilometre wide."""


@dataclass(frozen=True)
class Folder:
    """Items at a path, with a word on how pages are rendered.

    Attributes:
        path: Of a folder, a PDF, or whatever else a path may stand for.
        dpi: Dots per inch of a page's picture, which is kept in the index. ``None`` for as many as the model looks at,
            its ``max_pixels``, but at most 200: more cost space, and look better only when enlarged.
    """

    path: str | Path
    dpi: int | None = None

    def __post_init__(self) -> None:
        if self.dpi is not None and not 1 <= self.dpi <= 1200:
            raise ValueError(f"dpi is {self.dpi}; allowed is from 1 to 1200.")


Source: TypeAlias = str | Path | Folder | datasets.Dataset | datasets.IterableDataset | Iterable[Item]
"""What may be indexed; see the table above."""

Read: TypeAlias = Callable[[], Any]
"""Gives an item as it was found, or raises a ``ValueError`` that says why it cannot."""


@dataclass(frozen=True)
class _Rendering:
    dpi: int | None
    max_pixels: int | None


def located(source: Source, leave_out: Path | None = None, max_pixels: int | None = None) -> Iterator[tuple[str, Read]]:
    """Items one by one, each with the place it stands in.

    Args:
        source: Where they come from.
        leave_out: A folder that is not looked into: an index may lie among what is indexed.
        max_pixels: Pixels of an image that the model looks at, for pages to be rendered.

    Yields:
        ``file:line``, ``file#page=N``, ``row N`` or ``item N``, and what reads the item. Call it before the next one is
        taken.

    Raises:
        ValueError: If the source as a whole cannot be read, or is none of those.
        ImportError: If there are PDFs and pypdfium2 is missing.
    """
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        yield from _rows(source, "")
    elif isinstance(source, (str, Path, Folder)):
        folder = source if isinstance(source, Folder) else Folder(source)
        yield from _located_at(Path(folder.path), leave_out, _Rendering(folder.dpi, max_pixels))
    elif isinstance(source, datasets.DatasetDict):
        raise ValueError(_choose_split(list(source)))
    elif isinstance(source, Mapping):
        raise ValueError(f"items is one dict, keys {list(source)[:9]}; allowed is a list of items or a path.")
    else:
        yield from ((f"item {position}", partial(_as_it_is, item)) for position, item in enumerate(source))


def base_folder(source: Source) -> Path:
    """What relative image paths begin at: the folder of a JSONL file, else the working directory."""
    path = source.path if isinstance(source, Folder) else source
    return Path(path).parent if isinstance(path, (str, Path)) and Path(path).is_file() else Path()


def _located_at(path: Path, leave_out: Path | None, rendering: _Rendering) -> Iterator[tuple[str, Read]]:
    if _is_saved_dataset(path):
        yield from _rows(_load_dataset(path), f"{path}, ")
    elif path.is_dir():
        for name in _file_names(path, leave_out):
            yield from _file_items(path / name, name, rendering)
    elif path.suffix.lower() == PDF_SUFFIX and path.is_file():
        yield from _file_items(path, path.name, rendering)
    else:
        with _open_jsonl(path) as lines:
            yield from ((f"{path}:{n}", partial(_parse_line, line)) for n, line in enumerate(lines, 1) if line.strip())


def _as_it_is(item: Any) -> Any:
    return item


def _refuse(reason: str) -> Any:
    raise ValueError(reason)


# --- JSONL ---


def _open_jsonl(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read the items of {path}: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object; allowed is once")
    return dict(pairs)


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}; allowed is one object a line") from error
    except RecursionError as error:
        raise ValueError("nested too deeply for an item") from error


# --- files ---


def _file_names(folder: Path, leave_out: Path | None) -> list[str]:
    """Paths of all files below a folder, relative to it, with slashes, sorted."""
    names = []
    for place, folders, files in os.walk(folder, onerror=_raise_unreadable):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != leave_out]
        names += [(here / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _raise_unreadable(error: OSError) -> None:
    raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _file_items(path: Path, name: str, rendering: _Rendering) -> Iterator[tuple[str, Read]]:
    """The items of a file: one, or as many as it has pages."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        yield str(path), partial(_image_item, path, name)
    elif suffix in TEXT_SUFFIXES:
        yield str(path), partial(_text_item, path, name)
    elif suffix in TIFF_SUFFIXES:
        yield from _tiff_pages(path, name)
    elif suffix == PDF_SUFFIX:
        yield from _pdf_pages(path, name, rendering)
    else:
        yield str(path), partial(_refuse, f"the kind of file {suffix!r} is not read; allowed are {FILE_SUFFIXES}")


def _image_item(path: Path, name: str) -> dict[str, Any]:
    return {"id": name, "image": path.absolute(), "metadata": {"kind": "image", "file": name}}


def _text_item(path: Path, name: str) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError("the file is empty; a text is needed")
    return {"id": name, "text": text.replace("\r\n", "\n"), "metadata": {"kind": "text", "file": name}}


def _page(name: str, number: int, image: Image.Image, **more: Any) -> dict[str, Any]:
    metadata = {"kind": "page", "file": name, "page": number, **more}
    return {"id": f"{name}#page={number}", "image": image, "metadata": metadata}


def _tiff_pages(path: Path, name: str) -> Iterator[tuple[str, Read]]:
    """A TIFF of several pages, as scanners write them; one of a single page is an image."""
    try:
        image = Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError):
        yield str(path), partial(_image_item, path, name)  # reading it says what is wrong
        return
    with image:
        if getattr(image, "n_frames", 1) == 1:
            yield str(path), partial(_image_item, path, name)
            return
        for number, frame in enumerate(ImageSequence.Iterator(image), 1):
            yield f"{path}#page={number}", partial(_page, name, number, frame)


# --- PDFs ---


def _pdf_pages(path: Path, name: str, rendering: _Rendering) -> Iterator[tuple[str, Read]]:
    pdfium = require("pypdfium2", "pdf")
    try:
        document = pdfium.PdfDocument(path)
        document.init_forms()  # what was filled in is drawn, too
    except (pdfium.PdfiumError, OSError) as error:
        yield str(path), partial(_refuse, f"cannot be read as a PDF: {error}")
        return
    with closing(document):
        for number in range(1, len(document) + 1):
            yield f"{path}#page={number}", partial(_pdf_page, document, name, number, rendering)


def _pdf_page(document: PdfDocument, name: str, number: int, rendering: _Rendering) -> dict[str, Any]:
    pdfium = require("pypdfium2", "pdf")
    try:
        with closing(document[number - 1]) as page:
            image = page.render(scale=_scale(page, rendering)).to_pil()
            with closing(page.get_textpage()) as text_page:
                text = text_page.get_text_bounded()
    except pdfium.PdfiumError as error:
        raise ValueError(f"the page cannot be rendered: {error}") from error
    return _page(name, number, image, text=_clean(text))


def _scale(page: PdfPage, rendering: _Rendering) -> float:
    """Pixels per point: by the DPI asked for, or so that the page has the pixels that the model looks at."""
    width, height = page.get_size()  # points
    most = MOST_PAGE_PIXELS if rendering.dpi else min(rendering.max_pixels or MOST_PAGE_PIXELS, MOST_PAGE_PIXELS)
    return min((rendering.dpi or MOST_DPI) / POINTS_PER_INCH, math.sqrt(most / max(width * height, 1)))


def _clean(text: str) -> str:
    """Text of a page, which may hold anything, as Unicode."""
    return text.encode("utf-8", "replace").decode().replace("\r\n", "\n").replace("\0", "").strip()


# --- datasets ---


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def _load_dataset(path: Path) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the dataset {path}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise ValueError(f"{path}: {_choose_split(list(loaded))}")
    return loaded


def _choose_split(splits: list[str]) -> str:
    return (
        f"this is a dataset of the splits {splits}; allowed is one of them: dataset[{splits[0] if splits else ''!r}]."
    )


def _rows(data: datasets.Dataset | datasets.IterableDataset, place: str) -> Iterator[tuple[str, Read]]:
    columns = list(data.features or ())
    if columns and not {"text", "image"} & set(columns):
        raise ValueError(f"{place}the dataset has the columns {columns}; needed is 'text', 'image', or both.")
    for position, row in enumerate(_undecoded(data.with_format(None))):
        yield f"{place}row {position}", partial(_row_item, row)


def _undecoded(data: Any) -> Any:
    """The dataset with images as they are stored: a broken one shall be an error of its row alone."""
    bare = datasets.Image(decode=False)
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, bare)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(column, type(feature)(bare))
    return data


def _row_item(row: Mapping[str, Any]) -> dict[str, Any]:
    item = {key: row[key] for key in ITEM_KEYS if row.get(key) is not None}
    images = item.get("image", [])
    item["image"] = [_row_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    others = {key: value for key, value in row.items() if key not in ITEM_KEYS}
    if others:
        own = item.get("metadata", {})
        if not isinstance(own, Mapping):
            raise ValueError(f"'metadata' is a {type(own).__name__}; allowed is a dict")
        item["metadata"] = {**others, **own}
    return item


def _row_image(image: Any) -> Any:
    if not isinstance(image, Mapping):
        return image
    if image.get("bytes") is None:
        return image.get("path")
    try:
        return Image.open(io.BytesIO(image["bytes"]))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read its image: {error}") from error

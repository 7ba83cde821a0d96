"""Queries beside their results, as one HTML page that needs nothing else: no network, no scripts, no files."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sentence_vipyloqwen.index.filters import Where
from sentence_vipyloqwen.index.items import query_input
from sentence_vipyloqwen.index.snapshot import Hit
from sentence_vipyloqwen.index.vector_index import Query
from sentence_vipyloqwen.modules.images import open_image
from sentence_vipyloqwen.modules.inputs import ImageSource
from sentence_vipyloqwen.pages import load_template

logger = logging.getLogger(__name__)

THUMBNAIL_PIXELS = 256
_QUERY_LIMIT = 700
_TEXT_LIMIT = 400
_VALUE_LIMIT = 160
_JPEG_QUALITY = 82

LABELS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "query": "Query",
        "queries": "queries",
        "score": "cosine",
        "results": "results",
        "where": "only where",
        "missing": "cannot be shown",
    },
    "vi": {
        "query": "Truy vấn",
        "queries": "truy vấn",
        "score": "cosin",
        "results": "kết quả",
        "where": "chỉ khi",
        "missing": "không mở được",
    },
    "zh": {
        "query": "查询",
        "queries": "条查询",
        "score": "余弦",
        "results": "条结果",
        "where": "条件",
        "missing": "无法显示",
    },
}
"""The page's own words, by language."""


@dataclass(frozen=True)
class SearchResult:
    """A query and what it found.

    Attributes:
        query: As it was given to :meth:`VectorIndex.search`.
        hits: What that returned.
        prompt_name: The prompt it was asked with.
        where: The condition that its hits satisfy.
    """

    query: Query
    hits: Sequence[Hit]
    prompt_name: str | None = None
    where: Where | None = None


@dataclass(frozen=True)
class _Picture:
    """A thumbnail as a data URI, ``None`` where the image cannot be opened, and what it is called."""

    uri: str | None
    name: str


def write_report(
    path: str | Path,
    results: Iterable[SearchResult],
    *,
    title: str = "Search results",
    subtitle: str | None = None,
    lang: str = "en",
) -> Path:
    """Write a page of queries and their results.

    Thumbnails are downscaled to 256 pixels and stand in the page itself. Texts are escaped, long ones shortened. An
    image that can no longer be opened leaves its name on the page and a warning in the log.

    Args:
        path: Of the HTML file; its folder is made where it is missing.
        results: Queries in the order in which they shall stand on the page.
        title: Title and heading.
        subtitle: A line under the heading, e.g. what was searched with which model.
        lang: Language of the page's own words: ``"en"``, ``"vi"`` or ``"zh"``.

    Returns:
        The path of the page.

    Raises:
        ValueError: If ``lang`` is another language, or a query is empty or of no allowed kind.
    """
    if lang not in LABELS:
        raise ValueError(f"lang is {lang!r}; allowed is one of {list(LABELS)}.")
    pictures = _Pictures()
    sections = [_section(result, position, pictures) for position, result in enumerate(results)]
    page = load_template("sentence_vipyloqwen.index", "search.html.jinja").render(
        title=title, subtitle=subtitle, lang=lang, labels=LABELS[lang], sections=sections
    )
    return _write(Path(path), page)


class _Pictures:
    """Thumbnails, each file opened once."""

    def __init__(self) -> None:
        self._known: dict[str, _Picture] = {}

    def of(self, images: Iterable[ImageSource]) -> list[_Picture]:
        return [self._picture(image) for image in images]

    def _picture(self, image: ImageSource) -> _Picture:
        if not isinstance(image, (str, Path)):
            return _picture(image, "")
        source = str(image)
        if source not in self._known:
            self._known[source] = _picture(source, "" if source.startswith("data:") else Path(source).name)
        return self._known[source]


def _picture(image: ImageSource, name: str) -> _Picture:
    try:
        return _Picture(_data_uri(open_image(image)), name)
    except ValueError as error:
        logger.warning("The report shows no thumbnail: %s", error)
        return _Picture(None, name)


def _data_uri(image: Image.Image) -> str:
    content, kind = encode_picture(image, THUMBNAIL_PIXELS)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encode_picture(image: Image.Image, pixels: int) -> tuple[bytes, str]:
    """A picture made small, and its media type: PNG or JPEG, whichever is smaller.

    PNG suits drawings and print, JPEG photographs.

    Args:
        image: RGB; made small in place.
        pixels: The longer side at most.
    """
    image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    encoded = {}
    for kind, options in (("png", {"optimize": pixels <= THUMBNAIL_PIXELS}), ("jpeg", {"quality": _JPEG_QUALITY})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return encoded[kind], f"image/{kind}"


def _section(result: SearchResult, position: int, pictures: _Pictures) -> dict[str, Any]:
    query = query_input(result.query, position)
    return {
        "number": position + 1,
        "text": shorten(query.get("text", ""), _QUERY_LIMIT),
        "pictures": pictures.of(query.get("image", ())),
        "prompt_name": result.prompt_name,
        "where": "" if result.where is None else shorten(str(result.where), _QUERY_LIMIT),
        "hits": [_row(hit, pictures) for hit in result.hits],
    }


def _row(hit: Hit, pictures: _Pictures) -> dict[str, Any]:
    metadata = hit.item.get("metadata", {})
    return {
        "rank": hit.rank,
        "id": shorten(hit.id, _VALUE_LIMIT),
        "score": hit.score,
        "percent": percent(hit.score),
        "text": shorten(hit.item.get("text", ""), _TEXT_LIMIT),
        "pictures": pictures.of(hit.item.get("image", ())),
        "metadata": {shorten(str(key), _VALUE_LIMIT): show_value(value) for key, value in metadata.items()},
    }


def percent(score: float) -> str:
    """How long a score's bar is, in percent.

    >>> percent(0.873), percent(-0.4)
    ('87.3', '0.0')
    """
    return f"{100 * min(max(score, 0.0), 1.0):.1f}"


def show_value(value: Any) -> str:
    """A value of metadata in a line."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _VALUE_LIMIT)


def shorten(text: str, limit: int) -> str:
    """The beginning of a long text, and how much is not shown.

    >>> shorten("Hà Nội mùa thu", 6)
    'Hà Nội … (+8)'
    """
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … (+{len(text) - limit:,})"


def _write(path: Path, page: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(page, encoding="utf-8", errors="replace")
    os.replace(draft, path)
    return path

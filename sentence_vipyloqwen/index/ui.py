"""A local page to search an index in: type, drop an image, choose a prefix, set a condition, look at what is found.

It is for the person at this computer:

- requests are answered for the host names given alone, so that a page elsewhere cannot reach it by a name of its own
  that leads here (DNS rebinding), and requests that another site sends are refused; there is no CORS;
- of files, only the images of the index's items are shown, named by item and number, and drawn anew: no path is ever
  taken, and no file is sent as it is;
- uploads are limited in bytes and in pixels, are of the usual kinds of image, and are kept nowhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Annotated, Any, Literal
from urllib.parse import urlencode, urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import FormData, QueryParams
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from sentence_vipyloqwen.index.report import encode_picture, percent, shorten, show_value
from sentence_vipyloqwen.index.snapshot import Hit
from sentence_vipyloqwen.index.ui_words import WORDS, choose_language
from sentence_vipyloqwen.index.vector_index import VectorIndex
from sentence_vipyloqwen.modules.images import open_image
from sentence_vipyloqwen.modules.inputs import MAX_IMAGES
from sentence_vipyloqwen.pages import load_template

HOST = "127.0.0.1"
PORT = 8765
LOCAL_NAMES = (HOST, "localhost")

MOST_BYTES = 32 << 20
"""Of a request: five photographs."""

MOST_UPLOAD_PIXELS = 50_000_000
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_LETTERS = 20_000
DEFAULT_RESULTS, MOST_RESULTS = 12, 200

PICTURE_PIXELS = {"small": 512, "large": 2400}
"""Of the longer side; the small one is twice what the page shows, for dense screens."""

PICTURES_KEPT = 500
TEXT_SHOWN = 600

_PACKAGE = "sentence_vipyloqwen.index"
_ASSETS = {"ui.css": "text/css", "ui.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "style-src-attr 'unsafe-inline'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_PLAIN_NAME = re.compile(r"[^\W\d]\w*")


def create_app(index: VectorIndex, *, host_names: Sequence[str] = LOCAL_NAMES) -> FastAPI:
    """Make the page's application.

    Args:
        index: What is searched; changes that other processes make to its folder show with the next request.
        host_names: Names under which the page may be asked for, without port.

    Example::

        uvicorn.run(create_app(VectorIndex.load("my-index", model)), host="127.0.0.1", port=8765)
    """
    app = FastAPI(title="sentence-vipyloqwen", docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(_guard)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(host_names), www_redirect=False)
    desk = _Desk(index)

    @app.get("/")
    def page(request: Request) -> Response:
        return desk.answer(request, request.query_params, whole=True)

    @app.post("/")
    @app.post("/results")
    async def asked(request: Request) -> Response:
        async with request.form(max_files=MAX_IMAGES, max_fields=len(FIELDS)) as form:
            return await run_in_threadpool(desk.answer, request, form, whole=request.url.path == "/")

    @app.get("/image")
    def image(
        item: str, number: Annotated[int, Query(ge=0)] = 0, size: Literal["small", "large"] = "small"
    ) -> Response:
        return desk.picture(item, number, size)

    @app.get("/{name}")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404)
        return Response(_asset(name), media_type=_ASSETS[name])

    @app.exception_handler(StarletteHTTPException)
    def refused(request: Request, error: StarletteHTTPException) -> Response:
        return _refusal(str(error.detail), error.status_code)

    return app


def serve(index: VectorIndex, *, host: str = HOST, port: int = PORT, host_names: Sequence[str] = ()) -> None:
    """Serve the page until the process is told to end.

    Args:
        index: What is searched.
        host: Address to listen at.
        port: Port to listen at.
        host_names: Further names under which the page may be asked for.
    """
    names = dict.fromkeys((*LOCAL_NAMES, *host_names, *({host} - {"0.0.0.0"})))
    uvicorn.run(create_app(index, host_names=list(names)), host=host, port=port, log_level="warning")


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse what other sites send and what is too large; tell the browser what the page may do."""
    origin, length = request.headers.get("origin"), request.headers.get("content-length", "")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        response = _refusal(f"The request comes from {shorten(origin, 100)}; allowed is this page itself.", 403)
    elif request.method == "POST" and not length.isdecimal():
        response = _refusal("The request does not say how long it is.", 411)
    elif request.method == "POST" and (len(length) > 15 or int(length) > MOST_BYTES):
        response = _refusal(f"{shorten(length, 15)} bytes were sent; at most {MOST_BYTES:,} are allowed.", 413)
    else:
        response = await call_next(request)
    response.headers.update(_HEADERS)
    return response


def _refusal(reason: str, status: int) -> Response:
    return Response(
        _render("ui_results.html.jinja", found=Found(error=reason), words=WORDS["en"]), status, None, "text/html"
    )


_template = lru_cache(load_template)


def _render(name: str, **values: Any) -> str:
    return _template(_PACKAGE, name).render(**values)


def _asset(name: str) -> bytes:
    return (resources.files(_PACKAGE) / "templates" / name).read_bytes()


# --- what is asked ---

FIELDS = ("text", "like", "prompt_name", "where", "k")
"""Of the form, beside ``image``."""


@dataclass(frozen=True)
class Question:
    """What the form holds.

    Attributes:
        text: Words.
        like: Id of an item to begin with.
        prompt_name: Prompt of the query.
        where: Condition on metadata.
        k: Most results.
        images: Uploads.
    """

    text: str = ""
    like: str = ""
    prompt_name: str = ""
    where: str = ""
    k: str = str(DEFAULT_RESULTS)
    images: tuple[UploadFile, ...] = ()

    @classmethod
    def read(cls, form: FormData | QueryParams) -> Question:
        """Read a form; a file field left empty is no image."""
        fields = {name: value.strip() for name in FIELDS if isinstance(value := form.get(name), str)}
        uploads = tuple(file for file in form.getlist("image") if not isinstance(file, str) and file.filename)
        return cls(**fields, images=uploads)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not (self.text or self.like or self.images)


def _read_k(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MOST_RESULTS):
        raise ValueError(f"k is {shorten(text, 20)!r}; allowed is a whole number from 1 to {MOST_RESULTS}.")
    return int(text)


def _read_upload(upload: UploadFile) -> Image.Image:
    name, most = shorten(upload.filename or "", 80), f"at most {MOST_UPLOAD_PIXELS:,} are allowed"
    try:
        with Image.open(upload.file, formats=UPLOAD_FORMATS) as image:
            if image.width * image.height > MOST_UPLOAD_PIXELS:
                raise ValueError(
                    f"it has {image.width * image.height:,} pixels; at most {MOST_UPLOAD_PIXELS:,} are allowed"
                )
            return open_image(image)
    except UnidentifiedImageError as error:
        allowed = ", ".join(UPLOAD_FORMATS)
        raise ValueError(f"{name!r} cannot be read: it is no image of a kind that is allowed: {allowed}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name!r} cannot be read: it has far too many pixels; {most}.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read: {error}.") from error


def _read_query(index: VectorIndex, question: Question) -> dict[str, Any]:
    """The query: an item's own images, or its text where it has none, then what was added to it."""
    if len(question.text) > MOST_LETTERS:
        raise ValueError(f"The text has {len(question.text):,} letters; at most {MOST_LETTERS:,} are allowed.")
    item = index.get(question.like) if question.like else {"text": "", "image": []}
    texts = ["" if item["image"] else item["text"], question.text]
    images = [*item["image"], *map(_read_upload, question.images)]
    return {"text": "\n".join(filter(None, texts)), "image": images}


# --- what is found ---


@dataclass(frozen=True)
class Found:
    """What a question found.

    Attributes:
        cards: What the page shows of each hit.
        milliseconds: How long embedding and searching took; ``None`` where nothing was asked.
        error: Why there is no answer.
    """

    cards: Sequence[Mapping[str, Any]] = ()
    milliseconds: int | None = None
    error: str | None = None


class _Desk:
    """Answers requests from an index: questions one at a time, as a model is not made for several threads.

    Pictures do not wait for questions.
    """

    def __init__(self, index: VectorIndex) -> None:
        self._index = index
        self._model_lock, self._refresh_lock = Lock(), Lock()
        self._info = index.info()
        self._encoded = lru_cache(PICTURES_KEPT)(_encode)

    def answer(self, request: Request, form: FormData | QueryParams, *, whole: bool) -> Response:
        """The page with what was found, or that part of it alone."""
        lang = choose_language(request.headers.get("accept-language", ""))
        question = Question.read(form)
        found = self._find(question)
        values = {"found": found, "words": WORDS[lang], "question": question, "lang": lang}
        if whole:
            page = _render("ui.html.jinja", **values, index=self._about(), limits=_LIMITS)
        else:
            page = _render("ui_results.html.jinja", **values)
        return Response(page, 400 if found.error else 200, {"Cache-Control": "no-store"}, "text/html")

    def _find(self, question: Question) -> Found:
        start = perf_counter()
        try:
            self._refresh()
            if question.is_empty:
                return Found()
            query = _read_query(self._index, question)
            with self._model_lock:
                hits = self._index.search(
                    query, _read_k(question.k), question.prompt_name or None, where=question.where or None
                )
        except ValueError as error:
            return Found(error=str(error))
        return Found([_card(hit) for hit in hits], round(1000 * (perf_counter() - start)))

    def _refresh(self) -> None:
        with self._refresh_lock:
            self._index.refresh()

    def _about(self) -> dict[str, Any]:
        prompts = self._info["fingerprint"]["prompts"]
        return {
            "name": Path(self._info["folder"]).name,
            "count": len(self._index),
            "dim": self._info["dim"],
            "prompts": [name for name, prompt in prompts.items() if prompt],
        }

    def picture(self, id: str, number: int, size: str) -> Response:
        """An image of an item, drawn anew."""
        try:
            self._refresh()
            path = self._index.get(id)["image"][number]
            content, kind = self._encoded(path, PICTURE_PIXELS[size])
        except (ValueError, IndexError) as error:
            raise HTTPException(404, "There is no such image, or it cannot be opened any more.") from error
        return Response(content, headers={"Cache-Control": "private, max-age=600"}, media_type=kind)


_LIMITS = {"bytes": MOST_BYTES, "images": MAX_IMAGES, "letters": MOST_LETTERS, "results": MOST_RESULTS}


def _encode(path: str, pixels: int) -> tuple[bytes, str]:
    return encode_picture(open_image(path), pixels)


def _card(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "id": hit.id,
        "score": hit.score,
        "percent": percent(hit.score),
        "text": shorten(hit.item["text"], TEXT_SHOWN),
        "images": [
            {"name": (name := Path(path).name), "address": f"image?{urlencode(_address(hit.id, number, name))}"}
            for number, path in enumerate(hit.item["image"])
        ],
        "facts": [
            {"key": key, "value": show_value(value), "where": condition(key, value)}
            for key, value in hit.item["metadata"].items()
        ],
    }


def _address(id: str, number: int, name: str) -> dict[str, Any]:
    """An image by item and number; its name, which nobody reads, keeps browsers from showing what they have of old."""
    return {"item": id, "number": number, "name": name}


def condition(key: str, value: Any) -> str | None:
    """The condition that an item's metadata say this; ``None`` for lists, dicts and long texts.

    >>> condition("lang", "vi"), condition("số tiền", 5), condition("name", "it's"), condition("tags", [])
    ("lang = 'vi'", '"số tiền" = 5', "name = 'it''s'", None)
    """
    name = key if _PLAIN_NAME.fullmatch(key) else '"' + key.replace('"', '""') + '"'
    if value is None:
        return f"{name} IS NULL"
    if isinstance(value, (bool, int, float)):
        return f"{name} = {json.dumps(value)}"
    if isinstance(value, str) and len(value) <= 60:
        return f"{name} = '" + value.replace("'", "''") + "'"
    return None

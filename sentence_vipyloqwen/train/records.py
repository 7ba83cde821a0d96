"""Training records: one JSON object a line, read strictly, every fault named by ``file:line``.

| key | value | |
|---|---|---|
| `task` | `text_pair`, `instr`, `ocr`, `vqa_single`, `vqa_multi` or `general` | if absent, the anchor's prefix |
| `anchor` | a side | required |
| `positive` | a side | required |
| `negative` | a side or a list of sides | optional |
| `score` | number in [0, 1], how alike anchor and positive are | required for `text_pair`, refused elsewhere |
| `id`, `lang`, `domain` | text | optional; `lang` and `domain` serve breakdowns in evaluation |

A side is a text, or `{"text": ..., "image": ...}` with at least one of the two. `text` is a text or a list of turns,
which are joined by newlines; `image` is a path relative to the file, a `data:` URI, or a list of up to five of them.
`null` means that an optional key is absent. For example:

```json
{"task": "ocr", "anchor": {"image": "a.png", "text": "Tổng cộng?"}, "positive": "320.000 đ", "negative": ["32.000 đ"]}
{"anchor": "<text_pair> a cat", "positive": "một con mèo", "score": 0.97, "lang": "vi"}
```
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rich.console import Console
from rich.progress import Progress

from sentence_vipyloqwen.modules.images import image_size
from sentence_vipyloqwen.modules.inputs import IMAGE_PLACEHOLDER, INPUT_KEYS, MAX_IMAGES
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, SCORE_MSE, Task, split_prefix

MAX_ERRORS_KEPT = 1000
"""How many messages a `ValidationReport` holds; errors beyond are counted only."""

RECORD_KEYS = ("task", "anchor", "positive", "negative", "score", "id", "lang", "domain")

StrPath: TypeAlias = str | os.PathLike[str]


class RecordError(ValueError):
    """A line that is not a training record; the message reads ``file:line: what came, what is allowed``.

    Attributes:
        path: The file, as the caller named it.
        line: The line's number, from 1.
        reason: The message without file and line.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(path, line, reason)
        self.path, self.line, self.reason = path, line, reason

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Side:
    """One input of a record.

    Attributes:
        text: The text as the model gets it: turns joined, ``<image>`` placeholders dropped, the prefix at its head
            where the task puts one; ``""`` for none.
        images: Absolute paths or data URIs, at most `MAX_IMAGES`.
    """

    text: str
    images: tuple[str, ...] = ()

    def as_input(self) -> dict[str, Any]:
        """The side as `encode` takes it, with only the keys it has.

        >>> Side("một con mèo").as_input()
        {'text': 'một con mèo'}
        """
        image = {"image": list(self.images)} if self.images else {}
        text = {"text": self.text} if self.text else {}
        return {**image, **text}

    def as_row(self) -> dict[str, Any]:
        """The side as a dataset column holds it, always with both keys.

        >>> Side("một con mèo").as_row()
        {'image': [], 'text': 'một con mèo'}
        """
        return {"image": list(self.images), "text": self.text}


@dataclass(frozen=True)
class Record:
    """One training example, its texts bearing their prefix once: see `Side`.

    Attributes:
        task: The task, which selects the loss terms.
        anchor: The query side; bears the task's prefix.
        positive: What the anchor should lie close to.
        negatives: What it should not lie close to, none to several.
        score: For text_pair, how alike anchor and positive are, in [0, 1]; ``None`` for all other tasks.
        id: The record's own name.
        lang: Language, for breakdowns in evaluation.
        domain: Domain, for breakdowns in evaluation.
    """

    task: Task
    anchor: Side
    positive: Side
    negatives: tuple[Side, ...] = ()
    score: float | None = None
    id: str | None = None
    lang: str | None = None
    domain: str | None = None

    @property
    def sides(self) -> tuple[Side, ...]:
        """Anchor, positive and negatives, in this order."""
        return (self.anchor, self.positive, *self.negatives)


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found.

    Attributes:
        path: The file.
        records: How many good records it has.
        tasks: Good records by task, in the order of the task table.
        error_count: How many lines are bad.
        errors: The messages of the first `MAX_ERRORS_KEPT` bad lines.
    """

    path: str
    records: int
    tasks: dict[str, int]
    error_count: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the file can be trained on as it is: at least one record and no bad line."""
        return self.records > 0 and self.error_count == 0


def read_records(path: StrPath) -> Iterator[Record]:
    """Read a file of records, one at a time. Blank lines are skipped; images are not opened.

    Args:
        path: A JSONL file in UTF-8.

    Yields:
        The records in the order of the file.

    Raises:
        RecordError: At the first line that is not a record.
    """
    root = _image_root(path)
    with open(path, "rb") as file:
        for number, line in _numbered_lines(file):
            yield _parse_numbered(line, root, path, number)


def parse_record(line: bytes, root: str) -> Record:
    """Read one line.

    Args:
        line: A JSON object in UTF-8.
        root: The folder that image paths are relative to.

    Returns:
        The record.

    Raises:
        ValueError: Names what came and what is allowed.
    """
    raw = _load_object(line)
    _check_keys("record", raw, RECORD_KEYS)
    anchor = _side("anchor", raw.get("anchor"), root)
    task = _task(raw.get("task"), anchor)
    others = {"positive": _side("positive", raw.get("positive"), root), **_negatives(raw.get("negative"), root)}
    positive, *negatives = (_prefixed(name, side, task, task.prefix_on_positive) for name, side in others.items())
    return Record(
        task,
        _prefixed("anchor", anchor, task, True),
        positive,
        tuple(negatives),
        _score(raw.get("score"), task),
        *(_label(key, raw.get(key)) for key in ("id", "lang", "domain")),
    )


def validate(
    path: StrPath,
    *,
    write_good: StrPath | None = None,
    show_progress_bar: bool = False,
) -> ValidationReport:
    """Check every line of a file, images included: each must exist and have a readable header.

    Args:
        path: The file of records.
        write_good: Where to write the good lines, byte for byte, atomically. It must be another file in the same
            folder, as image paths are relative to the file.
        show_progress_bar: Show the progress through the file on standard error.

    Returns:
        Counts by task, and every bad line up to `MAX_ERRORS_KEPT`.

    Raises:
        ValueError: If `write_good` is the file itself or lies in another folder.
    """
    root = _image_root(path)
    _file_fault.cache_clear()
    counts: Counter[str] = Counter()
    errors: list[str] = []
    error_count = 0
    with open(path, "rb") as file, _good_lines(path, write_good) as good:
        for number, line in _with_progress(file, show_progress_bar):
            try:
                record = _parse_numbered(line, root, path, number, check_images=True)
            except RecordError as error:
                error_count += 1
                if len(errors) < MAX_ERRORS_KEPT:
                    errors.append(str(error))
            else:
                counts[record.task.name] += 1
                good.write(line if line.endswith(b"\n") else line + b"\n")
    tasks = {name: counts[name] for name in ALL_TASKS if counts[name]}
    return ValidationReport(os.fspath(path), counts.total(), tasks, error_count, tuple(errors))


def _image_root(path: StrPath) -> str:
    return os.path.realpath(os.path.dirname(path))


@contextmanager
def _good_lines(path: StrPath, write_good: StrPath | None) -> Iterator[BinaryIO]:
    """A file to write to, moved to its place on success only; the null device where none is wanted."""
    if write_good is None:
        with open(os.devnull, "wb") as file:
            yield file
        return
    if _image_root(write_good) != _image_root(path) or os.path.realpath(write_good) == os.path.realpath(path):
        raise ValueError(
            f"write_good: got {os.fspath(write_good)}; allowed: another file in {_image_root(path)}, "
            "since image paths are relative to the file"
        )
    partial = Path(f"{os.fspath(write_good)}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, write_good)
    finally:
        partial.unlink(missing_ok=True)


def _numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors put first
        if line.strip():
            yield number, line


def _with_progress(file: BinaryIO, show: bool, every: int = 1000) -> Iterator[tuple[int, bytes]]:
    with Progress(console=Console(stderr=True), disable=not show) as progress:
        bar = progress.add_task(f"Checking {file.name}", total=os.fstat(file.fileno()).st_size)
        for number, line in _numbered_lines(file):
            if show and number % every == 0:
                progress.update(bar, completed=file.tell())
            yield number, line


def _parse_numbered(line: bytes, root: str, path: StrPath, number: int, check_images: bool = False) -> Record:
    try:
        record = parse_record(line, root)
        for source in (image for side in record.sides for image in side.images if check_images):
            _check_image(source)
    except ValueError as error:
        raise RecordError(os.fspath(path), number, str(error)) from error
    return record


# --- JSON ---


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} occurs twice in one object; allowed: once")
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> None:
    raise ValueError(f"got {name}; allowed: finite numbers")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)


def _load_object(line: bytes) -> dict[str, Any]:
    try:
        raw = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno}); allowed: one JSON object a line") from error
    except RecursionError as error:
        raise ValueError("nested too deeply; allowed: the record format") from error
    if not isinstance(raw, dict):
        raise ValueError(f"record: got {_shown(raw)}; allowed: a JSON object")
    return raw


_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}


def _shown(value: Any) -> str:
    """What came, as a message names it, cut short.

    >>> _shown({"a": 1}), _shown(None)
    ("an object ({'a': 1})", 'nothing')
    """
    if value is None:
        return "nothing"
    text = repr(value) if len(str(value)) <= 60 else f"{str(value)[:60]!r}..."
    return f"{_KINDS[type(value)]} ({text})"


def _check_keys(name: str, raw: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for key in raw:
        if key not in allowed:
            raise ValueError(f"{name}: unknown key {key!r}; allowed: {', '.join(allowed)}")


# --- Fields ---


def _task(raw: Any, anchor: Side) -> Task:
    if raw is None:
        return split_prefix(anchor.text)[0]
    if not isinstance(raw, str) or raw not in ALL_TASKS:
        raise ValueError(f"task: got {_shown(raw)}; allowed: {', '.join(ALL_TASKS)}")
    return ALL_TASKS[raw]


def _score(raw: Any, task: Task) -> float | None:
    if SCORE_MSE not in task.weights:
        if raw is not None:
            scored = ", ".join(name for name, other in ALL_TASKS.items() if SCORE_MSE in other.weights)
            raise ValueError(f"score: got {_shown(raw)} on task {task.name}; allowed: on {scored} only")
        return None
    # `not ... <=` rather than `>`: NaN fails too.
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or not 0 <= raw <= 1:
        raise ValueError(f"score: got {_shown(raw)} on task {task.name}; allowed: a number from 0 to 1")
    return float(raw)


def _label(name: str, raw: Any) -> str | None:
    if raw is None:
        return None
    if name == "id" and type(raw) is int:
        return str(raw)
    return _text(name, raw, "a text that is not empty", empty=False)


def _text(name: str, raw: Any, allowed: str, *, empty: bool = True) -> str:
    if not isinstance(raw, str) or not (raw or empty):
        raise ValueError(f"{name}: got {_shown(raw)}; allowed: {allowed}")
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's \ud800 alone, which neither Arrow nor a tokenizer can hold
        raise ValueError(f"{name}: half of a surrogate pair at position {error.start}; allowed: Unicode") from error
    return raw


# --- Sides ---


def _side(name: str, raw: Any, root: str) -> Side:
    if isinstance(raw, dict):
        _check_keys(name, raw, INPUT_KEYS)
        side = Side(_turns(f"{name}.text", raw.get("text")), _images(f"{name}.image", raw.get("image"), root))
    elif isinstance(raw, str):
        side = Side(_turns(name, raw))
    else:
        raise ValueError(f'{name}: got {_shown(raw)}; allowed: a text or {{"text": ..., "image": ...}}')
    if not side.images and not split_prefix(side.text)[1].strip():
        raise ValueError(f"{name}: neither text nor image ({_shown(raw)}); allowed: at least one of them")
    return side


def _negatives(raw: Any, root: str) -> dict[str, Side]:
    """Name -> side, the name being the one of the dataset's column."""
    listed = raw if isinstance(raw, list) else [] if raw is None else [raw]
    names = (f"negative_{number}" for number in range(1, len(listed) + 1))
    return {name: _side(name, side, root) for name, side in zip(names, listed, strict=True)}


def _turns(name: str, raw: Any) -> str:
    turns = raw if isinstance(raw, list) else [] if raw is None else [raw]
    text = "\n".join(_text(name, turn, "a text or a list of texts") for turn in turns)
    text = text.replace(IMAGE_PLACEHOLDER, "")  # as the model does; a prefix may stand behind it
    return text if text.strip() else ""


def _images(name: str, raw: Any, root: str) -> tuple[str, ...]:
    listed = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if len(listed) > MAX_IMAGES:
        raise ValueError(f"{name}: got {len(listed)} images; allowed: up to {MAX_IMAGES}")
    return tuple(_image(name, source, root) for source in listed)


def _image(name: str, raw: Any, root: str) -> str:
    source = _text(name, raw, "a path, a data URI, or a list of them", empty=False)
    if source.startswith("data:"):
        if not source.startswith("data:image/") or not source.partition(",")[0].endswith(";base64"):
            raise ValueError(f"{name}: got {_shown(raw)}; allowed as data URI: data:image/<format>;base64,<data>")
        return source
    if source.startswith(("http://", "https://")):
        raise ValueError(f"{name}: got the URL {source!r}; allowed: files and data URIs (training fetches nothing)")
    if "\0" in source:
        raise ValueError(f"{name}: got {_shown(raw)}; allowed: a path without a NUL character")
    return os.path.normpath(os.path.join(root, source))


def _prefixed(name: str, side: Side, task: Task, bears_prefix: bool) -> Side:
    """Put the task's prefix at the head of the text, once, where it belongs; refuse any other prefix."""
    found, rest = split_prefix(side.text)
    if found is not GENERAL and not (bears_prefix and found is task):
        allowed = f"{task.token} or none" if bears_prefix and task.token else "no prefix here"
        raise ValueError(f"{name}: prefix {found.token} on task {task.name}; allowed: {allowed}")
    if not bears_prefix or not task.token:
        return side
    return Side(task.prompt + rest.lstrip(), side.images)


# --- Image headers ---


def _check_image(source: str) -> None:
    fault = _fault(source) if source.startswith("data:") else _file_fault(source)
    if fault:
        raise ValueError(fault)


@lru_cache(maxsize=1 << 16)
def _file_fault(path: str) -> str | None:
    """What is wrong with an image file; remembered, as many records share an image."""
    return _fault(Path(path))


def _fault(source: str | Path) -> str | None:
    try:
        image_size(source)
    except ValueError as error:
        return str(error)
    return None

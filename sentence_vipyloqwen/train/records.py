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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from rich.console import Console
from rich.progress import Progress

from sentence_vipyloqwen.modules.images import describe, image_size, open_image
from sentence_vipyloqwen.modules.inputs import IMAGE_PLACEHOLDER, INPUT_KEYS, MAX_IMAGES
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, SCORE_MSE, Task, split_prefix

MAX_ERRORS_KEPT = 1000
"""How many messages a `ValidationReport` holds; errors beyond are counted only."""

LINES_AT_ONCE = 1000
BYTES_AT_ONCE = 1 << 24
"""Lines whose images are looked at together; either bound ends them, so that data URIs do not fill the memory."""

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

    def as_dict(self) -> dict[str, Any]:
        """The error as a line of a report.

        >>> RecordError("train.jsonl", 3, "not JSON").as_dict()
        {'file': 'train.jsonl', 'line': 3, 'reason': 'not JSON'}
        """
        return {"file": self.path, "line": self.line, "reason": self.reason}


class ImageError(RecordError):
    """A line that is a training record, but for an image that cannot be opened.

    Attributes:
        image: The image's absolute path, or its data URI cut short.
        id: The record's own name, if it has one.
    """

    def __init__(self, path: str, line: int, reason: str, image: str, id: str | None = None) -> None:
        super().__init__(path, line, reason)
        self.args = (path, line, reason, image, id)  # what it is made of again after pickling
        self.image, self.id = image, id

    def as_dict(self) -> dict[str, Any]:
        """The error as a line of a report, with the image and, if it has one, the record's ``id``."""
        name = {} if self.id is None else {"id": self.id}
        return {"file": self.path, "line": self.line, **name, "image": self.image, "reason": self.reason}


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
class CheckedLine:
    """A line of a file of records, and what it is.

    Attributes:
        line: The line as it stands there, with its end.
        outcome: Its record, or what is wrong with it.
    """

    line: bytes
    outcome: Record | RecordError


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


def read_records(path: StrPath, *, show_progress_bar: bool = False) -> Iterator[Record]:
    """Read a file of records, one at a time. Blank lines are skipped; images are not opened.

    Args:
        path: A JSONL file in UTF-8.
        show_progress_bar: Show the progress through the file on standard error.

    Yields:
        The records in the order of the file.

    Raises:
        RecordError: At the first line that is not a record.
    """
    root = _image_root(path)
    with open(path, "rb") as file:
        for number, line in _with_progress(file, show_progress_bar):
            outcome = _outcome(line, root, path, number)
            if isinstance(outcome, RecordError):
                raise outcome
            yield outcome


def check_records(
    path: StrPath, *, decode_images: bool = False, show_progress_bar: bool = False
) -> Iterator[CheckedLine]:
    """Read a file of records and look at its images, a thousand lines at a time; a fault does not stop it.

    Images are read by as many threads as this process may use cores, an image of neighbouring lines once.

    Args:
        path: A JSONL file in UTF-8.
        decode_images: Decode every image to its end, as training does. By default its header is read, which finds what
            is missing, of another kind or too large, but not what was cut off.
        show_progress_bar: Show the progress through the file on standard error.

    Yields:
        Every line that is not blank, in the order of the file. Of a record with several broken images the first one is
        named.
    """
    root = _image_root(path)
    fault_of = _fault_finder(decode_images)
    with open(path, "rb") as file, ThreadPoolExecutor(_cores()) as threads:
        for lines in _batches(_with_progress(file, show_progress_bar)):
            outcomes = [_outcome(line, root, path, number) for number, line in lines]
            records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
            sources = list(dict.fromkeys(source for record in records for source in _images_of(record)))
            faults = dict(zip(sources, threads.map(fault_of, sources), strict=True))
            for (number, line), outcome in zip(lines, outcomes, strict=True):
                yield CheckedLine(line, _with_images(outcome, faults, path, number))


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
    decode_images: bool = False,
    write_good: StrPath | None = None,
    write_report: StrPath | None = None,
    show_progress_bar: bool = False,
) -> ValidationReport:
    """Check every line of a file, images included: each must exist and have a readable header.

    Args:
        path: The file of records.
        decode_images: Decode every image to its end, as training does: slower by far, and the only way to find one
            that was cut off.
        write_good: Where to write the good lines, byte for byte, atomically. It must be another file in the same
            folder, as image paths are relative to the file.
        write_report: Where to write all bad lines as JSON, one a line: ``file``, ``line``, ``reason``, and for a broken
            image ``image`` and the record's ``id``; atomically. Another file than the others.
        show_progress_bar: Show the progress through the file on standard error.

    Returns:
        Counts by task, and every bad line up to `MAX_ERRORS_KEPT`.

    Raises:
        ValueError: If `write_good` is the file itself or lies in another folder, or `write_report` is one of the two.
    """
    _check_targets(path, write_good, write_report)
    counts: Counter[str] = Counter()
    errors: list[str] = []
    error_count = 0
    with written(write_good) as good, written(write_report) as report:
        for checked in check_records(path, decode_images=decode_images, show_progress_bar=show_progress_bar):
            if isinstance(checked.outcome, RecordError):
                error_count += 1
                report.write(report_line(checked.outcome))
                if len(errors) < MAX_ERRORS_KEPT:
                    errors.append(str(checked.outcome))
            else:
                counts[checked.outcome.task.name] += 1
                good.write(checked.line if checked.line.endswith(b"\n") else checked.line + b"\n")
    tasks = {name: counts[name] for name in ALL_TASKS if counts[name]}
    return ValidationReport(os.fspath(path), counts.total(), tasks, error_count, tuple(errors))


def report_line(error: RecordError) -> bytes:
    """An error as a line of a report file: one JSON object."""
    # A file name that is not UTF-8 comes out as \udcXX, which is how JSON writes it.
    return json.dumps(error.as_dict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def written(path: StrPath | None) -> Iterator[BinaryIO]:
    """A file to write to, moved to its place on success only; the null device where none is wanted."""
    if path is None:
        with open(os.devnull, "wb") as file:
            yield file
        return
    partial = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_targets(path: StrPath, write_good: StrPath | None, write_report: StrPath | None) -> None:
    taken = [os.path.realpath(path)]
    if write_good is not None:
        if _image_root(write_good) != _image_root(path) or os.path.realpath(write_good) in taken:
            raise ValueError(
                f"write_good: got {os.fspath(write_good)}; allowed: another file in {_image_root(path)}, "
                "since image paths are relative to the file"
            )
        taken.append(os.path.realpath(write_good))
    if write_report is not None and os.path.realpath(write_report) in taken:
        raise ValueError(f"write_report: got {os.fspath(write_report)}; allowed: another file than {', '.join(taken)}")


def _image_root(path: StrPath) -> str:
    return os.path.realpath(os.path.dirname(path))


def _numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors put first
        if line.strip():
            yield number, line


def _with_progress(file: BinaryIO, show: bool, every: int = 1000) -> Iterator[tuple[int, bytes]]:
    with Progress(console=Console(stderr=True), disable=not show) as progress:
        bar = progress.add_task(f"Reading {file.name}", total=os.fstat(file.fileno()).st_size)
        for number, line in _numbered_lines(file):
            if show and number % every == 0:
                progress.update(bar, completed=file.tell())
            yield number, line


def _batches(lines: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    batch, size = [], 0
    for number, line in lines:
        batch.append((number, line))
        size += len(line)
        if len(batch) >= LINES_AT_ONCE or size >= BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _outcome(line: bytes, root: str, path: StrPath, number: int) -> Record | RecordError:
    try:
        return parse_record(line, root)
    except ValueError as error:
        return RecordError(os.fspath(path), number, str(error))


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


# --- Images ---


def _images_of(record: Record) -> Iterator[str]:
    return (source for side in record.sides for source in side.images)


def _with_images(
    outcome: Record | RecordError, faults: dict[str, str | None], path: StrPath, number: int
) -> Record | RecordError:
    """What a line is, once its images are known."""
    if isinstance(outcome, RecordError):
        return outcome
    for source in _images_of(outcome):
        if (fault := faults[source]) is not None:
            shown = describe(source)[1:-1] if source.startswith("data:") else source
            return ImageError(os.fspath(path), number, fault, shown, outcome.id)
    return outcome


def _fault_finder(decode: bool) -> Callable[[str], str | None]:
    """What tells what is wrong with an image; it remembers files, as many records share an image."""
    look = _decode if decode else image_size
    of_file = lru_cache(maxsize=1 << 16)(lambda path: _fault(look, Path(path)))
    return lambda source: _fault(look, source) if source.startswith("data:") else of_file(source)


def _fault(look: Callable[[Any], object], source: str | Path) -> str | None:
    try:
        look(source)
    except ValueError as error:
        return str(error)
    return None


def _decode(source: str | Path) -> None:
    """Open an image as training does: it takes room by what the header says, then decodes."""
    expected, size = image_size(source), open_image(source).size
    if size != expected:
        raise ValueError(f"the image {describe(source)} measures {size}, not {expected} as its header says")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

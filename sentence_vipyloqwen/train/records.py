"""Training records: one JSON object a line, read strictly; a fault is named, and what is allowed.

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
from dataclasses import dataclass
from typing import Any

from sentence_vipyloqwen.modules.inputs import IMAGE_PLACEHOLDER, INPUT_KEYS, MAX_IMAGES
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, SCORE_MSE, Task, split_prefix

RECORD_KEYS = ("task", "anchor", "positive", "negative", "score", "id", "lang", "domain")


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

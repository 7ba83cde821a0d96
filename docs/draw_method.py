"""Draw "How it works" of the READMEs anew, in both their languages.

    .venv/bin/python docs/draw_method.py

Writes `method.svg` and `method.vi.svg` beside this file, from `method.svg.jinja`, the words below and the table of
tasks. A test holds both files to it, so neither a task nor a loss term can be changed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sentence_vipyloqwen.model import EMBEDDING_DIM
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, TASKS, TRIPLET, Task

DOCS = Path(__file__).parent
TEMPLATE = "method.svg.jinja"

ENGLISH = {
    "language": "en",
    "title": "How it works",
    "inputs": "Inputs",
    "inputs_soft": "a text, an image, or a text with one to five images; a prefix names the task",
    "image": "image",
    "text": "text",
    "both": "image + text",
    "same": "the same image + text",
    "words": "a red circle",
    "total": "What is the total?",
    "customer": "Which customer?",
    "model": "Model",
    "model_soft": "Qwen2-VL, Qwen2.5-VL or Qwen3-VL",
    "distinct": "distinct images, each opened once",
    "prefixed": "prefix, then text",
    "tower": "vision tower",
    "packed": "one packed sequence, no padding",
    "shared": "what rows share is computed once",
    "language_model": "language model",
    "language_model_soft": "varlen attention, row by row · no LM head, no KV cache",
    "pooling": "mean pooling",
    "pooling_soft": "all tokens of a row",
    "head": "dense head",
    "head_soft": "{dimensions} dimensions",
    "unit": "normalise",
    "unit_soft": "unit length",
    "training": "Training",
    "training_soft": "the prefix chooses each row's loss terms",
    "prefix": "prefix",
    "none": "none",
    "margin": "(margin)",
    "mean": "loss: mean over the rows",
    "gradients": "gradients",
    "out": "What comes out",
    "folder": "Sentence Transformers",
    "folder_soft": "folder",
    "folder_same": "no plugin, the same vectors",
    "folder_places": "on disk or on the Hub",
    "index": "FAISS index",
    "index_soft": "Parquet shards",
    "page": "Search page",
}
VIETNAMESE = {
    "language": "vi",
    "title": "Cách hoạt động",
    "inputs": "Đầu vào",
    "inputs_soft": "văn bản, ảnh, hoặc một văn bản cùng một đến năm ảnh; tiền tố cho biết tác vụ",
    "image": "ảnh",
    "text": "văn bản",
    "both": "ảnh + văn bản",
    "same": "cùng ảnh ấy + văn bản",
    "words": "hình tròn màu đỏ",
    "total": "Tổng cộng?",
    "customer": "Khách hàng nào?",
    "model": "Mô hình",
    "model_soft": "Qwen2-VL, Qwen2.5-VL hoặc Qwen3-VL",
    "distinct": "mỗi ảnh chỉ được mở một lần",
    "prefixed": "tiền tố, rồi văn bản",
    "tower": "tháp thị giác",
    "packed": "một chuỗi xếp khít, không phần đệm",
    "shared": "phần dùng chung chỉ tính một lần",
    "language_model": "mô hình ngôn ngữ",
    "language_model_soft": "varlen attention, riêng từng dòng · không LM head, không KV cache",
    "pooling": "mean pooling",
    "pooling_soft": "mọi token của dòng",
    "head": "dense head",
    "head_soft": "{dimensions} chiều",
    "unit": "chuẩn hóa",
    "unit_soft": "độ dài bằng 1",
    "training": "Huấn luyện",
    "training_soft": "tiền tố chọn các loss của từng dòng",
    "prefix": "tiền tố",
    "none": "không có",
    "margin": "(margin)",
    "mean": "loss: trung bình các dòng",
    "gradients": "gradient",
    "out": "Kết quả",
    "folder": "Thư mục",
    "folder_soft": "Sentence Transformers",
    "folder_same": "không cần plugin, vector y hệt",
    "folder_places": "trên đĩa hoặc trên Hub",
    "index": "Chỉ mục FAISS",
    "index_soft": "các tệp Parquet",
    "page": "Trang tìm kiếm",
}
DRAWINGS: Mapping[str, Mapping[str, str]] = {"method.svg": ENGLISH, "method.vi.svg": VIETNAMESE}

CELL, MARGIN, GAP = 15.0, 9.0, 2.0
"""Width of an image token, of what stands around a word, and of what stands between two tokens."""

LETTERS = {"word": 6.6, "prefix": 7.3, "code": 7.2}
"""Width of a letter in each kind of type."""

SEQUENCE, TABLE = (48.0, 782.0), 156.0
"""Where the packed sequence begins and ends, and where the columns of loss terms begin."""

IMAGES = {"circle": (48, 48, 2), "page": (72, 48, 3)}
"""Symbols of the template: width, height, and into how many columns and rows of tokens they are cut."""


@dataclass(frozen=True)
class Row:
    """One input of the drawing.

    Attributes:
        label: Word for its kind.
        task: Whose prefix it bears.
        image: Which image it shows, if any.
        text: Word for its text, if any.
        vector: Shades of its vector, a digit each. Those of the circle and of its name are alike.
    """

    label: str
    task: Task
    image: str | None
    text: str | None
    vector: str


ROWS = (
    Row("image", GENERAL, "circle", None, "1842603917528406"),
    Row("both", TASKS["ocr"], "page", "total", "7291058364017925"),
    Row("same", TASKS["ocr"], "page", "customer", "6380149273106834"),
    Row("text", GENERAL, None, "words", "2841703826529406"),
)


@dataclass(frozen=True)
class Token:
    """A token as drawn.

    Attributes:
        kind: "image", "prefix" or "word".
        text: What it says; the symbol of an image.
        view: Which piece of the symbol it shows.
        x: Its left edge; 0 until it is laid out.
        width: Its width, at first what it needs.
    """

    kind: str
    text: str
    width: float
    view: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Packed:
    """The packed sequence.

    Attributes:
        tokens: From left to right.
        rows: For each row, the stretches (left, right) that make it up.
    """

    tokens: tuple[Token, ...]
    rows: tuple[tuple[tuple[float, float], ...], ...]


def main() -> None:
    """Write the drawings."""
    for name, words in DRAWINGS.items():
        (DOCS / name).write_text(draw(words), encoding="utf-8")


def draw(words: Mapping[str, str]) -> str:
    """The drawing in the language of its words."""
    environment = Environment(
        loader=FileSystemLoader(DOCS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value,
    )
    return environment.get_template(TEMPLATE).render(
        words={name: word.format(dimensions=EMBEDDING_DIM) for name, word in words.items()},
        rows=ROWS,
        images=IMAGES,
        packed=pack(words, *SEQUENCE),
        tasks=list(ALL_TASKS.values()),
        columns=columns(),
        note=note,
        with_margin=TRIPLET,
    )


def pack(words: Mapping[str, str], left: float, right: float) -> Packed:
    """Lay the rows out one behind the other: an image that several show stands once, as in the package's own packing.

    Args:
        words: Of the drawing.
        left: Where the sequence begins.
        right: Where it ends; the tokens are made as wide as that needs.
    """
    segments: dict[str, tuple[Token, ...]] = {}
    parts: list[list[str]] = []
    for row in ROWS:
        parts.append([name for name in (row.image, row.text) if name])
        if row.image:
            segments.setdefault(row.image, image_tokens(row.image))
        if row.text:
            segments[row.text] = text_tokens(row.task, words[row.text])
    needed = [token.width for segment in segments.values() for token in segment]
    stretch = (right - left - GAP * (len(needed) - 1)) / sum(needed)
    tokens: list[Token] = []
    stretches: dict[str, tuple[float, float]] = {}
    x = left
    for name, segment in segments.items():
        start = x
        for token in segment:
            tokens.append(replace(token, x=round(x, 1), width=round(stretch * token.width, 1)))
            x += stretch * token.width + GAP
        stretches[name] = round(start, 1), round(x - GAP, 1)
    return Packed(tuple(tokens), tuple(tuple(stretches[name] for name in row) for row in parts))


def image_tokens(name: str) -> tuple[Token, ...]:
    """The pieces of an image, row by row."""
    width, height, cuts = IMAGES[name]
    across, down = width // cuts, height // cuts
    views = (f"{across * column} {down * row} {across} {down}" for row in range(cuts) for column in range(cuts))
    return tuple(Token("image", name, CELL, view) for view in views)


def text_tokens(task: Task, text: str) -> tuple[Token, ...]:
    """The prefix of a task, where it has one, and the words of a text."""
    said = [("prefix", task.token)] if task.token else []
    said += [("word", word) for word in text.split()]
    return tuple(Token(kind, word, MARGIN + LETTERS[kind] * len(word)) for kind, word in said)


def columns() -> dict[str, float]:
    """Where the column of each loss term begins, in the order in which the table of tasks has them."""
    places: dict[str, float] = {}
    x = TABLE
    for term in dict.fromkeys(term for task in ALL_TASKS.values() for term in task.weights):
        places[term] = round(x, 1)
        x += LETTERS["code"] * len(term) + 14
    return places


def note(task: Task, term: str) -> str:
    """What stands beside the dot of a term: its weight where that is not 1, and the margin of a triplet."""
    weight = [f"×{task.weights[term]:g}"] if task.weights[term] != 1 else []
    margin = [f"({task.margin:g})"] if term == TRIPLET and task.margin is not None else []
    return " ".join(weight + margin)


if __name__ == "__main__":
    main()

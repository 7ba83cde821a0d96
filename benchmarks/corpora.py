"""What the benchmarks encode: texts and pictures drawn from a seed, in the shapes that users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SYLLABLES = [
    "ba",
    "cô",
    "đi",
    "em",
    "gà",
    "hóa",
    "khi",
    "lá",
    "mẹ",
    "năm",
    "ông",
    "phí",
    "quà",
    "sơn",
    "tiền",
    "uống",
    "vườn",
    "xanh",
    "yêu",
    "đơn",
    "red",
    "box",
    "pay",
    "day",
    "map",
]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
"""Enough words that no two texts are equal by chance; the bench model's tokenizer is trained on them."""

QUESTIONS_PER_PAGE = 8
COPIES = 4
"""How often each input of the corpus ``duplicates`` occurs."""

PAGE = (308, 448)
"""Width and height of a page in pixels: 11 x 16 merged tokens."""

LARGE = (1120, 840)
"""Width and height of a large image in pixels: 40 x 30 merged tokens."""


class Draw:
    """Draws texts and pictures, the same ones for the same seed.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def texts(self, count: int, shortest: int = 3, longest: int = 300) -> list[str]:
        """``count`` texts whose lengths in words are log-uniform, so that each order of magnitude is as frequent."""
        lengths = np.exp(self.rng.uniform(np.log(shortest), np.log(longest + 1), count)).astype(int)
        return [" ".join(self.rng.choice(WORDS, length)) for length in lengths]

    def picture(self, width: int, height: int) -> Image.Image:
        """A smooth picture in memory: neither side spends time on decoding it."""
        noise = self.rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    def pictures(self, count: int) -> list[Image.Image]:
        """``count`` pictures of 112 to 480 pixels a side."""
        return [self.picture(*self.rng.integers(112, 481, 2).tolist()) for _ in range(count)]

    def mixed(self, count: int) -> list[dict[str, Any]]:
        """``count`` rows of one picture and one text."""
        pairs = zip(self.pictures(count), self.texts(count), strict=True)
        return [{"image": image, "text": text} for image, text in pairs]

    def several(self, count: int) -> list[dict[str, Any]]:
        """``count`` rows of two or three pictures and one text."""
        return [{"image": self.pictures(int(self.rng.integers(2, 4))), "text": text} for text in self.texts(count)]

    def pages(self, pages: int) -> list[dict[str, Any]]:
        """Eight short questions on each of ``pages`` pages of one size, shuffled."""
        images = [self.picture(*PAGE) for _ in range(pages)]
        texts = self.texts(pages * QUESTIONS_PER_PAGE, 4, 12)
        rows = [{"image": images[row // QUESTIONS_PER_PAGE], "text": text} for row, text in enumerate(texts)]
        return self.shuffled(rows)

    def duplicates(self, distinct: int) -> list[Any]:
        """``distinct`` inputs, one half texts, the other picture and text, each :data:`COPIES` times, shuffled."""
        texts = [{"text": text} for text in self.texts(distinct - distinct // 2)]
        return self.shuffled((texts + self.mixed(distinct // 2)) * COPIES)

    def shuffled(self, rows: list[Any]) -> list[Any]:
        """The rows in another order."""
        return [rows[place] for place in self.rng.permutation(len(rows))]

    def large_images(self, folder: Path, count: int) -> list[dict[str, str]]:
        """``count`` large JPEG files, as inputs that both sides open themselves."""
        paths = [str(folder / f"{place}.jpg") for place in range(count)]
        for path in paths:
            self.picture(*LARGE).save(path)
        return [{"image": path} for path in paths]


def encode_corpora(rows: int) -> dict[str, list[Any]]:
    """The corpora of ``encode_vs_stock.py`` by name; the fewer rows of a kind, the longer they take.

    ========== ==================================================================================================
    text       rows / 2 texts of 3-300 words, log-uniform
    many-texts 2 * rows of them: stock, which sorts by length, finds like lengths for a batch
    images     rows / 4 images of 112-480 pixels a side
    mixed      rows / 4 rows of one image and one text
    several    rows / 8 rows of two or three images and one text
    shared     8 questions on each of rows / 4 pages, shuffled
    duplicates rows / 4 inputs (half text, half image and text), each 4 times, shuffled
    single     rows / 8 inputs (half text, half image and text), each in a call of its own
    ========== ==================================================================================================
    """
    draw = Draw()
    half, quarter, eighth = (max(2, rows // part) for part in (2, 4, 8))
    return {
        "text": draw.texts(half),
        "many-texts": draw.texts(2 * rows),
        "images": draw.pictures(quarter),
        "mixed": draw.mixed(quarter),
        "several": draw.several(eighth),
        "shared": draw.pages(quarter),
        "duplicates": draw.duplicates(quarter),
        "single": draw.texts(eighth - eighth // 2) + draw.mixed(eighth // 2),
    }


def train_corpora(rows: int) -> dict[str, list[list[Any]]]:
    """The batches of ``train_vs_stock.py`` by name, each the columns (anchors, positives) of one step.

    ========== ==================================================================================================
    text       rows / 2 anchors and positives, texts of 3-300 words, log-uniform
    mixed      rows / 2 anchors of one image and one text; positives are texts
    shared     8 questions on each of rows / 8 pages, shuffled; positives are short texts
    ========== ==================================================================================================
    """
    draw = Draw(seed=1)
    half, pages = max(2, rows // 2), max(1, rows // QUESTIONS_PER_PAGE)
    return {
        "text": [draw.texts(half), draw.texts(half)],
        "mixed": [draw.mixed(half), draw.texts(half)],
        "shared": [draw.pages(pages), draw.texts(pages * QUESTIONS_PER_PAGE, 4, 12)],
    }

"""Encode the same inputs with ``ViPyloQwen`` and with stock ``SentenceTransformer``; print the ratio of their times.

Same weights, one process, the two in turn, the median of several rounds. Run with ``make bench``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base

WORDS = [
    "số",
    "tiền",
    "tổng",
    "cộng",
    "phải",
    "thanh",
    "toán",
    "hóa",
    "đơn",
    "ngày",
    "tháng",
    "năm",
    "công",
    "ty",
    "khách",
    "hàng",
    "a",
    "red",
    "circle",
    "on",
    "a",
    "page",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=48, help="inputs of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both sides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder))
        sides = ViPyloQwen(path, device="cpu"), SentenceTransformer(path, device="cpu")
        table = Table("inputs", "stock / ours, median", "lowest", "highest", title="times faster than stock")
        for name, inputs in corpora(options.rows).items():
            ratios = compare(*sides, inputs, options.rounds)
            table.add_row(name, *(f"{f(ratios):.2f}" for f in (statistics.median, min, max)))
    Console().print(table)


def make_model(folder: Path) -> str:
    """A small model, large enough that arithmetic dominates."""
    base = make_tiny_base(folder / "base", WORDS * 20, hidden_size=384, layers=6, vision_size=256, vision_layers=4)
    model = ViPyloQwen.create(base, 256, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def corpora(rows: int) -> dict[str, list[Any]]:
    """Texts of 3 to 300 words (log-uniform), images of 112 to 480 pixels a side, and both together."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(3), np.log(300), rows)).astype(int)
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    sizes = rng.integers(112, 480, (rows // 4, 2))
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    mixed = [{"image": image, "text": text} for image, text in zip(images, texts, strict=False)]
    return {"text": texts, "images": images, "mixed": mixed}


def compare(ours: ViPyloQwen, stock: SentenceTransformer, inputs: Sequence[Any], rounds: int) -> list[float]:
    """Ratios of stock's time to ours, the two in turn, after one round of warm-up."""
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for model in (ours, stock):
            start = time.perf_counter()
            model.encode(list(inputs), batch_size=16)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return ratios[1:]


if __name__ == "__main__":
    main()

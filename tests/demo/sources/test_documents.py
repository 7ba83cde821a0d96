"""Rendered documents are legible, whole and small."""

from __future__ import annotations

import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont

from sentence_vipyloqwen.demo.sources import documents, vietnamese

LETTERS = "aàảãáạăằẳẵắặâầẩẫấậeèẻẽéẹêềểễếệiìỉĩíịoòỏõóọôồổỗốộơờởỡớợuùủũúụưừửữứựyỳỷỹýỵđ"


@pytest.mark.parametrize("face", ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold"])
def test_fonts_have_every_letter(face: str) -> None:
    glyphs = TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf").getBestCmap()
    written = {letter for word in vietnamese.BUSINESS_WORDS for letter in word}
    assert all(ord(letter) in glyphs for letter in (*LETTERS, *LETTERS.upper(), *written))


def test_sides_are_multiples_of_a_vision_token() -> None:
    for width, height in (documents.LINE_SIZE, *documents.PAGE_SIZES.values()):
        assert width % 28 == height % 28 == 0 and width * height // 28**2 <= 32


def test_lines_are_one_to_three_words_that_fit() -> None:
    rng = random.Random(0)
    vocabulary = set(vietnamese.BUSINESS_WORDS)
    for line in documents.draw_lines(200, rng):
        assert any(line.text == word or line.text.startswith(f"{word} ") for word in vocabulary)
        pixels = np.asarray(documents.render_line(line, rng).convert("L")).astype(int)
        ink = pixels < 120
        assert pixels.shape == documents.LINE_SIZE[::-1]
        assert ink.sum() > 15  # something is written
        assert not ink[:, :2].any() and not ink[:, -2:].any()  # and it does not run off the page
        assert ink.any(axis=0).argmax() <= 12  # its first letter stands near the left edge


@pytest.mark.parametrize("domain", documents.PAGE_SIZES)
def test_pages_answer_their_questions(domain: str) -> None:
    rng = random.Random(0)
    for page in documents.draw_pages(domain, 20, rng):
        records = documents.page_records(page, "a.png", 9, rng)
        assert len(records) == len(page.asked) and {record["positive"] for record in records} == page.keys
        assert all(record["negative"] != record["positive"] for record in records)
        assert documents.render_page(page, rng).size == documents.PAGE_SIZES[domain]
        assert "{" not in page.caption


def test_an_invoice_adds_up() -> None:
    for page in documents.draw_pages("invoice", 50, random.Random(0)):
        net, tax, total = (int(re.sub(r"\D", "", page.values[name])) for name in ("net", "tax", "total"))
        assert net + tax == total and tax * 10 == net


def test_amounts_are_written_the_vietnamese_way() -> None:
    for page in documents.draw_pages("receipt", 50, random.Random(0)):
        assert re.fullmatch(r"\d{1,3}(\.\d{3})* đ", page.values["total"])


def test_hard_negatives_avoid_what_is_reserved() -> None:
    page = documents.Page("form", (("birthday", "01/02/1990"),))
    reserved = {f"01/02/199{digit}" for digit in range(1, 9)}
    for seed in range(5):
        (record,) = documents.page_records(page, "a.png", 1, random.Random(seed), reserved)
        assert record["negative"] == "01/02/1999"


def test_equal_generators_paint_equal_pixels() -> None:
    page = documents.draw_pages("plate", 1, random.Random(0))[0]
    first, second, other = (np.asarray(documents.render_page(page, random.Random(seed))) for seed in (1, 1, 2))
    assert (first == second).all() and (first != other).any()

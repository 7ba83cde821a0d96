"""The five ways of writing a query."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest

from sentence_vipyloqwen.demo.sources.documents import PAGE_SIZES, Page, draw_pages
from sentence_vipyloqwen.mteb_tasks.queries import (
    CHINESE,
    ENGLISH,
    PLAIN,
    TYPOS,
    VIETNAMESE,
    WAYS,
    add_typing_errors,
    strip_diacritics,
    write_query,
)

CONTRACT = Page(
    "contract",
    (
        ("kind", "thuê nhà"),
        ("party_a", "Công ty TNHH Đại Lộc"),
        ("party_b", "Đỗ Thị Hạnh"),
        ("value", "12.340.000 đ"),
        ("start", "01/02/2020"),
    ),
)


def test_one_page_in_every_language() -> None:
    written = {kind: write_query(CONTRACT, kind, random.Random(0)) for kind in WAYS}
    names = "Công ty TNHH Đại Lộc", "Đỗ Thị Hạnh"
    assert written[VIETNAMESE] == f"hợp đồng thuê nhà giữa {names[0]} và {names[1]}, trị giá 12.340.000 đ"
    assert written[PLAIN] == "hop dong thue nha giua Cong ty TNHH Dai Loc va Do Thi Hanh, tri gia 12.340.000 d"
    assert written[ENGLISH] == f"house rental contract between {names[0]} and {names[1]}, worth 12.340.000 đ"
    assert written[CHINESE] == f"{names[0]}与{names[1]}之间的房屋租赁合同，价值12.340.000 đ"
    assert len(set(written.values())) == 5


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_every_kind_of_page_has_every_query(domain: str) -> None:
    for page in draw_pages(domain, 20, random.Random(1)):
        for kind in WAYS:
            query = write_query(page, kind, random.Random(2))
            assert "{" not in query
            assert any(value in query for value in page.values.values()) or kind in (PLAIN, TYPOS)


def test_without_diacritics_only_the_diacritics_are_gone() -> None:
    text = "Đường Nguyễn Huệ, số 12 – ước chừng 3.000 đ"
    plain = strip_diacritics(text)
    assert len(plain) == len(text)
    assert not any(unicodedata.decomposition(letter) for letter in plain)
    assert [a for a, b in zip(text, plain, strict=True) if a == b and not a.isascii()] == ["–"]


def test_typing_errors_are_few_and_leave_numbers_alone() -> None:
    text = "hợp đồng thuê nhà giữa Công ty TNHH Đại Lộc và Đỗ Thị Hạnh, trị giá 12.340.000 đ"
    damaged = add_typing_errors(text, random.Random(0))
    before, after = text.split(), damaged.split()
    changed = changed_words(text, damaged)
    long = [word for word in before if len(word.rstrip(",")) >= 3 and "0" not in word]
    assert len(long) == 13
    assert len(changed) == round(0.3 * 13) == 4
    for place in changed:
        assert after[place][0] == before[place][0]
        assert abs(len(after[place]) - len(before[place])) <= 1
    assert add_typing_errors(text, random.Random(0)) == damaged
    assert add_typing_errors(text, random.Random(1)) != damaged
    assert add_typing_errors("12.340 đ", random.Random(0)) == "12.340 đ"


def test_typing_errors_fall_on_words_with_punctuation_too() -> None:
    around = re.compile(r"\W+")
    for text in ("Hạnh,", "(«Hạnh»)", "“Công-ty”…", "1.200,50 (đồng)"):
        for seed in range(20):
            damaged = add_typing_errors(text, random.Random(seed))
            assert damaged != text
            assert around.findall(damaged) == around.findall(text)
            assert re.sub(r"\D", "", damaged) == re.sub(r"\D", "", text)


def test_every_long_word_of_a_query_has_its_share_of_errors() -> None:
    text = "đồng, (đơn) hàng; 2.500 kg."
    damaged = {
        place for seed in range(60) for place in changed_words(text, add_typing_errors(text, random.Random(seed)))
    }
    assert damaged == {0, 1, 2}


@pytest.mark.parametrize("text", ["29A-123.45", "số 2025abc", "ABC123, đ", "", "  ,"])
def test_typing_errors_leave_digits_and_what_stands_next_to_them(text: str) -> None:
    assert {add_typing_errors(text, random.Random(seed)) for seed in range(20)} == {text}


def changed_words(text: str, damaged: str) -> set[int]:
    pairs = zip(text.split(), damaged.split(), strict=True)
    return {place for place, (before, after) in enumerate(pairs) if before != after}


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="'telex'; allowed are .*'no_diacritics'"):
        write_query(CONTRACT, "telex", random.Random(0))

"""The ways of asking for a page, and the five ways of writing a query."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from string import Formatter

import pytest

from sentence_vipyloqwen.demo.data import DemoSizes, generator
from sentence_vipyloqwen.demo.sources.documents import PAGE_SIZES, Page, draw_pages
from sentence_vipyloqwen.mteb_tasks.queries import (
    ASKINGS,
    CHINESE,
    ENGLISH,
    PLAIN,
    TYPOS,
    VIETNAMESE,
    WAYS,
    Asking,
    clear_askings,
    strip_diacritics,
    write_query,
)

LANGUAGES = (VIETNAMESE, ENGLISH, CHINESE)
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
WITH_KIND = ASKINGS["contract"][0]


def held_out(domain: str, seed: int = 0) -> list[Page]:
    return draw_pages(domain, DemoSizes().eval.pages, generator(seed, "eval", domain))


def test_one_page_in_every_language() -> None:
    written = {kind: write_query(CONTRACT, WITH_KIND, kind, random.Random(0)) for kind in WAYS}
    assert written[VIETNAMESE] == "Đỗ Thị Hạnh ký hợp đồng thuê nhà với bên nào?"
    assert written[PLAIN] == "Do Thi Hanh ky hop dong thue nha voi ben nao?"
    assert written[ENGLISH] == "with which party did Đỗ Thị Hạnh sign a house rental contract?"
    assert written[CHINESE] == "Đỗ Thị Hạnh跟哪一方签了房屋租赁合同？"
    assert len(set(written.values())) == 5


def test_the_colour_of_a_plate_is_a_word_in_every_language() -> None:
    page = Page("plate", (("plate", "29A-123.45"), ("paint", "blue")))
    (asking,) = (asking for asking in ASKINGS["plate"] if "paint" in asking.fields)
    assert asking.ask(page, VIETNAMESE) == "xe đeo biển xanh 29A-123.45"
    assert asking.ask(page, ENGLISH) == "the vehicle with the blue plate 29A-123.45"
    assert asking.ask(page, CHINESE) == "挂蓝牌的车29A-123.45"


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_each_way_of_asking_names_the_same_fields_in_every_language(domain: str) -> None:
    askings = ASKINGS[domain]
    assert 3 <= len(askings) <= 5
    for asking in askings:
        templates = (asking.vietnamese, asking.english, asking.chinese)
        named = [sorted(name for _, name, _, _ in Formatter().parse(text) if name) for text in templates]
        assert named[0] == named[1] == named[2] == sorted(asking.fields) != []
    for language in LANGUAGES:
        assert len({asking.ask(held_out(domain)[0], language) for asking in askings}) == len(askings)
    assert any(len(asking.fields) == 1 for asking in askings)
    assert any(len(asking.fields) > 1 for asking in askings)


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_every_kind_of_page_has_every_query(domain: str) -> None:
    for page in draw_pages(domain, 20, random.Random(1)):
        for asking in ASKINGS[domain]:
            as_shown = [page.values[name] for name in asking.fields if name not in ("kind", "paint")]
            for language in LANGUAGES:
                query = write_query(page, asking, language, random.Random(2))
                assert "{" not in query
                assert as_shown
                assert all(value in query for value in as_shown)


def words_around(text: str, page: Page) -> set[str]:
    """The words of a text but those of the page's values."""
    for value in sorted(page.values.values(), key=len, reverse=True):
        text = text.replace(value, " ")
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_no_query_is_the_caption_that_the_demo_trains_on(domain: str) -> None:
    for page in held_out(domain):
        words = words_around(page.caption, page)
        assert words
        for asking in ASKINGS[domain]:
            query = asking.ask(page, VIETNAMESE)
            assert page.caption.lower() not in query.lower()
            assert query.lower() not in page.caption.lower()
            assert not words <= words_around(query, page)


def invoice(customer: str, total: str) -> Page:
    return Page("invoice", (("number", "1"), ("customer", customer), ("tax", "2"), ("total", total)))


def test_only_what_means_one_page_is_asked() -> None:
    pages = [invoice("Lê Văn Dung", "5 đ"), invoice("Lê Vân Dũng", "7 đ"), invoice("Lê Thị Hoa", "7 đ")]
    clear = [{asking.fields for asking in askings} for askings in clear_askings(pages)]
    assert clear == [
        {("customer", "total"), ("total",)},  # without diacritics, the first two customers are the same
        {("customer", "total")},
        {("customer",), ("customer", "total")},
    ]


def named(page: Page, asking: Asking) -> list[str]:
    return [strip_diacritics(page.values[name]).lower() for name in asking.fields]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_every_page_has_a_clear_query_and_no_clear_query_means_two(domain: str, seed: int) -> None:
    pages = held_out(domain, seed)
    clear = clear_askings(pages)
    assert all(clear)
    for page, askings in zip(pages, clear, strict=True):
        for asking in askings:
            assert [named(other, asking) for other in pages].count(named(page, asking)) == 1
    for kind in WAYS:
        texts = [
            write_query(page, asking, kind, random.Random(f"{seed}/{place}"))
            for place, (page, askings) in enumerate(zip(pages, clear, strict=True))
            for asking in askings
        ]
        assert len(set(texts)) == len(texts)


def is_in(value: str, query: str) -> bool:
    """Whether a query has a value as such, not as a part of a longer number or name."""
    return value in query and re.search(rf"(?<![\w.]){re.escape(value)}(?!\w)", query) is not None


@pytest.mark.parametrize("domain", PAGE_SIZES)
def test_no_typing_error_makes_the_values_of_another_page(domain: str) -> None:
    pages = held_out(domain)
    for page, askings in zip(pages, clear_askings(pages), strict=True):
        for asking in askings:
            others = [named(other, asking) for other in pages if other != page]
            for seed in range(3):
                query = strip_diacritics(write_query(page, asking, TYPOS, random.Random(seed))).lower()
                assert not any(all(is_in(value, query) for value in other) for other in others)


def test_every_way_of_asking_is_used() -> None:
    for domain, askings in ASKINGS.items():
        used = Counter(asking for clear in clear_askings(held_out(domain)) for asking in clear)
        assert set(used) == set(askings)
        assert min(used.values()) > DemoSizes().eval.pages / 2


def test_without_diacritics_only_the_diacritics_are_gone() -> None:
    text = "Đường Nguyễn Huệ, số 12 – ước chừng 3.000 đ"
    plain = strip_diacritics(text)
    assert len(plain) == len(text)
    assert not any(unicodedata.decomposition(letter) for letter in plain)
    assert [a for a, b in zip(text, plain, strict=True) if a == b and not a.isascii()] == ["–"]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="'telex'; allowed are .*'no_diacritics'"):
        write_query(CONTRACT, WITH_KIND, "telex", random.Random(0))

"""What people ask for a Vietnamese document: five ways to write the same query.

A query names what tells the page from others, such as a customer and an amount, as the page shows it. Its words are
Vietnamese, English or Chinese; a Vietnamese one is also written as many type it, without diacritics, and with errors.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping

from sentence_vipyloqwen.demo.sources.documents import Page

VIETNAMESE, PLAIN, TYPOS, ENGLISH, CHINESE = "vietnamese", "no_diacritics", "typing_errors", "english", "chinese"

_TEMPLATES: Mapping[str, Mapping[str, str]] = {
    "invoice": {
        VIETNAMESE: "hóa đơn của khách hàng {customer}, tổng cộng {total}",
        ENGLISH: "invoice of the customer {customer}, {total} in total",
        CHINESE: "客户{customer}的发票，总计{total}",
    },
    "receipt": {
        VIETNAMESE: "biên lai của cửa hàng {shop}, tổng {total}",
        ENGLISH: "receipt of the shop {shop}, {total} in total",
        CHINESE: "商店{shop}的收据，总计{total}",
    },
    "form": {
        VIETNAMESE: "đơn đăng ký của {name}, sinh ngày {birthday}",
        ENGLISH: "registration form of {name}, born on {birthday}",
        CHINESE: "{name}的登记表，出生日期{birthday}",
    },
    "plate": {
        VIETNAMESE: "ảnh chụp biển số xe {plate}",
        ENGLISH: "picture of the number plate {plate}",
        CHINESE: "车牌号{plate}的照片",
    },
    "contract": {
        VIETNAMESE: "hợp đồng {kind} giữa {party_a} và {party_b}, trị giá {value}",
        ENGLISH: "{kind} contract between {party_a} and {party_b}, worth {value}",
        CHINESE: "{party_a}与{party_b}之间的{kind}合同，价值{value}",
    },
}
_KINDS: Mapping[str, Mapping[str, str]] = {
    "thuê nhà": {ENGLISH: "house rental", CHINESE: "房屋租赁"},
    "mua bán": {ENGLISH: "sale", CHINESE: "买卖"},
    "dịch vụ": {ENGLISH: "service", CHINESE: "服务"},
    "vận chuyển": {ENGLISH: "transport", CHINESE: "运输"},
    "xây dựng": {ENGLISH: "construction", CHINESE: "建筑"},
}
"""Kinds of contracts, the one value of a page that a query translates."""

_SHARE_OF_ERRORS = 0.3
_WORD = re.compile(r"\b[^\W\d_]{3,}\b")
"""Three letters or more, with no digit next to them."""


def write_query(page: Page, kind: str, rng: random.Random) -> str:
    """The query for a page in one of the five ways.

    Raises:
        ValueError: If there is no such way.
    """
    if kind not in WAYS:
        raise ValueError(f"Unknown kind of query: {kind!r}; allowed are {list(WAYS)}.")
    return WAYS[kind](page, rng)


def strip_diacritics(text: str) -> str:
    """Vietnamese as it is typed without a Vietnamese keyboard.

    >>> strip_diacritics("Đơn đăng ký của Nguyễn Thúy, 1.250.000 đ")
    'Don dang ky cua Nguyen Thuy, 1.250.000 d'
    """
    letters = unicodedata.normalize("NFD", text.replace("đ", "d").replace("Đ", "D"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def add_typing_errors(text: str, rng: random.Random) -> str:
    """Damage about a third of the words of three letters or more, at least one, punctuation around them or not.

    Short words stay, and so do digits and the letters next to them: a wrong number would ask for another document.
    """
    words = list(_WORD.finditer(text))
    chosen = rng.sample(words, min(len(words), max(1, round(_SHARE_OF_ERRORS * len(words)))))
    for word in sorted(chosen, key=re.Match.start, reverse=True):  # from the end, so that earlier places stay right
        text = text[: word.start()] + _damage(word.group(), rng) + text[word.end() :]
    return text


def _damage(word: str, rng: random.Random) -> str:
    """One slip of the fingers: a letter left out, typed twice, or two letters exchanged; the first one stays."""
    at = rng.randrange(1, len(word))
    slips = [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]
    if at + 1 < len(word) and word[at] != word[at + 1]:
        slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return rng.choice(slips)


def _in_language(language: str) -> Callable[[Page, random.Random], str]:
    def write(page: Page, rng: random.Random) -> str:
        values = dict(page.values)
        if page.domain == "contract":
            values["kind"] = _KINDS[values["kind"]].get(language, values["kind"])
        return _TEMPLATES[page.domain][language].format(**values)

    return write


_vietnamese = _in_language(VIETNAMESE)

WAYS: Mapping[str, Callable[[Page, random.Random], str]] = {
    VIETNAMESE: _vietnamese,
    PLAIN: lambda page, rng: strip_diacritics(_vietnamese(page, rng)),
    TYPOS: lambda page, rng: add_typing_errors(_vietnamese(page, rng), rng),
    ENGLISH: _in_language(ENGLISH),
    CHINESE: _in_language(CHINESE),
}
"""Way of writing -> what writes a page's query so."""

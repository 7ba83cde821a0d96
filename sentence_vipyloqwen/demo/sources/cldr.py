"""Texts in Vietnamese, English and Chinese from Unicode's CLDR, through the PyPI package `babel`.

Licences: CLDR data Unicode-3.0, babel BSD-3-Clause. Whatever is written here is verifiable with babel.

A *content* is what a text says, whatever the language: some names, a date, an amount or a number. Contents compose (one
to three names out of hundreds, any date of 80 years, any number of any unit), so a model that has learnt the parts can
read combinations that it has never seen: train and eval share the parts, never a content and never a text.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Protocol

from babel import Locale
from babel.dates import format_date
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal, get_territory_currencies
from babel.units import format_unit

from sentence_vipyloqwen.demo.sources import Record, draw

LANGUAGES = ("vi", "en", "zh")
UNITS = (
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "volume-liter",
    "volume-milliliter",
    "area-hectare",
    "area-square-meter",
    "duration-hour",
    "duration-minute",
    "duration-day",
    "duration-week",
    "duration-month",
    "duration-year",
    "digital-megabyte",
    "digital-gigabyte",
    "power-watt",
    "energy-kilowatt-hour",
    "speed-kilometer-per-hour",
    "temperature-celsius",
)
CURRENCIES = ("VND", "USD", "EUR", "JPY", "CNY", "GBP", "KRW", "THB", "SGD", "AUD", "INR", "CAD")

_MAX_NAMES = 3
_FIRST_DAY = datetime.date(1950, 1, 1)
_DAYS = 80 * 365
_STYLES = ("medium", "long", "full")  # "short" leaves the century out


class Content(Protocol):
    """Something that can be said in each of the languages; two equal contents say the same."""

    @property
    def key(self) -> str:
        """Names the content, whatever the language and the order."""

    def text(self, lang: str, rng: random.Random) -> str:
        """Say it in `lang`; what is left free (order, style) is drawn from `rng`."""


@dataclass(frozen=True)
class Names:
    """One to three names of one kind, as a list.

    Attributes:
        kind: A key of `vocabulary()`.
        codes: Their CLDR codes, in the order in which they were drawn.
    """

    kind: str
    codes: tuple[str, ...]

    @property
    def key(self) -> str:
        """See `Content`."""
        return f"{self.kind}:{'+'.join(sorted(self.codes))}"

    def text(self, lang: str, rng: random.Random) -> str:
        """The names, joined as the language joins a list: "Pháp, Đức và Ý"."""
        codes = rng.sample(self.codes, len(self.codes))
        return format_list([vocabulary()[self.kind][code][lang] for code in codes], locale=lang)


@dataclass(frozen=True)
class Date:
    """A day."""

    day: datetime.date

    @property
    def key(self) -> str:
        """See `Content`."""
        return f"date:{self.day.isoformat()}"

    def text(self, lang: str, rng: random.Random) -> str:
        """The day in one of CLDR's longer styles: "17 tháng 3, 2024"."""
        return format_date(self.day, rng.choice(_STYLES), locale=lang)


@dataclass(frozen=True)
class Amount:
    """A number of a unit or of a currency.

    Attributes:
        number: How many.
        unit: One of `UNITS` or of `CURRENCIES`.
    """

    number: int
    unit: str

    @property
    def key(self) -> str:
        """See `Content`."""
        return f"amount:{self.number} {self.unit}"

    def text(self, lang: str, rng: random.Random) -> str:
        """The number and the unit's full name: "1.250 đô la Mỹ"."""
        if self.unit in CURRENCIES:
            return format_currency(
                self.number, self.unit, "#,##0", locale=lang, currency_digits=False, format_type="name"
            )
        texts = (format_unit(self.number, self.unit, length, locale=lang) for length in ("long", "short"))
        return next(text for text in texts if self.unit not in text)  # babel gives the code where CLDR has no long name


@dataclass(frozen=True)
class Number:
    """A number of four to nine digits, to be grouped as a language groups it."""

    number: int

    @property
    def key(self) -> str:
        """See `Content`."""
        return f"number:{self.number}"

    def text(self, lang: str, rng: random.Random) -> str:
        """The number with the language's group marks: "1.250.000"."""
        return format_decimal(self.number, locale=lang)


@lru_cache(maxsize=1)
def vocabulary() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Names by kind, code and language: territories, languages, currencies in use, months and weekdays.

    A code is taken where all three languages have a name without brackets or list marks, distinct within its kind.
    """
    locales = {lang: Locale(lang) for lang in LANGUAGES}
    in_use = {code for territory in locales["en"].territories for code in get_territory_currencies(territory)}
    return {
        "territories": _named({lang: _of_length(locale.territories, 2) for lang, locale in locales.items()}),
        "languages": _named({lang: _of_length(locale.languages, 2) for lang, locale in locales.items()}),
        "currencies": _named({lang: _members(locale.currencies, in_use) for lang, locale in locales.items()}),
        "calendar": _named({lang: _calendar(locale) for lang, locale in locales.items()}),
    }


def _of_length(names: Mapping[str, str], length: int) -> dict[str, str]:
    return {code: name for code, name in names.items() if len(code) == length}


def _members(names: Mapping[str, str], codes: Set[str]) -> dict[str, str]:
    return {code: name for code, name in names.items() if code in codes}


def _calendar(locale: Locale) -> dict[str, str]:
    months, days = locale.months["stand-alone"]["wide"], locale.days["stand-alone"]["wide"]
    return {f"{label}{number}": name for label, names in (("m", months), ("d", days)) for number, name in names.items()}


def _named(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Turn language -> code -> name into code -> language -> name, where every language has a usable name."""
    shared = sorted(set.intersection(*(set(of_lang) for of_lang in names.values())))
    taken: dict[str, dict[str, str]] = {}
    used: set[tuple[str, str]] = set()
    for code in shared:
        entry = {lang: names[lang][code] for lang in LANGUAGES}
        plain = not any(mark in name for name in entry.values() for mark in "()（）,、，/")
        if plain and used.isdisjoint(entry.items()):
            taken[code] = entry
            used.update(entry.items())
    return taken


@dataclass(frozen=True)
class Pair:
    """Two texts and how much of their content they share: task `text_pair`."""

    anchor: str
    positive: str
    score: float
    lang: str
    domain: str
    contents: tuple[str, str]

    @cached_property
    def keys(self) -> frozenset[str]:
        """See `Drawable`."""
        return frozenset((self.anchor, self.positive, *self.contents))

    def record(self) -> Record:
        """This pair as a record."""
        return {
            "task": "text_pair",
            "anchor": self.anchor,
            "positive": self.positive,
            "score": self.score,
            "lang": self.lang,
            "domain": self.domain,
        }


def draw_pairs(count: int, rng: random.Random, reserved: Set[str] = frozenset()) -> list[Pair]:
    """Draw `count` pairs: half of names, a quarter each of dates and of amounts."""
    dates = amounts = count // 4
    return [
        *draw(lambda: _pair("names", *_two_lists(rng), rng), count - dates - amounts, reserved),
        *draw(lambda: _pair("dates", *_two_dates(rng), rng), dates, reserved),
        *draw(lambda: _pair("amounts", *_two_amounts(rng), rng), amounts, reserved),
    ]


def _pair(domain: str, first: Content, second: Content, score: float, rng: random.Random) -> Pair:
    while True:  # the same text twice teaches nothing: draw the languages and styles again
        langs = rng.choices(LANGUAGES, weights=(2, 1, 1), k=2)
        anchor, positive = first.text(langs[0], rng), second.text(langs[1], rng)
        if anchor != positive:
            return Pair(anchor, positive, score, langs[0], domain, (first.key, second.key))


@lru_cache(maxsize=1)
def _overlaps() -> Mapping[float, Sequence[tuple[int, int, int]]]:
    """By Jaccard score: the sizes of two lists and the number of names they share."""
    by_score: dict[float, list[tuple[int, int, int]]] = {}
    for first, second in product(range(1, _MAX_NAMES + 1), repeat=2):
        for shared in range(min(first, second) + 1):
            by_score.setdefault(round(shared / (first + second - shared), 4), []).append((first, second, shared))
    return by_score


def _two_lists(rng: random.Random) -> tuple[Names, Names, float]:
    """Two lists of names; their score is the Jaccard overlap of the two sets, each possible value equally often."""
    score = rng.choice(sorted(_overlaps()))
    first, second, shared = rng.choice(_overlaps()[score])
    kind = _kind(rng)
    codes = rng.sample(sorted(vocabulary()[kind]), first + second - shared)
    return Names(kind, tuple(codes[:first])), Names(kind, tuple(codes[first - shared :])), score


def _kind(rng: random.Random) -> str:
    return rng.choices(list(vocabulary()), weights=(4, 3, 2, 1))[0]


def _two_dates(rng: random.Random) -> tuple[Date, Date, float]:
    """Two days, scored by what they share: 1.0 the day, 0.6 month and year alone, 0.3 the year alone, 0 none of it."""
    day, score = _date(rng).day, rng.choice((1.0, 0.6, 0.3, 0.0))
    other = {
        1.0: lambda: day,
        0.6: lambda: day.replace(day=_other(day.day, 28, rng)),
        0.3: lambda: day.replace(month=_other(day.month, 12, rng), day=rng.randint(1, 28)),
        0.0: lambda: day.replace(year=day.year + rng.choice((-1, 1)) * rng.randint(1, 30), day=rng.randint(1, 28)),
    }[score]
    return Date(day), Date(other()), score


def _date(rng: random.Random) -> Date:
    return Date(_FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS)))


def _other(value: int, highest: int, rng: random.Random) -> int:
    return rng.choice([other for other in range(1, highest + 1) if other != value])


def _two_amounts(rng: random.Random) -> tuple[Amount, Amount, float]:
    """Two amounts: 1.0 the same, 0.5 where the number or the unit is the same, 0 where neither is."""
    first, second = _amount(rng), _amount(rng)
    while first.number == second.number or first.unit == second.unit:
        second = _amount(rng)
    score = rng.choice((1.0, 0.5, 0.0))
    if score == 1.0:
        return first, first, score
    if score == 0.5:
        second = rng.choice((Amount(first.number, second.unit), Amount(second.number, first.unit)))
    return first, second, score


def _amount(rng: random.Random) -> Amount:
    if rng.random() < 0.5:
        return Amount(rng.randint(2, 999) * 10 ** rng.randint(0, 4), rng.choice(CURRENCIES))
    return Amount(rng.randint(2, 999), rng.choice(UNITS))


_LANGUAGE_NAMES = {
    "vi": {"vi": "tiếng Việt", "en": "tiếng Anh", "zh": "tiếng Trung"},
    "en": {"vi": "Vietnamese", "en": "English", "zh": "Chinese"},
    "zh": {"vi": "越南语", "en": "英语", "zh": "中文"},
}
_TRANSLATE = {"vi": "Dịch sang {language}", "en": "Translate into {language}", "zh": "翻译成{language}"}
_AGAIN = {"vi": "Bây giờ dịch sang {language}", "en": "Now into {language}", "zh": "现在翻译成{language}"}
_WRITE_DATE = {
    "vi": "Viết đầy đủ ngày {content} bằng {language}",
    "en": "Write the date {content} in full in {language}",
    "zh": "用{language}完整写出日期{content}",
}
_WRITE_NUMBER = {
    "vi": "Viết số {content} theo cách viết của {language}",
    "en": "Write the number {content} as it is written in {language}",
    "zh": "按{language}的写法写出数字{content}",
}


@dataclass(frozen=True)
class Instruction:
    """An instruction with what it applies to, and the answer: task `instr`."""

    turns: tuple[str, ...]
    positive: str
    lang: str
    domain: str
    contents: tuple[str, ...]

    @cached_property
    def keys(self) -> frozenset[str]:
        """See `Drawable`."""
        return frozenset((*self.turns[:1], "\n".join(self.turns), self.positive, *self.contents))

    def record(self) -> Record:
        """This instruction as a record; the anchor of a conversation is the list of its turns."""
        anchor = {"text": list(self.turns)} if len(self.turns) > 1 else self.turns[0]
        return {
            "task": "instr",
            "anchor": anchor,
            "positive": self.positive,
            "lang": self.lang,
            "domain": self.domain,
        }


def draw_instructions(count: int, rng: random.Random, reserved: Set[str] = frozenset()) -> list[Instruction]:
    """Draw `count` instructions: 2 in 5 to translate, 2 in 5 conversations, the rest to write a date or a number."""
    translations = conversations = count * 2 // 5
    dates = (count - translations - conversations) // 2
    numbers = count - translations - conversations - dates
    return [
        *draw(lambda: _translation(rng), translations, reserved),
        *draw(lambda: _conversation(rng), conversations, reserved),
        *draw(lambda: _written_date(rng), dates, reserved),
        *draw(lambda: _written_number(rng), numbers, reserved),
    ]


def _content(rng: random.Random) -> Content:
    draws = {"names": _names, "dates": _date, "amounts": _amount}
    return draws[rng.choices(list(draws), weights=(2, 1, 1))[0]](rng)


def _names(rng: random.Random) -> Names:
    kind = _kind(rng)
    return Names(kind, tuple(rng.sample(sorted(vocabulary()[kind]), rng.randint(1, _MAX_NAMES))))


def _say(forms: Mapping[str, str], lang: str, target: str, content: str = "") -> str:
    return forms[lang].format(language=_LANGUAGE_NAMES[lang][target], content=content)


def plain(content: Content, lang: str) -> str:
    """One fixed form of a content, so that a question has one right answer: its own order, the long style of a date."""
    if isinstance(content, Date):
        return format_date(content.day, "long", locale=lang)
    if isinstance(content, Names):
        return format_list([vocabulary()[content.kind][code][lang] for code in content.codes], locale=lang)
    return content.text(lang, random.Random(0))


def _translation(rng: random.Random) -> Instruction:
    content, (source, target) = _content(rng), rng.sample(LANGUAGES, 2)
    lang = rng.choice((source, target))  # the instruction's own language
    text = f"{_say(_TRANSLATE, lang, target)}: {plain(content, source)}"
    return Instruction((text,), plain(content, target), lang, "translation", (content.key,))


def _conversation(rng: random.Random) -> Instruction:
    """The last turn says into which language, an earlier one what; in half of them a translation stands between."""
    content, (source, target, between) = _content(rng), rng.sample(LANGUAGES, 3)
    lang, said = rng.choice((source, target)), plain(content, source)
    turns = (said, _say(_TRANSLATE, lang, target))
    if rng.random() < 0.5:
        request = f"{_say(_TRANSLATE, lang, between)}: {said}"
        turns = (request, plain(content, between), _say(_AGAIN, lang, target))
    return Instruction(turns, plain(content, target), lang, "conversation", (content.key,))


def _written_date(rng: random.Random) -> Instruction:
    content, (lang, target) = _date(rng), rng.choices(LANGUAGES, k=2)
    text = _say(_WRITE_DATE, lang, target, content.day.isoformat())
    return Instruction((text,), format_date(content.day, "full", locale=target), lang, "date", (content.key,))


def _written_number(rng: random.Random) -> Instruction:
    content, (lang, target) = Number(rng.randint(1000, 10 ** rng.randint(4, 9))), rng.choices(LANGUAGES, k=2)
    text = _say(_WRITE_NUMBER, lang, target, str(content.number))
    return Instruction((text,), content.text(target, rng), lang, "number", (content.key,))

"""Texts of CLDR say what their scores and answers claim."""

from __future__ import annotations

import datetime
import random
from collections import Counter

import pytest

from sentence_vipyloqwen.demo.sources import cldr, keys_of

RNG = random.Random(0)


@pytest.mark.parametrize(
    ("content", "vi", "en", "zh"),
    [
        (cldr.Names("territories", ("FR", "DE")), "Pháp và Đức", "France and Germany", "法国和德国"),
        (cldr.Date(datetime.date(2024, 3, 17)), "17 tháng 3, 2024", "March 17, 2024", "2024年3月17日"),
        (cldr.Amount(1250, "USD"), "1.250 đô la Mỹ", "1,250 US dollars", "1,250美元"),
        (cldr.Amount(12, "length-meter"), "12 mét", "12 meters", "12米"),
        (cldr.Number(1250000), "1.250.000", "1,250,000", "1,250,000"),
    ],
)
def test_a_content_in_three_languages(content: cldr.Content, vi: str, en: str, zh: str) -> None:
    assert [cldr.plain(content, lang) for lang in ("vi", "en", "zh")] == [vi, en, zh]


@pytest.mark.parametrize("unit", [*cldr.UNITS, *cldr.CURRENCIES])
def test_every_unit_has_a_name_in_every_language(unit: str) -> None:
    for lang in cldr.LANGUAGES:
        text = cldr.Amount(12, unit).text(lang, RNG)
        assert unit not in text and text.strip("0123456789 ")


def test_scores_of_lists_are_jaccard_overlaps_and_evenly_spread() -> None:
    pairs = [pair for pair in cldr.draw_pairs(2400, random.Random(1)) if pair.domain == "names"]
    for pair in pairs:
        first, second = (set(content.split(":")[1].split("+")) for content in pair.contents)
        assert pair.score == round(len(first & second) / len(first | second), 4)
    counts = Counter(pair.score for pair in pairs)
    assert set(counts) == {0.0, 0.2, 0.25, 0.3333, 0.5, 0.6667, 1.0}
    assert min(counts.values()) > 0.5 * len(pairs) / len(counts)


def test_scores_of_dates_count_shared_parts() -> None:
    pairs = [pair for pair in cldr.draw_pairs(800, random.Random(2)) if pair.domain == "dates"]
    for pair in pairs:
        first, second = (datetime.date.fromisoformat(content.split(":")[1]) for content in pair.contents)
        month = first.replace(day=1) == second.replace(day=1)
        expected = 1.0 if first == second else 0.6 if month else 0.3 if first.year == second.year else 0.0
        assert pair.score == expected
    assert set(Counter(pair.score for pair in pairs)) == {1.0, 0.6, 0.3, 0.0}


def test_scores_of_amounts_count_number_and_unit() -> None:
    for pair in cldr.draw_pairs(400, random.Random(3)):
        if pair.domain == "amounts":
            first, second = (content.split(":")[1].split() for content in pair.contents)
            assert pair.score == sum(a == b for a, b in zip(first, second, strict=True)) / 2


def test_no_pair_repeats_its_text() -> None:
    assert all(pair.anchor != pair.positive for pair in cldr.draw_pairs(1000, random.Random(4)))


def test_instructions_of_each_kind() -> None:
    instructions = cldr.draw_instructions(100, random.Random(5))
    assert Counter(i.domain for i in instructions) == {"translation": 40, "conversation": 40, "date": 10, "number": 10}
    assert {len(i.turns) for i in instructions if i.domain == "conversation"} == {2, 3}
    assert {i.lang for i in instructions} == {"vi", "en", "zh"}


def test_a_written_date_is_babels_full_date() -> None:
    dates = [i for i in cldr.draw_instructions(400, random.Random(6)) if i.domain == "date"]
    vietnamese = [i for i in dates if i.turns[0].endswith("bằng tiếng Việt")]
    for instruction in vietnamese:
        day = datetime.date.fromisoformat(instruction.contents[0].split(":")[1])
        assert instruction.positive.endswith(f", {day.day} tháng {day.month}, {day.year}")
    assert vietnamese


def test_reserved_contents_are_not_said_again_in_any_language() -> None:
    held_out = cldr.draw_pairs(200, random.Random(7))
    train = cldr.draw_pairs(500, random.Random(8), keys_of(held_out))
    assert keys_of(held_out).isdisjoint(keys_of(train))

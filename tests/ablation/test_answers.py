"""What the answers say, word for word, on figures made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sentence_vipyloqwen.ablation.answers import answer, in_short
from sentence_vipyloqwen.ablation.results import summarise
from sentence_vipyloqwen.ablation.variants import VARIANTS

RunOf = Callable[..., dict[str, Any]]


@pytest.fixture
def answers(run_of: RunOf) -> Callable[..., dict[str, str]]:
    """Variant -> its answer; every variant is given as (average, ocr, instr) by seed."""

    def make(**figures: list[tuple[float | None, float, float]]) -> dict[str, str]:
        runs = [
            run_of(name, seed, average, ocr=ocr, instr=instr)
            for name, of in figures.items()
            for seed, (average, ocr, instr) in enumerate(of)
        ]
        return {result.variant.name: answer(result) for result in summarise(runs)}

    return make


FULL = [(0.60, 0.6, 0.6), (0.62, 0.6, 0.6)]


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        (
            [(0.50, 0.4, 0.5), (0.52, 0.4, 0.5)],
            "Yes: as published, the average of the two tasks falls by 0.100 (from 0.610 in units of cosine to 0.510); "
            "significantly in two tasks, most in ocr, by 0.200.",
        ),
        (
            [(0.70, 0.9, 0.5), (0.72, 0.9, 0.5)],
            "No: as published, the average of the two tasks rises by 0.100 (from 0.610 in units of cosine to 0.710); "
            "significantly in ocr, by 0.300; but instr falls by 0.100.",
        ),
        (
            [(0.50, 0.2, 0.1), (0.52, 1.0, 1.0)],
            "Yes: as published, the average of the two tasks falls by 0.100 (from 0.610 in units of cosine to 0.510); "
            "in no task by itself significantly.",
        ),
        (
            [(0.61, 0.7, 0.5), (0.62, 0.7, 0.5)],
            "It depends on the task: as published, the average of the two tasks does not differ significantly "
            "(from 0.610 in units of cosine to 0.615), but ocr rises by 0.100 and instr falls by 0.100.",
        ),
        (
            [(0.60, 0.6, 0.6), (0.62, 0.6, 0.6)],
            "Not shown: as published, the average of the two tasks does not differ significantly (from 0.610 in "
            "units of cosine to 0.610), nor does any task.",
        ),
        (
            [(0.50, 0.4, 0.5)],
            "A hint, of one seed: as published, the average of the two tasks falls by "
            "0.100 (from 0.600 in units of cosine to 0.500).",
        ),
        (
            [(0.60, 0.6, 0.6)],
            "A hint, of one seed: as published, the average of the two tasks stays as it "
            "is (from 0.600 in units of cosine to 0.600).",
        ),
        ([(None, 0.0, 0.0)], "Every run failed."),
    ],
)
def test_an_answer_begins_with_what_it_means(
    answers: Callable[..., dict[str, str]], figures: list[tuple[float | None, float, float]], told: str
) -> None:
    """Do margins in units of cosine help, rather than as published?"""
    said = answers(full=FULL, published_triplet=figures)
    assert said["published_triplet"] == told
    assert said["full"] == "An average of 0.610 ± 0.014, with which the others are compared."


def test_a_question_about_the_variant_itself_is_answered_the_other_way_round(
    answers: Callable[..., dict[str, str]],
) -> None:
    better = [(average + 0.1, ocr + 0.1, instr) for average, ocr, instr in FULL]
    said = answers(full=FULL, attention_pooling=better, cut=FULL, matryoshka=FULL, matryoshka_cut=better)
    assert said["matryoshka_cut"].startswith("Yes: with Matryoshka training, the average of the two tasks rises by 0.1")
    assert "(from 0.610 without to 0.710)" in said["matryoshka_cut"]  # against cut
    assert said["attention_pooling"].startswith("It should learn them: with weights that are learned, the average of")
    assert said["cut"].startswith("Nothing that shows: cut, the average of the two tasks does not differ")


def test_what_has_nothing_to_be_compared_with_says_its_figure(answers: Callable[..., dict[str, str]]) -> None:
    assert answers(one_mix=FULL)["one_mix"] == (
        "The average of the two tasks is 0.610 ± 0.014; full has no run of the same seed yet."
    )
    assert answers(only_ocr=FULL[:1])["only_ocr"] == "ocr is 0.600; full has no run of the same seed yet."


def test_a_model_for_one_task_is_answered_by_that_task(answers: Callable[..., dict[str, str]]) -> None:
    said = answers(
        full=FULL, only_instr=[(0.1, 0.0, 0.6), (0.1, 0.0, 0.6)], only_ocr=[(0.1, 0.8, 0.0), (0.1, 0.8, 0.0)]
    )
    assert said["only_ocr"] == (
        "Yes: with a model of its own, ocr rises by 0.200 (from 0.600 with one model for all tasks to 0.800)."
    )
    assert said["only_instr"] == (
        "Not shown: with a model of its own, instr does not differ significantly (from 0.600 with one model for "
        "all tasks to 0.600)."
    )


def test_a_question_about_one_task_is_answered_by_it_and_then_by_the_others(
    answers: Callable[..., dict[str, str]],
) -> None:
    said = answers(
        full=FULL,
        no_ocr_prefix=[(0.50, 0.4, 0.5), (0.52, 0.4, 0.5)],
        no_instr_prefix=[(0.5, 0.4, 0.6)] * 2,
    )
    assert said["no_ocr_prefix"] == (
        "Yes: without the prefix of ocr, ocr falls by 0.200 (from 0.600 with it to 0.400); elsewhere, the average "
        "falls by 0.100 and instr falls by 0.100."
    )
    assert said["no_instr_prefix"] == (
        "Not shown: without the prefix of instr, instr does not differ significantly (from 0.600 with it to 0.600), "
        "but ocr falls by 0.200."
    )


def test_every_variant_has_words_for_every_outcome() -> None:
    for variant in VARIANTS.values():
        if variant.against:
            assert variant.side, variant.name
            assert variant.other_side, variant.name
            assert variant.if_better != variant.if_worse != variant.if_equal != variant.if_better, variant.name


def test_in_short_is_ordered_by_size(run_of: RunOf) -> None:
    def runs(name: str, average: float, seeds: int = 2, **tasks: float) -> list[dict[str, Any]]:
        return [run_of(name, seed, average, **{"ocr": 0.5, "instr": 0.5, **tasks}) for seed in range(seeds)]

    groups = in_short(
        summarise(
            [
                *runs("full", 0.5),
                *runs("info_nce_only", 0.52),
                *runs("one_mix", 0.4),
                *runs("no_prefix", 0.5, ocr=0.6, instr=0.4),
                *runs("no_cosine", 0.5, instr=0.46),
                *runs("only_ocr", 0.1, ocr=0.45),
                *runs("mixed_batches", 0.5),
                *runs("all_negatives", 0.47),
                *runs("cut", 0.3, seeds=1),
                run_of("matryoshka", 0, None),
                *runs("matryoshka_cut", 0.5, seeds=1),
            ]
        )
    )
    assert [heading.split(",")[0] for heading, _ in groups] == [
        "Worse",
        "Better",
        "No significant difference",
        "One seed",
        "Failed",
    ]
    assert [[(line.name, line.difference) for line in lines] for _, lines in groups] == [
        [
            ("one_mix", "-0.100"),
            ("only_ocr", "-0.050 in ocr"),
            ("no_cosine", "-0.040 in instr"),
            ("all_negatives", "-0.030 against mixed_batches"),
        ],
        [("info_nce_only", "+0.020")],
        [("no_prefix", "+0.000, but +0.100 in ocr and -0.100 in instr"), ("mixed_batches", "+0.000")],
        [("cut", "-0.200"), ("matryoshka_cut", "+0.200 against cut")],
        [("matryoshka", "")],
    ]
    assert groups[0][1][0].change == VARIANTS["one_mix"].change
    assert in_short(summarise(runs("full", 0.5))) == []

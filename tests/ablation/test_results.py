"""Means, spreads and the rule, on numbers made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sentence_vipyloqwen.ablation.results import (
    CONFIDENCE,
    MEAN,
    Difference,
    Spread,
    load_results,
    summarise,
    unknown_variants,
)

RunOf = Callable[..., dict[str, Any]]


def test_the_spread_of_a_figure() -> None:
    figure = Spread({1: 0.2, 2: 0.3, 3: 0.7})
    assert figure.mean == pytest.approx(0.4)
    assert figure.deviation == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert figure.range == (0.2, 0.7)
    assert Spread({1: 0.2}).deviation is None


@pytest.mark.parametrize(
    ("own", "other", "counts"),
    [
        ([0.50, 0.60, 0.70], [0.30, 0.41, 0.49], True),  # +0.2, by seed within 0.01 of it, though seeds lie 0.1 apart
        ([0.30, 0.41, 0.49], [0.50, 0.60, 0.70], True),
        ([0.52, 0.52, 0.52], [0.50, 0.51, 0.50], True),  # +0.0167; 4.303 x 0.0058 / sqrt(3) = 0.0143
        ([0.52, 0.52, 0.51], [0.50, 0.51, 0.50], False),  # +0.0133
        ([0.60, 0.70], [0.50, 0.61], True),  # +0.095; 12.706 x 0.0071 / sqrt(2) = 0.064
        ([0.60, 0.70], [0.50, 0.63], False),  # +0.085; 0.191
        ([0.5, 0.5], [0.5, 0.5], False),
        ([0.6, 0.6], [0.5, 0.5], True),
        ([0.9], [0.1], False),  # one seed
    ],
)
def test_a_difference_counts_where_its_interval_excludes_0(own: list[float], other: list[float], counts: bool) -> None:
    found = Difference.of(*(Spread(dict(enumerate(values))) for values in (own, other)))
    assert found is not None
    assert found.counts is counts
    assert found.by_seed.mean == pytest.approx(sum(own) / len(own) - sum(other) / len(other))


def test_a_difference_is_taken_over_the_seeds_that_both_have() -> None:
    found = Difference.of(Spread({1: 0.5, 2: 0.9, 3: 0.7}), Spread({1: 0.4, 3: 0.5, 4: 0.0}))
    assert found is not None
    assert found.by_seed.by_seed == pytest.approx({1: 0.1, 3: 0.2})
    assert (found.own.mean, found.other.mean) == pytest.approx((0.6, 0.45))
    assert found.interval == pytest.approx(math.tan(0.475 * math.pi) * 0.05)  # t of one degree is Cauchy's
    assert Difference.of(Spread({1: 0.5}), Spread({2: 0.5})) is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    zero = Spread(dict.fromkeys(range(3), 0.0))
    found = [Difference.of(Spread(dict(enumerate(map(float, of)))), zero) for of in draws]
    assert sum(difference.counts for difference in found) / len(found) == pytest.approx(1 - CONFIDENCE, abs=0.015)


def test_every_variant_is_compared_with_its_own_counterpart(run_of: RunOf) -> None:
    runs = [
        *(run_of("full", seed, 0.5 + seed / 100, ocr=0.6, instr=None) for seed in (0, 1, 2)),
        *(run_of("mixed_batches", seed, 0.52, ocr=0.5, instr=0.5) for seed in (0, 1, 2)),
        *(run_of("all_negatives", seed, 0.2, ocr=0.5 + seed / 10, instr=0.5) for seed in (0, 1)),
        run_of("all_negatives", 2, None),
        run_of("one_mix", 0, None),
    ]
    full, one_mix, mixed, negatives = summarise(runs)
    assert [result.variant.name for result in (full, one_mix, mixed, negatives)] == [
        "full",
        "one_mix",
        "mixed_batches",
        "all_negatives",
    ]
    assert full.figures[MEAN].mean == pytest.approx(0.51)
    assert full.figures["instr"].mean == 0  # undefined
    assert not full.differences
    assert negatives.differences[MEAN].by_seed.mean == pytest.approx(-0.32)  # against mixed_batches, of two seeds
    assert [result.compared_seeds for result in (full, mixed, negatives)] == [0, 3, 2]
    assert (one_mix.failed, one_mix.figures) == ([0], {})
    assert (negatives.failed, negatives.seconds) == ([2], 108.0)


def test_a_model_for_one_task_is_compared_in_that_task_alone(run_of: RunOf) -> None:
    runs = [
        *(run_of("full", seed, 0.5, ocr=0.6, instr=0.5 + seed / 10) for seed in (0, 1)),
        *(run_of("only_ocr", seed, 0.1, ocr=0.8, instr=0.0) for seed in (0, 1)),
        *(run_of("only_instr", seed, 0.1, ocr=0.0, instr=0.6) for seed in (0, 1)),
    ]
    _, instr, ocr = summarise(runs)
    assert (set(ocr.figures), set(ocr.differences)) == ({"ocr"}, {"ocr"})
    assert (ocr.main, instr.main) == ("ocr", "instr")


def test_a_question_about_one_task_is_answered_by_that_task(run_of: RunOf) -> None:
    runs = [
        *(run_of(name, 0, 0.5, ocr=0.6, instr=0.5) for name in ("full", "no_ocr_prefix", "no_cosine", "no_triplet")),
        run_of("no_text_pair_prefix", 0, 0.5, ocr=0.6, instr=0.5),
    ]
    mains = {result.variant.name: result.main for result in summarise(runs)}
    assert mains == {
        "full": MEAN,
        "no_cosine": "instr",
        "no_triplet": MEAN,  # of three tasks
        "no_ocr_prefix": "ocr",
        "no_text_pair_prefix": MEAN,  # which was not measured
    }


def test_a_variant_of_another_version_is_no_result(run_of: RunOf) -> None:
    runs = [run_of("full", 0, 0.5, ocr=0.6), run_of("renamed", 0, 0.9, ocr=0.9)]
    assert [result.variant.name for result in summarise(runs)] == ["full"]
    assert unknown_variants(runs) == ["renamed"]
    assert unknown_variants(runs[:1]) == []


def test_curves_are_means_over_the_seeds(run_of: RunOf) -> None:
    runs = [
        *(run_of("full", seed, 0.5 + seed, ocr=0.6, instr=0.5) for seed in (0, 1)),
        run_of("only_ocr", 0, 0.5, ocr=0.8, instr=0.0),
        run_of("one_mix", 0, None),
    ]
    full, mix, ocr = summarise(runs)
    assert full.curves == {task: {1: 3.0, 2: 1.0} for task in ("ocr", "instr")}
    assert (mix.curves, ocr.curves) == ({}, {"ocr": {1: 3.0, 2: 1.5}})


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results.json: nothing has been run there"):
        load_results(tmp_path)

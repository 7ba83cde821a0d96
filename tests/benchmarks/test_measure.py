from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import common
import measure
import numpy as np
import pytest
from flops import Work
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen


def result(**changes: Any) -> measure.Result:
    values = {
        "name": "text",
        "rows": 2,
        "seconds": {"stock": [6.0, 8.0, 4.0], "ours": [2.0, 2.0, 4.0]},
        "tokens": {"stock": 300, "ours": 120},
        "megabytes": {"stock": 300.4, "ours": 100.6},
        "work": Work(2e12, 1e12),
        "rates": [Work(2e12, 2e12), Work(4e12, 4e12), Work(2e12, 2e12)],
        "cosine": 0.999999,
    }
    return measure.Result(**values | changes)


@pytest.mark.parametrize("module", [common, measure])
def test_the_examples_of_docstrings(module: Any) -> None:
    outcome = doctest.testmod(module)
    assert outcome.failed == 0 and outcome.attempted > 0


def test_times_faster_is_stock_over_ours_round_by_round() -> None:
    assert result().times_faster() == [3.0, 4.0, 1.0]


def test_shares_are_the_ideal_time_of_a_round_over_the_time_taken_in_it() -> None:
    """2e12 and 1e12 operations at 2e12 a second: 1.5 seconds; at twice that rate, half of it."""
    assert result().shares() == [0.75, 0.375, 0.375]


def test_the_rates_of_the_report_are_medians_over_the_rounds() -> None:
    results = [result(rates=[Work(90e9, 80e9), Work(100e9, 90e9)]), result(rates=[Work(110e9, 100e9)])]
    assert "100 GFLOP/s in shapes of the language model, 90 in" in measure.describe_rates(results)


def test_bare_products_are_timed_in_the_same_rounds(model: ViPyloQwen) -> None:
    calls: list[str] = []
    seconds, rates = measure.timed({"stock": lambda: calls.append("stock")}, model, rounds=2)
    assert calls == ["stock"] * 2 and list(seconds) == ["stock"]
    assert len(rates) == 2 and all(rate.language > 0 and rate.vision > 0 for rate in rates)


def test_tokens_are_counted_with_padding_on_either_side(model: ViPyloQwen, folder: Path) -> None:
    texts = ["xin", "Xin chào thế giới"]
    lengths = [model.preprocess([text])["input_ids"].shape[1] for text in texts]
    for side, expected in ((SentenceTransformer(str(folder), device="cpu"), 2 * max(lengths)), (model, sum(lengths))):
        with measure.CountTokens(side) as count:
            side.encode(texts)
        side.encode(texts)  # not counted
        assert count.tokens == expected


def test_a_line_has_median_and_spread() -> None:
    cells = ["text", 2, "3.00 (1.00-4.00)", "6.00", "2.00", "2.50", "300", "101", "3.000", "38%", "0.999999"]
    assert result().line() == cells
    assert len(cells) == len(measure.COLUMNS)


def test_jobs_run_in_turn_and_in_the_other_order_every_second_round() -> None:
    calls: list[str] = []
    seconds = measure.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert calls == list("abbaab")
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_peak_memory_is_seen_after_it_is_freed() -> None:
    results, megabytes = measure.warm_up({"small": lambda: 1, "large": lambda: np.ones(20_000_000).sum()})
    assert results == {"small": 1, "large": 20_000_000}
    assert megabytes["small"] < 80 < 150 < megabytes["large"] < 260


def test_the_lowest_cosine_of_rows() -> None:
    left = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert measure.lowest_cosine(left, np.array([[3.0, 0.0], [3.0, 4.0]])) == pytest.approx(0.8)


@pytest.mark.parametrize("cosine", [0.9998, float("nan")])
def test_sides_that_disagree_stop_the_run(cosine: float) -> None:
    measure.check_agreement("text", 0.9999)
    with pytest.raises(RuntimeError, match="text: the sides disagree"):
        measure.check_agreement("text", cosine)

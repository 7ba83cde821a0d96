from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import where_time_goes
from where_time_goes import CORPORA, GROUPS, REST, shares

TINY = ["--hidden-size", "64", "--layers", "1", "--vision-size", "32", "--vision-layers", "1", "--threads", "1"]


def test_the_examples_of_docstrings() -> None:
    outcome = doctest.testmod(where_time_goes)
    assert outcome.failed == 0 and outcome.attempted > 0


def test_an_operator_counts_in_one_group_and_others_are_the_rest() -> None:
    operators = [
        ("aten::addmm", 1.0),
        ("aten::add_", 0.5),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 0.25),
        ("aten::silu_backward", 0.25),
        ("ProfilerStep*", 9.0),
    ]
    found = shares(operators, seconds=4.0)
    assert found["matrix products"] == 0.25 and found["attention"] == found["activations"] == 0.0625
    assert found["elementwise: rotary positions, residuals, gates"] == 0.125
    assert found[REST] == 0.5 and sum(found.values()) == pytest.approx(1)


def test_every_corpus_is_profiled_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = where_time_goes.run(tmp_path, where_time_goes.parser().parse_args([*TINY, "--rows", "8"]))
    assert list(found) == list(CORPORA)
    for of_corpus in found.values():
        assert list(of_corpus) == [*GROUPS, REST] and sum(of_corpus.values()) == pytest.approx(1)
        assert of_corpus["matrix products"] > 0 and of_corpus["attention"] > 0
    shown = capsys.readouterr().out
    assert (
        f"| matrix products | {found['text']['matrix products']:.0%} | {found['images']['matrix products']:.0%}"
        in shown
    )

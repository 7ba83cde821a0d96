"""What is drawn where: read off the figures, not off their pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sentence_vipyloqwen.ablation import plots
from sentence_vipyloqwen.ablation.results import VariantResult, summarise
from sentence_vipyloqwen.ablation.variants import LOSS, VARIANTS

RunOf = Callable[..., dict[str, Any]]
FAMILIES = ["loss", "prefixes", "pooling", "one task", "negatives", "size"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, before they become files."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_files", figures.append)
    return figures


@pytest.fixture
def results(run_of: RunOf) -> list[VariantResult]:
    """Every variant over two seeds, one of them over one; in ocr, all but the reference gain in the second seed."""
    runs = [
        run_of(name, seed, 0.5 - place / 100, ocr=0.5 + seed * (2 if place else 1) / 10, instr=0.5)
        for place, name in enumerate(VARIANTS)
        for seed in ((0,) if name == "attention_pooling" else (0, 1))
    ]
    for run in runs:
        if VARIANTS[run["variant"]].model_of:
            run["curves"] = {}
        if run["variant"] == "in_batch":
            run["settings"] = {**run["settings"], "batch_size": 2}
        if run["variant"] == "published_pair_weight":
            run["settings"] = {**run["settings"], "pair_weight": "uniform"}
    return summarise(runs)


def labels(panel: Any) -> list[str]:
    return [label.get_text() for label in panel.get_yticklabels()]


def diamonds(panel: Any) -> dict[int, Any]:
    """Row -> the mean that is drawn there."""
    return {int(line.get_ydata()[0]): line for line in panel.lines if line.get_marker() == "D"}


def whiskers(panel: Any) -> dict[int, list[float]]:
    """Row -> where its whisker ends."""
    ends = [segment for lines in panel.collections for segment in lines.get_segments()]
    return {int(segment[0, 1]): segment[:, 0].tolist() for segment in ends}


def test_every_variant_has_a_row_under_its_family(drawn: list[Any], results: list[VariantResult]) -> None:
    plots.draw_values(results)
    plots.draw_differences(results)
    values, differences = (figure.axes for figure in drawn)
    assert [panel.get_title(loc="left").split()[0] for panel in differences] == ["average:", "ocr:", "instr:"]
    assert [name for name in labels(values[0]) if name in FAMILIES] == FAMILIES
    assert [name for name in labels(values[0]) if name not in FAMILIES] == [
        name for name, variant in VARIANTS.items() if variant.only in (None, "ocr", "instr")
    ]
    assert "grad_cache (in_batch)" in labels(differences[0])
    assert len(diamonds(values[0])) == sum(variant.only is None for variant in VARIANTS.values())


def test_a_whisker_is_the_confidence_interval_and_one_seed_is_hollow(
    drawn: list[Any], results: list[VariantResult]
) -> None:
    plots.draw_differences(results)
    average, ocr, _ = drawn[0].axes
    rows = {name: place for place, name in enumerate(labels(average))}
    alone, other = diamonds(average)[rows["attention_pooling"]], diamonds(average)[rows["info_nce_only"]]
    assert (alone.get_markerfacecolor(), other.get_markerfacecolor()) == ("white", plots._WORSE)
    assert other.get_xdata()[0] == pytest.approx(-0.01)
    assert diamonds(ocr)[rows["info_nce_only"]].get_markerfacecolor() == plots._EQUAL
    width = 12.706 * 0.05  # t of one degree of freedom, times the standard error of 0 and 0.1
    assert whiskers(ocr)[rows["info_nce_only"]] == pytest.approx([0.05 - width, 0.05 + width], abs=1e-4)
    assert rows["attention_pooling"] not in whiskers(ocr)


def test_curves_are_by_rows_seen_and_a_family_has_its_own_panels(
    drawn: list[Any], results: list[VariantResult]
) -> None:
    plots.draw_curves(results)
    panels = drawn[0].axes
    assert len(panels) == len(FAMILIES) * 3  # two tasks and a legend
    told = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in panels[2::3]]
    assert told[0] == ["full", *(variant.name for variant in VARIANTS.values() if variant.family == LOSS)]
    assert told[4] == [
        "full",
        "mixed_batches",
        "all_negatives",
        "in_batch",
        "grad_cache",
        "in_batch_192",
        "grad_cache_192",
    ]
    assert told[5] == ["full", "matryoshka"]
    full, _, _, in_batch, grad_cache, *_ = panels[4 * 3].lines
    assert full.get_xdata().tolist() == [0.008, 0.016]  # thousands: 8 rows a step
    assert in_batch.get_xdata().tolist() == [0.004, 0.008]
    assert [line.get_linestyle() for line in (full, in_batch, grad_cache)] == ["-", "--", "-"]
    for family in panels[::3]:
        assert len({line.get_color() for line in family.lines}) == len(family.lines)


def test_a_curve_of_few_points_shows_them(drawn: list[Any], run_of: RunOf) -> None:
    short, long = run_of("only_ocr", 0, 0.5, ocr=0.5), run_of("full", 0, 0.5, ocr=0.5)
    short["curves"] = {"ocr": [(1, 2.0)]}
    long["curves"] = {"ocr": [(step, 2.0) for step in range(1, 10)]}
    plots.draw_curves(summarise([long, short]))
    assert [line.get_marker() for line in drawn[0].axes[0].lines] == ["None", "o"]


def test_what_can_be_compared_depends_on_the_task(results: list[VariantResult]) -> None:
    found = {result.variant.name: result for result in results}
    pairs = found["published_pair_weight"]
    assert not plots.comparable(pairs, found["full"], "text_pair")
    assert plots.comparable(pairs, found["full"], "ocr")
    assert plots.comparable(pairs, None, "text_pair")
    assert not plots.comparable(found["in_batch"], found["full"], "ocr")

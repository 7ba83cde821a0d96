"""The plots of an ablation: differences, figures and curves, variants of a family together.

A row of dots for each variant, a panel for each figure. Equal results give equal files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from sentence_vipyloqwen.ablation.answers import shown
from sentence_vipyloqwen.ablation.background import rows_a_step
from sentence_vipyloqwen.ablation.results import Difference, Spread, VariantResult, names_in
from sentence_vipyloqwen.ablation.variants import FULL
from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.tasks import ALL_TASKS, SCORE_MSE

FORMATS = ("png", "svg")
_EXTRA = "demo"
_DPI = 150
_BETTER, _WORSE, _EQUAL, _INK, _BAND = "#18794e", "#b4232c", "#6f7889", "#1a2030", "#f1f3f6"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7a3fb0", "#1a2030")
"""Of the variants of a family."""

_FEW = 3
"""Points of a curve that are drawn as points, too: of one there is no line."""

_STYLE = {
    "svg.hashsalt": "ablation",  # equal results give equal files
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _EQUAL,
}
_OTHER_BATCHES = ("batch_size", "mixed_batches", "negatives", "matryoshka_dims", "temperature")
"""Settings that change what InfoNCE is taken over, so that its value cannot be compared."""

Rows = Sequence[VariantResult | str]
"""Variants, and before each family its name."""


def check_plots() -> None:
    """Say early that nothing can be drawn.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    require("matplotlib.figure", _EXTRA)


def draw_differences(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """Every variant's difference to what it is compared with, by seed and as a mean over the seeds.

    A whisker is the confidence interval, so a difference counts where its whisker does not reach 0; such a one is in
    colour. One of a single seed is hollow.
    """
    compared = [result for result in results if result.differences]
    names = names_in([result.differences for result in compared])
    rows = _by_family(compared)
    figure, panels = _row_panels(len(names), len(rows))
    for panel, name in zip(panels, names, strict=True):
        panel.axvline(0, color=_INK, linewidth=0.8)
        for row, result in enumerate(rows):
            if isinstance(result, VariantResult) and name in result.differences:
                _draw_difference(panel, row, result.differences[name])
        _label(panel, rows, f"{shown(name)}: better \N{RIGHTWARDS ARROW}", against=True)
    return _files(figure)


def _draw_difference(panel: Any, row: int, difference: Difference) -> None:
    better = difference.by_seed.mean > 0
    colour = (_BETTER if better else _WORSE) if difference.counts else _EQUAL
    _draw_spread(panel, row, difference.by_seed, difference.interval, colour)


def draw_values(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """Every variant's figure: each seed, the mean over them, and the standard deviation; a line where the reference is.

    A figure of a single seed is hollow.
    """
    measured = [result for result in results if result.figures]
    names = names_in([result.figures for result in measured])
    rows = _by_family(measured)
    reference = next((result.figures for result in measured if result.variant.name == FULL), {})
    figure, panels = _row_panels(len(names), len(rows))
    for panel, name in zip(panels, names, strict=True):
        if name in reference:
            panel.axvline(reference[name].mean, color=_EQUAL, linewidth=0.8, linestyle=":")
        for row, result in enumerate(rows):
            if isinstance(result, VariantResult) and (spread := result.figures.get(name)):
                _draw_spread(panel, row, spread, spread.deviation, _INK)
        _label(panel, rows, f"{shown(name)} \N{RIGHTWARDS ARROW}", against=False)
    return _files(figure)


def _draw_spread(panel: Any, row: int, spread: Spread, whisker: float | None, colour: str) -> None:
    seeds = list(spread.by_seed.values())
    if len(seeds) > 1:
        panel.plot(seeds, [row + 0.28] * len(seeds), "o", color=colour, markersize=2.5, alpha=0.7, markeredgewidth=0)
    filled = "white" if whisker is None else colour
    style = {"fmt": "D", "color": colour, "markerfacecolor": filled, "markersize": 4.5, "capsize": 2}
    panel.errorbar(spread.mean, row, xerr=whisker, elinewidth=1, **style)


def draw_curves(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """InfoNCE in training by rows seen, the mean over the seeds: a row of panels for each family, one for each task.

    The reference is in every panel, in grey; what cannot be compared with it is dashed.
    """
    trained = [result for result in results if result.curves]
    reference = next((result for result in trained if result.variant.name == FULL), None)
    families = list(dict.fromkeys(result.variant.family for result in trained if result is not reference)) or [""]
    tasks = list(dict.fromkeys(task for result in trained for task in result.curves))
    figure, grid = _curve_panels(len(families), len(tasks))
    for (*panels, beside), family in zip(grid, families, strict=True):
        members = [result for result in trained if result.variant.family == family and result is not reference]
        lines = {}
        for result in [*([reference] if reference else []), *members]:
            own = result is reference
            style = {"color": _EQUAL, "linewidth": 2.6, "alpha": 0.6} if own else {"linewidth": 1.3, "markersize": 4}
            if not own:
                style["color"] = _COLOURS[members.index(result) % len(_COLOURS)]
            for panel, task in zip(panels, tasks, strict=True):
                if points := result.curves.get(task):
                    rows = [step * rows_a_step(result.settings) / 1000 for step in points]
                    dashed = "-" if own or comparable(result, reference, task) else "--"
                    marker = "o" if len(rows) <= _FEW else None
                    (line,) = panel.plot(rows, list(points.values()), linestyle=dashed, marker=marker, **style)
                    lines.setdefault(result.variant.name, line)
        beside.legend(lines.values(), lines.keys(), loc="center left", frameon=False, title=family, alignment="left")
    for panel, task in zip(grid[0], tasks, strict=False):
        panel.set_title(task, fontsize=10, loc="left")
    figure.supxlabel("thousands of rows seen", fontsize=9)
    figure.supylabel("InfoNCE", fontsize=9)
    return _files(figure)


def comparable(result: VariantResult, reference: VariantResult | None, task: str) -> bool:
    """Whether its InfoNCE is taken over the same as the reference's: equal batches, sizes, temperature and weights."""
    if reference is None:
        return True
    scored = SCORE_MSE in ALL_TASKS[task].weights if task in ALL_TASKS else False
    names = (*_OTHER_BATCHES, *(["pair_weight"] if scored else []))
    return all(result.settings.get(name) == reference.settings.get(name) for name in names)


# --- Figures and panels ---


def _by_family(results: Sequence[VariantResult]) -> Rows:
    rows: list[VariantResult | str] = []
    family = ""
    for result in results:
        if result.variant.family != family:
            family = result.variant.family
            rows.append(family)
        rows.append(result)
    return rows


def _row_panels(count: int, rows: int) -> tuple[Any, Sequence[Any]]:
    """A figure with a row of panels; names of variants stand beside the first."""
    figures = require("matplotlib.figure", _EXTRA)
    with require("matplotlib", _EXTRA).rc_context(_STYLE):
        figure = figures.Figure(figsize=(2.4 + 1.75 * count, 0.9 + 0.25 * max(rows, 3)), layout="constrained")
        panels = figure.subplots(1, count, sharey=True, squeeze=False).flatten()
    return figure, panels


def _label(panel: Any, rows: Rows, title: str, against: bool) -> None:
    labels = []
    for place, row in enumerate(rows):
        if isinstance(row, str):
            panel.axhspan(place - 0.5, place + 0.5, color=_BAND, zorder=0, linewidth=0)
            labels.append(row)
        else:
            other = row.variant.against
            labels.append(f"{row.variant.name} ({other})" if against and other != FULL else row.variant.name)
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_yticks(range(len(labels)), labels)
    for row, tick in zip(rows, panel.get_yticklabels(), strict=False):  # the first panel alone has them
        tick.set_fontweight("bold" if isinstance(row, str) else "normal")
    panel.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    panel.tick_params(axis="y", length=0)
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", color=_EQUAL, alpha=0.25)


def _curve_panels(families: int, tasks: int) -> tuple[Any, Any]:
    """A figure of as many panels, and at the end of each row room for a legend."""
    figures = require("matplotlib.figure", _EXTRA)
    with require("matplotlib", _EXTRA).rc_context(_STYLE):
        figure = figures.Figure(figsize=(2.2 + 2 * tasks, 0.7 + 1.75 * families), layout="constrained")
        ratios = {"width_ratios": [1.0] * tasks + [0.9]}
        grid = figure.subplots(families, tasks + 1, sharex="all", squeeze=False, gridspec_kw=ratios)
    for row in grid:
        row[-1].axis("off")
        for panel in row[:-1]:
            panel.grid(color=_EQUAL, alpha=0.25)
            panel.tick_params(labelsize=8)
            panel.locator_params(nbins=4)
    return figure, grid


def _files(figure: Any) -> dict[str, bytes]:
    """The figure in each format; without a date, so that equal results give equal files."""
    files = {}
    with require("matplotlib", _EXTRA).rc_context(_STYLE):
        for kind in FORMATS:
            written = io.BytesIO()
            figure.savefig(written, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = written.getvalue()
    return files

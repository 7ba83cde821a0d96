"""An ablation for a reader: one HTML page that needs nothing else, the same as Markdown, and its plots as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_vipyloqwen.ablation.results import (
    MEAN,
    RULE,
    Difference,
    Spread,
    VariantResult,
    chance,
    figures_of,
    headlines,
    load_results,
    summarise,
)
from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.pages import load_markdown, load_template

PAGE_FILE, MARKDOWN_FILE = "ablation.html", "ablation.md"
DIFFERENCES_PLOT, VALUES_PLOT, CURVES_PLOT = "differences", "values", "curves"
_PACKAGE = "sentence_vipyloqwen.ablation"
_FORMATS = ("png", "svg")
_DPI = 150
_ACROSS = 4
_BETTER, _WORSE, _EQUAL, _INK = "#18794e", "#b4232c", "#8b93a5", "#1a2030"
_STYLE = {
    "svg.hashsalt": "ablation",  # equal results give equal files
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _EQUAL,
}


def write_report(output: str | Path) -> Path:
    """Write the page and the plots of an ablation's raw results, as far as there are some.

    Args:
        output: Its folder, with ``results.json``. It receives ``ablation.html``, ``ablation.md``, ``differences``,
            ``values`` and, where runs trained, ``curves``, each as PNG and SVG.

    Returns:
        The page.

    Raises:
        ValueError: If there are no results.
        ImportError: If matplotlib is not installed.
    """
    output = Path(output)
    runs = load_results(output)
    results = summarise(runs)
    plots = {DIFFERENCES_PLOT: draw_differences(results), VALUES_PLOT: draw_values(results)}
    if any(result.curves for result in results):
        plots[CURVES_PLOT] = draw_curves(results)
    for name, drawn in plots.items():
        for kind in _FORMATS:
            with replacing(output / f"{name}.{kind}") as draft:
                draft.write_bytes(drawn[kind])
    told = {
        "results": results,
        "names": _names(results),
        "headlines": headlines(runs),
        "runs": [_run_row(run) for run in runs],
        "rule": RULE,
        "by_chance": by_chance(results),
        "facts": _facts(runs),
        "cell": cell,
        "change": change,
        "mean": MEAN,
    }
    images = {name: base64.b64encode(drawn["svg"]).decode() for name, drawn in plots.items()}
    pages = {
        PAGE_FILE: load_template(_PACKAGE, f"{PAGE_FILE}.jinja").render(told, plots=images),
        MARKDOWN_FILE: load_markdown(_PACKAGE, f"{MARKDOWN_FILE}.jinja").render(
            told, plots={name: f"{name}.svg" for name in plots}, tame=_tame
        ),
    }
    for name, page in pages.items():
        with replacing(output / name) as draft:
            draft.write_text(page, encoding="utf-8")
    return output / PAGE_FILE


# --- Words and numbers ---


def cell(figure: Spread | None) -> str:
    """A figure and its spread.

    >>> cell(Spread({0: 0.5, 1: 0.75})), cell(None)
    ('0.625 ± 0.177', '')
    """
    if figure is None:
        return ""
    return f"{figure.mean:.3f}" if figure.deviation is None else f"{figure.mean:.3f} ± {figure.deviation:.3f}"


def change(difference: Difference | None) -> str:
    """A difference, its sign and its spread."""
    if difference is None:
        return ""
    deviation = difference.by_seed.deviation
    return f"{difference.by_seed.mean:+.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def by_chance(results: Sequence[VariantResult]) -> tuple[int, float]:
    """How many differences are compared with a spread, and how many of them chance alone would let count."""
    compared = [found for result in results for found in result.differences.values() if found.threshold is not None]
    return len(compared), sum(chance(len(found.own.by_seed)) for found in compared)


def _tame(words: str) -> str:
    """Words for a cell of Markdown, where a task's prefix would be taken for a tag.

    >>> _tame("<ocr> | a")
    '\\\\<ocr> \\\\| a'
    """
    return words.replace("<", r"\<").replace("|", r"\|")


def _names(results: Sequence[VariantResult]) -> list[str]:
    """The mean, then the tasks, as far as any variant has a figure of it."""
    return list(dict.fromkeys(name for result in results for name in result.figures))


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    before, after = (figures_of(run[when]) if run[when] else {} for when in ("before", "after"))
    return {**run, "before": before, "after": after}


def _facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each thing that all or some runs have, as they have it."""
    seeds = sorted({run["seed"] for run in runs})
    machines = {_words(run["machine"]) for run in runs}
    versions = {_words(run["versions"]) for run in runs}
    return {
        "variants": str(len({run["variant"] for run in runs})),
        "runs": str(len(runs)),
        "seeds": ", ".join(map(str, seeds)),
        "hours": f"{sum(run['seconds'] for run in runs) / 3600:.2f}",
        "machine": "; or ".join(sorted(machines)),
        "versions": "; or ".join(sorted(versions)),
    }


def _words(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in described.items() if value is not None)


# --- Plots ---


def draw_differences(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """For the mean and each task, every variant's difference to what it is compared with, by seed and as a mean.

    A bar is the rule's threshold: the spread of both sides. What counts is in colour, and its mean lies beyond the bar.
    """
    compared = [result for result in results if result.differences]
    labels = [f"{result.variant.name}\nagainst {result.variant.against}" for result in compared]
    names = list(dict.fromkeys(name for result in compared for name in result.differences)) or [MEAN]
    figure, panels = _panels(len(names), len(labels), inches_a_row=0.42)
    for panel, name in zip(panels, names, strict=True):
        panel.axvline(0, color=_INK, linewidth=0.8)
        for row, result in enumerate(compared):
            if name in result.differences:
                _draw_difference(panel, row, result.differences[name])
        _label(panel, labels, f"{name}: better \N{RIGHTWARDS ARROW}")
    return _files(figure)


def _draw_difference(panel: Any, row: int, difference: Difference) -> None:
    better = difference.by_seed.mean > 0
    colour = (_BETTER if better else _WORSE) if difference.counts else _EQUAL
    seeds = list(difference.by_seed.by_seed.values())
    if difference.threshold is not None:
        panel.barh(row, 2 * difference.threshold, left=-difference.threshold, height=0.6, color=_EQUAL, alpha=0.2)
    panel.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=3, alpha=0.5)
    panel.plot(difference.by_seed.mean, row, "D", color=colour, markersize=5)


def draw_values(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """For the mean and each task, every variant's figure: each seed, the mean, and the standard deviation."""
    trained = [result for result in results if result.figures]
    names = _names(trained) or [MEAN]
    figure, panels = _panels(len(names), len(trained), inches_a_row=0.3)
    for panel, name in zip(panels, names, strict=True):
        for row, result in enumerate(trained):
            if spread := result.figures.get(name):
                seeds = list(spread.by_seed.values())
                panel.plot(seeds, [row] * len(seeds), "o", color=_EQUAL, markersize=3)
                panel.errorbar(spread.mean, row, xerr=spread.deviation, fmt="D", color=_INK, markersize=4, capsize=2)
        _label(panel, [result.variant.name for result in trained], name)
    return _files(figure)


def draw_curves(results: Sequence[VariantResult]) -> dict[str, bytes]:
    """For each task, its InfoNCE in training by step, a line for each variant: the mean over its seeds."""
    trained = [result for result in results if result.curves]
    tasks = list(dict.fromkeys(task for result in trained for task in result.curves))
    palettes = require("matplotlib", "demo").color_sequences
    colours = palettes["tab10"] if len(trained) <= len(palettes["tab10"]) else palettes["tab20"]
    figure, panels = _panels(len(tasks), 1, inches_a_row=1.9)
    lines = {}
    for panel, task in zip(panels, tasks, strict=True):
        for number, result in enumerate(trained):
            if points := result.curves.get(task):
                style = {"color": _INK, "linewidth": 2} if number == 0 else {"color": colours[number % len(colours)]}
                (lines[result.variant.name],) = panel.plot(list(points), list(points.values()), **style)
        panel.set_title(f"{task}: InfoNCE by step", fontsize=10, loc="left")
        panel.grid(color=_EQUAL, alpha=0.25)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=_ACROSS, frameon=False)
    return _files(figure)


def _panels(count: int, rows: int, inches_a_row: float) -> tuple[Any, Sequence[Any]]:
    """A figure of as many panels; what they have in common, such as names of variants, stands beside the first."""
    figures = require("matplotlib.figure", "demo")
    across = min(count, _ACROSS)
    down = -(-count // across)
    with require("matplotlib", "demo").rc_context(_STYLE):
        inches = (2 + 2.4 * across, down * (0.9 + inches_a_row * max(rows, 1)))
        figure = figures.Figure(figsize=inches, layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
        for empty in panels[count:]:
            empty.set_visible(False)
    return figure, panels[:count]


def _label(panel: Any, labels: Sequence[str], title: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    panel.locator_params(axis="x", nbins=4)
    panel.grid(axis="x", color=_EQUAL, alpha=0.25)


def _files(figure: Any) -> dict[str, bytes]:
    """The figure in each format; without a date, so that equal results give equal files."""
    files = {}
    with require("matplotlib", "demo").rc_context(_STYLE):
        for kind in _FORMATS:
            written = io.BytesIO()
            figure.savefig(written, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = written.getvalue()
    return files

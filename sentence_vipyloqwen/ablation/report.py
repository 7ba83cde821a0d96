"""An ablation for a reader: one HTML page that needs nothing else, the same as Markdown, and its plots as files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_vipyloqwen.ablation.answers import answer, cell, in_short, shown, signed
from sentence_vipyloqwen.ablation.background import (
    TERM_WORDS,
    reference_facts,
    rows_a_step,
    settings_changed,
    takes_model,
    task_rows,
)
from sentence_vipyloqwen.ablation.plots import FORMATS, check_plots, draw_curves, draw_differences, draw_values
from sentence_vipyloqwen.ablation.results import (
    CONFIDENCE,
    FEWEST_SEEDS,
    MEAN,
    RULE,
    Difference,
    VariantResult,
    figures_of,
    load_about,
    load_results,
    names_in,
    summarise,
    unknown_variants,
)
from sentence_vipyloqwen.files import replacing
from sentence_vipyloqwen.pages import load_markdown, load_template

PAGE_FILE, MARKDOWN_FILE = "ablation.html", "ablation.md"
DIFFERENCES_PLOT, VALUES_PLOT, CURVES_PLOT = "differences", "values", "curves"
_PACKAGE = "sentence_vipyloqwen.ablation"


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
    check_plots()
    output = Path(output)
    runs = load_results(output)
    results = summarise(runs)
    plots = {DIFFERENCES_PLOT: draw_differences(results), VALUES_PLOT: draw_values(results)}
    if any(result.curves for result in results):
        plots[CURVES_PLOT] = draw_curves(results)
    for name, drawn in plots.items():
        for kind in FORMATS:
            with replacing(output / f"{name}.{kind}") as draft:
                draft.write_bytes(drawn[kind])
    told = {"about": load_about(output), **_told(runs, results)}
    images = {name: base64.b64encode(drawn["svg"]).decode() for name, drawn in plots.items()}
    pages = {
        PAGE_FILE: load_template(_PACKAGE, f"{PAGE_FILE}.jinja").render(told, plots=images),
        MARKDOWN_FILE: load_markdown(_PACKAGE, f"{MARKDOWN_FILE}.jinja").render(
            told, plots={name: f"{name}.svg" for name in plots}, tame=tame
        ),
    }
    for name, page in pages.items():
        with replacing(output / name) as draft:
            draft.write_text(page, encoding="utf-8")
    return output / PAGE_FILE


def _told(runs: Sequence[Mapping[str, Any]], results: Sequence[VariantResult]) -> dict[str, Any]:
    """What the templates are given."""
    return {
        "results": results,
        "answers": _answers(results),
        "names": names_in([result.figures for result in results]),
        "runs": [_run_row(run) for run in runs],
        "unknown": unknown_variants(runs),
        "rule": RULE,
        "by_chance": by_chance(results),
        "facts": _facts(runs),
        "short": in_short(results),
        "tasks": task_rows(runs),
        "terms": TERM_WORDS,
        "reference": reference_facts(runs),
        "changed": settings_changed(runs),
        "answer": answer,
        "cell": cell,
        "change": change,
        "shown": shown,
        "mean": MEAN,
    }


def _answers(results: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """What is answered, the reference first, and what one seed hints at."""
    groups: dict[str, list[VariantResult]] = {"Questions and answers": [], "Hints of one seed": []}
    answered, hints = groups.values()
    for result in results:
        (hints if result.variant.against and result.compared_seeds < FEWEST_SEEDS else answered).append(result)
    return {heading: group for heading, group in groups.items() if group}


# --- Words and numbers ---


def change(difference: Difference | None) -> str:
    """A difference, its sign and its spread."""
    if difference is None:
        return ""
    deviation = difference.by_seed.deviation
    return signed(difference) + ("" if deviation is None else f" ± {deviation:.3f}")


def by_chance(results: Sequence[VariantResult]) -> tuple[int, float]:
    """How many differences have an interval, and how many of them chance alone would let count."""
    compared = sum(found.interval is not None for result in results for found in result.differences.values())
    return compared, compared * (1 - CONFIDENCE)


def tame(words: str) -> str:
    """Words for a cell of Markdown, where a task's prefix would be taken for a tag.

    >>> tame("<ocr> | a")
    '\\\\<ocr> \\\\| a'
    """
    return words.replace("<", r"\<").replace("|", r"\|")


def _run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of every run; one that took another's model has no steps of its own."""
    before, after = (figures_of(run[when]) if run[when] else {} for when in ("before", "after"))
    trains, settings = not takes_model(run), run["settings"]
    steps, rows = (settings["max_steps"] or "", rows_a_step(settings)) if trains else ("", "")
    return {**run, "before": before, "after": after, "steps": steps, "rows": rows}


def _facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each thing that all or some runs have, as they have it."""
    seeds = sorted({run["seed"] for run in runs})
    machines = {_words(run["machine"]) for run in runs}
    versions = {_words(run["versions"]) for run in runs}
    return {
        "variants": str(len({run["variant"] for run in runs})),
        "runs": str(len(runs)),
        "seeds": ", ".join(map(str, seeds)),
        "hours, all runs added up": f"{sum(run['seconds'] for run in runs) / 3600:.2f}",
        "machine": "; or ".join(sorted(machines)),
        "versions": "; or ".join(sorted(versions)),
    }


def _words(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in described.items() if value is not None)

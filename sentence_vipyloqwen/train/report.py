"""A run's curves and figures as one HTML page that needs nothing else: no network, no scripts, no files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_vipyloqwen.pages import load_template
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.progress import LOG_FILE, MEMORY, ROWS_RATE, TOKENS_RATE, read_log
from sentence_vipyloqwen.train.task_losses import ROWS

PAGE_FILE = "training.html"
HEADLINES = ("spearman", "accuracy", "ndcg@10")
"""The metric that stands for a task: the first of these that it has, as in the evaluation's own tables."""

WIDTH, HEIGHT = 640, 260
SMALL_WIDTH, SMALL_HEIGHT = 400, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 26
_MOST_POINTS = 300
_MOST_DOTS = 150

Points = Sequence[tuple[float, float]]
Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        name: What the legend says.
        points: (step, value), by step; values are finite.
        colour: Number of the page's colour.
    """

    name: str
    points: Points
    colour: int


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the drawing and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        name: What the legend says.
        colour: Number of the page's colour.
        path: SVG path.
        dots: (x, y, what a pointer there reads); of a curve of many points the last alone.
        last: The last value as text.
    """

    name: str
    colour: int
    path: str
    dots: Sequence[tuple[float, float, str]]
    last: str


@dataclass(frozen=True)
class Chart:
    """Curves over the steps of a run, ready to be drawn."""

    title: str
    note: str
    width: int
    height: int
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    left: int = _LEFT
    right: int = _RIGHT
    bottom: int = _BOTTOM


def write_training_report(output: str | Path) -> Path | None:
    """Write ``training.html`` of what a run has left so far.

    Args:
        output: The run's output folder, with ``log.jsonl`` and, where there were held-out records, ``metrics.json``.

    Returns:
        The page; ``None`` where nothing has been logged yet.
    """
    output = Path(output)
    log = read_log(output / LOG_FILE)
    if not log:
        return None
    metrics, recipe = _read_json(output / "metrics.json"), output / "recipe.yaml"
    page = load_template("sentence_vipyloqwen.train", "training.html.jinja").render(
        name=output.resolve().name,
        facts=facts(log, metrics),
        charts=[chart for chart in (loss_chart(log), metric_chart(log, metrics)) if chart.lines],
        task_charts=task_charts(log),
        run_charts=run_charts(log),
        table=metric_table(metrics),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    )
    draft = output / f".{PAGE_FILE}.new"
    draft.write_text(page, encoding="utf-8")
    draft.replace(output / PAGE_FILE)
    return output / PAGE_FILE


def draw_curves(output: str | Path) -> str:
    """The loss and the held-out metrics of a run as one SVG picture; ``""`` where nothing has been logged yet."""
    output = Path(output)
    log = read_log(output / LOG_FILE)
    charts = [loss_chart(log), metric_chart(log, _read_json(output / "metrics.json"))] if log else []
    drawn = [chart for chart in charts if chart.lines]
    return load_template("sentence_vipyloqwen.train", "curves.svg.jinja").render(charts=drawn) if drawn else ""


# --- What is shown ---


def facts(log: Log, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what one wants to know first."""
    losses = _curve(log, "loss")
    found = [("steps", f"{max(entry['step'] for entry in log):,}")]
    if losses:
        found.append(
            ("loss", f"{losses[0][1]:.3f} → {losses[-1][1]:.3f}" if len(losses) > 1 else f"{losses[0][1]:.3f}")
        )
    measured = [metrics[when] for when in ("before", "after") if when in metrics]
    if measured:
        found.append(("mean of the headline metrics", " → ".join(f"{of['mean']:.3f}" for of in measured)))
    for size in measured[-1].get("dims", {}) if measured else ():
        means = [of["dims"][size]["mean"] for of in measured if size in of.get("dims", {})]
        found.append((f"the same at {size} dimensions", " → ".join(f"{mean:.3f}" for mean in means)))
    for name, key, form in (
        ("rows a second", ROWS_RATE, ",.1f"),
        ("tokens a second", TOKENS_RATE, ",.0f"),
    ):
        if rates := sorted(value for _, value in _curve(log, key)):
            found.append((name, f"{rates[len(rates) // 2]:{form}}"))
    if memory := _curve(log, MEMORY):
        found.append(("most memory", f"{max(value for _, value in memory):.1f} GB"))
    return found


def loss_chart(log: Log) -> Chart:
    """The loss over the steps."""
    return chart("Loss", "Mean of the steps since the entry before.", [Series("loss", _curve(log, "loss"), 0)])


def metric_chart(log: Log, metrics: Mapping[str, Any]) -> Chart:
    """Each task's headline metric on the held-out records, before, during and after the training."""
    series = []
    for colour, task in enumerate(ALL_TASKS, start=1):
        curves = {metric: metric_points(task, metric, log, metrics) for metric in HEADLINES}
        if headline := next((metric for metric in HEADLINES if curves[metric]), None):
            series.append(Series(f"{task} · {headline}", curves[headline], colour))
    return chart("Held-out records", "Each task's headline metric; higher is better.", series)


def metric_points(task: str, metric: str, log: Log, metrics: Mapping[str, Any]) -> Points:
    """A task's metric by step: before the training, at every evaluation, after it."""
    points = dict(_curve(log, f"eval_{task}_{metric}"))
    last = max(entry["step"] for entry in log)
    for when, step in (("before", 0), ("after", last)):
        value = metrics.get(when, {}).get("tasks", {}).get(task, {}).get("metrics", {}).get(metric)
        if value is not None:
            points.setdefault(step, value)
    return sorted(points.items())


def task_charts(log: Log) -> list[Chart]:
    """For each task, its loss and the terms of it: means over its own rows."""
    charts = []
    for colour, task in enumerate(ALL_TASKS, start=1):
        names = dict.fromkeys(name for entry in log for name in entry if name.startswith(f"{task}/"))
        series = [
            Series(name.partition("/")[2], _curve(log, name), shade)
            for name, shade in zip((name for name in names if name != f"{task}/{ROWS}"), (colour, 7, 8), strict=False)
        ]
        if series:
            charts.append(chart(task, "", series, SMALL_WIDTH, SMALL_HEIGHT))
    return charts


def run_charts(log: Log) -> list[Chart]:
    """How the run went: rates, gradient, memory."""
    shown = {
        "learning_rate": "Learning rate",
        "grad_norm": "Gradient norm",
        ROWS_RATE: "Rows a second",
        TOKENS_RATE: "Tokens a second",
        MEMORY: "Memory, GB",
    }
    curves = {title: _curve(log, key) for key, title in shown.items()}
    return [
        chart(title, "", [Series(title, points, 0)], SMALL_WIDTH, SMALL_HEIGHT)
        for title, points in curves.items()
        if points
    ]


def metric_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each task's metric: its values before and after, and whether it stands for the task."""
    rows = []
    for colour, task in enumerate(ALL_TASKS, start=1):
        evaluated = {when: metrics.get(when, {}).get("tasks", {}).get(task) for when in ("before", "after")}
        newest = evaluated["after"] or evaluated["before"]
        for metric in newest["metrics"] if newest else ():
            values = [of["metrics"].get(metric) if of else None for of in evaluated.values()]
            rows.append(
                {
                    "task": task,
                    "colour": colour,
                    "queries": newest["queries"],
                    "metric": metric,
                    "headline": metric == newest["headline"],
                    "values": ["" if value is None else f"{value:.3f}" for value in values],
                    "gain": "" if None in values else f"{values[1] - values[0]:+.3f}",
                    "better": None not in values and values[1] > values[0],
                }
            )
    return rows


# --- Drawing ---


def chart(title: str, note: str, series: Sequence[Series], width: int = WIDTH, height: int = HEIGHT) -> Chart:
    """Scale curves into a drawing; those without points are left out."""
    drawn = [of for of in series if of.points]
    if not drawn:
        return Chart(title, note, width, height, [], [], [])
    x_values = [x for of in drawn for x, _ in of.points]
    y_values = [y for of in drawn for _, y in of.points]
    x_marks = ticks(min(0.0, *x_values), max(x_values), 6)
    y_marks = ticks(min(y_values) if min(y_values) < 0 else 0.0, max(y_values), 4)
    x_range = (min(0.0, *x_values), max(max(x_values), 1.0))
    y_range = (y_marks[0], y_marks[-1])

    def x_of(value: float) -> float:
        return round(_LEFT + (width - _LEFT - _RIGHT) * _share(value, x_range), 1)

    def y_of(value: float) -> float:
        return round(height - _BOTTOM - (height - _TOP - _BOTTOM) * _share(value, y_range), 1)

    lines = []
    for of in drawn:
        places = [(x_of(x), y_of(y)) for x, y in thin(of.points, _MOST_POINTS)]
        dots = [(x_of(x), y_of(y), f"step {x:,.0f}: {short(y)}") for x, y in of.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        told = dots if len(dots) <= _MOST_DOTS else dots[-1:]
        lines.append(Line(of.name, of.colour, path, told, short(of.points[-1][1])))
    x_ticks = [Tick(x_of(mark), short(mark)) for mark in x_marks if mark <= x_range[1]]
    return Chart(title, note, width, height, lines, x_ticks, [Tick(y_of(mark), short(mark)) for mark in y_marks])


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return (value - low) / (high - low) if high > low else 0.5


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that divide a range into about so many steps, from one at or below it to one at or above.

    >>> ticks(0, 850, 5), ticks(0, 0.93, 4), ticks(0, 0, 4)
    ([0, 200, 400, 600, 800, 1000], [0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 1.0])
    """
    if not high > low:
        return [low * 1.0, low + 1.0]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if step >= 1 and step == int(step):
        step = int(step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters.

    >>> [short(value) for value in (0, 0.5, 0.12345, 1500, 12.345, 0.00015, 2500000)]
    ['0', '0.5', '0.123', '1,500', '12.3', '0.00015', '2,500,000']
    """
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.2g}" if abs(value) >= 1e-5 else f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.1f}".rstrip("0").rstrip(".")


def thin(points: Points, most: int) -> Points:
    """At most so many points: the means of neighbours, and the last point itself.

    >>> thin([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)], 2)
    [(1.5, 2.0), (3.5, 6.0), (4, 7.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


# --- Reading ---


def _curve(log: Log, name: str) -> list[tuple[float, float]]:
    """(step, value) of the entries that have a number of that name."""
    return [(entry["step"], float(entry[name])) for entry in log if isinstance(entry.get(name), (int, float))]


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found

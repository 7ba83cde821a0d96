from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sentence_vipyloqwen.train.report import (
    HEIGHT,
    WIDTH,
    Series,
    chart,
    facts,
    metric_points,
    metric_table,
    task_charts,
    thin,
    write_training_report,
)

RECALL = {"recall@1": 0.1, "ndcg@10": 0.2}
METRICS: dict[str, Any] = {
    "before": {"mean": 0.2, "tasks": {"ocr": {"metrics": RECALL, "queries": 1200, "headline": "ndcg@10"}}},
    "after": {
        "mean": 0.6,
        "tasks": {"ocr": {"metrics": {"recall@1": 0.5, "ndcg@10": 0.6}, "queries": 1200, "headline": "ndcg@10"}},
    },
}
LOG = [
    {
        "step": 10,
        "loss": 4.0,
        "ocr/loss": 4.0,
        "ocr/info_nce": 3.0,
        "ocr/triplet": 1.0,
        "ocr/rows": 8,
        "grad_norm": None,
    },
    {"step": 10, "eval_ocr_ndcg@10": 0.3, "eval_tasks_mean": 0.3},
    {"step": 20, "loss": 2.0, "ocr/loss": 2.0, "ocr/info_nce": 1.5, "ocr/triplet": 0.5, "rows_per_second": 30.0},
    {"step": 20, "train_runtime": 3.0},
]


class Tags(HTMLParser):
    """Every tag opened is closed, in order."""

    void = {"meta"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_of_a_run(tmp_path: Path) -> None:
    output = tmp_path / "a <b> & c"
    output.mkdir()
    (output / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)))
    (output / "metrics.json").write_text(json.dumps(METRICS))
    (output / "recipe.yaml").write_text("base: <script>\n")
    page = write_training_report(output)
    assert page == output / "training.html"
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert "script" not in tags.seen
    assert not re.search(r"(src|href)=|url\(|@import", text)  # nothing from elsewhere
    assert "a &lt;b&gt; &amp; c" in text
    assert "base: &lt;script&gt;" in text
    for words in ("4.000 → 2.000", "0.200 → 0.600", "+0.400", "1,200", "ocr · ndcg@10", "Rows a second"):
        assert words in text, words
    assert "instr" not in re.sub(r"<pre>.*", "", text)  # a task without rows has no chart


def test_a_run_without_a_log_has_no_page(tmp_path: Path) -> None:
    assert write_training_report(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_log_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 5, "loss": 1.0}) + "\n" + '{"step": 6, "lo')
    page = write_training_report(tmp_path)
    assert page is not None
    assert "Before and after" not in page.read_text(encoding="utf-8")


def test_a_metric_is_known_before_during_and_after() -> None:
    assert metric_points("ocr", "ndcg@10", LOG, METRICS) == [(0, 0.2), (10, 0.3), (20, 0.6)]
    assert metric_points("ocr", "ndcg@10", LOG, {}) == [(10, 0.3)]
    assert metric_points("instr", "ndcg@10", LOG, METRICS) == []


def test_the_table_compares() -> None:
    first, second = metric_table(METRICS)
    assert (first["metric"], first["values"], first["gain"], first["headline"]) == (
        "recall@1",
        ["0.100", "0.500"],
        "+0.400",
        False,
    )
    assert second["headline"]
    (only, _) = metric_table({"after": METRICS["after"]})
    assert (only["values"], only["gain"], only["better"]) == (["", "0.500"], "", False)
    assert metric_table({}) == []


def test_facts_come_from_what_there_is() -> None:
    assert facts(LOG, METRICS) == [
        ("steps", "20"),
        ("loss", "4.000 → 2.000"),
        ("mean of the headline metrics", "0.200 → 0.600"),
        ("rows a second", "30.0"),
    ]
    assert facts([{"step": 1}], {}) == [("steps", "1")]
    sizes = {
        "before": {"mean": 0.2, "dims": {"4": {"mean": 0.1}}},
        "after": {"mean": 0.6, "dims": {"4": {"mean": 0.5}}},
    }
    assert ("the same at 4 dimensions", "0.100 → 0.500") in facts(LOG, sizes)


def test_terms_of_a_task_are_drawn_in_the_order_of_the_loss() -> None:
    (only,) = task_charts(LOG)
    assert only.title == "ocr"
    assert [line.name for line in only.lines] == ["loss", "info_nce", "triplet"]


def test_a_curve_is_scaled_into_its_frame() -> None:
    drawn = chart("t", "", [Series("s", [(0, 0.0), (50, 0.5), (100, 1.0)], 0)])
    (line,) = drawn.lines
    (x0, y0, told), (x1, y1, _), (x2, y2, _) = line.dots
    assert (x0, x2) == (drawn.left, WIDTH - drawn.right)
    assert y0 == HEIGHT - drawn.bottom
    assert y2 == drawn.y_ticks[-1].place < y1 < y0
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert told == "step 0: 0"
    assert [tick.label for tick in drawn.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert all(0 <= tick.place <= WIDTH for tick in drawn.x_ticks)


@pytest.mark.parametrize("points", [[(3, 0.0)], [(5, -1.0), (6, 1.0)], [(1, 1e-9), (2, 2e-9)], [(1, 1e9), (2, 5.0)]])
def test_any_values_can_be_drawn(points: list[tuple[float, float]]) -> None:
    drawn = chart("t", "", [Series("s", points, 0), Series("empty", [], 1)])
    (line,) = drawn.lines
    for x, y, _ in line.dots:
        assert drawn.left <= x <= WIDTH - drawn.right + 1e-9
        assert -1e-9 <= y <= HEIGHT - drawn.bottom + 1e-9
    assert chart("t", "", []).lines == []


def test_a_long_curve_is_drawn_with_few_points() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    assert len(thin(points, 300)) <= 301
    assert thin(points, 300)[-1] == points[-1]
    assert len(chart("t", "", [Series("s", points, 0)]).lines[0].path) < 6000

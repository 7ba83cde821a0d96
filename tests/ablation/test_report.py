"""What a reader sees: every run, the rule, and plots that are the same for the same results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sentence_vipyloqwen.ablation.report import by_chance, write_report
from sentence_vipyloqwen.ablation.results import RULE, summarise

RunOf = Callable[..., dict[str, Any]]
FILES = [
    "ablation.html",
    "ablation.md",
    "curves.png",
    "curves.svg",
    "differences.png",
    "differences.svg",
    "values.png",
    "values.svg",
]


class Tags(HTMLParser):
    """Every tag opened is closed, in order; cells of each row of the last table."""

    void = {"meta", "br", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.void:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def runs(run_of: RunOf) -> list[dict[str, Any]]:
    return [
        *(run_of("full", seed, 0.5, ocr=0.6, instr=0.4) for seed in (0, 1, 2)),
        *(run_of("one_mix", seed, 0.4 + seed / 100, ocr=0.5, instr=0.4) for seed in (0, 1, 2)),
        *(run_of("cut", seed, 0.3, ocr=0.3, instr=0.3) for seed in (0, 1)),
        run_of("no_prefix", 0, None),
    ]


def write(folder: Path, runs: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({**more, "runs": runs}), encoding="utf-8")
    return write_report(folder)


def test_the_page_names_every_run(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write(tmp_path, runs).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    listed = [(row[0], int(row[1])) for row in tags.rows[1:]]
    assert listed == [(run["variant"], run["seed"]) for run in runs]
    assert tags.rows[4] == ["one_mix", "0", "7", "8", "36", "", "0.400", "0.500", "0.400"]
    assert tags.rows[-1] == ["no_prefix", "0", "7", "8", "36", "", "not finite"]
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", page)  # nothing from elsewhere
    for words in (
        escape(RULE, quote=True).replace("&#x27;", "&#39;"),
        "Yes: with one mix for all, the average of the two tasks falls by 0.090 (from 0.500 with terms by task to "
        "0.410); significantly in ocr, by 0.100.",
        "<li>all four terms with weight 1 and margin 0.2 for every task: -0.090 <code>one_mix</code></li>",
        "<td>an instruction, in one turn or several</td><td>its answer</td><td>info_nce + cosine</td><td>ndcg@10</td>",
        "<dt>training</dt><dd>7 steps of 8 rows: 56 rows</dd>",
        "-0.090 ± 0.010",
        "0.400 to 0.420",
        "Is it worth choosing terms by task",
        "Failed with seed 0.",
        "torch 2.0",
    ):
        assert words in page, words


def test_how_many_differences_chance_would_make(runs: list[dict[str, Any]]) -> None:
    assert by_chance(summarise(runs)) == (6, pytest.approx(0.3))


def test_equal_results_give_equal_files(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, runs)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_runs_that_trained_nothing_have_no_curves(run_of: RunOf, tmp_path: Path) -> None:
    page = write(tmp_path, [{**run_of("full", 0, 0.5, ocr=0.5), "curves": {}}]).read_text(encoding="utf-8")
    assert "Learning curves" not in page
    assert not list(tmp_path.glob("curves.*"))


def test_the_reference_alone_is_a_page_too(run_of: RunOf, tmp_path: Path) -> None:
    page = write(tmp_path, [run_of("full", 0, 0.5, ocr=0.5)]).read_text(encoding="utf-8")
    assert "An average of 0.500, with which the others are compared." in page
    assert "In short" not in page
    assert "by chance" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "results.json"])


def test_the_same_stands_in_markdown(runs: list[dict[str, Any]], run_of: RunOf, tmp_path: Path) -> None:
    single = [run_of("only_ocr", seed, 0.1, ocr=0.7, instr=0.1) for seed in (0, 1, 2)]
    write(tmp_path, [*runs, *single])
    lines = (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()
    for line in (
        "| variant | against | seeds | average | ocr | instr |",
        "| `one_mix` | `full` | 3 | **-0.090 ± 0.010** | **-0.100 ± 0.000** | +0.000 ± 0.000 |",
        "| `cut` | `full` | 2 | **-0.200 ± 0.000** | **-0.300 ± 0.000** | **-0.100 ± 0.000** |",
        "| `only_ocr` | `full` | 3 |  | **+0.100 ± 0.000** |  |",
        "- a model for ocr alone, of as many rows of it as in full: +0.100 in ocr (`only_ocr`)",
        "| ocr | \\<ocr> | an image, with a question or without | the text that it shows | info_nce + triplet, margin "
        "0.2 | ndcg@10 |",
        "| `one_mix` | 3 | 0.410 ± 0.010 | 0.500 ± 0.000 | 0.400 ± 0.000 |",
        "| `one_mix` | 0 | 7 | 8 | 36 |  | 0.400 | 0.500 | 0.400 |",
        "| `no_prefix` | 0 | 7 | 8 | 36 |  | not finite |",
        "![Figures of every variant, in the average and each task](values.svg)",
    ):
        assert line in lines, line
    assert any(r"\<text_pair> is seen by the loss alone" in line for line in _markdown(tmp_path, run_of))
    widths = [line.count("|") for line in lines if line.startswith("| `one_mix` |")]
    assert widths == [5, 7, 6, 10, 10, 10]  # question, difference, figures, each run
    head = "\n".join(lines).split("## Questions and answers")[0].replace("mean over the seeds", "")
    assert not re.search(r"\bmean\b", head)  # what is taken over the tasks is called an average


def _markdown(folder: Path, run_of: RunOf) -> list[str]:
    write(folder, [run_of(name, 0, 0.5, ocr=0.5) for name in ("full", "no_text_pair_prefix")])
    return (folder / "ablation.md").read_text(encoding="utf-8").splitlines()


def test_a_failure_in_words_is_a_cell_of_its_row(runs: list[dict[str, Any]], run_of: RunOf, tmp_path: Path) -> None:
    failed = {**run_of("no_prefix", 1, None), "failure": "memory lacks for 3 | 4 <ocr>"}
    page = write(tmp_path, [*runs, failed]).read_text(encoding="utf-8")
    assert "memory lacks for 3 | 4 &lt;ocr&gt;" in page
    row = r"| `no_prefix` | 1 | 7 | 8 | 36 |  | memory lacks for 3 \| 4 \<ocr> |"
    assert row in (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()


def test_runs_of_a_variant_that_the_table_lacks_are_listed(run_of: RunOf, tmp_path: Path) -> None:
    page = write(tmp_path, [run_of("full", 0, 0.5, ocr=0.5), run_of("renamed", 0, 0.4, ocr=0.4)])
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    assert tags.rows[-1] == ["renamed", "0", "7", "8", "36", "", "0.400", "0.400"]
    text = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "This version's table of variants lacks `renamed`: their runs stand here" in text


def test_what_base_and_data_are_stands_at_the_head(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write(tmp_path, runs, about="Pages of <b> a tiny base").read_text(encoding="utf-8")
    assert "<p>Pages of &lt;b&gt; a tiny base</p>" in page.split("<h2>")[0]
    markdown = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "\n\nPages of \\<b> a tiny base\n\n" in markdown.split("## ")[0]


def test_a_run_that_took_a_model_has_no_steps(run_of: RunOf, tmp_path: Path) -> None:
    cut = run_of("cut", 0, 0.3, ocr=0.3)
    cut["settings"] = {**cut["settings"], "evaluation": {"hidden_prefixes": [], "cut": 8}}
    write(tmp_path, [run_of("full", 0, 0.5, ocr=0.5), cut])
    lines = (tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()
    assert "| `full` | 0 | 7 | 8 | 36 |  | 0.500 | 0.500 |" in lines
    assert "| `cut` | 0 |  |  | 36 |  | 0.300 | 0.300 |" in lines


def test_settings_beyond_a_change_are_shown(run_of: RunOf, tmp_path: Path) -> None:
    small = run_of("in_batch", 0, 0.5, ocr=0.5)
    small["settings"] = {**small["settings"], "batch_size": 2, "accumulation": 8}
    write(tmp_path, [run_of("full", 0, 0.5, ocr=0.5), small])
    text = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "many such batches a step (`batch_size 2`, `accumulation 8`) |" in text

"""Write the tables of the READMEs anew from what was measured.

    make bench                                             # speed: benchmarks/results.md
    make demo
    .venv/bin/python docs/write_figures.py demo-output     # quality: the demo's figures and curves, kept here
    make ablation                                          # what each part is worth: docs/ablation/results.json
    .venv/bin/python docs/write_figures.py                 # from what is kept, without a demo

A test holds the READMEs to these files, so a figure cannot be changed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_vipyloqwen.ablation.report import cell, change, write_report
from sentence_vipyloqwen.ablation.results import MEAN, load_results, summarise
from sentence_vipyloqwen.ablation.variants import FULL, VARIANTS
from sentence_vipyloqwen.model_card import CURVES_FILE
from sentence_vipyloqwen.train.run import MODEL

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS, DEMO, ABLATION = ROOT / "benchmarks" / "results.md", DOCS / "demo.json", DOCS / "ablation"
CURVES = DOCS / "demo_curves.svg"

ENCODE, TRAINING = "Encode, against stock SentenceTransformer", "Training step, against stock SentenceTransformer"
RATIO = "times faster"

HEADLINES = (
    ("vqa_single", "accuracy"),
    ("vqa_multi", "accuracy"),
    ("text_pair", "spearman"),
    ("instr", "recall@1"),
    ("instr", "recall@10"),
    ("ocr", "recall@10"),
    ("general", "recall@10"),
)
"""Task and measure of each line of the demo's table; the lines of text alone follow."""

ENGLISH = {
    "speed": "| times faster than stock | encode | training step |",
    "text": "{rows} texts",
    "many-texts": "{rows} texts",
    "images": "images",
    "mixed": "text + image",
    "several": "2 to 3 images",
    "shared": "8 questions on each page",
    "duplicates": "each input 4 times",
    "single": "one by one",
    "figures": "| task | measure | before training | after training |",
    "counts": "({queries} queries, {candidates} candidates)",
    "pairs": "({queries} pairs)",
    "lines": ", unseen lines alone",
    "captions": ", pictures of shapes alone",
    "ablation": "| variant | what is changed | mean of the tasks | difference | tasks that differ beyond the spread |",
    "changes": {variant.name: variant.change for variant in VARIANTS.values()},
    "against": "{difference}, against `{other}`",
}
VIETNAMESE = {
    "speed": "| nhanh hơn nguyên bản (lần) | encode | bước huấn luyện |",
    "text": "{rows} văn bản",
    "many-texts": "{rows} văn bản",
    "images": "ảnh",
    "mixed": "văn bản + ảnh",
    "several": "2 đến 3 ảnh",
    "shared": "8 câu hỏi mỗi trang",
    "duplicates": "mỗi đầu vào 4 lần",
    "single": "từng cái một",
    "figures": "| tác vụ | thước đo | trước huấn luyện | sau huấn luyện |",
    "counts": "({queries} truy vấn, {candidates} ứng viên)",
    "pairs": "({queries} cặp)",
    "lines": ", riêng các dòng chữ chưa thấy",
    "captions": ", riêng ảnh các hình",
    "ablation": "| biến thể | thay đổi | trung bình các tác vụ | chênh lệch | tác vụ chênh lệch vượt quá độ phân tán |",
    "changes": {
        "full": "không đổi gì",
        "info_nce_only": "mọi tác vụ chỉ còn InfoNCE (cặp vẫn có trọng số như trước)",
        "one_mix": "cả bốn thành phần loss với trọng số 1 và margin 0.2 cho mọi tác vụ",
        "published_pair_weight": "một cặp có điểm được tính trọn trong InfoNCE, điểm bao nhiêu cũng vậy",
        "published_triplet": "triplet lấy độ tương đồng đã chia cho nhiệt độ",
        "no_prefix": "chỉ loss thấy tiền tố, cả khi huấn luyện lẫn khi đánh giá",
        "prefix_forgotten": "mô hình của full, hỏi mà không có tiền tố",
    },
    "against": "{difference}, so với `{other}`",
}
READMES: Mapping[str, Mapping[str, Any]] = {"README.md": ENGLISH, "README.vi.md": VIETNAMESE}


def main(arguments: list[str]) -> None:
    """Keep the demo's figures, where its folder is given, and write the tables."""
    for folder in arguments:
        shutil.copyfile(Path(folder, "metrics.json"), DEMO)
        shutil.copyfile(Path(folder, "training", MODEL, CURVES_FILE), CURVES)
    write_report(ABLATION)
    for name, words in READMES.items():
        file = ROOT / name
        file.write_text(with_figures(file.read_text(encoding="utf-8"), words), encoding="utf-8")


def with_figures(text: str, words: Mapping[str, Any]) -> str:
    """The text of a README with its tables written anew."""
    text = with_region(text, "speed", speed_table(RESULTS.read_text(encoding="utf-8"), words))
    text = with_region(text, "ablation", ablation_table(load_results(ABLATION), words))
    return with_region(text, "figures", demo_table(json.loads(DEMO.read_text(encoding="utf-8")), words))


def with_region(text: str, name: str, body: str) -> str:
    """The text with what stands between the two marks of a region replaced.

    Raises:
        ValueError: If the text does not have the region once.
    """
    found, count = re.subn(
        rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)",
        lambda match: match[1] + body + match[2],
        text,
        flags=re.S,
    )
    if count != 1:
        raise ValueError(f"The region {name!r} stands {count} times in the text; it must stand once.")
    return found


def speed_table(results: str, words: Mapping[str, Any]) -> str:
    """Our speed over stock's by corpus, of ``encode`` and of a training step."""
    encode, training = (section_rows(results, section) for section in (ENCODE, TRAINING))
    lines = [
        f"| {words[name].format_map(row)} | {row[RATIO]} | {training.get(name, {}).get(RATIO, '')} |"
        for name, row in encode.items()
    ]
    return "\n".join([words["speed"], "|---|---|---|", *lines]) + "\n"


def section_rows(results: str, section: str) -> dict[str, dict[str, str]]:
    """The table of a section of ``benchmarks/results.md``: first cell of a row -> column -> cell."""
    body = results.partition(f"## {section}\n")[2].partition("\n## ")[0]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    )
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def demo_table(metrics: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """What the demo's model reached on held-out data, before and after training."""
    lines = []
    for task, measure in HEADLINES:
        before, after = (metrics[when]["tasks"][task] for when in ("before", "after"))
        lines.append(_line(task, after, measure, _figure(before, measure), words))
    before, after = (_captions(metrics[when]) for when in ("before", "after"))
    lines.append(_line("general", after, "recall@10", _figure(before, "recall@10"), words, words["captions"]))
    alone = metrics["ocr_lines"]["tasks"]["ocr"]
    lines += [_line("ocr", alone, measure, "–", words, words["lines"]) for measure in ("recall@1", "recall@10")]
    return "\n".join([words["figures"], "|---|---|---|---|", *lines]) + "\n"


def _captions(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures asked for their captions, among the captions of pages as well."""
    task = evaluation["tasks"]["general"]
    return {**task["domain"]["caption"], "candidates": task["candidates"]}


def _line(
    task: str, result: Mapping[str, Any], measure: str, before: str, words: Mapping[str, Any], of: str = ""
) -> str:
    counts = words["counts" if result["candidates"] else "pairs"].format_map(result)
    return f"| `{task}`{of} {counts} | {measure} | {before} | {_figure(result, measure)} |"


def _figure(result: Mapping[str, Any], measure: str) -> str:
    return f"{result['metrics'][measure]:.3f}"


def ablation_table(runs: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> str:
    """What every change did to the mean of the tasks, and to which of them it did something."""
    lines = []
    for result in summarise(runs):
        difference = change(result.differences.get(MEAN))
        if difference and result.variant.against != FULL:
            difference = words["against"].format(difference=difference, other=result.variant.against)
        counted = [
            f"{name} {change(found)}" for name, found in result.differences.items() if found.counts and name != MEAN
        ]
        cells = [words["changes"][result.variant.name], cell(result.figures.get(MEAN)), difference, "; ".join(counted)]
        lines.append(" | ".join([f"| `{result.variant.name}`", *cells]) + " |")
    return "\n".join([words["ablation"], "|---|---|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])

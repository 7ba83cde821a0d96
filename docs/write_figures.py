"""Write the tables of the READMEs, docs/speed.md and docs/scaling.md anew from what was measured.

    make bench                                             # speed: benchmarks/results.md
    make demo
    .venv/bin/vipyloqwen mteb demo-output/training/model --output demo-output/mteb --json demo-output/mteb.json
    .venv/bin/python docs/write_figures.py demo-output     # quality: the demo's figures and curves, kept here
    make ablation                                          # what each part is worth: docs/ablation/results.json
    .venv/bin/python docs/write_figures.py                 # from what is kept, without a demo

A test holds these pages to these files, so a figure cannot be changed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_vipyloqwen.ablation.report import cell, change, shown, tame, write_report
from sentence_vipyloqwen.ablation.results import FEWEST_SEEDS, MEAN, load_results, summarise
from sentence_vipyloqwen.ablation.variants import FULL, VARIANTS
from sentence_vipyloqwen.model_card import CURVES_FILE
from sentence_vipyloqwen.tasks import TASKS
from sentence_vipyloqwen.train.run import MODEL

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS, DEMO, ABLATION = ROOT / "benchmarks" / "results.md", DOCS / "demo.json", DOCS / "ablation"
METRICS, SCORES = "metrics.json", "mteb.json"
"""What a folder of the demo has, once `vipyloqwen mteb` has been run on its model."""

SCALING, RECORDS = DOCS / "scaling.md", ROOT / "benchmarks" / "scale.md"
SPEED, CURVES, MTEB = DOCS / "speed.md", DOCS / "demo_curves.svg", DOCS / "mteb.json"

ENCODE, TRAINING = "Encode, against stock SentenceTransformer", "Training step, against stock SentenceTransformer"
RATIO, SHARE = "times faster", "share of rate"
AIMS = (
    ("64 texts", ENCODE, "text", RATIO, "3.5"),
    ("256 texts", ENCODE, "many-texts", RATIO, "3.5"),
    ("images", ENCODE, "images", RATIO, "1.5"),
    ("text + image", ENCODE, "mixed", RATIO, "2.5"),
    ("8 questions on each page", ENCODE, "shared", RATIO, "6"),
    ("each input 4 times", ENCODE, "duplicates", RATIO, "4"),
    ("never slower: inputs one by one", ENCODE, "single", RATIO, "1"),
    ("training step, text + image", TRAINING, "mixed", RATIO, "2"),
    ("training step, 8 questions on each page", TRAINING, "shared", RATIO, "4"),
    ("share of the matrix-product rate, 64 texts", ENCODE, "text", SHARE, "75%"),
    ("share of the matrix-product rate, 256 texts", ENCODE, "many-texts", SHARE, "75%"),
    ("share of the matrix-product rate, images", ENCODE, "images", SHARE, "75%"),
)
"""What docs/speed.md says was aimed at: its words; section, row and column of the results; the aim."""

HEADLINES = (
    ("vqa_single", "", "accuracy", "0.95"),
    ("vqa_multi", "", "accuracy", ""),
    ("text_pair", "", "spearman", "0.8"),
    ("instr", "", "recall@1", ""),
    ("instr", "", "recall@10", "0.8"),
    ("ocr", "", "recall@10", ""),
    ("general", "", "recall@10", ""),
    ("general", "caption", "recall@10", "0.8"),
    ("general", "document", "recall@10", ""),
)
"""Of each line of the demo's table: task, domain if it is of one alone, measure, and what was aimed at."""

LINES = (("recall@1", "0.8"), ("recall@10", ""))
"""The same of lines of text, which are measured among themselves."""

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
    "figures": "| task | measure | before training | after training | aim |",
    "counts": "({queries} queries, {candidates} candidates)",
    "pairs": "({queries} pairs)",
    "lines": ", unseen lines alone",
    "caption": ", pictures of shapes alone",
    "document": ", pages of documents alone",
    "mteb": "| task of mteb | subset | metric | value |",
    "ablation": ("variant", "what is changed", "seeds", "average of tasks", "difference", "significant in"),
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
    "figures": "| tác vụ | thước đo | trước huấn luyện | sau huấn luyện | mục tiêu |",
    "counts": "({queries} truy vấn, {candidates} ứng viên)",
    "pairs": "({queries} cặp)",
    "lines": ", riêng các dòng chữ chưa thấy",
    "caption": ", riêng ảnh các hình",
    "document": ", riêng các trang tài liệu",
    "mteb": "| bài đo của mteb | phần | thước đo | giá trị |",
    "ablation": (
        "biến thể",
        "thay đổi",
        "seed",
        "trung bình các tác vụ",
        "chênh lệch",
        "tác vụ khác biệt có ý nghĩa thống kê",
    ),
    "changes": {
        "full": "không đổi gì",
        "info_nce_only": "mọi tác vụ chỉ còn InfoNCE (cặp vẫn có trọng số như trước)",
        "no_score_mse": "sai số bình phương của điểm (text_pair) có trọng số 0; các thành phần khác giữ nguyên",
        "no_cosine": "thành phần cosine (instr) có trọng số 0; các thành phần khác giữ nguyên",
        "no_triplet": "thành phần triplet (ocr, vqa_single, vqa_multi) có trọng số 0; các thành phần khác giữ nguyên",
        "one_mix": "cả bốn thành phần loss với trọng số 1 và margin 0.2 cho mọi tác vụ",
        "published_pair_weight": "một cặp có điểm được tính trọn trong InfoNCE, điểm bao nhiêu cũng vậy",
        "published_triplet": "triplet lấy độ tương đồng đã chia cho nhiệt độ",
        "published_triplet_weighed": "triplet như công bố, trọng số nhân với nhiệt độ",
        "no_prefix": "chỉ loss thấy tiền tố, cả khi huấn luyện lẫn khi đánh giá",
        "prefix_forgotten": "mô hình của full, hỏi mà không có tiền tố",
        **{f"no_{task}_prefix": f"chỉ loss thấy <{task}>, cả khi huấn luyện lẫn khi đánh giá" for task in TASKS},
        "last_token_pooling": "token cuối cùng là embedding",
        "attention_pooling": "một truy vấn học được định trọng số của các token",
        "weighted_mean_pooling": "token càng về sau càng nặng trong trung bình",
        **{f"only_{task}": f"mô hình riêng cho {task}, với số dòng của nó như trong full" for task in TASKS},
        "mixed_batches": "một lô có nhiều tác vụ; mẫu âm vẫn cùng tác vụ",
        "all_negatives": "lô nhiều tác vụ, dòng của mọi tác vụ đều là mẫu âm",
        "in_batch": "mỗi lần đối chiếu 24 dòng như công bố, mỗi bước nhiều lô như thế",
        "in_batch_192": "mỗi lần đối chiếu 24 dòng như công bố, mỗi bước chỉ 8 lô như thế",
        **dict.fromkeys(
            ("grad_cache", "grad_cache_192"),
            "đối chiếu mọi dòng của một bước như thế với nhau, tính mỗi lần 24 dòng (GradCache)",
        ),
        "cut": "mô hình của full, embedding cắt còn 1/8",
        "matryoshka": "huấn luyện ở trọn, nửa, phần tư và 1/8 kích thước (Matryoshka)",
        "matryoshka_cut": "mô hình của matryoshka, embedding cắt còn 1/8",
    },
    "against": "{difference}, so với `{other}`",
}
READMES: Mapping[str, Mapping[str, Any]] = {"README.md": ENGLISH, "README.vi.md": VIETNAMESE}


def main(arguments: list[str]) -> None:
    """Keep the demo's figures, where its folder is given, and write the tables."""
    for folder in map(Path, arguments):
        kept = {
            folder / METRICS: DEMO,
            folder / SCORES: MTEB,
            folder / "training" / MODEL / CURVES_FILE: CURVES,
        }
        if missing := [str(path) for path in kept if not path.exists()]:
            raise FileNotFoundError(f"{', '.join(missing)}: missing. See the commands at the head of this file.")
        measured = {
            name: json.loads((folder / name).read_text(encoding="utf-8"))["weights"] for name in (METRICS, SCORES)
        }
        if len(set(measured.values())) > 1:
            raise ValueError(f"{folder} holds figures of different models, by their weights: {measured}.")
        for path, copy in kept.items():
            shutil.copyfile(path, copy)
    write_report(ABLATION)
    SCALING.write_text(with_records(SCALING.read_text(encoding="utf-8")), encoding="utf-8")
    SPEED.write_text(with_aims(SPEED.read_text(encoding="utf-8")), encoding="utf-8")
    for name, words in READMES.items():
        file = ROOT / name
        file.write_text(with_figures(file.read_text(encoding="utf-8"), words), encoding="utf-8")


def with_aims(text: str) -> str:
    """The text of docs/speed.md with its table written anew."""
    results, lines = RESULTS.read_text(encoding="utf-8"), []
    for words, section, row, column, aim in AIMS:
        reached = section_rows(results, section)[row][column]
        median, least = (float(figure.split()[0].rstrip("%")) for figure in (reached, aim))
        lines.append(f"| {words} | {aim} | {reached} | {'' if median >= least else 'missed'} |")
    return with_region(text, "aims", "\n".join(["| | aim | reached | |", "|---|---|---|---|", *lines]) + "\n")


def with_records(text: str) -> str:
    """The text of docs/scaling.md with the table of ``benchmarks/scale.md``."""
    measured = RECORDS.read_text(encoding="utf-8").splitlines()
    return with_region(text, "records", "\n".join(line for line in measured if line.startswith("|")) + "\n")


def with_figures(text: str, words: Mapping[str, Any]) -> str:
    """The text of a README with its tables written anew."""
    text = with_region(text, "speed", speed_table(RESULTS.read_text(encoding="utf-8"), words))
    text = with_region(text, "mteb", mteb_table(json.loads(MTEB.read_text(encoding="utf-8"))["scores"], words))
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
    found, body = results.partition(f"## {section}\n")[1:]
    if not found:
        raise ValueError(f"The results have no section {section!r}: run make bench.")
    body = body.partition("\n## ")[0]
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    )
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def demo_table(metrics: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """What the demo's model reached on held-out data, before and after training."""
    lines = []
    for task, domain, measure, aim in HEADLINES:
        before, after = (_part(metrics[when]["tasks"][task], domain) for when in ("before", "after"))
        lines.append(_line(task, after, measure, _figure(before, measure), aim, words, words.get(domain, "")))
    alone = metrics["ocr_lines"]["tasks"]["ocr"]
    lines += [_line("ocr", alone, measure, "–", aim, words, words["lines"]) for measure, aim in LINES]
    return "\n".join([words["figures"], "|---|---|---|---|---|", *lines]) + "\n"


def _part(task: Mapping[str, Any], domain: str) -> Mapping[str, Any]:
    """What a task reached, or its queries of one domain, ranked among the candidates of all."""
    return {**task["domain"][domain], "candidates": task["candidates"]} if domain else task


def _line(
    task: str, result: Mapping[str, Any], measure: str, before: str, aim: str, words: Mapping[str, Any], of: str
) -> str:
    counts = words["counts" if result["candidates"] else "pairs"].format_map(result)
    return f"| `{task}`{of} {counts} | {measure} | {before} | {_figure(result, measure)} | {aim} |"


def _figure(result: Mapping[str, Any], measure: str) -> str:
    return f"{result['metrics'][measure]:.3f}"


def mteb_table(scores: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> str:
    """What the demo's model reached on the tasks of mteb that need no network."""
    lines = ["| `{task}` | {subset} | {metric} | {value:.3f} |".format_map(score) for score in scores]
    return "\n".join([words["mteb"], "|---|---|---|---|", *lines]) + "\n"


def ablation_table(runs: Sequence[Mapping[str, Any]], words: Mapping[str, Any]) -> str:
    """What every change did to what it is about, and to which tasks it did something; of one seed, nothing is told."""
    lines = []
    for result in summarise(runs):
        if result.variant.against and result.compared_seeds < FEWEST_SEEDS:
            continue
        found = result.differences.get(result.main)
        figure, difference = cell(result.figures.get(result.main)), change(found)
        if found and found.counts:
            difference = f"**{difference}**"
        if result.main != MEAN:
            figure = f"{result.main} {figure}"
        if difference and result.variant.against != FULL:
            difference = words["against"].format(difference=difference, other=result.variant.against)
        counted = [
            f"{shown(name)} {change(other)}"
            for name, other in result.differences.items()
            if other.counts and name != result.main
        ]
        what = tame(words["changes"][result.variant.name])
        cells = [f"`{result.variant.name}`", what, str(result.seeds), figure, difference, "; ".join(counted)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"| {' | '.join(words['ablation'])} |", "|---|---|---:|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])

"""The embedded default: the whole job, from nothing to answers, on a tiny model and small real data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.demo.base_model import make_tiny_base
from sentence_vipyloqwen.demo.data import DemoData, DemoSizes, build_demo_data
from sentence_vipyloqwen.fingerprint import fingerprint
from sentence_vipyloqwen.index import SearchResult, VectorIndex, write_report
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.model_card import CARD_FILE
from sentence_vipyloqwen.modules.images import open_image
from sentence_vipyloqwen.tasks import split_prefix
from sentence_vipyloqwen.train.evaluation import Evaluation, evaluate
from sentence_vipyloqwen.train.interruption import SIGNALS, ProcessLost, TrainingInterrupted
from sentence_vipyloqwen.train.recipe import Recipe, load_recipe
from sentence_vipyloqwen.train.record_lines import read_records
from sentence_vipyloqwen.train.records import Record
from sentence_vipyloqwen.train.run import METRICS_FILE, MODEL, train

T = TypeVar("T")

RECIPE = "tiny.yaml"
MIN_PIXELS = 6272
"""A picture of 64 x 64 is enlarged to 9 tokens, from the 4 that it would have: of those a small model tells the colour,
but hardly a circle from a rectangle. A line of 224 x 28 has so many pixels and stays as it is. It is not in the recipe,
as that is for finished models, too: their pictures keep the size that they were trained at."""

BASE_CARD = """---
license: apache-2.0
---

A random Qwen2-VL checkpoint, made by the demo of sentence-vipyloqwen.
"""
"""The base's own card, from which the trained model's card has its licence."""

VOCABULARY = 3000
PROCESSES = min(2, os.cpu_count() or 1)
"""Two of one thread each train 1.2 to 1.6 times as fast as one of two threads, whose operations are too small."""

PAGE_FILE = "search.html"
COSINE_FLOOR = 0.9999
ANSWERED = ("ocr", "vqa_single", "vqa_multi")


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's results lie.

    Attributes:
        model_path: The trained model, a portable folder.
        metrics_path: Every figure, before and after training.
        page_path: Queries and what they found, to open in a browser.
        metrics: The figures.
    """

    model_path: Path
    metrics_path: Path
    page_path: Path
    metrics: dict[str, Any]


def prepare_demo(
    output: str | Path,
    *,
    sizes: DemoSizes = DemoSizes(),  # noqa: B008 - frozen
    seed: int = 0,
    console: Console | None = None,
) -> tuple[DemoData, Path]:
    """Make what a training of the demo begins with, and no more; see `run_demo` for the arguments.

    Returns:
        The data and the folder of the base.
    """
    return _prepare(Path(output), sizes, seed, _Steps(console or Console(quiet=True)))


def run_demo(
    output: str | Path,
    *,
    sizes: DemoSizes = DemoSizes(),  # noqa: B008 - frozen
    overrides: dict[str, Any] | None = None,
    seed: int = 0,
    processes: int = PROCESSES,
    console: Console | None = None,
) -> DemoResult:
    """Do the whole job: data, base, create, train, evaluate, save, load, index, search.

    1. Make the data and a tiny random Qwen2-VL.
    2. Create a model of it, train it on all tasks together, evaluate it before and after.
    3. Load the saved folder with plain Sentence Transformers and with ours, and compare the vectors.
    4. Index held-out pictures, documents and texts; ask four kinds of question; write the page of results.

    A second call makes data and base anew, equal for equal seeds and sizes, and goes on with training from its last
    checkpoint; other sizes or another seed need another folder.

    Args:
        output: Folder for everything.
        sizes: How much data to make.
        overrides: Settings that replace those of ``tiny.yaml`` and ``MIN_PIXELS``.
        seed: Seed of data, weights and sampling.
        processes: That train together, each with its part of the cores; a step has as many times ``batch_size`` rows.
        console: Where to tell what happens.

    Raises:
        ValueError: If the recipe evaluates nothing.
        TrainingInterrupted: If SIGTERM or SIGINT ended the training; the same call goes on from its last checkpoint.
        ProcessLost: If the processes of the training failed.
        RuntimeError: If plain Sentence Transformers gives other vectors.
    """
    output = Path(output)
    steps = _Steps(console or Console(quiet=True))
    data, base = _prepare(output, sizes, seed, steps)
    settings = {
        "base": str(base),
        "train": [str(data.train)],
        "eval": str(data.eval),
        "output": str(output / "training"),
    }
    recipe = load_recipe(RECIPE, {**settings, "seed": seed, "min_pixels": MIN_PIXELS, **(overrides or {})})
    if not recipe.eval:
        raise ValueError("The demo shows what a training changes: setting eval is None; allowed is a JSONL file.")
    steps.run("Training on all tasks together", lambda: _train(recipe, processes))
    training = Path(recipe.output)
    model_path, measured = training / MODEL, json.loads((training / METRICS_FILE).read_text(encoding="utf-8"))
    model = ViPyloQwen(model_path, device="cpu")
    lines = evaluate(model, data.eval_lines)
    _show(steps.console, measured, lines)
    records = list(read_records(data.eval))
    agreement = steps.run(
        "Loading the saved folder with plain SentenceTransformer",
        lambda: compare_with_stock(model_path, _sample(records)),
    )
    page = steps.run("Index and search", lambda: _search(model_path, data, records, output))
    metrics = {
        **{when: measured[when] for when in ("before", "after")},
        "ocr_lines": lines.to_dict(),
        "stock_agreement": agreement,
        "records": data.counts,
        "processes": processes,
        "weights": fingerprint(model).weights,
        "recipe": {name: value for name, value in yaml.safe_load(recipe.to_yaml()).items() if name not in settings},
        "seconds": steps.seconds,
    }
    metrics_path = output / METRICS_FILE
    metrics_path.write_text(json.dumps(metrics, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    steps.console.print(f"\nModel    {model_path}\nFigures  {metrics_path}\nResults  {page}  (open it in a browser)")
    return DemoResult(model_path, metrics_path, page, metrics)


def _prepare(output: Path, sizes: DemoSizes, seed: int, steps: _Steps) -> tuple[DemoData, Path]:
    data = steps.run(
        "Data: easy-vqa, CLDR names, rendered Vietnamese documents",
        lambda: _make_data(output, sizes, seed, steps.console),
    )
    base = steps.run("Base: a tiny random Qwen2-VL checkpoint", lambda: _make_base(output / "base", data.train, seed))
    return data, base


def _train(recipe: Recipe, processes: int) -> None:
    """Train here, or in several processes that ``torchrun`` starts."""
    if processes == 1:
        train(recipe, device="cpu")
        return
    settings = Path(recipe.output).with_suffix(".yaml")
    settings.write_text(recipe.to_yaml(), encoding="utf-8")
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = ["-m", "sentence_vipyloqwen", "train", "--recipe", str(settings), "--device", "cpu"]
    code, received = run_listening([*launcher, *command], {"OMP_NUM_THREADS": threads})
    if received:
        raise TrainingInterrupted(f"Signal {received}. The same command goes on from the last checkpoint.", received)
    if code:
        raise ProcessLost(f"The {processes} processes of the training ended with exit code {code}: see above.")


def run_listening(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Run a command in a session of its own, and pass SIGTERM and SIGINT on to it.

    Args:
        command: The program and its arguments.
        environment: Variables beside those of this process.

    Returns:
        Its exit code, and the first signal that came, or 0. Outside the main thread none is heard.
    """
    received: list[int] = []
    running: subprocess.Popen[bytes] | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if running:
            running.send_signal(number)

    heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        running = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
        for number in tuple(received):  # before it was there
            running.send_signal(number)
        code = running.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else 0


def compare_with_stock(model_path: Path, inputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Encode inputs with plain ``SentenceTransformer`` and with ``ViPyloQwen``.

    Returns:
        The lowest ``cosine`` between the two, and the largest ``norm_error`` from 1.

    Raises:
        RuntimeError: If a cosine is below 0.9999.
    """
    theirs, ours = (
        load(str(model_path), device="cpu").encode(list(inputs), convert_to_numpy=True)
        for load in (SentenceTransformer, ViPyloQwen)
    )
    cosine = float((theirs * ours).sum(axis=1).min())
    if cosine < COSINE_FLOOR:
        raise RuntimeError(f"Plain SentenceTransformer gives other vectors: cosine {cosine:.6f} < {COSINE_FLOOR}.")
    norms = np.linalg.norm(np.concatenate([theirs, ours]), axis=1)
    return {"inputs": len(inputs), "cosine": cosine, "norm_error": float(np.abs(norms - 1).max())}


class _Steps:
    """Names each step on the screen and measures it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Do a step's work and return its result."""
        self.console.print(f"\n[bold]{len(self.seconds) + 1}. {name}[/]")
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        self.console.print(f"[dim]   {self.seconds[name]} s[/]")
        return result


def _make_data(output: Path, sizes: DemoSizes, seed: int, console: Console) -> DemoData:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=total)
            bar.update(rows[what], completed=done)

        return build_demo_data(output / "data", seed=seed, sizes=sizes, progress=show)


def _make_base(folder: Path, train_file: Path, seed: int) -> Path:
    make_tiny_base(folder, _texts(train_file), _images(train_file), vocab_size=VOCABULARY, seed=seed)
    (folder / CARD_FILE).write_text(BASE_CARD, encoding="utf-8")
    return folder


def _images(train_file: Path, every: int = 500) -> list[Image.Image]:
    sides = (side for record in islice(read_records(train_file), 0, None, every) for side in record.sides)
    return [open_image(image) for side in sides for image in side.images]


def _texts(train_file: Path) -> Iterator[str]:
    with train_file.open(encoding="utf-8") as file:
        for record in map(json.loads, file):
            for side in (record["anchor"], record["positive"]):
                text = side.get("text", "") if isinstance(side, dict) else side
                yield "\n".join(text) if isinstance(text, list) else text


def _show(console: Console, measured: Mapping[str, Any], lines: Evaluation) -> None:
    table = Table("task", "measure", "before", "after", title="Held-out data")
    for name, task in measured["after"]["tasks"].items():
        headline = task["headline"]
        before = measured["before"]["tasks"][name]["metrics"][headline]
        table.add_row(name, headline, f"{before:.3f}", f"{task['metrics'][headline]:.3f}")
    ocr = lines.tasks["ocr"]
    table.add_row("ocr, lines alone", "recall@1", "", f"{ocr.metrics['recall@1']:.3f}")
    table.add_row("", "recall@10", "", f"{ocr.metrics['recall@10']:.3f}")
    console.print(table)


def _sample(records: Sequence[Record], count: int = 64) -> list[dict[str, Any]]:
    """Inputs of every task, spread evenly over the records."""
    rows = np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)
    return [records[row].anchor.as_input() for row in rows]


def _search(model_path: Path, data: DemoData, records: Sequence[Record], output: Path) -> Path:
    """Index what was held out, and the answers to the questions; ask by text, image, both, and with a prefix."""
    model = ViPyloQwen(str(model_path), device="cpu")
    items = _items(data, records)
    index = VectorIndex.build(model, items, output / "index", overwrite=True)
    results = [
        SearchResult(query, index.search(query, k=5, prompt_name=prompt), prompt_name=prompt)
        for query, prompt in _queries(records, items)
    ]
    subtitle = f"{len(index)} held-out pictures, documents, texts and answers; a model of 3 million parameters"
    return write_report(output / PAGE_FILE, results, title="sentence-vipyloqwen: search", subtitle=subtitle)


def _items(data: DemoData, records: Sequence[Record]) -> list[dict[str, Any]]:
    items = [json.loads(line) for line in data.items.read_text(encoding="utf-8").splitlines()]
    for item in items:
        if "image" in item:
            item["image"] = [str(data.folder / image) for image in item["image"]]
    known = {item.get("text") for item in items}
    answers = dict.fromkeys(record.positive.text for record in records if record.task.name in ANSWERED)
    texts = [text for text in answers if text not in known]
    return items + [
        {"id": f"answer-{i:04d}", "text": text, "metadata": {"kind": "answer"}} for i, text in enumerate(texts)
    ]


def _queries(records: Sequence[Record], items: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, Any], str | None]]:
    """A text, an image, an image with a text, and questions under a prefix, all of held-out records.

    Without a prefix, a query that is an item finds itself, so others come first.
    """
    of: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        of.setdefault((record.task.name, record.domain), []).append(record)
    captions, pages = of["general", "caption"], of["general", "document"]
    indexed = [_content(item) for item in items]

    def first_that_is_no_item(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return next((query for query in inputs if _content(query) not in indexed), inputs[0])

    queries: list[tuple[dict[str, Any], str | None]] = [
        ({"text": captions[0].positive.text}, None),
        (first_that_is_no_item([record.anchor.as_input() for record in captions]), None),
        (first_that_is_no_item([{**page.anchor.as_input(), "text": page.positive.text} for page in pages]), None),
    ]
    asked = [key for key in of if key[0] in ANSWERED]
    return queries + [(_unprefixed(of[key][0]), key[0]) for key in asked]


def _content(of: Mapping[str, Any]) -> tuple[list[Path], str]:
    """Images and text of an input or an item, wherever a path begins."""
    return [Path(image).resolve() for image in of.get("image", [])], of.get("text", "")


def _unprefixed(record: Record) -> dict[str, Any]:
    """The record's anchor without its prefix, which the query names as its prompt."""
    query = record.anchor.as_input()
    return {**query, "text": split_prefix(query["text"])[1].lstrip()}

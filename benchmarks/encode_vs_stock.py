"""Encode the same inputs with ``ViPyloQwen`` and with stock ``SentenceTransformer``: time and memory.

Both sides load the same folder, so their weights are the same. For each corpus: one round of both warms up, gives the
peak memory of each and checks that their vectors agree (lowest cosine >= 0.9999, or the run fails); then both are timed
in turn, beside bare matrix products of the model's own shapes. Ratios are taken within a round.

  times faster     stock's seconds / ours: median of the rounds (lowest-highest)
  tokens           those that the language model of either side computes, stock / ours: padding, and what repeats
  share of rate    time that our useful work takes as bare float32 matrix products, at their rate in the same round /
                   time we took; useful (benchmarks/flops.py): real tokens only, an image or input that repeats once
  int8             the quantised model against stock, and against our own float32
  memory           200 large images in one call, each side in a process of its own, at two batch sizes

Examples:
  python benchmarks/encode_vs_stock.py
  python benchmarks/encode_vs_stock.py --corpus text shared --rows 64 --rounds 5
  python benchmarks/encode_vs_stock.py --corpus memory --memory-images 50
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import measure
import numpy as np
import torch
from corpora import COPIES, Draw, encode_corpora
from flops import useful_work
from sentence_transformers import SentenceTransformer

CORPORA = ("text", "many-texts", "images", "mixed", "several", "shared", "duplicates", "single", "memory")
MEMORY_SIZES = {"hidden_size": 128, "layers": 2, "vision_size": 32, "vision_layers": 1}
"""Of the model that encodes large images: narrow, or attention over 4,800 patches an image takes minutes."""

MEMORY_BATCHES = (8, 32)
INT8_COLUMNS = ("int8: times faster", "int8 over float32", "int8: lowest cosine to float32")


def main() -> None:
    """Run the corpora asked for and report them."""
    options = parser().parse_args()
    common.set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        if names := [name for name in options.corpus if name != "memory"]:
            speed(Path(folder), names, options)
        if "memory" in options.corpus:
            memory(Path(folder), options)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = common.parser(__doc__, rows=128, corpora=CORPORA)
    options.add_argument("--batch-size", type=int, default=32, help="of both sides; ours takes it for an upper bound")
    options.add_argument("--memory-images", type=int, default=200, help="large images of the corpus 'memory'")
    has_int8 = importlib.util.find_spec("torchao") is not None
    options.add_argument("--int8", action=argparse.BooleanOptionalAction, default=has_int8, help="quantised model too")
    return options


# --- times faster -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodeResult(measure.Result):
    """One corpus.

    Attributes:
        int8_cosine: The lowest cosine of the quantised model's vectors to ours; None where it was not run.
    """

    int8_cosine: float | None = None

    def line(self) -> list[Any]:
        """Its cells of the table, in the order of ``COLUMNS`` and :data:`INT8_COLUMNS`."""
        if self.int8_cosine is None:
            return super().line()
        over_ours = [ours / int8 for ours, int8 in zip(self.seconds["ours"], self.seconds["int8"], strict=True)]
        cells = measure.spread(self.times_faster("int8")), measure.spread(over_ours), f"{self.int8_cosine:.4f}"
        return [*super().line(), *cells]


def speed(folder: Path, names: Sequence[str], options: argparse.Namespace) -> list[EncodeResult]:
    """Compare the sides on corpora and report a table of them."""
    path = common.make_model(folder, {name: getattr(options, name) for name in common.SIZES})
    models = {side: common.load(side, path) for side in ("stock", "ours", *["int8"] * options.int8)}
    corpora, results = encode_corpora(options.rows), []
    for name in names:
        print(f"{name} ...", flush=True)
        results.append(compare(models, name, corpora[name], options.batch_size, options.rounds))
    notes = [
        f"- model: random weights, float32; {common.parameters(models['stock'])}; batch_size {options.batch_size}",
        f"- duplicates: each input {COPIES} times; single: each input in a call of its own",
        f"- {measure.describe_rates(results)}",
        common.machine(options),
    ]
    columns = (*measure.COLUMNS, *INT8_COLUMNS * options.int8)
    body = "\n\n".join([common.table(columns, [result.line() for result in results]), "\n".join(notes)])
    common.report("Encode, against stock SentenceTransformer", body, options.output)
    return results


def compare(
    models: Mapping[str, SentenceTransformer], name: str, inputs: list[Any], batch_size: int, rounds: int
) -> EncodeResult:
    """Compare the sides on one corpus.

    Args:
        models: ``"stock"``, ``"ours"`` and possibly ``"int8"``.
        name: The corpus.
        inputs: Its inputs.
        batch_size: Of both sides.
        rounds: Timed rounds.

    Raises:
        RuntimeError: If the vectors of the sides disagree.
    """
    run = one_by_one if name == "single" else at_once
    jobs = {side: partial(run, model, inputs, batch_size) for side, model in models.items()}
    for model in models.values():
        run(model, inputs[:2], batch_size)  # what is set up once is nobody's peak memory
    with measure.CountTokens(models["stock"]) as stock, measure.CountTokens(models["ours"]) as ours:
        vectors, megabytes = measure.warm_up(jobs)
    cosine = measure.lowest_cosine(vectors["ours"], vectors["stock"])
    measure.check_agreement(name, cosine)
    work = useful_work(models["ours"], inputs)
    seconds, rates = measure.timed(jobs, models["ours"], rounds)
    return EncodeResult(
        name=name,
        rows=len(inputs),
        seconds=seconds,
        tokens={"stock": stock.tokens, "ours": ours.tokens},
        megabytes=megabytes,
        work=work,
        rates=rates,
        cosine=cosine,
        int8_cosine=measure.lowest_cosine(vectors["int8"], vectors["ours"]) if "int8" in vectors else None,
    )


def at_once(model: SentenceTransformer, inputs: list[Any], batch_size: int) -> np.ndarray:
    """All inputs in one call: (N, D) float32."""
    return model.encode(inputs, batch_size=batch_size, show_progress_bar=False)


def one_by_one(model: SentenceTransformer, inputs: list[Any], batch_size: int) -> np.ndarray:
    """Each input in a call of its own, as queries come: (N, D) float32."""
    return np.concatenate([at_once(model, [item], batch_size) for item in inputs])


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Encode many large images in one call, each side in its own process, and report the peaks.

    Returns:
        For each batch size: ``batch_size`` and side -> (peak in megabytes, seconds).
    """
    print("memory ...", flush=True)
    sizes = {name: min(size, getattr(options, name)) for name, size in MEMORY_SIZES.items()}
    path = common.make_model(folder / "memory", sizes)
    inputs = Draw().large_images(folder, options.memory_images)
    results = []
    for batch_size in MEMORY_BATCHES:
        run = partial(_in_own_process, path, inputs, batch_size, options.threads)
        results.append({"batch_size": batch_size, **{side: run(side) for side in ("stock", "ours")}})
    columns = ("batch_size", "stock, MB", "ours, MB", "stock, s", "ours, s", "times faster")
    notes = [
        f"- {options.memory_images} JPEG files of 1120 x 840 pixels, 1,200 tokens each; each side in its own process",
        f"- a narrow model: {common.parameters(common.load('stock', path))}",
        common.machine(options),
    ]
    body = "\n\n".join([common.table(columns, map(_memory_line, results)), "\n".join(notes)])
    common.report("Memory: many large images in one encode", body, options.output)
    return results


def _in_own_process(path: str, inputs: list[Any], batch_size: int, threads: int, side: str) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_of_encode, side, path, inputs, batch_size, threads).result()


def peak_of_encode(side: str, path: str, inputs: list[Any], batch_size: int, threads: int) -> tuple[float, float]:
    """Encode in this process, after one image that warms up.

    Returns:
        Peak memory above that of the loaded model, in megabytes, and seconds.
    """
    torch.set_num_threads(threads)
    model = common.load(side, path)
    at_once(model, inputs[:1], batch_size)
    with measure.PeakMemory() as peak:
        start = time.perf_counter()
        at_once(model, inputs, batch_size)
        seconds = time.perf_counter() - start
    return peak.megabytes, seconds


def _memory_line(result: Mapping[str, Any]) -> list[Any]:
    (stock, stock_seconds), (ours, our_seconds) = result["stock"], result["ours"]
    return [
        result["batch_size"],
        f"{stock:.0f}",
        f"{ours:.0f}",
        f"{stock_seconds:.1f}",
        f"{our_seconds:.1f}",
        f"{stock_seconds / our_seconds:.2f}",
    ]


if __name__ == "__main__":
    main()

"""Where the time of an encode and of a training step goes: torch's profiler, its operators in a few groups.

Runs some corpora of encode_vs_stock.py and one batch of train_vs_stock.py under the profiler, after one run that warms
up, and reports for each group the share of the wall-clock time that its operators took themselves. What is left is
Python, the tokenizer, images and plans.

Examples:
  python benchmarks/where_time_goes.py
  python benchmarks/where_time_goes.py --corpus text training --threads 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import encode_vs_stock
import train_vs_stock
from corpora import encode_corpora, train_corpora
from torch.profiler import ProfilerActivity, profile

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import PrefixRoutedLoss

CORPORA = ("text", "images", "mixed", "training")
TRAINING_BATCH = "mixed"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot"),
    "attention": ("_scaled_dot_product",),
    "activations": ("silu", "sigmoid", "gelu"),
    "norms": ("native_layer_norm", "pow", "rsqrt", "mean", "rms_norm", "_fused_rms_norm"),
    "elementwise: rotary positions, residuals, gates": ("mul", "add", "sub", "div", "neg", "sin", "cos", "exp"),
    "gathering and joining": ("index", "cat", "stack", "gather", "scatter", "embedding", "select_backward"),
    "sums": ("sum", "cumsum", "norm", "linalg_vector_norm"),
    "copies": ("copy", "clone", "fill", "zero"),
}
"""Group -> how the names of its operators begin; an operator belongs to the first group that it fits."""

REST = "the rest: Python, tokenizer, images, plans"


def main() -> None:
    """Profile what is asked for and report it."""
    options = parser().parse_args()
    common.set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    options = common.parser(__doc__, rows=128, corpora=CORPORA)
    options.add_argument("--batch-size", type=int, default=32, help="of encode")
    return options


def run(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Profile each corpus and report a table of shares.

    Returns:
        Corpus -> group -> share of the time, between 0 and 1.
    """
    path = common.make_model(folder, {name: getattr(options, name) for name in common.SIZES})
    model = common.load("ours", path)
    found = {}
    for name in options.corpus:
        print(f"{name} ...", flush=True)
        found[name] = profiled(job(model, name, options))
    lines = [[group, *(f"{of_corpus[group]:.0%}" for of_corpus in found.values())] for group in [*GROUPS, REST]]
    notes = [
        f"- shares of the wall-clock time of one run; training: one step of the batch {TRAINING_BATCH!r}",
        f"- model: random weights, float32; {common.parameters(model)}",
        common.machine(options),
    ]
    body = "\n\n".join([common.table(["", *found], lines), "\n".join(notes)])
    common.report("Where the time goes", body, options.output)
    return found


def job(model: ViPyloQwen, name: str, options: argparse.Namespace) -> Callable[[], Any]:
    """What is profiled under a name: an encode of a corpus, or one training step."""
    if name == "training":
        columns = train_corpora(options.rows // 4)[TRAINING_BATCH]
        return partial(train_vs_stock.step, PrefixRoutedLoss(model), columns)
    return partial(encode_vs_stock.at_once, model, encode_corpora(options.rows)[name], options.batch_size)


def profiled(run_once: Callable[[], Any]) -> dict[str, float]:
    """Run a job twice, the second time under the profiler: group -> share of the wall-clock time."""
    run_once()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        run_once()
        seconds = time.perf_counter() - start
    return shares([(event.key, event.self_cpu_time_total / 1e6) for event in recorded.key_averages()], seconds)


def shares(operators: Iterable[tuple[str, float]], seconds: float) -> dict[str, float]:
    """Share of the time for each group.

    Args:
        operators: Names as the profiler gives them, and seconds that each took itself.
        seconds: Wall-clock time of the whole.

    Returns:
        Group -> share; what no group has goes to the rest.

    >>> shares([("aten::mm", 0.6), ("aten::mul_", 0.1), ("TorchFunction", 0.2)], seconds=1.0)["matrix products"]
    0.6
    """
    taken = dict.fromkeys(GROUPS, 0.0)
    for name, own in operators:
        if group := group_of(name):
            taken[group] += own
    return {**{group: own / seconds for group, own in taken.items()}, REST: 1 - sum(taken.values()) / seconds}


def group_of(name: str) -> str | None:
    """The group of an operator, ``None`` for those that are in none.

    >>> group_of("aten::index_select"), group_of("aten::as_strided"), group_of("cudaLaunchKernel")
    ('gathering and joining', None, None)
    """
    namespace, _, operator = name.partition("::")
    if namespace != "aten":
        return None
    return next((group for group, begins in GROUPS.items() if operator.startswith(begins)), None)


if __name__ == "__main__":
    main()

"""Gradient caching: peak memory of one training step by the size of its mini-batches, for the same loss.

A step prepares a batch's two columns and runs the loss forward and backward; the optimiser is left out. It runs with
PrefixRoutedLoss, which holds the activations of the whole batch, and with CachedPrefixRoutedLoss for each size asked
for. Loss and gradients must agree with the uncached ones (loss to 1e-4, cosine over all parameters >= 0.9999), or the
run fails. Then the steps are timed in turn.

  peak, MB     how far the process's memory rises in a step; gradients, which every step leaves behind, are in it
  of uncached  peak / that of the uncached step
  times longer seconds of the step / those of the uncached one: median of the rounds (lowest-highest)

Examples:
  python benchmarks/gradcache_memory.py
  python benchmarks/gradcache_memory.py --corpus shared --rows 64 --mini-batch 4 16 --tokens 1024
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import measure
import torch
from corpora import train_corpora
from torch import nn
from train_vs_stock import CORPORA

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen

COLUMNS = ("batch", "rows", "mini-batch", "peak, MB", "of uncached", "seconds", "times longer", "loss")
LOSS_TOLERANCE = 1e-4
UNCACHED = "uncached"


def main() -> None:
    """Run the batches asked for and report them."""
    options = parser().parse_args()
    common.set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = common.parser(__doc__, rows=32, corpora=CORPORA)
    options.add_argument("--mini-batch", type=int, nargs="*", default=[8, 2], metavar="ROWS", help="sizes in rows")
    options.add_argument("--tokens", type=int, nargs="*", default=[512], metavar="TOKENS", help="sizes in tokens")
    return options


def run(folder: Path, options: argparse.Namespace) -> list[list[Any]]:
    """Measure the batches; report a table of them and return its lines."""
    model = common.load("ours", common.make_model(folder, {name: getattr(options, name) for name in common.SIZES}))
    corpora, lines = train_corpora(options.rows), []
    for name in options.corpus:
        print(f"{name} ...", flush=True)
        lines += [[name, *line] for line in compare(losses(model, options), name, corpora[name], options.rounds)]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    notes = [
        f"- model: random weights, float32; {common.parameters(model)}",
        f"- gradients of all parameters: {gradients / measure.MEGABYTE:.0f} MB",
        common.machine(options),
    ]
    body = "\n\n".join([common.table(COLUMNS, lines), "\n".join(notes)])
    common.report("Gradient caching: memory by mini-batch", body, options.output)
    return lines


def losses(model: ViPyloQwen, options: argparse.Namespace) -> dict[str, nn.Module]:
    """What to compare, by name; the uncached loss first."""
    by_rows = {f"{rows} rows": CachedPrefixRoutedLoss(model, mini_batch_size=rows) for rows in options.mini_batch}
    by_tokens = {
        f"{tokens} tokens": CachedPrefixRoutedLoss(model, mini_batch_num_tokens=tokens) for tokens in options.tokens
    }
    return {UNCACHED: PrefixRoutedLoss(model), **by_rows, **by_tokens}


def compare(sides: Mapping[str, nn.Module], name: str, columns: Sequence[list[Any]], rounds: int) -> list[list[Any]]:
    """Compare losses on one batch.

    Args:
        sides: The losses; the first is what the others are held to.
        name: The batch's name.
        columns: Its anchors and positives.
        rounds: Timed rounds.

    Returns:
        For each loss the cells of :data:`COLUMNS` but the first.

    Raises:
        RuntimeError: If losses or gradients disagree.
    """
    jobs: dict[str, Callable[[], float]] = {side: partial(step, loss, columns) for side, loss in sides.items()}
    step(next(iter(sides.values())), columns)  # what is allocated once, before memory is measured
    values, peaks, reference = {}, {}, None
    for side, job in jobs.items():
        sides[side].zero_grad(set_to_none=True)
        with measure.PeakMemory() as memory:
            values[side] = job()
        peaks[side] = memory.megabytes
        gradients = all_gradients(sides[side])
        reference = gradients if reference is None else reference
        check(f"{name}, {side}", values[side] - values[UNCACHED], reference, gradients)
    seconds = measure.interleave(jobs, rounds)
    return [[len(columns[0]), side, *cells(side, peaks, seconds), f"{values[side]:.4f}"] for side in sides]


def cells(side: str, peaks: Mapping[str, float], seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Memory and time of one loss, each beside the uncached."""
    longer = [own / plain for own, plain in zip(seconds[side], seconds[UNCACHED], strict=True)]
    share = f"{peaks[side] / peaks[UNCACHED]:.0%}"
    return [f"{peaks[side]:.0f}", share, f"{median(seconds[side]):.2f}", measure.spread(longer)]


def step(loss: nn.Module, columns: Sequence[list[Any]]) -> float:
    """Prepare the columns and run the loss on them, forward and backward; gradients are left in the parameters."""
    loss.train()
    loss.zero_grad(set_to_none=True)
    total = torch.stack(list(loss([loss.model.preprocess(column) for column in columns]).values())).sum()
    total.backward()
    return total.item()


def all_gradients(loss: nn.Module) -> torch.Tensor:
    """(parameters,) float32; zeros where a parameter took no part."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in loss.model.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients])


def check(what: str, difference: float, reference: torch.Tensor, gradients: torch.Tensor) -> None:
    """Raise if a loss or its gradients are not those of the uncached.

    Raises:
        RuntimeError: If the loss differs by more than 1e-4, or the gradients' cosine is below 0.9999.
    """
    if not abs(difference) <= LOSS_TOLERANCE:
        raise RuntimeError(f"{what}: the loss differs from the uncached one by {difference:g}.")
    measure.check_agreement(what, torch.cosine_similarity(reference.double(), gradients.double(), dim=0).item())


if __name__ == "__main__":
    main()

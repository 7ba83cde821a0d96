"""One training step with ``ViPyloQwen`` and with stock ``SentenceTransformer``: time and memory.

A step prepares a batch's two columns and runs the loss forward and backward; the optimiser, the same on both sides, is
left out. Ours is PrefixRoutedLoss on ViPyloQwen, stock's is MultipleNegativesRankingLoss on the same folder loaded by
SentenceTransformer. To warm up, both take a step of PrefixRoutedLoss, which runs on either: it gives the peak memory of
each, and their gradients must agree (cosine over all parameters >= 0.9999), or the run fails. Then both are timed in
turn, beside bare matrix products of the model's own shapes. Ratios are taken within a round.

  times faster     stock's seconds / ours: median of the rounds (lowest-highest)
  share of rate    time that our useful work takes as bare float32 matrix products, at their rate in the same round /
                   time we took; a step's useful work is three times its forward's (benchmarks/flops.py): the backward
                   has two products for each

Examples:
  python benchmarks/train_vs_stock.py
  python benchmarks/train_vs_stock.py --corpus shared --rows 32 --rounds 5
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import measure
import torch
from corpora import QUESTIONS_PER_PAGE, train_corpora
from flops import Work, useful_work
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import PrefixRoutedLoss

CORPORA = ("text", "mixed", "shared")
STEP_PER_FORWARD = 3
"""A product in the forward, two in the backward: the gradients of its two factors.

The pixels' own gradient is not computed, so the patch embedding is overcounted: 1 to 2 % of the vision tower's
work at the default sizes.
"""


def main() -> None:
    """Run the batches asked for and report them."""
    options = parser().parse_args()
    common.set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    return common.parser(__doc__, rows=32, corpora=CORPORA)


def run(folder: Path, options: argparse.Namespace) -> list[measure.Result]:
    """Compare the sides on batches and report a table of them."""
    path = common.make_model(folder, {name: getattr(options, name) for name in common.SIZES})
    stock, ours = (common.load(side, path) for side in ("stock", "ours"))
    corpora, results = train_corpora(options.rows), []
    for name in options.corpus:
        print(f"{name} ...", flush=True)
        results.append(compare(stock, ours, name, corpora[name], options.rounds))
    notes = [
        f"- model: random weights, float32; {common.parameters(stock)}",
        f"- shared: {QUESTIONS_PER_PAGE} rows on each page; lowest cosine: that of the gradients of all parameters",
        "- seconds: stock with MultipleNegativesRankingLoss, ours with PrefixRoutedLoss; "
        "MB: with PrefixRoutedLoss on both sides",
        f"- {measure.describe_rates(results)}",
        common.machine(options),
    ]
    body = "\n\n".join([common.table(measure.COLUMNS, [result.line() for result in results]), "\n".join(notes)])
    common.report("Training step, against stock SentenceTransformer", body, options.output)
    return results


def compare(
    stock: SentenceTransformer, ours: ViPyloQwen, name: str, columns: Sequence[list[Any]], rounds: int
) -> measure.Result:
    """Compare the sides on one batch.

    Args:
        stock: The model as stock loads it.
        ours: The model as we load it.
        name: The batch's name.
        columns: Its anchors and positives.
        rounds: Timed rounds.

    Raises:
        RuntimeError: If the gradients of the sides disagree.
    """
    routed = {
        side: partial(step, PrefixRoutedLoss(model), columns) for side, model in (("stock", stock), ("ours", ours))
    }
    with measure.CountTokens(stock) as of_stock, measure.CountTokens(ours) as of_ours:
        megabytes = measure.warm_up(routed)[1]
    cosine = gradient_cosine(stock, ours)
    measure.check_agreement(f"gradients, {name}", cosine)
    jobs = {
        "stock": partial(step, MultipleNegativesRankingLoss(stock), columns),
        "ours": routed["ours"],
    }
    forward = sum((useful_work(ours, column) for column in columns), start=Work())  # columns are embedded one by one
    work = forward * STEP_PER_FORWARD
    seconds, rates = measure.timed(jobs, ours, rounds)
    return measure.Result(
        name=name,
        rows=len(columns[0]),
        seconds=seconds,
        tokens={"stock": of_stock.tokens, "ours": of_ours.tokens},
        megabytes=megabytes,
        work=work,
        rates=rates,
        cosine=cosine,
    )


def step(loss: nn.Module, columns: Sequence[list[Any]]) -> None:
    """Prepare the columns and run the loss on them, forward and backward; gradients are left in the parameters."""
    loss.train()
    loss.zero_grad(set_to_none=True)
    value = loss([loss.model.preprocess(column) for column in columns], None)
    (sum(value.values()) if isinstance(value, Mapping) else value).backward()


def gradient_cosine(stock: SentenceTransformer, ours: ViPyloQwen) -> float:
    """The cosine of the gradients that both sides' parameters hold, all of them as one vector."""
    left, right = (_gradients(model) for model in (stock, ours))
    return torch.cosine_similarity(left, right, dim=0).item()


def _gradients(model: SentenceTransformer) -> torch.Tensor:
    """(parameters,) float64; zeros where a parameter took no part, as the vision tower in a batch of texts."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([gradient.double().flatten() for gradient in gradients])


if __name__ == "__main__":
    main()

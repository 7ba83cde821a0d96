"""What ranks run in the tests of the losses: the same model, each rank its part of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_workers import load, picture, shard
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen

Columns = list[list[Any]]
NAN = math.nan


@dataclass(frozen=True)
class Batch:
    """Columns and scores."""

    columns: Columns
    scores: Sequence[float] | None = None

    @property
    def labels(self) -> Tensor | None:
        return None if self.scores is None else torch.tensor(self.scores)


def page(seed: int, text: str) -> dict[str, Any]:
    return {"image": picture(seed), "text": text}


TEXTS = Batch([["<instr> một", "<instr> hai ba bốn năm sáu", "<instr> bảy"], ["one", "two three", "seven eight nine"]])
PAGES = Batch([[page(seed, f"<ocr> số tiền {seed}") for seed in (1, 2, 2)], ["1.000", "2.000 đồng chẵn", "3"]])

PARTS: dict[str, tuple[Batch, Batch]] = {
    "texts beside images": (TEXTS, PAGES),
    "one task, unlike rows, equal content": (
        PAGES,
        Batch([[page(1, "<ocr> số tiền 1"), page(4, "<ocr> ngày?")], ["năm đồng", "3"]]),
    ),
    "scores and negatives": (
        Batch(
            [["<text_pair> a", "<text_pair> b"], ["<text_pair> c", "<text_pair> d"], ["<text_pair> e", "f"]],
            [0.25, NAN],
        ),
        Batch([["<text_pair> g", page(5, "<vqa_multi> h")], ["<text_pair> i", "j"], ["k", "l"]], [0.75, NAN]),
    ),
}
"""Parts of two ranks that one process can hold as one batch."""

WITH_NEGATIVES = Batch([*PAGES.columns, ["3.000", "1", "2"]])
ONE_EACH = Batch([["<instr> một", "<text_pair> hai", "ba"], ["one", "<text_pair> two", "three"]], [NAN, 0.5, NAN])
RAGGED = (ONE_EACH, Batch(WITH_NEGATIVES.columns, [NAN] * 3))
"""One rank has no negatives. In one process its rows have their own positives there, which count for none of them,
and, as each is the only one of its task, for no other row."""


def whole(parts: Sequence[Batch]) -> Batch:
    """The same batch in one process."""
    width = max(len(part.columns) for part in parts)
    filled = [part.columns + [part.columns[1]] * (width - len(part.columns)) for part in parts]
    columns = [sum((part[column] for part in filled), []) for column in range(width)]
    if all(part.scores is None for part in parts):
        return Batch(columns)
    return Batch(columns, [score for part in parts for score in part.scores or ()])


KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "cached by rows": {"mini_batch_size": 2},
    "cached by tokens": {"mini_batch_num_tokens": 12},
}


def make_loss(model: ViPyloQwen, kind: str, gather: bool, sizes: Sequence[int] | None = None) -> nn.Module:
    options = KINDS[kind]
    if options is None:
        loss: nn.Module = PrefixRoutedLoss(model, gather_across_devices=gather)
    else:
        loss = CachedPrefixRoutedLoss(model, gather_across_devices=gather, **options)
    return MatryoshkaLoss(model, loss, list(sizes), [1, 0.5]) if sizes else loss


def step(model: ViPyloQwen, loss: nn.Module, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Terms and gradients."""
    model.zero_grad(set_to_none=True)
    terms = loss([model.preprocess(column) for column in batch.columns], batch.labels)
    torch.stack(list(terms.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


def wrap(loss: nn.Module, model: nn.Module) -> nn.Module:
    """As the trainer puts the wrapped model into a loss."""
    if isinstance(loss, MatryoshkaLoss):
        loss.model = model
        wrap(loss.loss, model)
    loss.model = model
    return loss


def every_step(folder: Path) -> dict[tuple[str, str], Any]:
    """This rank's step for each batch and kind of loss, replicated."""
    model, rank = load(folder, packed=True), distributed.get_rank()
    replicated = DistributedDataParallel(model, find_unused_parameters=False)
    forwards = count_forwards(model)
    steps = {}
    for name, parts in {**PARTS, "ragged": RAGGED}.items():
        for kind in KINDS:
            forwards.clear()
            loss = wrap(make_loss(model, kind, gather=True), replicated)
            steps[name, kind] = *step(model, loss, parts[rank]), len(forwards)
    return steps


def matryoshka_steps(folder: Path) -> dict[str, Any]:
    model, rank = load(folder, packed=True), distributed.get_rank()
    replicated = DistributedDataParallel(model, find_unused_parameters=False)
    cached = wrap(make_loss(model, "cached by rows", gather=True, sizes=(32, 16)), replicated)
    steps = {"cached by rows": step(model, cached, PARTS["texts beside images"][rank])}
    plain = make_loss(model, "plain", gather=True, sizes=(32, 16))  # it patches the forward of the model it holds
    plain.model = replicated
    plain.loss.model = replicated
    return {**steps, "plain": step(model, plain, PARTS["texts beside images"][rank])}


def sharded_steps(folder: Path) -> dict[str, Any]:
    """Full shard, with negatives gathered, mini-batches unequal and columns ragged."""
    model, rank = shard(load(folder, packed=True)), distributed.get_rank()
    steps = {}
    for kind in KINDS:
        terms, gradients = step(model, make_loss(model, kind, gather=True), RAGGED[rank])
        steps[kind] = (
            terms,
            {name: value.full_tensor() for name, value in gradients.items() if isinstance(value, DTensor)},
        )
    return steps


def bad_scores(folder: Path) -> list[str]:
    """What a rank raises when rank 1 has a score out of range."""
    model, rank = load(folder, packed=True), distributed.get_rank()
    batch = Batch(ONE_EACH.columns, [NAN, [0.5, 4.0][rank], NAN])
    messages = []
    for kind in KINDS:
        try:
            step(model, make_loss(model, kind, gather=False), batch)
        except ValueError as error:
            messages.append(str(error))
    return messages


def evaluate(folder: Path) -> dict[str, float]:
    """The terms without gradients."""
    model, rank = load(folder, packed=True).eval(), distributed.get_rank()
    loss, batch = make_loss(model, "cached by rows", gather=True), RAGGED[rank]
    with torch.no_grad():
        terms = loss([model.preprocess(column) for column in batch.columns], batch.labels)
    return {name: value.item() for name, value in terms.items()}


def count_forwards(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen

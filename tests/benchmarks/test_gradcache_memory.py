from __future__ import annotations

from pathlib import Path

import gradcache_memory
import pytest
import torch
from corpora import train_corpora
from torch import nn

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.losses.terms import LossTerms

TINY = ["--hidden-size", "64", "--layers", "1", "--vision-size", "32", "--vision-layers", "1", "--threads", "1"]


def test_every_size_is_measured_and_the_loss_is_one(tmp_path: Path) -> None:
    arguments = [*TINY, "--rows", "4", "--rounds", "1", "--corpus", "text", "--mini-batch", "1", "--tokens", "64"]
    output = tmp_path / "results.md"
    options = gradcache_memory.parser().parse_args([*arguments, "--output", str(output)])
    lines = gradcache_memory.run(tmp_path, options)
    assert [line[:3] for line in lines] == [["text", 2, "uncached"], ["text", 2, "1 rows"], ["text", 2, "64 tokens"]]
    assert {len(line) for line in lines} == {len(gradcache_memory.COLUMNS)}
    assert len({line[-1] for line in lines}) == 1
    written = output.read_text(encoding="utf-8")
    assert "## Gradient caching: memory by mini-batch" in written
    assert all(f"| {' | '.join(map(str, line))} |" in written for line in (gradcache_memory.COLUMNS, *lines))


def test_make_bench_writes_its_table() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert "python benchmarks/gradcache_memory.py --output benchmarks/results.md" in makefile


def test_smaller_mini_batches_take_less_memory(model: ViPyloQwen) -> None:
    columns = [[" ".join(f"{row} {word}" for word in range(250)) for row in range(24)] for _ in range(2)]
    sides = {"uncached": PrefixRoutedLoss(model), "1 rows": CachedPrefixRoutedLoss(model, mini_batch_size=1)}
    plain, cached = gradcache_memory.compare(sides, "text", columns, rounds=1)
    assert float(cached[2]) < 0.5 * float(plain[2])


def test_a_loss_that_disagrees_stops_the_run(model: ViPyloQwen) -> None:
    class Doubled(nn.Module):
        def __init__(self, loss: PrefixRoutedLoss) -> None:
            super().__init__()
            self.loss, self.model = loss, loss.model

        def forward(self, columns: list[dict[str, torch.Tensor]]) -> LossTerms:
            return self.loss(columns) * 2

    loss = PrefixRoutedLoss(model)
    with pytest.raises(RuntimeError, match="text, other: the loss differs from the uncached one by"):
        gradcache_memory.compare({"uncached": loss, "other": Doubled(loss)}, "text", train_corpora(8)["text"], 1)

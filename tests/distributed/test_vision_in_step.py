"""A rank whose batch has no image, beside one whose batch has: replicated and sharded, packed and padded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_workers
import torch
from ranks import RanksFailed
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen

Run = Callable[..., list[Any]]
TOLERANCE = 1e-5


def alone(folder: Path, packed: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The step of one process over both batches, whose losses are averaged."""
    model = rank_workers.load(folder, packed)
    losses = [rank_workers.batch_loss(model, model, rank) for rank in range(2)]
    return rank_workers.step(model, lambda: torch.stack(losses).mean())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_loss_gradients_and_weights_are_those_of_one_process(folder: Path, run: Run, how: str, packed: bool) -> None:
    loss, gradients, weights = alone(folder, packed)
    results = run(rank_workers.train, folder, how, packed)
    assert torch.stack([result[0] for result in results]).mean() == pytest.approx(loss.item(), abs=TOLERANCE)
    for _, found_gradients, found_weights, _ in results:
        assert_near(found_gradients, gradients)
        assert_near(found_weights, weights)
    assert results[0][3] == [4, 4, 4]  # an image of 2 x 2 patches in each pass, of which it makes as many as the other
    assert results[1][3] == [3 * 4 * 6, 4, 4]  # its anchors have images, its positives and negatives none


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_without_it_the_ranks_wait_for_ever(folder: Path, run: Run, how: str) -> None:
    ended_in_a_step = "in step|exit codes"  # by a traceback from there, or aborted by gloo
    with pytest.raises(RanksFailed, match=ended_in_a_step):
        run(rank_workers.train, folder, how, dummy=False, patience=8)


def test_a_single_process_never_runs_it(model: ViPyloQwen) -> None:
    vision = rank_workers.count_vision(model)
    model(model.preprocess(["xin chào"]))["sentence_embedding"].sum().backward()
    assert vision == []
    assert model[0].model.visual.merger.mlp[0].weight.grad is None

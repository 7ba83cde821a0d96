"""DeepSpeed's ZeRO-3, on two CPU processes: the weights of replicated ones come out, whatever ends a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.train.checkpoints import best_of, complete_checkpoints

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "distributed"), str(TESTS / "integration")]  # the ranks import what they run


@pytest.fixture
def settings(base: Path, tmp_path: Path, picture: Callable[..., Image.Image]) -> Callable[..., dict[str, Any]]:
    from run_workers import settings_of

    records: list[dict[str, Any]] = []
    for i in range(8):
        picture(56, 56, seed=i).save(tmp_path / f"{i}.png")
        records += [
            {"task": "ocr", "anchor": {"image": [f"{i}.png"], "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}"},
        ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    return lambda name, **more: {**settings_of(base, data, tmp_path / name), "eval": str(data), **more}


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(function, *args)` on two ranks; each call has a folder of its own."""
    from ranks import run_ranks

    def call(*args: Any) -> list[Any]:
        folder = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
        folder.mkdir()
        return run_ranks(folder, *args, timeout=240)

    return call


def weights(path: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(path), device="cpu").state_dict()


def test_it_trains_as_replicated_ranks_do_and_goes_on_after_a_signal(
    ranks: Callable[..., list[Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import run_workers
    import zero3_workers

    more = {"eval_steps": 2, "best_metric": "mean", "keep_checkpoints": 3}
    ranks(run_workers.whole, settings("replicated", **more))
    assert [evaluated for evaluated, _ in ranks(zero3_workers.whole, settings("sharded", **more))] == [True, False]
    told = ranks(zero3_workers.signalled, settings("resumed", **more), 1, 3)
    assert all("Step 3 is saved in" in message for message in told)
    ranks(zero3_workers.whole, settings("resumed", **more))
    replicated, sharded, resumed = (weights(tmp_path / name / "model") for name in ("replicated", "sharded", "resumed"))
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-4)
        assert torch.equal(resumed[name], sharded[name])
    best = best_of(complete_checkpoints(tmp_path / "sharded" / "checkpoints")[-1])
    assert best is not None
    assert all(torch.equal(value, sharded[name]) for name, value in weights(best).items())
    before, after = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("replicated", "sharded"))
    assert after["before"]["mean"] == pytest.approx(before["before"]["mean"])


def test_a_gradient_that_is_no_number_stops_it_before_the_step(
    ranks: Callable[..., list[Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import zero3_workers

    told = ranks(zero3_workers.poisoned_gradient, settings("run"), 1, 3)
    assert all("the gradient of step 3 is NaN or infinite, so the step was not taken" in message for message in told)
    good, saved = (weights(tmp_path / "run" / name) for name in ("checkpoints/checkpoint-2", "stopped/step-3/model"))
    assert all(torch.equal(saved[name], value) for name, value in good.items())


def test_an_adapter_is_merged_into_a_portable_folder(
    ranks: Callable[..., list[Any]], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import run_workers
    import zero3_workers

    ranks(run_workers.whole, settings("replicated", tuning="lora"))
    ranks(zero3_workers.whole, settings("sharded", tuning="lora"))
    replicated, sharded = (weights(tmp_path / name / "model") for name in ("replicated", "sharded"))
    for name, value in replicated.items():
        torch.testing.assert_close(sharded[name], value, rtol=0, atol=1e-4)

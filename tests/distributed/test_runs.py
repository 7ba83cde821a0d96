"""Runs by recipe on two ranks that end early: both stop at the same step, and nothing is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules.vision_cache import VisionCache
from sentence_vipyloqwen.train.checkpoints import complete_checkpoints, step_of


@pytest.fixture
def data(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """Records with images and without."""
    records: list[dict[str, Any]] = []
    for i in range(8):
        picture(56, 56, seed=i).save(tmp_path / f"{i}.png")
        records += [
            {"task": "ocr", "anchor": {"image": [f"{i}.png"], "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}"},
        ]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def settings(base: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    from run_workers import settings_of

    return lambda name="run", **more: {**settings_of(base, data, tmp_path / name), **more}


@pytest.fixture
def again(tmp_path: Path) -> Callable[..., list[Any]]:
    """`again(number, function, *args)`: the n-th call of the ranks in one test."""
    from ranks import run_ranks

    def call(number: int, *args: Any) -> list[Any]:
        folder = tmp_path / f"ranks-{number}"
        folder.mkdir()
        return partial(run_ranks, folder)(*args)

    return call


def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on_to_the_bit(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """In the second epoch, of four steps each: its order is another than that of the first."""
    import run_workers

    more = {"eval": str(data), "max_steps": 8, "gather_negatives": False}
    inputs = 32  # embedded before and after, by both ranks alike
    assert again(0, run_workers.whole, settings("whole", **more)) == [(True, inputs), (False, inputs)]
    told = again(1, run_workers.signalled, settings(**more), 1, 6)
    assert all("Step 6 is saved in" in message for message in told)
    checkpoints = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [step_of(path) for path in checkpoints] == [4, 6]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(
        json.loads((checkpoints[-1] / "complete.json").read_text())["files"]
    )
    again(2, run_workers.whole, settings(**more))
    first, second = (ViPyloQwen(tmp_path / name / "model", device="cpu").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_rank_is_told_of_by_the_other_and_nothing_is_lost(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """SIGKILL to rank 1 in its third step, under torchrun, which then sends rank 0 SIGTERM."""
    import run_workers

    (tmp_path / "recipe.yaml").write_text(json.dumps(settings()))
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from run_workers import during_step
from sentence_vipyloqwen.cli import main
during_step(1, 3, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
sys.argv = ["vipyloqwen", "train", "--recipe", {str(tmp_path / "recipe.yaml")!r}, "--device", "cpu"]
try:
    main()
except SystemExit as end:
    open({str(tmp_path / "code")!r}, "w").write(str(end.code))
    raise
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert (tmp_path / "code").read_text() == "1"
    assert done.stderr.count("another process of this training ended, and this one with it") == 1
    assert f"the last complete checkpoint in {tmp_path / 'run' / 'checkpoints'}" in done.stderr
    assert "Signal 9 (SIGKILL) received" in done.stderr  # what torchrun says of the other
    assert [step_of(path) for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    again(0, run_workers.whole, settings())
    again(1, run_workers.whole, settings("whole"))
    first, second = (ViPyloQwen(tmp_path / name / "model", device="cpu").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_no_number_on_one_rank_stops_both(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import run_workers

    told = again(0, run_workers.poisoned, settings(), 1, 2)
    assert all("step 2 is NaN or infinite" in message for message in told)
    folder = tmp_path / "run" / "stopped" / "step-2"
    assert {path.name for path in folder.iterdir()} == {"rank-0-batch-0", "rank-1-batch-0", "model"}
    assert all(value.isfinite().all() for value in ViPyloQwen(folder / "model", device="cpu").state_dict().values())


def test_a_sharded_run_goes_on_after_kills_and_a_signal_and_leaves_the_best_as_a_portable_folder(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Killed in a step, and while a checkpoint is written, by the chance of a seed."""
    import run_workers
    from ranks import RanksFailed

    more = {"eval": str(data), "eval_steps": 2, "best_metric": "mean", "keep_checkpoints": 3}
    assert again(0, run_workers.sharded, settings("whole", **more)) == ["evaluated: True", "evaluated: False"]
    rng = random.Random(5)
    killed = [(rng.randint(0, 1), rng.randint(1, 4), 0), (rng.randint(0, 1), 0, rng.randint(1, 12))]
    for number, (rank, step, file) in enumerate(killed):
        with pytest.raises(RanksFailed, match=r"exit codes \[.*-9"):
            again(1 + number, run_workers.sharded_and_killed, settings(**more), rank, step, file)
    told = again(3, run_workers.sharded, settings(**more), 3)
    assert all("Step 3 is saved in" in message for message in told)
    again(4, run_workers.sharded, settings(**more))
    first, second = (tmp_path / name / "model" for name in ("whole", "run"))
    assert not (first / "training_args.bin").exists()
    weights = [SentenceTransformer(str(path), device="cpu").state_dict() for path in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    best = SentenceTransformer(state["best_model_checkpoint"], device="cpu").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in weights[0].items())


def test_ranks_share_a_vision_cache(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Each image is kept once, whichever rank saw it; features differ by rounding with their batch, as do gradients."""
    import run_workers

    frozen = {"frozen": ["visual"], "gather_negatives": False}
    again(0, run_workers.whole, settings("whole", **frozen))
    again(1, run_workers.whole, settings(**frozen, vision_cache=str(tmp_path / "cache")))
    (folder,) = (tmp_path / "cache").iterdir()
    cache = VisionCache(folder, merge_size=2)
    assert len(cache) == 8
    cache.close()
    first, second = (ViPyloQwen(tmp_path / name / "model", device="cpu").state_dict() for name in ("whole", "run"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-4)


def test_a_vision_cache_is_refused_under_full_shard_before_anything_is_written(
    again: Callable[..., Any], settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    import run_workers

    given = settings(frozen=["visual"], vision_cache=str(tmp_path / "cache"))
    refused = f"Setting vision_cache is '{given['vision_cache']}'; allowed is none under full sharding"
    assert all(message.startswith(refused) for message in again(0, run_workers.sharded, given))
    assert not (tmp_path / "run" / "recipe.yaml").exists()

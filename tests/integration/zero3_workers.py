"""What the ranks of `test_zero3.py` do: whole runs by recipe, sharded by DeepSpeed, on CPUs."""

from __future__ import annotations

import os
from typing import Any

import run_workers
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from rank_workers import checked_arguments
from torch import distributed

from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.train import build
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.run import train


def shard() -> None:
    """Have the run be sharded as `deepspeed_zero3.yaml` says; accelerate would not do it on CPUs."""
    arguments = checked_arguments("deepspeed_zero3.yaml", "--mixed_precision", "no")
    arguments.deepspeed_fields_from_accelerate_config = "zero_stage"  # the launcher notes what stands in the file
    _, environment = prepare_deepspeed_cmd_env(arguments)
    os.environ |= {key: value for key, value in environment.items() if key.startswith("ACCELERATE_")}
    os.environ["DS_ACCELERATOR"] = "cpu"
    del os.environ["ACCELERATE_USE_CPU"]
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def whole(settings: dict[str, Any]) -> tuple[bool, int]:
    """`run_workers.whole`, sharded."""
    shard()
    return run_workers.whole(settings)


def signalled(settings: dict[str, Any], rank: int, step: int) -> str:
    """`run_workers.signalled`, sharded."""
    shard()
    return run_workers.signalled(settings, rank, step)


def poisoned_gradient(settings: dict[str, Any], rank: int, step: int) -> str:
    """Train; at a step the gradients of one rank's loss are infinite, the loss itself is not. How it ended."""
    shard()

    class Poisoned(PrefixRoutedLoss):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            terms = super().forward(*args, **kwargs)
            self.calls += torch.is_grad_enabled()
            if self.calls == step and distributed.get_rank() == rank:
                for value in terms.values():
                    value.register_hook(lambda gradient: gradient * float("inf"))
            return terms

    build.PrefixRoutedLoss = Poisoned
    try:
        train(load_recipe(None, settings), device="cpu")
    except NonFiniteStep as error:
        return str(error)
    return ""

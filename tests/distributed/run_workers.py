"""What the ranks of `test_runs.py` do: a whole run by recipe, ended early in several ways."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_workers import launch_environment, shard_on_cpu
from sentence_transformers import SentenceTransformerTrainer
from torch import distributed

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train import run
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.interruption import TrainingInterrupted
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.run import train


def whole(settings: dict[str, Any]) -> tuple[bool, int]:
    """Train to the end; whether this rank evaluated, and how many inputs it embedded."""
    embedded: list[int] = []
    usual = ViPyloQwen._inference

    def inference(self: ViPyloQwen, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        embedded.append(len(inputs))
        return usual(self, inputs, *args, **kwargs)

    ViPyloQwen._inference = inference
    return train(load_recipe(None, settings), device="cpu").after is not None, sum(embedded)


def signalled(settings: dict[str, Any], rank: int, step: int) -> str:
    """Train; one rank is sent SIGTERM in the middle of a step. The message of the end."""
    during_step(rank, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    try:
        train(load_recipe(None, settings), device="cpu")
    except TrainingInterrupted as error:
        return str(error)
    return ""


def poisoned(settings: dict[str, Any], rank: int, step: int) -> str:
    """Train; one rank's head holds an infinite weight, so that its loss is NaN. The message of the end."""
    during_step(rank, step, lambda trainer: trainer.model[2].linear.weight.data.fill_(float("inf")))
    try:
        train(load_recipe(None, settings), device="cpu")
    except NonFiniteStep as error:
        return str(error)
    return ""


def sharded(settings: dict[str, Any], step: int = 0) -> str:
    """Train with the weights sharded, as on four GPUs; at a step, if any, rank 1 is sent SIGTERM. How it ended."""
    shard()
    if step:
        return signalled(settings, 1, step)
    try:
        return f"evaluated: {whole(settings)[0]}"
    except ValueError as error:
        return str(error)


def sharded_and_killed(settings: dict[str, Any], rank: int, step: int = 0, file: int = 0) -> None:
    """Train sharded; one rank is killed in the middle of a step, or when it opens its n-th file of a checkpoint."""
    shard()
    if step:
        during_step(rank, step, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
    elif distributed.get_rank() == rank:
        opened = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal opened
            if event == "open" and f"{settings['output']}/checkpoints/checkpoint-" in str(arguments[0]):
                opened += 1
                if opened == file:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
    train(load_recipe(None, settings), device="cpu")


def shard() -> None:
    """Have the run's trainer shard, as `fsdp2_4x_h100.yaml` says."""
    usual = run.trainer_class

    def trainer_class(*args: Any) -> Callable[..., Any]:
        def make(*args_of_trainer: Any, **kwargs: Any) -> Any:
            trainer = usual(*args)(*args_of_trainer, **kwargs)
            shard_on_cpu(trainer, launch_environment("fsdp2_4x_h100.yaml"))
            return trainer

        return make

    run.trainer_class = trainer_class


def during_step(rank: int, step: int, work: Callable[[Any], Any]) -> None:
    usual = SentenceTransformerTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step and distributed.get_rank() == rank:
            work(self)
        return usual(self, *args, **kwargs)

    SentenceTransformerTrainer.training_step = training_step


def settings_of(base: Path, data: Path, output: Path) -> dict[str, Any]:
    """A recipe of a few steps."""
    return {
        "base": str(base),
        "train": str(data),
        "output": str(output),
        "embedding_dim": 16,
        "max_seq_length": 512,
        "batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "gather_negatives": True,
        "report_to": "none",
    }

"""What ranks run in these tests: one batch each, that of rank 0 without any image."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer, Qwen2VLVisionBlock

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen, load_tasks
from sentence_vipyloqwen.losses.cached_prefix_routed import CachedPrefixRoutedLoss
from sentence_vipyloqwen.modules import packed_forward, padded_forward
from sentence_vipyloqwen.train import run
from sentence_vipyloqwen.train.evaluation import TasksEvaluator
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.trainer import ViPyloQwenTrainer

LEARNING_RATE = 0.1
DDP = {"find_unused_parameters": False, "broadcast_buffers": False}
LOSSES: Mapping[str, Callable[[ViPyloQwen], nn.Module]] = {
    "plain": PrefixRoutedLoss,
    "cached": lambda model: CachedPrefixRoutedLoss(model, mini_batch_size=1),
    "matryoshka": lambda model: MatryoshkaLoss(model, PrefixRoutedLoss(model), [32, 8]),
}
UNITS = (Qwen2VLDecoderLayer, Qwen2VLVisionBlock)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((84, 56), Image.Resampling.BICUBIC)


def batch(rank: int) -> list[list[Any]]:
    """The columns of a rank's batch: rank 0 has texts of one task, rank 1 images of another and negatives."""
    if rank == 0:
        return [[f"<instr> dịch: câu {i}" for i in range(3)], [f"sentence {i}" for i in range(3)]]
    anchors = [{"image": picture(seed), "text": f"<ocr> số tiền? {seed}"} for seed in (1, 2, 3)]
    return [anchors, ["1.000 đ", "2.000 đ", "3.000 đ"], ["4.000 đ", "5.000 đ", "6.000 đ"]]


def batch_loss(model: ViPyloQwen, wrapped: nn.Module, rank: int) -> Tensor:
    """The real loss of a rank's batch."""
    loss = PrefixRoutedLoss(model)
    loss.model = wrapped  # as the trainer puts the wrapped model into the loss
    columns = [model.preprocess(column) for column in batch(rank)]
    return torch.stack(list(loss(columns).values())).sum()


def step(model: ViPyloQwen, loss: Callable[[], Tensor], whole: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """One step of SGD: the loss, the gradients and the weights after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    value = loss()
    value.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: whole(gradient) for name, gradient in trained.items()}
    optimizer.step()
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return value.detach(), gradients, weights


def shard(model: ViPyloQwen) -> ViPyloQwen:
    for module in model.modules():
        if isinstance(module, UNITS):
            fully_shard(module)
    return fully_shard(model)


def leave_vision_out(model: Any, embeddings: Tensor) -> Tensor:
    return embeddings


def load(folder: Path, packed: bool) -> ViPyloQwen:
    model = ViPyloQwen(folder, device="cpu")
    model[0].packed = packed
    return model.train()


def count_vision(model: ViPyloQwen) -> list[int]:
    """A list that receives the number of patches of each run of the vision tower."""
    seen: list[int] = []
    model[0].model.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def train(folder: Path, how: str, packed: bool = True, dummy: bool = True) -> Any:
    """One step of a model that is replicated (`how="ddp"`) or sharded."""
    if not dummy:
        packed_forward.keep_vision_in_step = padded_forward.keep_vision_in_step = leave_vision_out
    model, rank = load(folder, packed), distributed.get_rank()
    if how == "ddp":
        wrapped, whole = DistributedDataParallel(model, **DDP), Tensor.clone
    else:
        wrapped, whole = shard(model), DTensor.full_tensor
    vision = count_vision(model)
    for _ in range(1 if dummy else 2):  # DDP tells of a parameter without gradient in the next forward pass
        result = step(model, lambda: batch_loss(model, wrapped, rank), whole)
    return *result, vision


def save_sharded(folder: Path, output: Path) -> Tensor:
    """Train a sharded model for a step and save it; gives the embeddings that the sharded model then computes."""
    model, rank = load(folder, packed=True), distributed.get_rank()
    arguments = SentenceTransformerTrainingArguments(output_dir=str(output), report_to="none")
    trainer = ViPyloQwenTrainer(model, arguments, loss=PrefixRoutedLoss(model))
    shard(model)
    step(model, lambda: batch_loss(model, model, rank), DTensor.full_tensor)
    trainer.save_model()
    return model.encode(batch(1)[0])


def checked_arguments(config: str, *options: str) -> argparse.Namespace:
    """What ``accelerate launch --config_file`` makes of a shipped file."""
    arguments = [
        "--config_file",
        str(files("sentence_vipyloqwen.train") / "accelerate" / config),
        *options,
        "script.py",
    ]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def launch_environment(config: str, arguments: argparse.Namespace | None = None) -> dict[str, str]:
    """What it sets for the processes that it starts."""
    return {**prepare_multi_gpu_env(arguments or checked_arguments(config))}


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, whole."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found = {name: as_whole(parameter.grad) for name, parameter in named_parameters(model)}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Under the names that they have without activation checkpointing."""
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def as_whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train_by_trainer(
    folder: Path,
    data: Path,
    output: Path,
    how: str,
    config: str = "",
    *,
    loss: str = "plain",
    optimizer: str = "sgd",
    bf16: bool = False,
    resume: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Two steps of the whole trainer over `data`: alone with two batches a step, or one batch on each of two ranks."""
    random.seed(0)
    model = load(folder, packed=True)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 if how == "alone" else 1,
        max_steps=2,
        multi_dataset_batch_sampler="round_robin",
        optim=optimizer,
        bf16=bf16,
        learning_rate=0.1 if optimizer == "sgd" else 1e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_on_start=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    gradients = Gradients()
    trainer = ViPyloQwenTrainer(
        model,
        arguments,
        train_dataset=load_tasks(data),
        loss=LOSSES[loss](model),
        evaluator=TasksEvaluator(data),
        callbacks=[gradients],
    )
    if how == "sharded":
        shard_on_cpu(trainer, {**launch_environment(config), **(environment or {})})
    saves = count_calls(ViPyloQwen, "save_pretrained")
    trainer.train(resume_from_checkpoint=resume and str(resume))
    trainer.save_model(str(output / "model"))
    return {
        "log": trainer.state.log_history,
        "gradients": gradients.found,
        "weights": {name: as_whole(parameter.detach()) for name, parameter in named_parameters(trainer.model)},
        "kinds": {type(module).__name__ for module in trainer.model.modules()},
        "saves": len(saves),
        "embeddings": trainer.model.encode([record.anchor.as_input() for record in trainer.evaluator.records]),
    }


def count_calls(kind: type, name: str) -> list[None]:
    """A list that grows with every call of a method."""
    calls, method = [], getattr(kind, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return method(self, *args, **kwargs)

    setattr(kind, name, counted)
    return calls


def shard_on_cpu(trainer: ViPyloQwenTrainer, environment: Mapping[str, str]) -> None:
    """accelerate shards on accelerators alone: tell it, in this test, that this machine is one."""
    os.environ |= {key: value for key, value in environment.items() if key.startswith("FSDP_")}
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if trainer.args.bf16:
        state.fsdp_plugin.set_mixed_precision("bf16")
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def train_by_recipe(recipe: Recipe, config: str | None = None) -> Path:
    """A whole run, sharded as a shipped configuration says, or replicated; gives the folder of the model."""
    if config:
        make = ViPyloQwenTrainer.__init__

        def make_sharding(trainer: ViPyloQwenTrainer, *args: Any, **kwargs: Any) -> None:
            make(trainer, *args, **kwargs)
            shard_on_cpu(trainer, launch_environment(config))

        ViPyloQwenTrainer.__init__ = make_sharding
    return run.train(recipe, device="cpu").model_path

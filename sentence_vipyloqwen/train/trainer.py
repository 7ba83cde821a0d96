"""The stock trainer, for models of whose weights every rank holds a part."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.modules.sharding import is_sharded


class ViPyloQwenTrainer(SentenceTransformerTrainer):
    """``SentenceTransformerTrainer`` with what full sharding (FSDP 2, ZeRO-3) needs; else it does what that one does.

    - Checkpoints and saved models are portable folders whatever the sharding: all ranks gather the weights, one writes.
      The stock trainer would write the parts, or nothing.
    - A checkpoint is read by one rank, and every rank gets its parts of the weights.
    - Where every rank has whole weights, one saves them; of the stock trainer's ranks each writes the same files.

    Args:
        model: The model, not yet sharded: accelerate shards it when the training begins.
        *args: As for ``SentenceTransformerTrainer``.
        **kwargs: As for ``SentenceTransformerTrainer``.

    Raises:
        ValueError: If the model is already sharded.
    """

    def __init__(self, model: ViPyloQwen, *args: Any, **kwargs: Any) -> None:
        if is_sharded(model):
            raise ValueError("The model is sharded; give the trainer a whole one, which it shards as accelerate says.")
        super().__init__(model, *args, **kwargs)
        # Where accelerate looks for a last norm to shard by itself: it would take our Normalize, which cannot be.
        model.base_model_prefix = "0"
        self._weightless = copy_without_weights(model) if self.args.world_size > 1 else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a portable folder. Every rank must call it, as all gather the weights; one writes.

        Args:
            output_dir: The folder; the training arguments' own by default.
            _internal_call: Whether the trainer itself calls.
        """
        if self.is_deepspeed_enabled or not is_sharded(self.model):  # transformers gathers what DeepSpeed sharded
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, gather_weights(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # Private seams, held by tests that save and resume: who writes what, and how a checkpoint's weights are loaded.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        sharded = self.model
        if state_dict is not None:
            self.model = fill(self._weightless, state_dict)
        try:
            super()._save(output_dir)
        finally:
            self.model = sharded

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model: nn.Module | None = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(str(resume_from_checkpoint))
            return
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(resume_from_checkpoint))
            return
        weights = {}
        if distributed.get_rank() == 0:
            weights = type(self._weightless)(str(resume_from_checkpoint), device="cpu").state_dict()
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, weights, options=options)


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a model sharded by FSDP 2, on the CPU of rank 0; on the others nothing. All must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def copy_without_weights(model: ViPyloQwen) -> ViPyloQwen:
    """A copy of a model whose parameters are on the meta device, where they take no memory.

    What sharding does to a model in place (names of classes, kinds of parameters), it does not do to the copy.
    """
    empty = {
        id(old): nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad) for old in model.parameters()
    }
    return _share_card(model, empty)


def fill(weightless: ViPyloQwen, weights: dict[str, Tensor]) -> ViPyloQwen:
    """A whole model of a copy without weights and of weights, which are not copied."""
    model = _share_card(weightless, {})
    model.load_state_dict(weights, assign=True)
    return model


def _share_card(model: ViPyloQwen, memo: dict[int, Any]) -> ViPyloQwen:
    """A deep copy of a model but for its card, which knows the trainer and gathers the measures of a training."""
    card = model.model_card_data
    return deepcopy(model, {**memo, id(card): card})

"""LoRA and QLoRA: a base that stays as it is, and a small adapter that is trained, saved, resumed and merged.

The adapter holds low-rank updates of the language model's projections and the five task tokens; the dense head, and the
query of attention pooling, are trained beside it. Everything else, the vision tower included, is frozen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.modules import AttentionPooling, DenseHead
from sentence_vipyloqwen.modules.sharding import is_sharded
from sentence_vipyloqwen.modules.whole_weights import whole_weights
from sentence_vipyloqwen.train.trainer import ViPyloQwenTrainer

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
"""The language model's linear layers: attention and feed-forward, of every layer."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_TRAINED_BESIDE = (AttentionPooling, DenseHead)
"""Modules with weights of their own, which an adapter's folder holds whole."""


def save_base(model: ViPyloQwen, folder: Path) -> None:
    """Save a new model as the base that an adapter's folder names; a kill leaves none rather than half of one."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), create_model_card=False)
    os.replace(partial, folder)


def add_lora(
    model: ViPyloQwen, *, r: int, alpha: float, dropout: float, targets: str = LORA_TARGETS, seed: int = 0
) -> None:
    """Add a trainable LoRA adapter.

    Args:
        model: A model that was loaded from a saved one.
        r: Rank of the updates.
        alpha: Their scale, divided by ``r``.
        dropout: Share of an adapter's inputs that are dropped in training.
        targets: Regular expression that a linear layer's whole name matches.
        seed: Of the adapter's random half; the other half begins at 0, so that nothing is changed yet.

    Raises:
        ImportError: If ``peft`` is not installed.
        ValueError: If no layer matches.
    """
    peft = require("peft", "lora")
    configuration = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="FEATURE_EXTRACTION"
    )
    with torch.random.fork_rng(), whole_weights():  # peft draws from the global state
        torch.manual_seed(seed)
        model.add_adapter(configuration)
    _keep_four_bits_trainable(model)


def _keep_four_bits_trainable(model: nn.Module) -> None:
    """Keep evaluation from changing layers in 4 bits so that they can be trained no more.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) turns the weights of a layer that is evaluated into a form without a
    backward pass, and leaves them in it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def four_bits(device: torch.device) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` that load the language model's linear layers in 4 bits (NF4), for QLoRA.

    Args:
        device: Where the model is trained.

    Raises:
        ImportError: If ``bitsandbytes`` is not installed.
        ValueError: If the installed one has no NF4 for this kind of device.
    """
    bitsandbytes = require("bitsandbytes", "qlora")
    try:
        bitsandbytes.functional.quantize_4bit(torch.zeros(64, device=device), quant_type="nf4")
    except RuntimeError as error:
        raise ValueError(
            f"tuning is 'qlora'; bitsandbytes {bitsandbytes.__version__} has no NF4 for the device {device.type!r}: "
            f"{error}. Allowed here are 'lora' and 'full', or a newer one that has it (pip install -U bitsandbytes)."
        ) from error
    from transformers import BitsAndBytesConfig

    configuration = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["visual"],  # by this name for 4 bits as well
    )
    return {"quantization_config": configuration}


def load_adapter_state(model: ViPyloQwen, folder: Path) -> None:
    """Give a model with an adapter the adapter and head of a saved one of the same shape; the base is not read.

    Raises:
        ValueError: If the folder's adapter has other parameters.
    """
    peft = require("peft", "lora")
    saved = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    own = set(peft.get_peft_model_state_dict(model[0].model))
    if set(saved) != own:
        raise ValueError(f"{folder}: its adapter differs from the model's in {sorted(set(saved) ^ own)[:4]}.")
    peft.set_peft_model_state_dict(model[0].model, saved)
    _load_beside(model, folder)


def merge_adapter(adapter: Path, output: Path, model_kwargs: Mapping[str, Any] | None = None) -> None:
    """Write a portable folder of a base with its adapter merged into the weights; no ``peft`` is needed to load it.

    Args:
        adapter: Folder of the adapter, which names its base.
        output: The new folder.
        model_kwargs: For loading the base: ``dtype``, ``attn_implementation``. Never 4 bits: merging needs the floats.
    """
    peft = require("peft", "lora")
    base = peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = ViPyloQwen(base, device="cpu", model_kwargs=dict(model_kwargs or {}))
    with whole_weights():
        model[0].model = peft.PeftModel.from_pretrained(model[0].model, str(adapter)).merge_and_unload()
    _load_beside(model, adapter)
    model.save_pretrained(str(output))


def _load_beside(model: ViPyloQwen, folder: Path) -> None:
    """Load the dense head, and the query of attention pooling."""
    saved = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for module, entry in zip(model, saved, strict=True):
        if isinstance(module, _TRAINED_BESIDE):
            module.load_state_dict(type(module).load(str(folder), subfolder=entry["path"]).state_dict())


class AdapterTrainer(ViPyloQwenTrainer):
    """The trainer, which on resuming loads adapter and head instead of a second base.

    The stock one would load base and adapter anew and copy every weight, which a base in 4 bits does not allow.
    """

    # A private seam, held by a test that resumes: how a checkpoint's weights are loaded.
    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_state(self.model, Path(resume_from_checkpoint))

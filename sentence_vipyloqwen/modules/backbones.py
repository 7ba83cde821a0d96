"""The models that this package runs, and in what they differ.

All of them are a vision tower, whose patches of 2 x 2 become one token, and a causal language model with M-RoPE; images
take the same positions in each. What is left is this table: the processor by which plain Sentence Transformers reads a
saved folder, and what a vision tower is told of its images besides the places of their patches. Everything else, from
the side of a patch to the norms of attention, stands in a checkpoint's own configuration and in transformers' classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sentence_vipyloqwen.modules.attention import Segments

try:  # with this module a vision tower takes `cu_seqlens` from its caller
    from transformers.vision_utils import (
        get_vision_interpolation_indices_and_weights,
        get_vision_position_ids,
        get_vision_window_index,
    )
except ImportError as error:
    import transformers

    raise ImportError(
        f"transformers {transformers.__version__} is installed, whose vision tower cannot run several images as one "
        "sequence; install it with: pip install --upgrade transformers"
    ) from error

WINDOWS = "windows"
"""Argument of a vision tower with windows: the segments of the layers that attend within them."""


@dataclass(frozen=True)
class Backbone:
    """A kind of model.

    Attributes:
        name: As its authors write it.
        processor_class: transformers' processor, which plain Sentence Transformers needs to know of.
        vision_plan: From the tower and the images' grids (I, 3), on the CPU, to what the tower is told of them.
        windowed: From the tower to the layers whose attention stays within windows.
    """

    name: str
    processor_class: str
    vision_plan: Callable[[PreTrainedModel, Tensor], dict[str, Any]] = lambda tower, thw: {}
    windowed: Callable[[PreTrainedModel], list[nn.Module]] = lambda tower: []


def _window_plan(tower: PreTrainedModel, thw: Tensor) -> dict[str, Any]:
    """Qwen2.5-VL sorts patches by windows, and most of its layers see no further."""
    index, bounds = get_vision_window_index(thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return {
        "window_index": index,
        "cu_window_seqlens": bounds[[0, -1]],  # every layer reads one sequence: the segments say who sees whom
        WINDOWS: Segments.apart(bounds.diff().tolist()),
    }


def _outside_full_attention(tower: PreTrainedModel) -> list[nn.Module]:
    return [block for place, block in enumerate(tower.blocks) if place not in tower.fullatt_block_indexes]


def _interpolation_plan(tower: PreTrainedModel, thw: Tensor) -> dict[str, Any]:
    """Qwen3-VL adds learned positions, stretched to each image."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw,
        tower.num_grid_per_side,
        tower.interpolation_mode,
        tower.interpolation_align_corners,
        tower.spatial_merge_size,
    )
    return {"interp_indices": indices, "interp_weights": weights}


BACKBONES: Mapping[str, Backbone] = {
    "qwen2_vl": Backbone("Qwen2-VL", "Qwen2VLProcessor"),
    "qwen2_5_vl": Backbone("Qwen2.5-VL", "Qwen2_5_VLProcessor", _window_plan, _outside_full_attention),
    "qwen3_vl": Backbone("Qwen3-VL", "Qwen3VLProcessor", _interpolation_plan),
}
"""Type of a model, as its configuration has it -> what it is."""


def backbone_of(config: PreTrainedConfig, path: str) -> Backbone:
    """The row of the table for a configuration.

    Args:
        config: The configuration of a checkpoint.
        path: Where it came from; named in the error.

    Raises:
        ValueError: If it is of another type.
    """
    if config.model_type not in BACKBONES:
        allowed = ", ".join(f"{kind!r} ({backbone.name})" for kind, backbone in BACKBONES.items())
        raise ValueError(f"{path!r} holds a model of type {config.model_type!r}; allowed is {allowed}.")
    return BACKBONES[config.model_type]


def plan_vision(model: PreTrainedModel, thw: Tensor, device: torch.device) -> dict[str, Any]:
    """What the vision tower of a model is told of its images, besides their segments.

    Args:
        model: The model.
        thw: (I, 3) their grids, on the CPU.
        device: Where the tower is.
    """
    places = get_vision_position_ids(thw, model.visual.spatial_merge_size)  # (P, 2)
    plan = {"position_ids": places, **BACKBONES[model.config.model_type].vision_plan(model.visual, thw)}
    on_device = plan.keys() - {"cu_window_seqlens", WINDOWS}  # those are read as numbers
    return {key: value.to(device, non_blocking=True) if key in on_device else value for key, value in plan.items()}


def see_windows(model: PreTrainedModel) -> None:
    """Have the layers with windows attend by the segments of these, where a packed batch names them."""
    for block in BACKBONES[model.config.model_type].windowed(model.visual):
        block.attn.register_forward_pre_hook(_by_windows, with_kwargs=True)


def _by_windows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "segments": kwargs[WINDOWS]} if WINDOWS in kwargs else kwargs

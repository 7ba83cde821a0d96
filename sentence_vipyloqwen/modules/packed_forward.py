"""Running a model over a packed batch: every patch, image token and word that is computed is computed once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentence_vipyloqwen.modules.attention import PACKED, Segments
from sentence_vipyloqwen.modules.backbones import plan_vision, see_windows
from sentence_vipyloqwen.modules.packing import Packing
from sentence_vipyloqwen.modules.patch_projection import PatchProjection
from sentence_vipyloqwen.modules.sharding import runs_together

logger = logging.getLogger(__name__)

PLAN = "plan"
"""Feature of a batch that was planned when it was collated: its `Packing`. Only the patches it asks for are there."""


def prepare(model: PreTrainedModel) -> bool:
    """Make a model ready for packed batches, where its attention allows; without segments it works as before.

    Args:
        model: The transformers model; its patch embedding and attention implementation are replaced.

    Returns:
        Whether it is ready: not with another attention implementation than those of ``PACKED``, nor with sliding
        windows. A log line then says so, once: a warning, or information where "eager" was asked for.
    """
    implementation = model.config._attn_implementation
    if implementation not in PACKED:
        _log_once(logging.INFO if implementation == "eager" else logging.WARNING, f"attention is {implementation!r}")
        return False
    if "sliding_attention" in (getattr(model.language_model.config, "layer_types", None) or ()):
        _log_once(logging.WARNING, f"attention ({implementation!r}) has sliding windows")
        return False
    model.set_attn_implementation(PACKED[implementation])
    model.visual.patch_embed = PatchProjection(model.visual.patch_embed.proj)
    see_windows(model)
    return True


def is_prepared(model: PreTrainedModel) -> bool:
    """Whether every part of a model still has the attention that :func:`prepare` gave it.

    It may be set anew afterwards, by transformers' ``set_attn_implementation``, for a part alone as well.
    """
    configs = (model.config, model.visual.config, model.language_model.config)
    return all(config._attn_implementation in PACKED.values() for config in configs)


@cache  # so that it is said once
def _log_once(level: int, reason: str) -> None:
    allowed = " or ".join(map(repr, PACKED))
    logger.log(level, "Batches are padded, not packed, which is slower: %s; allowed is %s, no window.", reason, allowed)


def run_packed(model: PreTrainedModel, packing: Packing, input_ids: Tensor, vision: Tensor | None) -> Tensor:
    """Compute the last layer's output for every token of a packed sequence.

    Args:
        model: A model that :func:`prepare` found ready.
        packing: The plan of the batch.
        input_ids: (B, L) the padded batch.
        vision: (merged patches, W) of ``packing.images``, in that order: what :func:`run_vision` gives; ``None``
            without images.

    Returns:
        (T, hidden).
    """
    embeddings = model.get_input_embeddings()(input_ids.flatten()[packing.source])  # (T, hidden)
    deep: dict[str, Any] = {}
    if vision is not None:
        shown, *later = (
            vision[packing.vision_rows].to(embeddings.dtype).split(embeddings.shape[1], dim=1)
        )  # (V, hidden)
        embeddings = embeddings.index_copy(0, packing.image_tokens, shown)
        if later:
            is_image = torch.zeros_like(packing.source, dtype=torch.bool).index_fill(0, packing.image_tokens, True)
            deep = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": later}
    else:
        embeddings = keep_vision_in_step(model, embeddings)
    output = model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=packing.positions,
        attention_mask=embeddings.new_zeros(1, 1, 1, 1),  # no mask is made: the segments say who sees whom
        use_cache=False,
        segments=packing.segments,
        **deep,
    )
    return output.last_hidden_state[0]


def run_vision(model: PreTrainedModel, patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Run the vision tower over images as one sequence; images of one size share a call of attention.

    A model that :func:`prepare` did not find ready runs them one by one.

    Args:
        model: The transformers model.
        patches: (P, C * side * side) floats of all images, or each frame twice, as for a model that is not ready.
        grids: Frames (1), patch rows and patch columns of each image: numbers, so that no GPU is waited for.

    Returns:
        (P / 4, W): hidden numbers for the first layer of the language model, and as many again for each of the layers
        behind which the model adds what it saw earlier (DeepStack, https://arxiv.org/abs/2406.04334).
    """
    thw = torch.tensor(grids)  # (I, 3)
    if not is_prepared(model):
        return _joined(model.visual(patches, grid_thw=thw.to(patches.device)))
    plan = {
        "cu_seqlens": torch.tensor([0, len(patches)], dtype=torch.int32),  # every block reads it, as numbers
        "segments": Segments.apart(thw.prod(dim=1).tolist()),
        **plan_vision(model, thw, patches.device),
    }
    return _joined(model.visual(patches, grid_thw=thw, **plan))


def _joined(output: Any) -> Tensor:
    """What the language model gets of a tower's output, side by side."""
    later = getattr(output, "deepstack_features", ())
    return torch.cat([output.pooler_output, *later], dim=1) if later else output.pooler_output


def keep_vision_in_step(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """Run the vision tower for a batch without images, where other ranks wait for it; it changes no value.

    Ranks gather a sharded tower's weights together, in the order of the forward pass, and add up its gradients
    together; one whose batch has no image would hang them all. So it shows the tower one grey image of the smallest
    size, here, where a real one would be shown, and takes the output times zero: every gradient of it is zero. In a
    single process nothing is run.

    Args:
        model: The transformers model.
        embeddings: (..., hidden) of the batch's tokens.

    Returns:
        (..., hidden), the same values.
    """
    if not runs_together(model.visual):
        return embeddings
    config, side = model.visual.config, model.visual.config.spatial_merge_size
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = embeddings.new_zeros(side * side, values)  # one merged token's
    vision = run_vision(model, patches, [(1, side, side)])  # (1, W)
    return embeddings + 0 * vision.to(embeddings.dtype).unflatten(1, (-1, embeddings.shape[-1])).sum(dim=1)


def select_patches(features: Mapping[str, Any], packing: Packing, places: Sequence[int]) -> Tensor:
    """The patches of some of a batch's different images.

    Args:
        features: A batch with images.
        packing: Its plan.
        places: Of the images, among ``packing.images``.
    """
    patches: Tensor = features["pixel_values"]
    if PLAN in features:  # the plan's images are there alone, in its order; no device is asked for numbers
        sizes, chosen = [down * across for _, down, across in packing.grids], list(places)
    else:
        sizes = features["image_grid_thw"].prod(dim=1).tolist()
        chosen = [packing.images[place] for place in places]
    if chosen == list(range(len(sizes))):
        return patches
    parts = patches.split(sizes)
    return torch.cat([parts[image] for image in chosen])

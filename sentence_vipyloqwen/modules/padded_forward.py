"""Running a model over a padded batch: the plain call of transformers, to which the packed one is held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentence_vipyloqwen.modules.packed_forward import keep_vision_in_step


def run_padded(model: PreTrainedModel, features: Mapping[str, Any], pixel_values: Tensor | None) -> Tensor:
    """Compute the last layer's output for every place of a padded batch.

    Args:
        model: The transformers model.
        features: The batch: ``input_ids`` and ``attention_mask``, (B, L); with images ``mm_token_type_ids`` and
            ``image_grid_thw``, too.
        pixel_values: (P, 1176) floats of all its images; ``None`` without images.

    Returns:
        (B, L, hidden).
    """
    if pixel_values is not None:
        shown = {name: features[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        shown["pixel_values"] = pixel_values
    else:  # positions are told: a model that is not shown ids takes those of the batch before for its own
        ids = features["input_ids"]
        embeddings = keep_vision_in_step(model, model.get_input_embeddings()(ids))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)  # (3, B, L)
        shown = {"inputs_embeds": embeddings, "position_ids": positions}
    output = model(attention_mask=features["attention_mask"], use_cache=False, **shown)
    return output.last_hidden_state

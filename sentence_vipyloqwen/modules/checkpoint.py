"""A checkpoint's parts, from a folder or the Hub: safetensors only, and never the folder's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, Qwen2VLImageProcessorPil
from transformers.utils.peft_utils import find_adapter_config_file

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.modules.backbones import backbone_of
from sentence_vipyloqwen.modules.whole_weights import whole_weights

_PIXEL_KEYS = ("min_pixels", "max_pixels")


def load_parts(
    path: str,
    hub: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    processor_kwargs: Mapping[str, Any],
    config_kwargs: Mapping[str, Any],
) -> tuple[PreTrainedModel, Any, Qwen2VLImageProcessorPil]:
    """Load a checkpoint's model, tokenizer and image processor.

    Args:
        path: Folder or Hub id of a checkpoint of a type in `BACKBONES`, or of a LoRA adapter of one.
        hub: Where and how to find it: ``token``, ``revision``, ``local_files_only``, ``cache_dir``, ``subfolder``.
        model_kwargs: For the model.
        processor_kwargs: For the tokenizer, and ``min_pixels`` / ``max_pixels`` for the image processor.
        config_kwargs: For the configuration.

    Raises:
        ValueError: If the checkpoint is of another architecture, the pixel budget is none, or code of the folder or
            pickled weights are asked for.
    """
    for options in (model_kwargs, processor_kwargs, config_kwargs):
        if options.get("trust_remote_code") or options.get("use_safetensors") is False:
            raise ValueError(f"Code of a folder is never run, nor are pickled weights loaded; got {dict(options)}.")
    config = _load_config(path, hub, config_kwargs)
    with whole_weights():
        model = AutoModel.from_pretrained(path, config=config, **{**hub, "use_safetensors": True, **model_kwargs})
    tokenizer_kwargs = {key: value for key, value in processor_kwargs.items() if key not in _PIXEL_KEYS}
    pixels = {key: value for key, value in processor_kwargs.items() if key in _PIXEL_KEYS}
    tokenizer = AutoTokenizer.from_pretrained(path, **{**hub, **tokenizer_kwargs})
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, **hub, **pixels)
    low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    if not 0 < low <= high:
        raise ValueError(f"min_pixels is {low} and max_pixels {high}; allowed is 0 < min_pixels <= max_pixels.")
    return model, tokenizer, image_processor


def _load_config(path: str, hub: Mapping[str, Any], config_kwargs: Mapping[str, Any]) -> Any:
    """The configuration of a checkpoint, or of the base model that a LoRA adapter's folder names."""
    where = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    if find_adapter_config_file(path, **where) is not None:
        path = require("peft", "lora").PeftConfig.from_pretrained(path, **where).base_model_name_or_path
    config = AutoConfig.from_pretrained(path, **{**hub, **config_kwargs})
    backbone_of(config, path)
    return config


@torch.no_grad()
def start_rows_at_mean(model: PreTrainedModel, known: int, total: int) -> None:
    """Give the new tokens' rows the mean of the known ones; the matrix grows only where it is too short.

    The models' matrices have more rows than their tokenizers have tokens, so resizing to the tokenizer would shrink it.
    """
    if total > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(total, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    weight[known:total] = weight[:known].float().mean(dim=0).to(weight.dtype)

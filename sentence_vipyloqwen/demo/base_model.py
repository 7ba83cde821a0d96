"""A tiny random Qwen2-VL or successor, written as an ordinary local checkpoint: base of the demo and of the tests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

QWEN_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
HEAD_DIM = 32
EMBEDDING_STD = 1.0
VISION_STD = 1.5
"""Spread of text and vision tokens as the language model gets them: a picture must be heard beside the prefix."""


def make_tiny_base(
    folder: str | Path,
    texts: Iterable[str],
    images: Sequence[Image.Image] = (),
    *,
    vocab_size: int = 2048,
    hidden_size: int = 192,
    layers: int = 3,
    vision_size: int = 128,
    vision_layers: int = 2,
    min_pixels: int = 56 * 56,
    max_pixels: int = 1280 * 28 * 28,
    seed: int = 0,
    model_type: str = "qwen2_vl",
) -> Path:
    """Write a tiny random checkpoint: weights, configuration, tokenizer and image processor.

    The tokenizer is a byte-level BPE with Qwen's split pattern, trained on ``texts``, with Qwen's special tokens.
    Weights are drawn with a standard deviation of 1/sqrt(fan_in): with transformers' default of 0.02 a model as narrow
    as this one hardly learns.

    Args:
        folder: Where the checkpoint goes.
        texts: Corpus of the tokenizer.
        images: A sample of the pictures to come. The vision tower's output is centred and scaled on them (as in LSUV,
            Mishkin & Matas 2016, https://arxiv.org/abs/1511.06422): what all pictures share, such as paper white, would
            otherwise make all of them look alike.
        vocab_size: Most entries of the vocabulary, special tokens not counted.
        hidden_size: Width of the language model, a multiple of 32.
        layers: Layers of the language model.
        vision_size: Width of the vision tower, a multiple of 32.
        vision_layers: Layers of the vision tower.
        min_pixels: Fewest pixels of an image after resizing.
        max_pixels: Most pixels of an image after resizing.
        seed: Seed of the weights; the global random state is left alone.
        model_type: One of :data:`~sentence_vipyloqwen.modules.backbones.BACKBONES`.

    Returns:
        The folder.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    config = _config(model_type, tokenizer, hidden_size, layers, vision_size, vision_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        _draw_weights(model)
    normalised = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if model_type == "qwen3_vl" else {}
    image_processor = Qwen2VLImageProcessorPil(
        min_pixels=min_pixels, max_pixels=max_pixels, patch_size=config.vision_config.patch_size, **normalised
    )
    if images:
        _centre_vision(model.model.visual, **image_processor(images=list(images), return_tensors="pt"))
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)
    return Path(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE of Qwen2's kind on a corpus."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL_TOKENS[1:])})
    return tokenizer


def _config(
    model_type: str, tokenizer: Qwen2Tokenizer, hidden_size: int, layers: int, vision_size: int, vision_layers: int
) -> PreTrainedConfig:
    heads = hidden_size // HEAD_DIM
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    rotation: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    width = {}
    if model_type == "qwen3_vl":
        rotation |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        width = {"head_dim": HEAD_DIM}
    return AutoConfig.for_model(
        model_type,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 3,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": 32768,
            "rope_parameters": rotation,
            **width,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=_vision_config(model_type, hidden_size, vision_size, vision_layers),
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        tie_word_embeddings=True,
    )


def _vision_config(model_type: str, hidden_size: int, vision_size: int, layers: int) -> dict[str, Any]:
    sizes = {"depth": layers, "num_heads": vision_size // HEAD_DIM}
    if model_type == "qwen2_vl":
        return {**sizes, "embed_dim": vision_size, "hidden_size": hidden_size, "mlp_ratio": 3}
    sizes |= {"hidden_size": vision_size, "out_hidden_size": hidden_size, "intermediate_size": vision_size * 3}
    if model_type == "qwen2_5_vl":  # windows of 2 x 2 merged tokens, but for the last layer
        return {**sizes, "window_size": 56, "fullatt_block_indexes": [layers - 1]}
    return {**sizes, "deepstack_visual_indexes": list(range(layers - 1)), "num_position_embeddings": 64}


@torch.no_grad()
def _draw_weights(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=1 / math.sqrt(fan_in))
    _centre(model.model.visual.patch_embed.proj.weight)
    model.get_input_embeddings().weight.normal_(std=EMBEDDING_STD)  # last: the language-modelling head is tied to it


def _centre(filters: torch.Tensor) -> None:
    """Take each channel's mean out of the patch filters, so that paper white does not drown the strokes on it.

    Every eighth filter keeps it: flat colours are seen by those.
    """
    flat = filters[::8].clone()
    filters -= filters.mean(dim=(2, 3, 4), keepdim=True)
    filters[::8] = flat


@torch.no_grad()
def _centre_vision(visual: nn.Module, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> None:
    tokens = visual(pixel_values, grid_thw=image_grid_thw).pooler_output  # (merged patches, hidden)
    mean = tokens.mean(dim=0)
    scale = VISION_STD / (tokens - mean).std()
    last = [part for part in visual.merger.modules() if isinstance(part, nn.Linear)][-1]
    last.weight.mul_(scale)
    last.bias.copy_((last.bias - mean) * scale)

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel

from sentence_vipyloqwen.demo.base_model import (
    EMBEDDING_STD,
    QWEN_SPECIAL_TOKENS,
    VISION_STD,
    make_tiny_base,
    train_tokenizer,
)


def test_the_base_is_an_ordinary_checkpoint(base: Path) -> None:
    config = AutoConfig.from_pretrained(base)
    assert (config.model_type, config.architectures) == ("qwen2_vl", ["Qwen2VLForConditionalGeneration"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.text_config.vocab_size == len(tokenizer)
    assert Qwen2VLImageProcessorPil.from_pretrained(base).size["shortest_edge"] == 56 * 56


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer(["xin chào"] * 5, 300)
    for token in QWEN_SPECIAL_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    for text in ("Số tiền: 1.250.000 đ", "一个红色的圆形", "naïve\n\n  x 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens() -> None:
    assert len(train_tokenizer(["12345 12345"] * 50, 400).encode("12345")) == 5


def test_weights_are_scaled_by_their_fan_in(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    for name, expected in {
        "model.layers.0.mlp.down_proj.weight": 1 / math.sqrt(192),
        "visual.blocks.0.mlp.fc1.weight": 1 / math.sqrt(32),
        "model.embed_tokens.weight": EMBEDDING_STD,
    }.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.1), name


def test_a_seed_gives_the_same_base_and_leaves_the_random_state(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        make_tiny_base(tmp_path / name, ["a b"] * 3, hidden_size=64, layers=1, vision_size=32, vision_layers=1)
    assert torch.equal(state, torch.get_rng_state())
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_vision_tower_is_centred_on_a_sample(tmp_path: Path, picture: Callable[..., Image.Image]) -> None:
    images = [picture(seed=seed) for seed in range(8)]
    make_tiny_base(tmp_path, ["a b"] * 3, images, hidden_size=64, layers=1, vision_size=32, vision_layers=1)
    model = Qwen2VLModel.from_pretrained(tmp_path)
    features = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=images, return_tensors="pt")
    tokens = model.visual(features["pixel_values"], grid_thw=features["image_grid_thw"]).pooler_output
    assert tokens.mean(0).abs().max() < 1e-4
    assert tokens.std().item() == pytest.approx(VISION_STD, rel=0.01)

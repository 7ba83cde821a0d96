"""Useful work against counts by hand, and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from flops import PRODUCT_TOKENS, Costs, MatrixProducts, Work, useful_work
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLModel

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules.packed_forward import run_vision

Picture = Callable[..., Image.Image]

# The model of the fixture: 64 wide, 2 layers, 2 heads of 32 and 1 for keys and values, intermediate 192; vision 32
# wide, 1 layer, MLP of 96, merger 4 * 32 -> 4 * 32 -> 64; head 64 -> 32.
TOKEN = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
TOKEN_PAIR = 4 * 64 * 2
PATCH = 2 * (588 * 32 + 4 * 32 * 32 + 2 * 32 * 96 + (128 * 128 + 128 * 64) // 4)
PATCH_PAIR = 4 * 32
ROW = 2 * 64 * 32


def language(tokens: int) -> float:
    """A whole row in the language model: token p sees p + 1 tokens."""
    return tokens * TOKEN + TOKEN_PAIR * sum(range(1, tokens + 1))


def test_costs_of_a_tiny_model_by_hand(model: ViPyloQwen) -> None:
    assert Costs.of(model) == Costs(TOKEN, TOKEN_PAIR, PATCH, PATCH_PAIR, ROW, merged=4)


def test_work_of_texts_by_hand_without_padding_and_equal_ones_once(model: ViPyloQwen) -> None:
    short, long = "xin", "Xin chào thế giới, 25 tháng 12"
    lengths = [model.preprocess([text])["input_ids"].shape[1] for text in (short, long)]
    assert lengths[0] < lengths[1]
    expected = sum(language(length) + ROW for length in lengths)
    assert useful_work(model, [short, long, short]) == Work(expected, 0)


def test_work_of_an_image_by_hand(model: ViPyloQwen, picture: Picture) -> None:
    """56 x 84 pixels are 4 x 6 patches, 6 tokens between two others."""
    assert useful_work(model, [picture()]) == Work(language(6 + 2) + ROW, 24 * PATCH + 24 * 24 * PATCH_PAIR)


def test_rows_on_one_page_count_it_once(model: ViPyloQwen, picture: Picture) -> None:
    page, texts = picture(), ["Số tiền?", "Ngày?"]
    rows = [{"image": page, "text": text} for text in texts]
    lengths = [model.preprocess([row])["input_ids"].shape[1] for row in rows]
    expected = sum(language(length) + ROW for length in lengths) - language(8)
    work = useful_work(model, rows)
    assert work == Work(expected, useful_work(model, [page]).vision)
    assert useful_work(model, [picture(), *rows, page]).language == expected + ROW  # the page alone: only its head


def test_rows_share_the_images_they_begin_with_alike(model: ViPyloQwen, picture: Picture) -> None:
    """b after a is another prefix than b alone, but the same image to the vision tower."""
    a, b, c = (picture(seed=seed) for seed in range(3))
    one = useful_work(model, [a]).vision
    assert useful_work(model, [{"image": [a, b]}, {"image": [a, c]}]) == Work(
        2 * (language(16) + ROW) - language(8), 3 * one
    )
    assert useful_work(model, [{"image": [a, b]}, b]) == Work(language(16) + ROW + language(8) + ROW, 2 * one)


def test_the_count_equals_that_of_torch_on_the_padded_forward(
    model: ViPyloQwen, folder: Path, picture: Picture
) -> None:
    """Torch counts the whole square of causal attention and both frames of a patch; all else is the same."""
    row = {"image": picture(), "text": "Số tiền tổng cộng?"}
    features = model.preprocess([row])
    length = features["input_ids"].shape[1]
    keys = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    plain = Qwen2VLModel.from_pretrained(folder, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(**{key: features[key] for key in keys}, pixel_values=torch.randn(24, 1176), use_cache=False)
    upper_triangle = TOKEN_PAIR * length * (length - 1) // 2
    second_frame = 24 * 2 * 588 * 32
    work = useful_work(model, [row])
    assert counter.get_total_flops() == work.language - ROW + work.vision + upper_triangle + second_frame


def test_the_count_equals_that_of_torch_on_our_own_vision_tower(model: ViPyloQwen, picture: Picture) -> None:
    math = sdpa_kernel(SDPBackend.MATH)  # the counter of torch 2.14 does not know the CPU's own kernel
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), math:
        run_vision(model[0].model, torch.randn(24, 588), [(1, 4, 6)])
    assert counter.get_total_flops() == useful_work(model, [picture()]).vision


def test_matrix_products_count_what_torch_counts() -> None:
    products = MatrixProducts(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)), repeats=2)
    with FlopCounterMode(display=False) as counter:
        products()
    assert products.flops == counter.get_total_flops() == 2 * 2 * PRODUCT_TOKENS * (8 * 16 + 16 * 4)


def test_the_time_of_work_at_the_rates_of_the_two_towers() -> None:
    assert Work(language=10, vision=8).seconds(Work(language=5, vision=16)) == 2.5

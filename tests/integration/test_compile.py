"""A model compiled by Inductor, torch's default, which needs a C++ compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen


@pytest.fixture
def rows(picture: Callable[..., Image.Image]) -> list[dict[str, Any]]:
    """Two questions on one page, a page with another behind it, and texts."""
    page, other = picture(), picture(seed=1)
    return [
        {"image": page, "text": "Số tiền?"},
        {"image": page, "text": "Ngày lập hóa đơn là ngày nào?"},
        {"image": [page, other], "text": "red"},
        {"text": "xin chào"},
        {"text": "một hóa đơn khác " * 4},
    ]


def with_gradients(model: ViPyloQwen, rows: list[dict[str, Any]]) -> list[Tensor]:
    """The rows' vectors, and the gradients of the mean of a random objective."""
    model.zero_grad()
    vectors = model(model.preprocess(rows))["sentence_embedding"]
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    (vectors.float() * weights).sum(dim=-1).mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [vectors.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def test_values_and_gradients_are_those_of_the_model_that_is_not_compiled(
    folder: Path, rows: list[dict[str, Any]]
) -> None:
    model = ViPyloQwen(folder, device="cpu")
    expected = with_gradients(model, rows)
    model.compile()
    compiled = with_gradients(model, rows)
    assert model[0].packed and len(compiled) == len(expected)
    for got, wanted in zip(compiled, expected, strict=True):
        assert (got - wanted).abs().max() <= 1e-5


def test_bfloat16_is_as_close_to_float32_as_without_compiling(folder: Path, rows: list[dict[str, Any]]) -> None:
    exact = ViPyloQwen(folder, device="cpu").encode(rows, convert_to_tensor=True)
    half = ViPyloQwen(folder, device="cpu", model_kwargs={"dtype": "bfloat16"})
    errors = []
    for compile_it in (False, True):
        if compile_it:
            half.compile()
        vectors, *gradients = with_gradients(half, rows)
        errors.append((1 - torch.cosine_similarity(vectors.float(), exact)).max())
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert errors[1] <= 2 * errors[0] and errors[0] < 1e-3

"""Attention pooling: packed against row by row, a query of zero against the mean, and who loads its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.fingerprint import fingerprint
from sentence_vipyloqwen.modules import AttentionPooling, MeanPooling
from sentence_vipyloqwen.modules.mean_pooling import PACKED_EMBEDDINGS, PACKING
from sentence_vipyloqwen.modules.packing import pack

Picture = Callable[..., Image.Image]
WIDTH = 8
START, PAD, END = 1, 2, 3
PAGE = [START, PAD, PAD, END]
ROWS = [[10, 11, 12], [13], [*PAGE, 10, 11], [10, 11, 12], [*PAGE, 14], [14, 15, 16, 17, 18, 19, 20], PAGE]
"""Of one token and of several; equal ones, and three that share an image."""


@pytest.fixture(params=["right", "left"])
def batch(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A packed batch of random tokens."""
    longest = max(map(len, ROWS))
    fill = [[0] * (longest - len(row)) for row in ROWS]
    sides = [row + zeros if request.param == "right" else zeros + row for row, zeros in zip(ROWS, fill, strict=True)]
    features = {"input_ids": torch.tensor(sides)}
    features["attention_mask"] = (features["input_ids"] > 0).long()
    images = torch.tensor([[int(PAD in row)] for row in ROWS])
    plan = {"image_keys": 77 * images, "num_images_per_sample": images[:, 0]}
    grids = {"image_grid_thw": torch.tensor([[1, 2, 4]] * int(images.sum()))}
    packing = pack({**features, **plan, **grids}, merge_size=2, image_pad=PAD)
    assert len(packing.source) < sum(map(len, ROWS))  # what rows share stands once
    return {**features, PACKING: packing, PACKED_EMBEDDINGS: random(len(packing.source), WIDTH)}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pooling(scale: float = 1.0) -> AttentionPooling:
    made = AttentionPooling(WIDTH)
    with torch.no_grad():
        made.query.copy_(random(WIDTH, seed=1, scale=scale))
    return made


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as plain Sentence Transformers would give it, with something in place of padding."""
    tokens = batch[PACKING].pad(batch[PACKED_EMBEDDINGS])
    noise = random(*tokens.shape, seed=2, scale=100).to(tokens.dtype)
    mask = batch["attention_mask"]
    return {"attention_mask": mask, "token_embeddings": torch.where(mask[..., None] > 0, tokens, noise)}


def row_by_row(tokens: Tensor, query: Tensor, batch: dict[str, Any]) -> Tensor:
    """The formula as it stands."""
    rows = [tokens[places[places >= 0]] for places in batch[PACKING].row_tokens]
    return torch.stack([torch.softmax(row @ query / WIDTH**0.5, dim=0) @ row for row in rows])


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.0, torch.float32), (1.0, torch.float32), (1.0, torch.float64), (30.0, torch.float64)]
)
@pytest.mark.parametrize("layout", [dict, padded])
def test_values_and_gradients_are_those_of_the_formula(
    batch: dict[str, Any], layout: Callable[[dict[str, Any]], dict[str, Any]], scale: float, dtype: torch.dtype
) -> None:
    tokens = batch[PACKED_EMBEDDINGS] = batch[PACKED_EMBEDDINGS].to(dtype).requires_grad_()
    made = pooling(scale).to(dtype)
    expected = row_by_row(tokens, made.query, batch)
    got = made(layout(batch))["sentence_embedding"]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    objective = random(*expected.shape, seed=3)
    wanted = torch.autograd.grad((expected * objective).sum(), [tokens, made.query])
    gradients = torch.autograd.grad((got * objective).sum(), [tokens, made.query])
    for gradient, other in zip(gradients, wanted, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=0)


def test_gradients_are_those_of_finite_differences(batch: dict[str, Any]) -> None:
    packing, tokens = batch[PACKING], batch[PACKED_EMBEDDINGS].double().requires_grad_()
    made = pooling().double()

    def forward(tokens: Tensor, query: Tensor) -> Tensor:
        features = {PACKING: packing, PACKED_EMBEDDINGS: tokens}
        return torch.func.functional_call(made, {"query": query}, (features,))["sentence_embedding"]

    assert torch.autograd.gradcheck(forward, (tokens, made.query.detach().requires_grad_()))


def test_it_begins_as_the_mean(batch: dict[str, Any]) -> None:
    for layout, exact in ((dict, True), (padded, False)):
        mean = MeanPooling(WIDTH)(layout(batch))["sentence_embedding"]
        attention = AttentionPooling(WIDTH)(layout(batch))["sentence_embedding"]
        torch.testing.assert_close(attention, mean, atol=0 if exact else 1e-6, rtol=0)


def test_features_are_left_as_mean_pooling_leaves_them(batch: dict[str, Any]) -> None:
    for layout in (dict, padded):
        assert pooling()(layout(batch)).keys() == MeanPooling(WIDTH)(layout(batch)).keys()
    without_mask = {"token_embeddings": random(2, 3, WIDTH)}
    attention = AttentionPooling(WIDTH)(dict(without_mask))["sentence_embedding"]
    torch.testing.assert_close(attention, without_mask["token_embeddings"].mean(dim=1))


def test_rows_one_behind_the_other_are_told_apart(batch: dict[str, Any]) -> None:
    """As plain Sentence Transformers packs texts for FlashAttention."""
    features = padded(batch)
    real = features["attention_mask"] > 0
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), real.sum(1).cumsum(0)]).int()
    flat = {"token_embeddings": features["token_embeddings"][real][None], "cu_seq_lens_q": bounds}
    expected = pooling()(features)["sentence_embedding"]
    torch.testing.assert_close(pooling()(flat)["sentence_embedding"], expected)


def test_large_scores_do_not_overflow_and_small_ones_do_not_vanish(batch: dict[str, Any]) -> None:
    """One token takes all of the weight; where all scores are far below zero, as where they are above."""
    tokens = batch[PACKED_EMBEDDINGS].requires_grad_()
    for sign in (1, -1):
        made = pooling(sign * 1e6)
        vectors = made(dict(batch))["sentence_embedding"]
        torch.testing.assert_close(vectors, row_by_row(tokens, made.query, batch))
        (gradient,) = torch.autograd.grad(vectors.sum(), [tokens])
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_weighed_in_float32(batch: dict[str, Any], dtype: torch.dtype) -> None:
    made = pooling(3.0).to(dtype)
    half = {**batch, PACKED_EMBEDDINGS: batch[PACKED_EMBEDDINGS].to(dtype)}
    exact = row_by_row(half[PACKED_EMBEDDINGS].float(), made.query.float(), half)
    for layout in (dict, padded):
        vectors = made(layout(half))["sentence_embedding"]
        assert vectors.dtype == dtype
        torch.testing.assert_close(vectors, exact.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype):
        vectors = made.float()(dict(half))["sentence_embedding"]
    torch.testing.assert_close(vectors, exact.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


def test_a_row_without_a_token_is_zero_and_harms_no_other(batch: dict[str, Any]) -> None:
    features = padded(batch)
    features["attention_mask"] = features["attention_mask"].index_fill(0, torch.tensor([1]), 0)
    tokens = features["token_embeddings"].requires_grad_()
    vectors = pooling()(dict(features))["sentence_embedding"]
    assert not vectors[1].any()
    torch.testing.assert_close(vectors[2:], pooling()(padded(batch))["sentence_embedding"][2:])
    (gradient,) = torch.autograd.grad(vectors.sum(), [tokens])
    assert gradient.isfinite().all()


def test_a_folder_of_its_own(tmp_path: Path) -> None:
    made = pooling()
    made.save(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text()) == {"embedding_dimension": WIDTH}
    loaded = AttentionPooling.load(str(tmp_path))
    assert torch.equal(loaded.query, made.query)
    assert loaded.query.requires_grad
    assert loaded.get_embedding_dimension() == WIDTH
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"No model.safetensors for the attention pooling in .*; pickled weights"):
        AttentionPooling.load(str(tmp_path))


# --- in a model ---


@pytest.fixture
def attentive(model: ViPyloQwen) -> ViPyloQwen:
    """A model whose query is not zero."""
    model[1] = AttentionPooling(64)
    with torch.no_grad():
        model[1].query.copy_(random(64, seed=1, scale=3))
    return model


def inputs_of(picture: Picture) -> list[Any]:
    page = picture(56, 84)
    return ["a", "<ocr> xin chào thế giới", {"image": page, "text": "<ocr> Số tiền?"}, {"image": page}]


def test_a_model_hands_it_packed_batches(attentive: ViPyloQwen, picture: Picture) -> None:
    seen: list[bool] = []
    attentive[0].register_forward_hook(lambda module, args, output: seen.append(PACKING in output))
    features = attentive.preprocess(inputs_of(picture))
    packed = attentive(dict(features))["sentence_embedding"]
    one_by_one = attentive(dict(features), padded_output=True)["sentence_embedding"]
    assert seen == [True, False]
    torch.testing.assert_close(packed, one_by_one, atol=1e-6, rtol=0)


def test_who_loads_a_folder_with_it(attentive: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    inputs = inputs_of(picture)
    expected = attentive.encode(inputs)
    attentive.save_pretrained(str(tmp_path / "ours"))
    types = [module["type"] for module in json.loads((tmp_path / "ours" / "modules.json").read_text())]
    assert types[1] == "sentence_vipyloqwen.modules.attention_pooling.AttentionPooling"
    assert [kind.split(".")[0] for kind in types[:1] + types[2:]] == ["sentence_transformers"] * 3
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "AttentionPooling({'embedding_dimension': 64})" in card
    assert 'SentenceTransformer("sentence_transformers_model_id", trust_remote_code=True)' in card
    assert "it comes with `pip install sentence-vipyloqwen`" in card

    loaded = ViPyloQwen(tmp_path / "ours", device="cpu")
    assert type(loaded[1]) is AttentionPooling
    loaded.save_pretrained(str(tmp_path / "again"), model_name="someone/a-model")
    card = (tmp_path / "again" / "README.md").read_text()
    assert 'SentenceTransformer("someone/a-model", trust_remote_code=True)' in card
    assert "sentence_transformers_model_id" not in card
    np.testing.assert_array_equal(loaded.encode(inputs), expected)

    with pytest.raises(ValueError, match=r"AttentionPooling', which is not part of Sentence Transformers"):
        SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    stock = SentenceTransformer(str(tmp_path / "ours"), device="cpu", trust_remote_code=True)
    assert type(stock[0]) is not type(loaded[0])
    np.testing.assert_allclose(stock.encode(inputs), expected, atol=1e-5)
    assert fingerprint(stock) == fingerprint(loaded)

    stock.save_pretrained(str(tmp_path / "stock"), create_model_card=False)
    np.testing.assert_array_equal(ViPyloQwen(tmp_path / "stock", device="cpu").encode(inputs), expected)


def test_the_class_is_never_code_of_the_folder(attentive: ViPyloQwen, tmp_path: Path) -> None:
    attentive.save_pretrained(str(tmp_path), create_model_card=False)
    file = tmp_path / "sentence_vipyloqwen" / "modules" / "attention_pooling.py"
    file.parent.mkdir(parents=True)
    file.write_text("raise SystemExit('ran code from the folder')")
    assert type(ViPyloQwen(tmp_path, device="cpu")[1]) is AttentionPooling


def test_it_moves_and_changes_dtype_with_its_model(attentive: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    inputs = inputs_of(picture)
    expected = attentive.encode(inputs)
    attentive.save_pretrained(str(tmp_path), create_model_card=False)
    half = ViPyloQwen(tmp_path, device="cpu", model_kwargs={"dtype": "bfloat16"})
    assert half[1].query.dtype == torch.bfloat16
    vectors = half.encode(inputs, convert_to_tensor=True).float()
    assert torch.cosine_similarity(vectors, torch.from_numpy(expected)).min() > 0.99
    assert attentive.to("meta")[1].query.device.type == "meta"


def test_a_fingerprint_tells_it_from_the_mean(model: ViPyloQwen) -> None:
    before = fingerprint(model)
    model[1] = AttentionPooling(64)
    zero = fingerprint(model)
    assert set(before.differences(zero)) == {"weights", "processing.modules"}
    assert {"pooling_mode": "attention"} in zero.processing["modules"]
    with torch.no_grad():
        model[1].query[3] = 1e-3
    assert zero.differences(fingerprint(model)) == ["weights"]

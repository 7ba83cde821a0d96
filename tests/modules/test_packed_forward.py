"""The packed forward against the padded one: hidden states, embeddings and gradients, over randomly drawn batches."""

from __future__ import annotations

import logging
import random
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
    TripletDistanceMetric,
    TripletLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils
from varlen_reference import reference_varlen

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.modules import MeanPooling, attention, backbones, packed_forward
from sentence_vipyloqwen.modules.attention import PACKED, varlen_attention
from sentence_vipyloqwen.modules.mean_pooling import PACKING

TOLERANCE = 1e-5
"""In float32, of values and of gradients."""

Picture = Callable[..., Image.Image]

WORDS = ("xin", "chào", "thế", "giới", "hóa", "đơn", "red", "circle", "红色", "发票")
lengths = st.one_of(st.integers(0, 12), st.integers(13, 300))  # in words: hypothesis would hardly ever draw a long one
texts = st.tuples(lengths, st.integers(0, 9)).map(lambda drawn: words(*drawn))
numbers = st.lists(st.integers(0, 3), max_size=5)  # of the pictures, which have two sizes


def words(count: int, seed: int) -> str:
    """So many words, the same ones for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


rows = st.tuples(numbers, texts, st.sampled_from(["", "<ocr> ", "<vqa_multi> "])).filter(lambda row: row[0] or row[1])
batches = st.lists(rows, min_size=1, max_size=6).flatmap(
    lambda drawn: st.lists(st.sampled_from(drawn), max_size=3).map(lambda again: drawn + again)
)
LONG = [([0, 1, 2, 3, 1], words(300, 0), "<ocr> "), ([0], words(1, 1), ""), ([], words(300, 2), ""), ([0, 1], "", "")]
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
fewer = settings(few, max_examples=5)


def as_inputs(drawn: list[Any], picture: Picture) -> list[dict[str, Any]]:
    pictures = [picture(56, 56 + 28 * (seed % 2), seed=seed) for seed in range(4)]
    return [{"image": [pictures[n] for n in images], "text": prefix + text} for images, text, prefix in drawn]


def both(model: ViPyloQwen, compute: Callable[[], Tensor]) -> list[list[Tensor]]:
    """What `compute` gives, and the gradients of a random objective, a mean over its vectors: packed, then padded."""
    results = []
    for packed in (True, False):
        model[0].packed = packed
        model.zero_grad()
        value = compute()
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        (value * weights).sum(dim=-1).mean().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        results.append([value.detach(), *gradients])
    return results


def assert_equal(results: list[list[Tensor]], tolerance: float = TOLERANCE) -> None:
    for packed, padded in zip(*results, strict=True):
        assert (packed - padded).abs().max().item() <= tolerance


def embed(model: ViPyloQwen, inputs: list[Any]) -> Tensor:
    return model(model.preprocess(inputs))["sentence_embedding"]


@few
@given(batches)
@example(LONG)
def test_embeddings_and_gradients_are_those_of_the_padded_batch(
    model: ViPyloQwen, picture: Picture, drawn: list[Any]
) -> None:
    assert_equal(both(model, lambda: embed(model, as_inputs(drawn, picture))))


@few
@given(batches)
@example(LONG)
def test_in_float64_only_the_float32_of_norms_and_rotations_is_left(
    model: ViPyloQwen, picture: Picture, drawn: list[Any]
) -> None:
    model.double()
    assert_equal(both(model, lambda: embed(model, as_inputs(drawn, picture))), tolerance=1e-6)


@few
@given(batches)
def test_token_embeddings_are_padded_on_request(model: ViPyloQwen, picture: Picture, drawn: list[Any]) -> None:
    def tokens() -> Tensor:
        output = model(model.preprocess(as_inputs(drawn, picture)), padded_output=True)
        return output["token_embeddings"] * output["attention_mask"][..., None]

    assert_equal(both(model, tokens), tolerance=5e-5)  # hidden states and their gradients are larger than 1


SHARED = [
    ([0], "hóa đơn", "<ocr> "),
    ([0], "xin chào", ""),
    ([0, 1], "red", ""),
    ([0], "hóa đơn", "<ocr> "),
    ([], "xin", ""),
]
"""Four rows that begin with picture 0, two of them equal, one with another picture behind it, and a text."""


@fewer
@given(batches)
@example(SHARED)
def test_one_call_of_a_varlen_kernel_gives_the_same(model: ViPyloQwen, picture: Picture, drawn: list[Any]) -> None:
    """The GPU's way through the whole model, vision tower included, with the kernel in plain torch."""
    calls: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs["causal"])
        return reference_varlen(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "choose_kernel", lambda *_: partial(varlen_attention, kernel=kernel))
        assert_equal(both(model, lambda: embed(model, as_inputs(drawn, picture))))
    seen = any(images for images, *_ in drawn)
    assert calls == [False] * seen + [True] * 2  # the vision tower's one layer, the language model's two


@pytest.mark.parametrize("lora", [False, True])
@fewer
@given(drawn=batches)
@example(drawn=SHARED)
@example(drawn=LONG)
def test_gradient_checkpointing_shares_images_as_well(
    folder: Path, picture: Picture, lora: bool, drawn: list[Any]
) -> None:
    model = ViPyloQwen(folder, device="cpu")
    inputs = as_inputs(drawn, picture)
    if lora:
        adapt(model)
    model.gradient_checkpointing_enable()
    plain = both(model.eval(), lambda: embed(model, inputs))  # it checkpoints in training alone
    checkpointed = both(model.train(), lambda: embed(model, inputs))
    assert_equal(checkpointed)
    assert_equal([plain[0], checkpointed[0]])


def adapt(model: ViPyloQwen) -> ViPyloQwen:
    """Give a model LoRA adapters that change something."""
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "qkv", "proj"], lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def adapted(model: ViPyloQwen) -> ViPyloQwen:
    """With LoRA adapters."""
    return adapt(model)


@fewer
@given(batches)
@example(SHARED)
def test_lora_adapters_get_the_same_gradients(adapted: ViPyloQwen, picture: Picture, drawn: list[Any]) -> None:
    results = both(adapted, lambda: embed(adapted, as_inputs(drawn, picture)))
    assert_equal(results)
    trained = [gradient for gradient in results[0][1:] if gradient.abs().max() > 0]
    vision = 3 if any(images for images, *_ in drawn) else 0  # qkv and proj of its one layer, and the patch embedding
    assert len(trained) >= 2 * (2 * 2 + vision)


def test_under_dropout_equal_rows_share_their_mask_unless_padded(model: ViPyloQwen, picture: Picture) -> None:
    model.train()
    for layer in model[0].model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    features = model.preprocess(as_inputs(SHARED, picture))  # rows 0 and 3 are equal
    packed = model(dict(features))["sentence_embedding"]
    assert torch.equal(packed[0], packed[3])
    model[0].packed = False
    padded = model(dict(features))["sentence_embedding"]
    assert not torch.allclose(padded[0], padded[3])


LOSSES = {
    "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    "CachedMultipleNegativesRankingLoss": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "PrefixRoutedLoss": lambda model: _Summed(PrefixRoutedLoss(model)),
    "CoSENTLoss": partial(CoSENTLoss, scale=1.0),
    "TripletLoss": lambda model: TripletLoss(model, TripletDistanceMetric.COSINE, triplet_margin=2.0),
}
"""Of pairs, of pairs with labels and of triplets, whose margin none reaches; one is ours, the others stock."""


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", LOSSES)
@fewer
@given(drawn=batches)
@example(drawn=SHARED)
@example(drawn=SHARED[:1])
def test_losses_get_the_same_gradients(folder: Path, picture: Picture, name: str, lora: bool, drawn: list[Any]) -> None:
    model = ViPyloQwen(folder, device="cpu")
    loss = LOSSES[name](adapt(model) if lora else model)
    others = [[{"text": f"{word} {row % 4}"} for row in range(len(drawn))] for word in ("hóa đơn", "发票")]
    sides = [as_inputs(drawn, picture), *others[: 2 if name == "TripletLoss" else 1]]
    labels = torch.linspace(1, 0, len(drawn)) if name == "CoSENTLoss" else None

    def value() -> Tensor:
        return loss([model.preprocess(side) for side in sides], labels).reshape(1)

    assert_equal(both(model, value))


class _Summed(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, columns: list[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        return sum(self.loss(columns, labels).values())


def test_what_rows_share_is_computed_once(model: ViPyloQwen, picture: Picture) -> None:
    inputs = as_inputs(SHARED, picture)
    features = model.preprocess(inputs)
    seen: dict[str, int] = {}
    language_model, vision = model[0].model.language_model, model[0].model.visual
    language_model.norm.register_forward_pre_hook(lambda norm, args: seen.update(tokens=args[0].shape[1]))
    vision.merger.register_forward_pre_hook(lambda merger, args: seen.update(patches=len(args[0])))
    model(dict(features))
    alone = [model.preprocess([row])["input_ids"].shape[1] for row in inputs]
    page = 2 + 2 * 2
    assert seen["tokens"] == alone[0] + (alone[1] - page) + (alone[2] - page) + alone[4]
    assert seen["patches"] == 4 * 4 + 4 * 6  # pictures 0 and 1, though 0 stands in four rows
    assert len(features["pixel_values"]) == 4 * (4 * 4) + 4 * 6


@pytest.mark.parametrize("kind", [ViPyloQwen, SentenceTransformer])
@pytest.mark.parametrize("pooling", [Pooling, MeanPooling])
def test_any_module_may_follow(model: ViPyloQwen, picture: Picture, kind: Any, pooling: Any) -> None:
    inputs = as_inputs(SHARED, picture)
    expected = model[1](model[0](model.preprocess(inputs)))["sentence_embedding"].detach()
    other = kind(modules=[model[0], pooling(64)], device="cpu")
    assert (embed(other, inputs) - expected).abs().max() < TOLERANCE
    assert other.encode("xin chào").shape == (64,)
    assert other.encode("xin chào", output_value="token_embeddings").shape[1] == 64


def test_only_mean_pooling_is_handed_a_packed_batch(model: ViPyloQwen) -> None:
    seen: list[bool] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(PACKING in output))
    features = model.preprocess(["xin chào", "a"])
    model(dict(features))
    model(dict(features), padded_output=True)
    model[0](dict(features))
    model[1] = Pooling(64)
    model(dict(features))
    assert seen == [True, False, False, False]


def test_eager_attention_runs_padded(folder: Path) -> None:
    model = ViPyloQwen(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert not model[0].packed
    reference = ViPyloQwen(folder, device="cpu")
    assert reference[0].packed
    assert abs(model.encode("xin chào") - reference.encode("xin chào")).max() < TOLERANCE


@pytest.mark.parametrize(
    ("implementation", "sliding", "level", "reason"),
    [
        ("eager", False, "INFO", "attention is 'eager'"),
        ("flash_attention_3", False, "WARNING", "attention is 'flash_attention_3'"),
        ("sdpa", True, "WARNING", "attention ('sdpa') has sliding windows"),
    ],
)
def test_what_keeps_batches_from_being_packed_is_logged_once(
    model: ViPyloQwen,
    caplog: pytest.LogCaptureFixture,
    implementation: str,
    sliding: bool,
    level: str,
    reason: str,
) -> None:
    packed_forward._log_once.cache_clear()
    transformer = model[0].model
    transformer.config._attn_implementation_internal = implementation
    transformer.language_model.config.layer_types = ["sliding_attention" if sliding else "full_attention"] * 2
    with caplog.at_level(logging.INFO, packed_forward.__name__):
        assert not packed_forward.prepare(transformer) and not packed_forward.prepare(transformer)
    assert [record.levelname for record in caplog.records] == [level]
    assert f"padded, not packed, which is slower: {reason}; allowed is 'sdpa' or" in caplog.text


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.vision_utils", None)
    with pytest.raises(ImportError, match=r"transformers [\d.]+ is installed, whose vision tower cannot"):
        runpy.run_module(backbones.__name__)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """FlashAttention 2 in plain torch, where transformers imports it; which of it was called, and whether causal."""
    calls: list[tuple[str, bool]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float, causal: bool) -> Tensor:
        groups = query.shape[-2] // key.shape[-2]
        states = (query, key.repeat_interleave(groups, -2), value.repeat_interleave(groups, -2))
        options = {"scale": softmax_scale, "is_causal": causal}
        return scaled_dot_product_attention(*(part.transpose(-2, -3) for part in states), **options).transpose(-2, -3)

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float = 1.0, causal: bool = False
    ) -> Tensor:
        calls.append(("batch", causal))
        return attend(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float = 1.0,
        causal: bool = False,
    ) -> Tensor:
        calls.append(("varlen", causal))
        rows = zip(*(part.tensor_split(cu_seqlens_q[1:-1].long()) for part in (q, k, v)), strict=True)
        return torch.cat([attend(*row, softmax_scale, causal) for row in rows])

    module, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    module.flash_attn_func = module.flash_attn_with_kvcache = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    padding.pad_input = modeling_flash_attention_utils._pad_input
    padding.unpad_input = modeling_flash_attention_utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    for name, value in vars(modeling_flash_attention_utils).copy().items():
        if name == "_loaded_implementation" or (name.startswith("_") and name.endswith("_fn")):
            monkeypatch.setattr(
                modeling_flash_attention_utils, name, None if name == "_loaded_implementation" else value
            )
    return calls


def test_without_segments_flash_attention_is_reached_by_its_own_name(
    model: ViPyloQwen, picture: Picture, flash_calls: list[tuple[str, bool]]
) -> None:
    transformer, inputs = model[0].model, as_inputs(SHARED, picture)
    patches, grid = torch.randn(16, 1176), torch.tensor([[1, 4, 4]])
    model[0].packed = False
    expected = embed(model, inputs), transformer.visual(patches, grid_thw=grid).pooler_output
    transformer.set_attn_implementation(PACKED["flash_attention_2"])
    assert flash_calls == []
    assert (transformer.visual(patches, grid_thw=grid).pooler_output - expected[1]).abs().max() < TOLERANCE
    assert flash_calls == [("batch", False)]
    assert (embed(model, inputs) - expected[0]).abs().max() < TOLERANCE
    assert set(flash_calls) == {("batch", False), ("varlen", True)}  # its images, and its rows without their padding


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", None])
def test_the_pass_that_keeps_ranks_in_step_runs_as_images_do(
    model: ViPyloQwen, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer, seen = model[0].model, []
    transformer.set_attn_implementation("eager" if implementation is None else PACKED[implementation])
    hook = lambda module, args, options: seen.append((len(args[0]), "segments" in options))  # noqa: E731
    transformer.visual.register_forward_pre_hook(hook, with_kwargs=True)
    monkeypatch.setattr(packed_forward, "runs_together", lambda module: True)
    embeddings = torch.randn(5, 64)
    assert torch.equal(packed_forward.keep_vision_in_step(transformer, embeddings), embeddings)
    assert seen == [(4, implementation is not None)]


@pytest.mark.parametrize("images", [True, False])
def test_stock_padding_on_the_left_gives_the_same(
    model: ViPyloQwen, folder: Path, picture: Picture, images: bool
) -> None:
    stock = SentenceTransformer(str(folder), device="cpu")
    stock.tokenizer.padding_side = "left"
    texts = [{"text": "a"}, {"text": "xin chào thế giới"}]
    rows = [{"image": picture(56, 84), "text": "a b c"}, {"image": [picture(56, 56), picture(56, 84)]}]
    features = stock.preprocess(rows if images else texts)
    assert features["attention_mask"][:, 0].min() == 0
    expected = stock(dict(features))["sentence_embedding"]
    assert (model(dict(features))["sentence_embedding"] - expected).abs().max() < TOLERANCE
    tokens, reference = (part(dict(features))["token_embeddings"] for part in (model[0], stock[0]))
    assert ((tokens - reference) * features["attention_mask"][..., None]).abs().max() < TOLERANCE


def test_the_transformers_model_alone_works_as_ever(model: ViPyloQwen) -> None:
    features = model.preprocess(["xin chào", "hóa đơn số 0123"])
    output = model[0].model(input_ids=features["input_ids"], attention_mask=features["attention_mask"], use_cache=False)
    expected = model[0](features)["token_embeddings"]
    assert ((output.last_hidden_state - expected) * features["attention_mask"][..., None]).abs().max() < TOLERANCE


def test_bfloat16_is_as_close_to_float32_as_the_padded_batch(folder: Path, picture: Picture) -> None:
    """As the mean over many rows; of one the rounding may be luck."""
    exact, half = (ViPyloQwen(folder, device="cpu", model_kwargs={"dtype": dtype}) for dtype in ("float32", "bfloat16"))
    errors: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(8):
        rows = [
            {"image": picture(56 + 28 * (row % 3), 84 + 28 * row, 10 * seed + row), "text": "a b " * row}
            for row in range(1, 6)
        ]
        with torch.no_grad():
            expected = embed(exact, rows)
            for half[0].packed in (True, False):
                errors[half[0].packed].append(1 - torch.cosine_similarity(embed(half, rows).float(), expected))
    packed, padded = (torch.cat(errors[packed]).mean() for packed in (True, False))
    assert packed < 1.15 * padded


def test_compiled_models_give_the_same_values_and_gradients(model: ViPyloQwen, picture: Picture) -> None:
    inputs = as_inputs(SHARED, picture)
    expected = both(model, lambda: embed(model, inputs))
    model.compile(backend="aot_eager")
    compiled = both(model, lambda: embed(model, inputs))
    assert_equal(compiled)
    assert_equal([expected[0], compiled[0]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", {"text_config": "sdpa"}, {"vision_config": "sdpa"}])
def test_attention_set_anew_is_honoured_without_packing(
    model: ViPyloQwen, picture: Picture, implementation: Any
) -> None:
    inputs: list[Any] = ["xin chào", "hóa đơn số 12 của khách hàng", {"image": picture(56), "text": "màu gì?"}]
    expected = model.encode(inputs)
    model[0].model.set_attn_implementation(implementation)
    assert abs(model.encode(inputs) - expected).max() <= 1e-5

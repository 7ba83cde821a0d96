"""Attention over segments against one dense mask, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from varlen_reference import reference_varlen

from sentence_vipyloqwen.modules import attention
from sentence_vipyloqwen.modules.attention import (
    BRANCH_TOKENS,
    LIKE_LENGTH,
    PACKED,
    Segments,
    choose_kernel,
    find_varlen_attn,
    grouped_attention,
    packed_attention,
    repeats_heads,
    torch_varlen,
    varlen_attention,
)

FAMILY = Segments((3, 4, 2, 3, 3), (-1, -1, 1, 1, 1))
"""A text of its own, and a page with two questions and a second page."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """One (T, T) mask, written from the definition: a token sees its segment's ancestors and its own segment."""
    owner, place = segments.of_tokens(query.device), torch.arange(len(query))
    mask = torch.zeros(len(query), len(query), dtype=torch.bool)
    for token in range(len(query)):
        seen = {*segments.ancestors(int(owner[token]))}
        before = place <= token if segments.causal else torch.ones_like(mask[0])
        mask[token] = ((owner == owner[token]) & before) | torch.tensor([int(o) in seen for o in owner])
    heads = query.shape[1] // key.shape[1]
    states = (query, key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1))
    return F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in states), attn_mask=mask).transpose(0, 1)


def states(segments: Segments, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator, total = torch.Generator().manual_seed(0), sum(segments.lengths)
    return [
        torch.randn(total, count, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    ]


def with_gradients(attend: Callable[..., Tensor], segments: Segments, **kwargs: Any) -> list[Tensor]:
    inputs = states(segments)
    output = attend(*inputs, segments, **kwargs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@st.composite
def forests(draw: st.DrawFn) -> Segments:
    """Segments as packing lays them out: those that stand alone by length, then families, parents first."""
    lengths = sorted(draw(st.lists(st.integers(1, 40), max_size=5)))
    parents = [-1] * len(lengths)

    def family(parent: int, depth: int) -> None:
        lengths.append(draw(st.integers(1, 20)))
        parents.append(parent)
        me = len(lengths) - 1
        for length in sorted(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))):
            lengths.append(length)
            parents.append(me)
        if depth and draw(st.booleans()):
            family(me, depth - 1)

    for _ in range(draw(st.integers(0 if lengths else 1, 2))):
        family(-1, 2)
    return Segments(tuple(lengths), tuple(parents))


@settings(max_examples=60, deadline=None)
@given(forests())
def test_every_kernel_equals_one_dense_mask(segments: Segments) -> None:
    expected = with_gradients(dense_attention, segments)
    for attend, kwargs in ((grouped_attention, {}), (varlen_attention, {"kernel": reference_varlen})):
        for value, reference in zip(with_gradients(attend, segments, **kwargs), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_segments_apart_see_all_of_themselves(lengths: list[int]) -> None:
    segments = Segments.apart(lengths)
    expected = with_gradients(dense_attention, segments)
    for attend, kwargs in ((grouped_attention, {}), (varlen_attention, {"kernel": reference_varlen})):
        for value, reference in zip(with_gradients(attend, segments, **kwargs), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)


def test_many_children_are_cut_into_blocks() -> None:
    segments = Segments((10, *[60] * 9), (-1, *[0] * 9))
    sizes = [block.tokens for block in segments.blocks(torch.device("cpu"))]
    assert sizes == [10, 240, 240, 60] and max(sizes) <= BRANCH_TOKENS
    value, expected = (with_gradients(attend, segments)[0] for attend in (grouped_attention, dense_attention))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_the_blocks_of_the_drawn_batch() -> None:
    blocks = Segments((3, 4, 2, 3, 5), (-1, -1, 1, 1, 1)).blocks(torch.device("cpu"))
    assert [(block.tokens, block.ancestors) for block in blocks] == [(3, ()), (4, ()), (10, (1,))]
    seen = ["".join("#" if sees else "." for sees in row) for row in blocks[2].mask.tolist()]
    assert seen[:5] == [
        "#####.........",
        "######........",
        "####..#.......",
        "####..##......",
        "####..###.....",
    ]
    assert seen[5:] == ["####....." + "#" * own + "." * (5 - own) for own in range(1, 6)]


def test_like_lengths_share_a_block() -> None:
    segments = Segments((5, 5, 6, 5 + LIKE_LENGTH), (-1,) * 4, causal=True)
    assert [(block.tokens, block.rows) for block in segments.blocks(torch.device("cpu"))] == [(16, 3), (13, 1)]


def test_the_varlen_plan_of_a_family() -> None:
    plan = FAMILY.varlen(torch.device("cpu"))
    assert plan.cu_seqlens_q.tolist() == [0, 3, 7, 9, 12, 15]
    assert plan.cu_seqlens_k.tolist() == [0, 3, 7, 13, 20, 27]
    assert (plan.max_seqlen_q, plan.max_seqlen_k) == (4, 7)
    parent = [3, 4, 5, 6]
    assert plan.key_tokens.tolist() == [0, 1, 2, *parent, *parent, 7, 8, *parent, 9, 10, 11, *parent, 12, 13, 14]


def test_without_families_keys_stand_as_tokens_do() -> None:
    plan = Segments((2, 3), (-1, -1)).varlen(torch.device("cpu"))
    assert plan.key_tokens is None and plan.cu_seqlens_k is plan.cu_seqlens_q


def test_plans_are_made_once_for_all_layers() -> None:
    segments, device = Segments((2, 3), (-1, -1)), torch.device("cpu")
    assert segments.blocks(device) is segments.blocks(device)
    assert segments.varlen(device) is segments.varlen(device)


def torch_varlen_attn() -> Callable[..., Tensor]:
    return pytest.importorskip("torch.nn.attention.varlen").varlen_attn


def test_a_varlen_attn_without_the_options_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_varlen_attn() is torch_varlen_attn()

    def of_torch_2_10(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool = False
    ) -> None: ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch_2_10)
    assert find_varlen_attn() is None


def test_torch_varlen_is_called_by_flash_attentions_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> Tensor:
        calls.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})
        causal = window_size == (-1, 0)
        return reference_varlen(*args, dropout_p=0, softmax_scale=scale, causal=causal)

    checked = create_autospec(torch_varlen_attn(), side_effect=varlen_attn)  # refuses what torch's does not take
    monkeypatch.setattr(attention, "varlen_attn", checked)
    for segments in (FAMILY, Segments.apart((2, 3))):
        inputs = states(segments)
        value = varlen_attention(*inputs, segments, 0.5, kernel=torch_varlen)
        torch.testing.assert_close(value, grouped_attention(*inputs, segments, 0.5), rtol=0, atol=1e-12)
    assert calls == [
        {"scale": 0.5, "window_size": (-1, 0), "enable_gqa": True},
        {"scale": 0.5, "window_size": (-1, -1), "enable_gqa": True},
    ]


def test_the_kernel_is_chosen_by_device_dtype_and_request(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = SimpleNamespace(flash_attn_varlen_func=reference_varlen)
    monkeypatch.setattr(attention, "require", lambda module, extra: flash)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda: True)
    sdpa, fa2 = PACKED["sdpa"], PACKED["flash_attention_2"]
    assert choose_kernel(sdpa, "cpu", torch.bfloat16, 0) is grouped_attention
    assert choose_kernel(sdpa, "cuda", torch.float32, 0) is grouped_attention
    assert choose_kernel(sdpa, "cuda", torch.bfloat16, 0.1) is grouped_attention
    assert choose_kernel(sdpa, "cuda", torch.bfloat16, 0).keywords == {"kernel": torch_varlen}
    assert choose_kernel(fa2, "cuda", torch.float16, 0.1).keywords == {"kernel": reference_varlen}
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda: False)
    assert choose_kernel(sdpa, "cuda", torch.bfloat16, 0) is grouped_attention
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda: True)
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert choose_kernel(sdpa, "cuda", torch.bfloat16, 0) is grouped_attention


def test_missing_flash_attention_is_named() -> None:
    with pytest.raises(ImportError, match=r"sentence-vipyloqwen\[flash-attn\]"):
        choose_kernel(PACKED["flash_attention_2"], "cuda", torch.bfloat16, 0)


def test_without_segments_the_replaced_implementation_is_called() -> None:
    seen: dict[str, Any] = {}

    def fallback(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.update(args=args, kwargs=kwargs)
        return args[1], None

    inputs = [torch.ones(1, 2, 3, 4)] * 3
    layer = SimpleNamespace(config=SimpleNamespace(_attn_implementation=PACKED["sdpa"], hidden_size=8), layer_idx=1)
    options = {"scaling": 0.1, "dropout": 0.2, "sliding_window": None}
    packed_attention(layer, *inputs, None, fallback=fallback, replaces="sdpa", **options)
    given, *others = seen["args"]
    assert others == [*inputs, None] and seen["kwargs"] == options
    assert (given.layer_idx, given.config._attn_implementation, given.config.hidden_size) == (1, "sdpa", 8)
    assert layer.config._attn_implementation == PACKED["sdpa"] and not hasattr(given, "no_such_attribute")


def test_heads_are_repeated_where_a_mask_would_keep_torch_from_its_fused_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [repeats_heads(masked, device) for device in ("cpu", "cuda") for masked in (False, True)] == [
        *(False, False),
        *(False, True),
    ]
    calls: list[tuple[int, bool, bool]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Any, enable_gqa: bool, **kwargs: Any) -> Tensor:
        calls.append((key.shape[1], enable_gqa, attn_mask is not None))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for device in ("cpu", "meta"):
        grouped_attention(*(part.to(device) for part in states(FAMILY)), FAMILY)
    alone = [(2, True, False)] * 2
    assert calls == [*alone, (2, True, True), *alone, (4, False, True)]


def test_repeated_heads_change_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = with_gradients(grouped_attention, FAMILY)
    monkeypatch.setattr(attention, "repeats_heads", lambda masked, device: True)
    for value, reference in zip(with_gradients(grouped_attention, FAMILY), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=1e-12)


def test_autocast_sets_the_dtype_of_attention() -> None:
    inputs = [part.detach().float().transpose(0, 1)[None] for part in states(FAMILY)]
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=PACKED["sdpa"]))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(module, *inputs, None, fallback=print, replaces="sdpa", segments=FAMILY)
    assert output.dtype == torch.bfloat16 and output.shape == (1, 15, 4, 8)

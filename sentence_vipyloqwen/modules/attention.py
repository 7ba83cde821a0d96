"""Attention over a packed sequence: every segment attends to its ancestors and causally to itself.

`Segments` says how a sequence of T tokens is cut. Three kernels carry it out, and give the same values:

- grouped: torch's `scaled_dot_product_attention`, once for segments of like length, once for the children of a
  parent. Runs anywhere.
- FlashAttention 2 and torch's own `varlen_attn`: one call for all segments, on a GPU in half precision.

A node of the forest that `packing.py` grows becomes a segment once it is laid out; a block is one or several segments
that share a call of the grouped kernel. The batch drawn there takes three calls, the last of them with a mask::

    packed    w w w | A A A A | r r | q q q | B B B s s
    segment   0       1         2     3       4
    block     0       1         2

    block 2      A A A A | r r | q q q | B B B s s
    r r          # # # #   % %                           #  seen whole
    q q q        # # # #         % % %                   %  seen up to the token itself
    B B B s s    # # # #                 % % % % %          the rest is not seen

They stand behind transformers' `AttentionInterface` under the names of `PACKED`. A layer that gets no segments (someone
calls the transformers model itself) does what the implementation would have done that it replaces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from sentence_vipyloqwen.extras import require

VARLEN_OPTIONS = {"scale", "window_size", "enable_gqa"}


def find_varlen_attn() -> Callable[..., Tensor] | None:
    """Torch's ``varlen_attn`` where it has the options used here, as since torch 2.12; else ``None``."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10
        return None
    return varlen_attn if inspect.signature(varlen_attn).parameters.keys() >= VARLEN_OPTIONS else None


varlen_attn = find_varlen_attn()

LIKE_LENGTH = 8
"""Segments whose lengths differ by less share a call, padded: for short ones a call costs more than its arithmetic."""

BRANCH_TOKENS = 256
"""Children of one parent share a call up to this many tokens, or the parent's length: they do not see each other."""

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Segments:
    """How a packed sequence is cut.

    Attributes:
        lengths: Tokens of each of the S segments, in their order.
        parents: For each, the segment before it whose tokens, and whose ancestors', it sees whole; -1 for none.
        causal: Whether a token sees only those before it in its own segment.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    causal: bool = True
    _made: dict[tuple[str, torch.device], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def apart(cls, lengths: Sequence[int], causal: bool = False) -> Segments:
        """Segments that see nothing but themselves, such as the images of the vision tower."""
        return cls(tuple(lengths), (-1,) * len(lengths), causal)

    def of_tokens(self, device: torch.device) -> Tensor:
        """(T,) the segment of each token."""
        lengths = torch.tensor(self.lengths, device=device)
        places = torch.arange(len(self.lengths), device=device)
        return torch.repeat_interleave(places, lengths, output_size=sum(self.lengths))  # a GPU is not waited for

    def ancestors(self, segment: int) -> list[int]:
        """The segments that a segment sees whole, the first of its row first."""
        path = []
        while (segment := self.parents[segment]) >= 0:
            path.append(segment)
        return path[::-1]

    def path(self, segment: int) -> list[int]:
        """The ancestors of a segment, then itself."""
        return [*self.ancestors(segment), segment]

    def blocks(self, device: torch.device) -> list[Block]:
        """The calls of the grouped kernel, made once for all layers."""
        return self._once("blocks", device, lambda: _blocks(self, device))

    def varlen(self, device: torch.device) -> VarlenPlan:
        """The arguments of a varlen kernel, made once for all layers."""
        return self._once("varlen", device, lambda: _varlen_plan(self, device))

    def _once(self, what: str, device: torch.device, make: Callable[[], Any]) -> Any:
        key = what, device
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


# --- grouped: torch's scaled_dot_product_attention ---


@dataclass(frozen=True)
class Block:
    """One call of the grouped kernel: segments of like length side by side, or the children of one parent in a row.

    Attributes:
        tokens: Tokens of its segments.
        rows: Rows of the call.
        gather: (rows * length,) for each place of the call its token, where rows are padded.
        keep: (tokens,) for each token its place in the call, where rows are padded.
        ancestors: Blocks whose tokens all of these see.
        mask: (tokens, ancestors' tokens + tokens) what each token sees, where there are ancestors.
    """

    tokens: int
    rows: int
    gather: Tensor | None = None
    keep: Tensor | None = None
    ancestors: tuple[int, ...] = ()
    mask: Tensor | None = None


def _blocks(segments: Segments, device: torch.device) -> list[Block]:
    groups = _groups(segments)
    block_of = {member: index for index, members in enumerate(groups) for member in members}
    blocks = []
    for members in groups:
        lengths = torch.tensor([segments.lengths[member] for member in members])
        if ancestors := segments.ancestors(members.start):
            prefix = sum(segments.lengths[ancestor] for ancestor in ancestors)
            blocks.append(_branch(lengths, prefix, tuple(block_of[ancestor] for ancestor in ancestors), device))
        else:
            blocks.append(_side_by_side(lengths, device))
    return blocks


def _groups(segments: Segments) -> list[range]:
    """Which segments share a call: neighbours."""
    parents, parental = segments.parents, set(segments.parents)
    groups: list[range] = []
    for segment, parent in enumerate(parents):
        last = groups[-1] if groups else range(0)
        joins = last and segment not in parental and last[-1] not in parental and parent == parents[last[0]]
        if joins and _fits(segments, last, segment):
            groups[-1] = range(last.start, segment + 1)
        else:
            groups.append(range(segment, segment + 1))
    return groups


def _fits(segments: Segments, members: range, segment: int) -> bool:
    lengths = segments.lengths
    if segments.parents[segment] < 0:  # in a block that is not causal, padding would be seen
        lowest, highest = min(lengths[segment], lengths[members.start]), max(lengths[segment], lengths[members.start])
        return highest - lowest < (LIKE_LENGTH if segments.causal else 1)
    prefix = sum(lengths[ancestor] for ancestor in segments.ancestors(segment))
    return sum(lengths[member] for member in members) + lengths[segment] <= max(BRANCH_TOKENS, prefix)


def _side_by_side(lengths: Tensor, device: torch.device) -> Block:
    """A block of segments without ancestors."""
    tokens = int(lengths.sum())
    longest = int(lengths.max())
    if tokens == longest * len(lengths):
        return Block(tokens, len(lengths))
    real = torch.arange(longest) < lengths[:, None]  # (n, longest)
    place = torch.arange(longest) + (lengths.cumsum(0) - lengths)[:, None]
    gather = place.where(real, 0)  # padding stands behind its row, where causal attention does not look
    return Block(tokens, len(lengths), gather.flatten().to(device), real.flatten().nonzero().squeeze(1).to(device))


def _branch(lengths: Tensor, prefix: int, ancestors: tuple[int, ...], device: torch.device) -> Block:
    """A block of children of one parent, behind a prefix of so many tokens in these blocks."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (tokens,)
    own = (owner[:, None] == owner).tril()
    mask = torch.cat([own.new_ones(len(owner), prefix), own], dim=1)
    return Block(len(owner), 1, ancestors=ancestors, mask=mask.to(device))


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention by groups of segments.

    Args:
        query: (T, heads, D).
        key: (T, key-value heads, D); their number divides that of the heads.
        value: (T, key-value heads, D).
        segments: How the T tokens are cut.
        scale: Factor of the scores; 1 / sqrt(D) by default.
        dropout: Probability of dropping an attention weight.

    Returns:
        (T, heads, D).
    """
    blocks = segments.blocks(query.device)
    sizes = [block.tokens for block in blocks]
    queries, keys, values = (states.split(sizes) for states in (query, key, value))
    attend = partial(_attend, causal=segments.causal, scale=scale, dropout=dropout)
    outputs = []
    for index, block in enumerate(blocks):
        seen = (*block.ancestors, index)
        outputs.append(attend(block, queries[index], _joined(keys, seen), _joined(values, seen)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _joined(parts: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return parts[indices[0]] if len(indices) == 1 else torch.cat([parts[index] for index in indices])


def _attend(block: Block, *states: Tensor, causal: bool, scale: float | None, dropout: float) -> Tensor:
    if block.gather is not None:
        states = tuple(part.index_select(0, block.gather) for part in states)
    query, key, value = (part.unflatten(0, (block.rows, -1)).transpose(1, 2) for part in states)  # (n, heads, L, D)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and repeats_heads(block.mask is not None, query.device.type):
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=block.mask,
        is_causal=causal and block.mask is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output = output.transpose(1, 2).flatten(0, 1)  # (n * L, heads, D)
    return output if block.keep is None else output.index_select(0, block.keep)


def repeats_heads(masked: bool, device: str) -> bool:
    """Whether keys and values of fewer heads are repeated before a call, not by it.

    With a mask, an accelerator's fused kernels refuse ``enable_gqa``, and torch would fall back to plain products.
    """
    return masked and device != "cpu"


# --- varlen: FlashAttention 2, and torch's own ---


@dataclass(frozen=True)
class VarlenPlan:
    """The segments as a varlen kernel takes them: keys may be more than queries, and the last of each are level.

    Attributes:
        cu_seqlens_q: (S + 1,) int32, where each segment's queries begin.
        cu_seqlens_k: (S + 1,) int32, where its keys begin: those of its ancestors, then its own. The very same tensor
            where no segment has a parent.
        max_seqlen_q: Most queries of a segment.
        max_seqlen_k: Most keys of a segment.
        key_tokens: (K,) the token of each key; ``None`` where keys stand as tokens do. K is at most twice the tokens of
            the batch's rows, each counted whole: a row's path is that long, and a prefix that is a segment of its own
            stands before two rows at least. So large are the copies of keys and values that a layer makes.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_tokens: Tensor | None


def _varlen_plan(segments: Segments, device: torch.device) -> VarlenPlan:
    starts = [0, *torch.tensor(segments.lengths).cumsum(0).tolist()]
    cu_q = torch.tensor(starts, dtype=torch.int32, device=device)
    if max(segments.parents) < 0:
        longest = max(segments.lengths)
        return VarlenPlan(cu_q, cu_q, longest, longest, None)
    seen = [segments.path(segment) for segment in range(len(segments.lengths))]
    counts = torch.tensor([sum(segments.lengths[part] for part in path) for path in seen])
    keys = torch.cat([torch.arange(starts[part], starts[part + 1]) for path in seen for part in path])
    cu_k = F.pad(counts.cumsum(0), (1, 0)).to(device, torch.int32)
    return VarlenPlan(cu_q, cu_k, max(segments.lengths), int(counts.max()), keys.to(device))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None = None,
    dropout: float = 0.0,
    *,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention by one call over all segments.

    Args:
        query: (T, heads, D).
        key: (T, key-value heads, D).
        value: (T, key-value heads, D).
        segments: How the T tokens are cut.
        scale: Factor of the scores; 1 / sqrt(D) by default.
        dropout: Probability of dropping an attention weight.
        kernel: Called with the arguments of FlashAttention 2's ``flash_attn_varlen_func``.

    Returns:
        (T, heads, D).
    """
    plan = segments.varlen(query.device)
    if plan.key_tokens is not None:
        key, value = (part.index_select(0, plan.key_tokens) for part in (key, value))  # (K, key-value heads, D)
    return kernel(
        query,
        key,
        value,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=segments.causal,
    )


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    """Torch's ``varlen_attn`` by FlashAttention 2's arguments; it knows no dropout."""
    assert not dropout_p
    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )


# --- behind transformers' interface ---


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    fallback: Callable[..., Any],
    replaces: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' kind; with ``segments`` its batch is one packed sequence.

    Args:
        module: The attention layer that calls.
        query: (1, heads, T, D).
        key: (1, key-value heads, T, D).
        value: (1, key-value heads, T, D).
        attention_mask: For the fallback.
        fallback: What is called without segments.
        replaces: The name of the fallback, which it finds in the layer's configuration.
        scaling: Factor of the scores.
        dropout: Probability of dropping an attention weight.
        segments: How the T tokens are cut.
        **kwargs: For the fallback.

    Returns:
        (1, T, heads, D), and no weights.
    """
    if segments is None:
        layer = _Instead(module, config=_Instead(module.config, _attn_implementation=replaces))
        return fallback(layer, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    states = (part[0].transpose(0, 1).to(dtype) for part in (query, key, value))  # (T, heads, D)
    attend = choose_kernel(module.config._attn_implementation, device, dtype, dropout)
    return attend(*states, segments, scaling, dropout)[None], None


class _Instead:
    """An object with some of its attributes replaced, for whoever reads it."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self._original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@cache
def has_varlen_kernel() -> bool:
    """Whether the GPU runs torch's varlen kernel: NVIDIA's from Ampere on."""
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def choose_kernel(implementation: str, device: str, dtype: torch.dtype, dropout: float) -> Callable[..., Tensor]:
    """The fastest attention over segments that a device, a dtype and what is installed allow.

    FlashAttention 2 where it was asked for, else torch's varlen attention, both in half precision on CUDA; else groups.

    Raises:
        ImportError: If FlashAttention 2 was asked for and is not installed.
    """
    if device != "cuda" or dtype not in HALF:
        return grouped_attention
    if implementation == PACKED["flash_attention_2"]:
        return partial(varlen_attention, kernel=require("flash_attn", "flash-attn").flash_attn_varlen_func)
    if varlen_attn is None or dropout or not has_varlen_kernel():
        return grouped_attention
    return partial(varlen_attention, kernel=torch_varlen)


PACKED: Mapping[str, str] = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_fa2"}
"""Implementation as transformers names it -> the one of ours that stands in for it."""

for _name, _forward, _mask in (
    ("sdpa", sdpa_attention_forward, sdpa_mask),
    ("flash_attention_2", flash_attention_forward, flash_attention_mask),
):
    AttentionInterface.register(PACKED[_name], partial(packed_attention, fallback=_forward, replaces=_name))
    AttentionMaskInterface.register(PACKED[_name], _mask)

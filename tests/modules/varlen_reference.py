"""FlashAttention 2's varlen call in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_varlen(
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
    """What `flash_attn_varlen_func` computes: of each segment, the last query and the last key are level."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0
    outputs = []
    for q, k, v in zip(
        *(
            torch.tensor_split(part, cu[1:-1].long())
            for part, cu in ((query, cu_seqlens_q), (key, cu_seqlens_k), (value, cu_seqlens_k))
        ),
        strict=True,
    ):
        assert len(q) <= max_seqlen_q and len(k) <= max_seqlen_k
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)) if causal else None
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        states = (part.transpose(0, 1) for part in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*states, attn_mask=mask, scale=softmax_scale).transpose(0, 1))
    return torch.cat(outputs)

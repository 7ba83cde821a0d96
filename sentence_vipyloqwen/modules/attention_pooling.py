"""One vector for a row, of its packed tokens: their mean, weighed by a learned query."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from sentence_vipyloqwen.modules.mean_pooling import PACKED_EMBEDDINGS, PACKING
from sentence_vipyloqwen.modules.packing import Packing

ATTENTION = "attention"
"""The name of this pooling, beside those of Sentence Transformers' ``Pooling``."""

_WHERE = ("subfolder", "token", "cache_folder", "revision", "local_files_only")


class AttentionPooling(Module):
    """A weighted mean over every token, whose weights the model learns.

    The weights of a row are the softmax over its tokens of ``token . query / sqrt(width)``: one head of the
    self-attentive embedding of Lin et al. 2017 (https://arxiv.org/abs/1703.03130), with a scaled dot product in place
    of its two layers. The query begins at zero, and the embedding as exactly the mean.

    It is saved under its own name, as Sentence Transformers has no such module: the folder of a model that has it is
    **not portable**. ``ViPyloQwen("path")`` loads it as ever. Plain Sentence Transformers needs this package to be
    installed, and is to be told so: ``SentenceTransformer("path", trust_remote_code=True)`` gives the same vectors;
    without ``trust_remote_code`` it refuses the folder.

    Args:
        embedding_dimension: Width of a token, and of the embedding.
    """

    config_keys = ["embedding_dimension"]
    pooling_mode = ATTENTION

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__()
        self.embedding_dimension = embedding_dimension
        self.query = nn.Parameter(torch.zeros(embedding_dimension))

    def get_embedding_dimension(self) -> int:
        """Width of the embedding."""
        return self.embedding_dimension

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (B, dimensions) to the features.

        Args:
            features: A packed batch, or ``token_embeddings`` (B, L, width) with their ``attention_mask``.
            **kwargs: Accepted for Sentence Transformers' sake, without effect.
        """
        if PACKING in features:
            packing, tokens = features.pop(PACKING), features.pop(PACKED_EMBEDDINGS)
            rows = self._pool_packed(tokens, packing)
        else:
            tokens = features["token_embeddings"]
            rows = self._pool_padded(tokens, features)
        total = rows.weights.where(rows.weights > 0, 1)  # 0 of a row without tokens, else 1 at least
        pooled = rows.tokens / total[:, None]  # (B, H)
        features["sentence_embedding"] = pooled.to(tokens.dtype)
        return features

    def _pool_packed(self, tokens: Tensor, packing: Packing) -> _Sums:
        """A segment is summed once, whatever number of rows it stands in; a row is the sum of its segments."""
        segments = _sum(self._weigh(tokens), packing.segments.of_tokens(tokens.device), len(packing.segments.lengths))
        rows, members = packing.row_segments
        return _sum(_Sums(*(part[members] for part in segments)), rows, len(packing.lengths))

    def _pool_padded(self, tokens: Tensor, features: dict[str, Any]) -> _Sums:
        if "cu_seq_lens_q" in features:  # rows one behind the other, (1, T, H): Sentence Transformers' own packing
            bounds = features["cu_seq_lens_q"]
            count, lengths = len(bounds) - 1, bounds.diff()
        else:
            count, lengths = tokens.shape[:2]
        row = torch.arange(count, device=tokens.device).repeat_interleave(lengths)  # (N,)
        parts = self._weigh(tokens.flatten(0, 1))  # (B, L, H) to (N, H)
        if (mask := features.get("attention_mask")) is not None:
            parts = parts._replace(peak=parts.peak.masked_fill(mask.flatten() == 0, -math.inf))
        return _sum(parts, row, count)

    def _weigh(self, tokens: Tensor) -> _Sums:
        """Each of the (N, H) tokens by itself, in float32 at least."""
        wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
        # Not a matrix product: autocast would take it, and compute it in half precision.
        scores = (wide * self.query.to(wide.dtype)).sum(dim=1) / math.sqrt(self.embedding_dimension)  # (N,)
        return _Sums(scores, torch.ones_like(scores), wide)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> AttentionPooling:
        """Load what :meth:`save` wrote; a pickled ``pytorch_model.bin`` is refused.

        Raises:
            ValueError: If the folder has no ``model.safetensors``.
        """
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        if cls.load_file_path(model_name_or_path, filename="model.safetensors", **where) is None:
            raise ValueError(
                f"No model.safetensors for the attention pooling in {model_name_or_path!r}; "
                "pickled weights are not loaded."
            )
        return cls.load_torch_weights(model_name_or_path, model=super().load(model_name_or_path, **kwargs), **where)


class _Sums(NamedTuple):
    """The weighted sums of N groups of tokens; a token's weight is exp(score - peak of its group).

    Attributes:
        peak: (N,) the greatest score of each, so that no weight is above 1.
        weights: (N,) the sum of its weights.
        tokens: (N, H) the weighted sum of its tokens.
    """

    peak: Tensor
    weights: Tensor
    tokens: Tensor


def _sum(parts: _Sums, group: Tensor, groups: int) -> _Sums:
    """Sum groups into larger ones, the weights of each brought to the peak that they then have in common.

    A softmax by parts (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). No gradient flows through the
    peaks of the sums, which cancel out.

    Args:
        parts: N groups; single tokens to begin with.
        group: (N,) where each belongs.
        groups: How many there are then.
    """
    lowest = torch.finfo(parts.peak.dtype).min  # also the peak of a group without tokens, whose weights are 0
    peak = parts.peak.new_full((groups,), lowest).scatter_reduce(0, group, parts.peak.detach(), "amax")
    scale = (parts.peak - peak[group]).exp()  # (N,)
    weights = parts.weights.new_zeros(groups).index_add(0, group, scale * parts.weights)
    tokens = parts.tokens.new_zeros(groups, parts.tokens.shape[1])
    return _Sums(peak, weights, tokens.index_add(0, group, scale[:, None] * parts.tokens))

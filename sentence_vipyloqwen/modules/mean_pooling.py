"""The mean over every token of a row."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_vipyloqwen.modules.packing import Packing

PACKING, PACKED_EMBEDDINGS = "packing", "packed_embeddings"
"""Features that carry a packed batch from the model to the pooling: a `Packing`, and the tokens (T, hidden)."""


class MeanPooling(Pooling):
    """Sentence Transformers' ``Pooling``, mean over every token by default: image, prefix and text tokens alike.

    Saved and loaded as ``Pooling``. A folder that pools otherwise keeps its own mode; a packed batch is padded for it.
    """

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (B, dimensions) to the features."""
        if PACKING not in features:
            return super().forward(features, **kwargs)
        packing: Packing = features.pop(PACKING)
        tokens = features.pop(PACKED_EMBEDDINGS)
        if self.pooling_mode == "mean" and self.include_prompt:
            features["sentence_embedding"] = packing.mean(tokens)
            return features
        return super().forward({**features, "token_embeddings": packing.pad(tokens)}, **kwargs)

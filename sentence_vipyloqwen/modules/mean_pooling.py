"""One vector for a row, of its packed tokens: their mean, or the last of them."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_vipyloqwen.modules.packing import Packing

PACKING, PACKED_EMBEDDINGS = "packing", "packed_embeddings"
"""Features that carry a packed batch from the model to the pooling: a `Packing`, and the tokens (T, hidden)."""


class MeanPooling(Pooling):
    """Sentence Transformers' ``Pooling``, mean over every token by default: image, prefix and text tokens alike.

    Saved and loaded as ``Pooling``. A folder that pools otherwise keeps its own mode: the last token is taken from the
    packed batch as the mean is, for any other mode the batch is padded.
    """

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (B, dimensions) to the features."""
        if PACKING not in features:
            return super().forward(features, **kwargs)
        packing: Packing = features.pop(PACKING)
        tokens = features.pop(PACKED_EMBEDDINGS)
        packed_modes = {"mean": packing.mean, "lasttoken": packing.last}
        if self.include_prompt and self.pooling_mode in packed_modes:
            features["sentence_embedding"] = packed_modes[self.pooling_mode](tokens)
            return features
        return super().forward({**features, "token_embeddings": packing.pad(tokens)}, **kwargs)

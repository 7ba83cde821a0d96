"""The mean over every token of a row."""

from __future__ import annotations

from sentence_transformers.sentence_transformer.modules import Pooling


class MeanPooling(Pooling):
    """Sentence Transformers' ``Pooling``, mean over every token by default: image, prefix and text tokens alike.

    Saved and loaded as ``Pooling``. A folder that pools otherwise keeps its own mode.
    """

"""Models whose vectors are known, for tasks of mteb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule
from torch import Tensor

KeyOf = Callable[[str, Any], str]
"""A text with its prompt and an image, either of which may be missing -> what the vector is drawn from."""


class KnownEmbedder(InputModule):
    """Inputs of equal keys have equal vectors, others are nearly orthogonal; what was asked is kept."""

    config_keys: list[str] = []

    def __init__(self, key_of: KeyOf) -> None:
        super().__init__()
        self.key_of = key_of
        self.seen: list[str] = []
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.max_seq_length = 512

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text")]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return {"vectors": torch.stack([self._vector(item, prompt or "") for item in inputs])}

    def _vector(self, item: Any, prompt: str) -> Tensor:
        parts = item if isinstance(item, Mapping) else {"text": item}
        text = prompt + parts["text"] if "text" in parts else ""
        self.seen.append(text)
        seed = xxhash.xxh3_64_intdigest(self.key_of(text, parts.get("image")).encode()) % 2**62
        vector = torch.randn(256, generator=torch.Generator().manual_seed(seed))
        return vector / vector.norm()

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return features | {"sentence_embedding": features["vectors"] * self.weight}

    def get_embedding_dimension(self) -> int:
        return 256

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def known() -> Callable[[KeyOf], SentenceTransformer]:
    """Make a model that embeds by keys."""
    return lambda key_of: SentenceTransformer(modules=[KnownEmbedder(key_of)], device="cpu")

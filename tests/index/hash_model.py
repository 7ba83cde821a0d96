"""A tiny deterministic model: real ``encode``, vectors from hashes of what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import InputModule, Normalize
from torch import Tensor

from sentence_vipyloqwen.modules.images import open_image

VOCABULARY = 64


class HashEmbedder(InputModule):
    """Each word, and each image as a whole, picks one row of a random table; the vector is their mean."""

    config_keys = ["dim"]

    def __init__(self, dim: int = 32, dtype: torch.dtype = torch.float32, max_seq_length: int = 64) -> None:
        super().__init__()
        self.dim = dim
        self.max_seq_length = max_seq_length
        table = torch.randn(VOCABULARY, dim, generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table.to(dtype))
        self.steps = torch.nn.Buffer(torch.tensor(7))  # a tensor without dimensions, as batch norm has

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text"), "message"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        counts = torch.zeros(len(inputs), VOCABULARY)
        for row, item in enumerate(inputs):
            for key in self._keys(item, prompt or ""):
                counts[row, key % VOCABULARY] += 1
        return {"counts": counts}

    def _keys(self, item: Any, prompt: str) -> list[int]:
        assert isinstance(item, Mapping), "the index hands over dicts only"
        assert set(item) <= {"text", "image"}
        assert all(item.values()), "the index drops empty parts"
        words = (prompt + item.get("text", "")).encode().split()
        images = [open_image(image).tobytes() for image in item.get("image", [])]
        return [xxhash.xxh3_64_intdigest(value) for value in [*words, *images]]

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        return features | {"sentence_embedding": features["counts"].to(self.table.dtype) @ self.table}

    def get_embedding_dimension(self) -> int:
        return self.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def make_hash_model(truncate_dim: int | None = None, prompts: dict[str, str] | None = None, **kwargs: Any):
    return SentenceTransformer(
        modules=[HashEmbedder(**kwargs), Normalize()],
        prompts={"ocr": "<ocr> "} if prompts is None else prompts,
        truncate_dim=truncate_dim,
        device="cpu",
    )

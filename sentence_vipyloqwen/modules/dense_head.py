"""The linear map from the language model's width to the embedding."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn


class DenseHead(Dense):
    """Sentence Transformers' ``Dense``, saved and loaded as that, but never from pickled weights."""

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start from a random (semi-)orthogonal map, which keeps the angles of the base model as far as they fit.

        Args:
            seed: Seed of the draw; the global random state is left alone.
        """
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(self.linear.weight.shape, dtype=torch.float32)
        self.linear.weight.copy_(nn.init.orthogonal_(weight, generator=generator))

    @classmethod
    def load_torch_weights(cls, model_name_or_path: str, model: nn.Module | None = None, **hub_kwargs: Any) -> Any:
        """Load ``model.safetensors``; a pickled ``pytorch_model.bin`` is refused.

        Raises:
            ValueError: If the folder has no ``model.safetensors``.
        """
        if cls.load_file_path(model_name_or_path, filename="model.safetensors", **hub_kwargs) is None:
            raise ValueError(
                f"No model.safetensors for the dense head in {model_name_or_path!r}; pickled weights are not loaded."
            )
        return super().load_torch_weights(model_name_or_path, model=model, **hub_kwargs)

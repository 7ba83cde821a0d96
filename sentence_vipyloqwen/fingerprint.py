"""What a model is, as far as its vectors go: two models with equal fingerprints may share an index.

Only facts are read that a ``ViPyloQwen`` and a stock ``SentenceTransformer`` of the same folder both have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import torch
import xxhash
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.hashing import hash_tensors

_MODULE_FACTS = ("pooling_mode", "include_prompt", "activation_function")
_IMAGE_FACTS = ("image_mean", "image_std", "rescale_factor", "resample", "patch_size", "merge_size")


@dataclass(frozen=True)
class Fingerprint:
    """What decides a model's vectors.

    Attributes:
        weights: xxh3-128 of every tensor of the state dict: name, dtype, shape and bytes (32 hexadecimal digits). Of a
            quantised model, those of the float model that it was made of.
        dim: Dimensions of an embedding, after truncation.
        prompts: Prompt name -> text, empty ones left out: they change nothing.
        default_prompt_name: Name of the prompt that is used where none is asked for.
        processing: What else changes a vector: ``max_seq_length`` (tokens), ``min_pixels`` and ``max_pixels`` of an
            image, how its pixels become patches (``image_mean``, ``image_std``, ``rescale_factor``, ``resample``,
            ``patch_size``, ``merge_size``), ``vocabulary`` (a hash), ``modules`` (pooling and activations),
            ``quantize`` (``"int8"``; absent for a float model).
    """

    weights: str
    dim: int
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    processing: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """All of it as 16 hexadecimal digits: a name for messages, not for comparison."""
        return xxhash.xxh3_64_hexdigest(_canonical(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: If a field is missing or unknown.
        """
        allowed = {field.name for field in fields(cls)}
        if set(data) != allowed:
            raise ValueError(f"a fingerprint has the fields {sorted(allowed)}, got {sorted(data)}")
        return cls(**data)

    def differences(self, other: Fingerprint) -> list[str]:
        """Names of the facts in which two fingerprints differ, e.g. ``["dim", "processing.max_pixels"]``."""
        mine, theirs = self._flat(), other._flat()
        return [name for name in mine | theirs if mine.get(name) != theirs.get(name)]

    def may_query(self, index: Fingerprint) -> bool:
        """Whether a model of this fingerprint may query an index of that one.

        It may if the two are equal, or if they are a float model and the quantised model made of it, either way round:
        their vectors differ, but by so little that they rank alike.
        """
        return set(self.differences(index)) <= {"processing.quantize"}

    def _flat(self) -> dict[str, Any]:
        flat = self.to_dict()
        processing = flat.pop("processing")
        return flat | {f"processing.{name}": value for name, value in processing.items()}

    def __str__(self) -> str:
        return f"{self.digest} (weights {self.weights[:8]}, {self.dim} dimensions)"


def fingerprint(model: SentenceTransformer) -> Fingerprint:
    """Take a model's fingerprint.

    Reads every weight once, so it costs about as long as copying the model to the CPU's memory. The same weights in
    another dtype have another fingerprint, as they give other vectors.

    Args:
        model: A ``ViPyloQwen`` or any ``SentenceTransformer``.

    Raises:
        ValueError: If the model does not know its embedding dimension.
    """
    dim = model.get_embedding_dimension()
    if dim is None:
        raise ValueError("The model does not tell its embedding dimension (get_embedding_dimension() is None).")
    return Fingerprint(
        weights=_weights(model),
        dim=dim,
        prompts={name: text for name, text in model.prompts.items() if text},
        default_prompt_name=model.default_prompt_name,
        processing=_processing(model),
    )


def _weights(model: SentenceTransformer) -> str:
    quantization = getattr(model, "quantization", None)
    return quantization.float_weights if quantization else hash_tensors(model.state_dict().items())


def _processing(model: SentenceTransformer) -> dict[str, Any]:
    image_processor = _part(model, "image_processor")
    facts = {
        "max_seq_length": model.max_seq_length,
        **_pixel_budget(image_processor),
        **{name: _plain(getattr(image_processor, name, None)) for name in _IMAGE_FACTS},
        "vocabulary": _hash_vocabulary(_part(model, "tokenizer")),
        "modules": [_module_facts(module) for module in model],
        "quantize": getattr(getattr(model, "quantization", None), "mode", None),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _part(model: SentenceTransformer, name: str) -> Any | None:
    """A part of the first module, which holds it itself (ours) or in its ``processor`` (stock)."""
    first = model[0]
    part = getattr(first, name, None)
    return part if part is not None else getattr(getattr(first, "processor", None), name, None)


def _pixel_budget(image_processor: Any | None) -> dict[str, int | None]:
    # Qwen2-VL's processor keeps its pixel budget under the names of edges.
    size = dict(getattr(image_processor, "size", None) or {})
    return {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}


def _hash_vocabulary(tokenizer: Any | None) -> str | None:
    if not hasattr(tokenizer, "get_vocab"):
        return None
    return xxhash.xxh3_64_hexdigest(_canonical(tokenizer.get_vocab()))


def _module_facts(module: torch.nn.Module) -> dict[str, Any]:
    return {name: _plain(getattr(module, name)) for name in _MODULE_FACTS if hasattr(module, name)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Enum):  # a resampling filter
        return value.value
    return type(value).__name__ if callable(value) else value


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()

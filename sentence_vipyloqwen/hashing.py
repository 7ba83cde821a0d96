"""A hash of a model's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """xxh3-128 of every tensor: name, dtype, shape and bytes; 32 hexadecimal digits. Order does not count."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, for numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

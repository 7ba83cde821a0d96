"""What ranks must agree on: an error, and the number of forward passes. A process by itself agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from sentence_transformers.util import all_gather, get_world_size
from torch import Tensor
from torch import distributed as dist

Result = TypeVar("Result")


def of_all_ranks(values: Tensor) -> Tensor:
    """(ranks, ...) the tensors of all ranks, which are of one shape and dtype; no gradients."""
    return all_gather(values[None]) if get_world_size() > 1 else values[None]


def missing_forwards(own: int, device: torch.device) -> int:
    """How many forward passes this rank lacks to run as many as the rank with the most.

    Sharded and wrapped models exchange weights, gradients or buffers in each pass, so ranks that run fewer would leave
    the others waiting.

    Args:
        own: How many this rank has something to do in.
        device: Where ranks exchange tensors.
    """
    return _most_of_ranks(own, device) - own


def _most_of_ranks(value: int, device: torch.device) -> int:
    return int(of_all_ranks(torch.tensor(value, device=device)).max())


def raise_together(work: Callable[[], Result], device: torch.device) -> Result:
    """Do some work; if a rank finds a ``ValueError``, every rank raises it, lest the others wait for that one for ever.

    Args:
        work: What this rank does; nothing in it waits for other ranks.
        device: Where ranks exchange tensors.

    Raises:
        ValueError: This rank's own, else one that repeats those of other ranks.
    """
    error: ValueError | None = None
    try:
        result = work()
    except ValueError as raised:
        error = raised
    if _most_of_ranks(int(error is not None), device):
        raise _error_of(error)
    return result


def _error_of(own: ValueError | None) -> ValueError:
    messages: list[str | None] = [str(own) if own else None] * get_world_size()
    if len(messages) > 1:
        dist.all_gather_object(messages, messages[0])
    others = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]
    return own or ValueError("; ".join(others))

"""What the ranks of a distributed run must do together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sentence_transformers.util.distributed import get_world_size
from torch import nn

try:
    from torch.distributed.fsdp import FSDPModule
except ImportError:  # torch is built without distributed
    FSDPModule = ()


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds a part of a module's weights, by FSDP 2 or ZeRO-3, and gathers the rest when it runs."""
    if get_world_size() == 1:
        return False
    units = any(isinstance(part, FSDPModule) for part in module.modules())
    return units or any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Compute without gradients: in torch's inference mode, but for a sharded module.

    FSDP gathers weights into tensors that it keeps. Those made in inference mode could not be written to in training.
    """
    with torch.no_grad(), torch.inference_mode(not is_sharded(module)):
        yield


def runs_together(module: nn.Module) -> bool:
    """Whether a rank that leaves a module out of a forward pass makes the others wait for ever.

    So it is with a sharded module, whose weights all ranks gather together, and with a module in training, whose
    gradients they add up together. A single process, and ranks that only embed, are free.
    """
    if get_world_size() == 1:
        return False
    trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return trains or is_sharded(module)

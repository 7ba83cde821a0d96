"""One embedding space for text and images on Qwen2-VL, as a plugin for Sentence Transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_vipyloqwen.index import VectorIndex
    from sentence_vipyloqwen.losses import CachedPrefixRoutedLoss, PrefixRoutedLoss
    from sentence_vipyloqwen.model import ViPyloQwen
    from sentence_vipyloqwen.tasks import TASKS
    from sentence_vipyloqwen.train.dataset import load_tasks

__all__ = ["TASKS", "CachedPrefixRoutedLoss", "PrefixRoutedLoss", "VectorIndex", "ViPyloQwen", "load_tasks"]

_HOMES = {
    "TASKS": "tasks",
    "CachedPrefixRoutedLoss": "losses",
    "PrefixRoutedLoss": "losses",
    "VectorIndex": "index",
    "ViPyloQwen": "model",
    "load_tasks": "train.dataset",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `vipyloqwen --help` needs neither torch nor faiss."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

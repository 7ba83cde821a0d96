"""One embedding space for text and images on Qwen2-VL, as a plugin for Sentence Transformers."""

from __future__ import annotations

from sentence_vipyloqwen.index import VectorIndex
from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.tasks import TASKS
from sentence_vipyloqwen.train.dataset import load_tasks

__all__ = ["TASKS", "PrefixRoutedLoss", "VectorIndex", "ViPyloQwen", "load_tasks"]

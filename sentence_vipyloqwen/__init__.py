"""One embedding space for text and images on Qwen2-VL, as a plugin for Sentence Transformers."""

from __future__ import annotations

from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.tasks import TASKS

__all__ = ["TASKS", "ViPyloQwen"]

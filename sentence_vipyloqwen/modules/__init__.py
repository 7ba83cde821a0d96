"""The modules of a model, in their order: Qwen2-VL, mean or attention pooling, dense head."""

from __future__ import annotations

from sentence_vipyloqwen.modules.attention_pooling import AttentionPooling
from sentence_vipyloqwen.modules.dense_head import DenseHead
from sentence_vipyloqwen.modules.mean_pooling import MeanPooling
from sentence_vipyloqwen.modules.qwen2_vl import Qwen2VLTransformer

__all__ = ["AttentionPooling", "DenseHead", "MeanPooling", "Qwen2VLTransformer"]

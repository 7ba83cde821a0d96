"""Pooling of a packed batch against that of the padded one, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_vipyloqwen.modules import MeanPooling
from sentence_vipyloqwen.modules.mean_pooling import PACKED_EMBEDDINGS, PACKING
from sentence_vipyloqwen.modules.packing import pack


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling_mode", ["mean", "cls", "lasttoken", "max", ("mean", "max")])
def test_every_mode_gives_what_it_gives_of_the_padded_batch(pooling_mode: Any, side: str) -> None:
    rows = [[10, 11, 12], [13], [10, 11, 12], [14, 15]]
    left = [side == "left" and 3 - len(row) for row in rows]
    features = {
        "input_ids": torch.tensor([[0] * n + row + [0] * (3 - n - len(row)) for n, row in zip(left, rows, strict=True)])
    }
    features["attention_mask"] = (features["input_ids"] > 0).long()
    packing = pack(features, merge_size=2, image_pad=1)
    tokens = torch.randn(len(packing.source), 8, generator=torch.Generator().manual_seed(0))
    packed = MeanPooling(8, pooling_mode)({**features, PACKING: packing, PACKED_EMBEDDINGS: tokens})
    padded = Pooling(8, pooling_mode)({**features, "token_embeddings": packing.pad(tokens)})
    torch.testing.assert_close(packed["sentence_embedding"], padded["sentence_embedding"])
    assert PACKING not in packed and PACKED_EMBEDDINGS not in packed


def test_a_padded_batch_is_pooled_as_ever() -> None:
    features = {"token_embeddings": torch.randn(2, 3, 8), "attention_mask": torch.ones(2, 3)}
    pooled = MeanPooling(8)(dict(features))["sentence_embedding"]
    torch.testing.assert_close(pooled, features["token_embeddings"].mean(dim=1))

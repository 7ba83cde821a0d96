"""The floating-point operations that an encode cannot do without, and the rate at which this machine could do them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sentence_vipyloqwen import ViPyloQwen

PRODUCT_TOKENS = 2048
"""Rows of the matrix products that are timed: tokens, or patches, of a batch."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations, by the tower that does them: their matrices differ in shape, and so in rate.

    Attributes:
        language: Of the language model and the dense head.
        vision: Of the vision tower.
    """

    language: float = 0.0
    vision: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.language + other.language, self.vision + other.vision)

    def __mul__(self, factor: float) -> Work:
        return Work(self.language * factor, self.vision * factor)

    def seconds(self, rates: Work) -> float:
        """The time it takes at the rates, operations a second, of the two towers' matrix products."""
        return self.language / rates.language + self.vision / rates.vision


@dataclass(frozen=True)
class Costs:
    """What a token, a patch and a row cost in a model's forward.

    A linear layer of n weights costs 2n a token. Attention costs 4 * width a layer for each pair of a query and a key
    it sees: 2 * width for the score, 2 * width for the sum of values. Norms, rotations, softmax and activations are not
    counted.

    Attributes:
        token: Linear layers of the language model, for one token.
        token_pair: Attention of the language model, for a token and one that it sees.
        patch: Patch embedding, blocks and merger of the vision tower, for one patch. A still image's two frames are
            equal, so the embedding needs one product with the sum of the two frames' filters.
        patch_pair: Attention of the vision tower, for two patches of an image.
        row: The dense head, for one row.
        merged: Patches that make one token.
    """

    token: int
    token_pair: int
    patch: int
    patch_pair: int
    row: int
    merged: int

    @classmethod
    def of(cls, model: ViPyloQwen) -> Costs:
        """Read them off a float model."""
        language, visual = model[0].model.language_model, model[0].model.visual
        attention = language.layers[0].self_attn.q_proj.out_features  # heads * head width
        embedding = visual.patch_embed.proj.weight.numel() // visual.config.temporal_patch_size
        merged = visual.spatial_merge_size**2
        return cls(
            token=2 * _weights(language.layers),
            token_pair=4 * attention * len(language.layers),
            patch=2 * (embedding + _weights(visual.blocks) + _weights(visual.merger) // merged),
            patch_pair=4 * visual.config.embed_dim * len(visual.blocks),
            row=2 * _weights(model[2]),
            merged=merged,
        )

    def tokens(self, start: int, stop: int) -> float:
        """The tokens ``start`` to ``stop`` of a row, in the language model; attention is causal: token p sees p + 1."""
        pairs = (stop * (stop + 1) - start * (start + 1)) / 2
        return (stop - start) * self.token + pairs * self.token_pair

    def image(self, patches: int) -> float:
        """An image of that many patches, in the vision tower; every patch sees every other."""
        return patches * (self.patch + patches * self.patch_pair)


def _weights(modules: nn.Module) -> int:
    return sum(module.weight.numel() for module in modules.modules() if isinstance(module, nn.Linear))


def useful_work(model: ViPyloQwen, inputs: Iterable[Any]) -> Work:
    """The least that the forward of these inputs takes.

    1. Only real tokens and patches count, no padding.
    2. An image counts once in the vision tower, however often it occurs.
    3. What rows begin with alike, the same images in the same order, counts once in the language model: attention is
       causal, so what follows changes nothing there.
    4. Equal inputs count once.

    This is the least over all inputs together, so a runtime that computes a page anew in the next batch does not get
    it counted twice.
    """
    costs, seen = Costs.of(model), set[Hashable]()
    return sum((_row_work(costs, model.preprocess([item]), seen) for item in inputs), start=Work())


def _row_work(costs: Costs, features: dict[str, Tensor], seen: set[Hashable]) -> Work:
    tokens = tuple(features["input_ids"][0].tolist())  # 1. a batch of one has no padding
    keys = tuple(key for key in features["image_keys"][0].tolist() if key)
    grids = features["image_grid_thw"].tolist() if keys else []
    work, start = Work(), 0
    for position, (_, height, width) in enumerate(grids):
        patches = height * width
        stop = start + patches // costs.merged + 2  # between <|vision_start|> and <|vision_end|>
        work += Work(vision=_unless_seen(seen, keys[position]) * costs.image(patches))  # 2.
        work += Work(language=_unless_seen(seen, keys[: position + 1]) * costs.tokens(start, stop))  # 3.
        start = stop
    return work + Work(_unless_seen(seen, (keys, tokens)) * (costs.tokens(start, len(tokens)) + costs.row))  # 4.


def _unless_seen(seen: set[Hashable], key: Hashable) -> int:
    """1 the first time, 0 ever after."""
    count = int(key not in seen)
    seen.add(key)
    return count


class MatrixProducts:
    """The float32 matrix products of one layer, nothing else: tokens x hidden by hidden x intermediate, and so on.

    Args:
        layer: A layer of the model; each of its ``nn.Linear`` weights is multiplied.
        repeats: How often they are run in one call.

    Attributes:
        flops: Floating-point operations of one call.
    """

    def __init__(self, layer: nn.Module, repeats: int = 10) -> None:
        weights = [module.weight.detach() for module in layer.modules() if isinstance(module, nn.Linear)]
        self.operands = [(torch.randn(PRODUCT_TOKENS, weight.shape[1]), weight.T) for weight in weights]
        self.outputs = [torch.empty(PRODUCT_TOKENS, len(weight)) for weight in weights]
        self.repeats = repeats
        self.flops = 2 * PRODUCT_TOKENS * sum(weight.numel() for weight in weights) * repeats

    @torch.inference_mode()
    def __call__(self) -> None:
        """Run them, into memory that is there already: the highest rate to hold anything against."""
        for _ in range(self.repeats):
            for (left, right), output in zip(self.operands, self.outputs, strict=True):
                torch.mm(left, right, out=output)

"""The patch embedding as a product, against the convolution it replaces, with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules.patch_projection import PatchProjection

Picture = Callable[..., Image.Image]


def convolution(dtype: torch.dtype = torch.float64) -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(3, 8, (2, 14, 14), stride=(2, 14, 14), bias=True).to(dtype)


def frames(count: int = 5) -> Tensor:
    """(count, 3, 1, 14, 14)"""
    return torch.randn(count, 3, 1, 14, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_it_is_the_convolution() -> None:
    reference = convolution()
    projection = PatchProjection(reference)
    expected = reference(frames().expand(-1, -1, 2, -1, -1)).flatten(1)
    assert (projection(frames().flatten(1)) - expected).abs().max() < 1e-12
    both_frames = frames(10).reshape(5, 3, 2, 14, 14)
    assert (projection(both_frames.flatten(1)) - reference(both_frames).flatten(1)).abs().max() < 1e-12


class Doubled(nn.Module):
    """Stands in the convolution's place, as an adapter does."""

    def __init__(self, base: nn.Conv3d) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, patches: Tensor) -> Tensor:
        return 2 * self.base(patches)


def test_a_module_in_the_convolutions_place_is_called() -> None:
    reference = convolution()
    projection = PatchProjection(Doubled(reference))
    for patches in (frames(), frames(10).reshape(5, 3, 2, 14, 14)):
        expected = 2 * reference(patches.expand(-1, -1, 2, -1, -1)).flatten(1)
        assert (projection(patches.flatten(1)) - expected).abs().max() < 1e-12


def test_the_names_are_those_of_the_stock_layout(model: ViPyloQwen) -> None:
    assert isinstance(model[0].model.visual.patch_embed, PatchProjection)
    assert "visual.patch_embed.proj.weight" in model[0].model.state_dict()


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_one_frame_is_as_exact_as_two(autocast: bool) -> None:
    """The sum of two filters is not rounded."""
    reference = convolution(torch.float32 if autocast else torch.bfloat16)
    projection, exact = PatchProjection(reference), convolution(torch.bfloat16).double()
    patches = frames(500)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        one, two = (projection(part.flatten(1)) for part in (patches, patches.expand(-1, -1, 2, -1, -1)))
    assert one.dtype == two.dtype == torch.bfloat16
    expected = exact(patches.expand(-1, -1, 2, -1, -1)).flatten(1)
    assert (one - expected).abs().mean() < 1.05 * (two - expected).abs().mean()


def test_a_lora_adapter_of_it_takes_part(model: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    model.add_adapter(LoraConfig(r=4, target_modules=["qkv", "proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    inputs = [{"image": picture(56, 84), "text": "a"}]  # a size that needs no resizing, in which stock differs
    packed = model(model.preprocess(inputs))["sentence_embedding"]
    (packed * torch.arange(packed.shape[1])).sum().backward()
    adapter = {name: parameter for name, parameter in model.named_parameters() if "patch_embed.proj.lora" in name}
    assert len(adapter) == 2 and all(parameter.grad.abs().max() > 0 for parameter in adapter.values())
    model.eval()
    expected = model.encode(inputs)
    model[0].packed = False
    assert abs(model.encode(inputs) - expected).max() < 1e-5
    model.save_pretrained(str(tmp_path), create_model_card=False)
    for loaded in (SentenceTransformer(str(tmp_path), device="cpu"), ViPyloQwen(tmp_path, device="cpu")):
        assert abs(loaded.encode(inputs) - expected).max() < 1e-5
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.zero_()
    assert abs(model.encode(inputs) - expected).max() > 1e-4

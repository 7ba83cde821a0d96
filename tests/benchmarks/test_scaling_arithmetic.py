"""The page's tables are the script's, its parameters those of the real model, its bytes those that torch keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import scaling_arithmetic
import torch
from flops import Costs
from scaling_arithmetic import BYTES_A_PATCH, BYTES_A_TOKEN, DATA, Data, Gpu, Parameters, RowWork, Run
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2VLConfig, Qwen2VLModel

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"

TOKEN = 2 * 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
PATCH = 2 * (588 * 1280 + 32 * (4 * 1280 * 1280 + 2 * 1280 * 5120) + (5120 * 5120 + 5120 * 1536) // 4)


def test_the_tables_of_the_page_are_those_that_the_script_prints() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition("<!-- arithmetic:start -->\n")[2].partition("<!-- arithmetic:end -->")[0]
    assert shown.strip() == scaling_arithmetic.tables(Run(), Gpu()).strip()


def test_operations_of_qwen2_vl_2b_by_hand() -> None:
    costs = Costs.of(scaling_arithmetic.make_model())
    assert costs == Costs(TOKEN, 4 * 1536 * 28, PATCH, 4 * 1280 * 32, 2 * 1536 * 1024, merged=4)


def test_parameters_of_qwen2_vl_2b() -> None:
    """1.54 and 0.665 billion, as the checkpoint has them; rank 16 on seven projections of 28 layers."""
    count = scaling_arithmetic.parameters(scaling_arithmetic.make_model())
    lora = 28 * 16 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert count == Parameters(1_310_340_608, 151_936 * 1536, 665_271_296, 1536 * 1024 + 1024, lora)
    assert count.total == 2_210_559_488


def test_the_published_run() -> None:
    run = Run()
    assert (run.rows, run.steps) == (768, 28_646)
    assert run.days * 86_400 / run.steps == pytest.approx(45.24, abs=0.01)


def test_work_of_a_row_by_hand() -> None:
    costs = Costs(token=2, token_pair=0, patch=3, patch_pair=0, row=5, merged=4)
    data = Data("x", 0.5, 2, 10, question=6, answer=4, text=8, padding=0.5, together=4)
    work = scaling_arithmetic.row_work(costs, data)
    assert work == RowWork(text=0.5 * 2 * 10 + 0.5 * 2 * 16 + 10, prefix=0.5 * 2 * 24, vision=0.5 * 2 * 40 * 3)
    assert work.padded(0.5) == 2 * (36 + 24) + 120
    assert (work.packed(), work.packed(4)) == (180, 36 + 36)


def test_seconds_follow_from_the_share_of_the_peak() -> None:
    run, gpu = Run(gpus=2, batch_size=1, accumulation=5), Gpu(peak=1.0, low=0.25, high=0.5)
    assert scaling_arithmetic.seconds_a_step(1e12, 3, run, gpu) == (30.0, 60.0)


def test_states_of_a_billion_parameters() -> None:
    count = Parameters(layers=600, embeddings=100, vision=250, head=50, lora=10)
    states = scaling_arithmetic.states(count, replace(Run(), gpus=2))
    assert states["full, sharded"] == 8_000
    assert states["full, each GPU whole"] == 16_000
    assert states["frozen tower, sharded"] == (750 * 16 + 250 * 4) / 2
    assert states["LoRA, each GPU whole"] == 950 * 4 + 60 * 16
    assert states["QLoRA, each GPU whole"] == pytest.approx(600 * 0.515875 + 350 * 4 + 60 * 16)


def test_tokens_and_patches_of_rows_on_shared_images() -> None:
    data = replace(DATA[1], images=2, image_tokens=10, question=3, answer=5)
    assert scaling_arithmetic.tokens_and_patches(data, 8, 4) == (2 * 24 + 8 * 8, 2 * 2 * 40)
    assert scaling_arithmetic.tokens_and_patches(data, 8, 1, anchors=True) == (8 * 27, 8 * 80)


# --- What torch keeps for the backward pass ---


def kept_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the distinct storages that a forward pass under autocast keeps, parameters excepted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    tensors: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


@pytest.fixture(scope="module")
def two_of_each() -> Qwen2VLModel:
    """Two layers and two blocks of full width."""
    text = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = {"hidden_size": 1536, "embed_dim": 1280, "depth": 2, "num_heads": 16, "mlp_ratio": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": 64, "rope_parameters": rope}
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))


def of_the_last(layers: nn.ModuleList, kept: Callable[[int], int]) -> float:
    """Bytes that the last layer keeps of a token: the difference that 8 more make, lest copies of weights count."""
    both = kept(16) - kept(8)
    last = layers[-1]
    del layers[-1]
    one = kept(16) - kept(8)
    layers.append(last)
    return (both - one) / 8


def test_bytes_that_a_layer_keeps_of_a_token(two_of_each: Qwen2VLModel) -> None:
    model = two_of_each.language_model

    def kept(tokens: int) -> int:
        inputs, places = torch.randn(1, tokens, 1536, requires_grad=True), torch.arange(tokens).expand(3, 1, tokens)
        return kept_bytes(model, lambda: model(inputs_embeds=inputs, position_ids=places, use_cache=False))

    assert of_the_last(model.layers, kept) == pytest.approx(BYTES_A_TOKEN, rel=0.15)


def test_bytes_that_a_block_keeps_of_a_patch(two_of_each: Qwen2VLModel) -> None:
    model = two_of_each.visual

    def kept(patches: int) -> int:
        grid = torch.tensor([[1, 2, patches // 2]])
        return kept_bytes(model, lambda: model(torch.randn(patches, 1176), grid_thw=grid))

    assert of_the_last(model.blocks, kept) == pytest.approx(BYTES_A_PATCH, rel=0.15)

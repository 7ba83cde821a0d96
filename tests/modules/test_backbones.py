"""Every backbone: packed against padded, against stock Sentence Transformers, saved, loaded, trained."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import BertConfig

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base
from sentence_vipyloqwen.modules import packed_forward
from sentence_vipyloqwen.modules.backbones import BACKBONES
from sentence_vipyloqwen.modules.vision_cache import VisionCache

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="module", params=list(BACKBONES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of each kind: of Qwen2.5-VL with windows, of Qwen3-VL with two deep features."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "layers": 3, "vision_size": 64, "vision_layers": 3}
    texts = ["hóa đơn số tiền là bao nhiêu?", "a red circle"] * 9
    return make_tiny_base(tmp_path_factory.mktemp("base"), texts, **sizes, model_type=request.param)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model, saved."""
    path = tmp_path_factory.mktemp("model")
    ViPyloQwen.create(base, embedding_dim=32, device="cpu").save_pretrained(str(path), create_model_card=False)
    return path


def inputs_of(model: ViPyloQwen, picture: Picture) -> list[Any]:
    """Of every kind; sides are those of whole tokens, so that nothing depends on who resizes."""
    side = model[0].image_processor.patch_size * 2
    a, b, c = picture(3 * side, 4 * side), picture(5 * side, 3 * side, seed=1), picture(2 * side, 2 * side, seed=2)
    return [
        "số tiền",
        a,
        {"image": a, "text": "<ocr> số tiền là bao nhiêu?"},
        {"image": [a, b], "text": "<vqa_multi> which?"},
        {"image": [b, c, a, b, a]},
        {"text": "<instr> a red circle"},
        {"image": c, "text": "a red circle"},
        {"image": a, "text": "<ocr> hóa đơn"},
    ]


def values_and_gradients(model: ViPyloQwen, inputs: list[Any]) -> list[torch.Tensor]:
    model.zero_grad()
    vectors = model(model.preprocess(inputs))["sentence_embedding"]
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    (vectors * weights).sum(dim=1).mean().backward()
    return [vectors.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize("chosen", [slice(None), slice(0, 1), slice(1, 2), slice(2, 5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_padded_batch(
    folder: Path, picture: Picture, chosen: slice, checkpointing: bool
) -> None:
    packed, padded = ViPyloQwen(folder, device="cpu"), ViPyloQwen(folder, device="cpu")
    inputs = inputs_of(packed, picture)
    assert packed[0]._packs
    padded[0].packed = False
    padded[0]._forward_padded(padded.preprocess(inputs))  # what it keeps of one batch is not used for another
    if checkpointing:
        packed.train().gradient_checkpointing_enable()
    results = [values_and_gradients(model, inputs[chosen]) for model in (packed, padded)]
    for left, right in zip(*results, strict=True):
        assert (left - right).abs().max().item() <= 1e-5


def test_the_padded_batch_is_that_of_untouched_transformers(folder: Path, picture: Picture) -> None:
    plain = ViPyloQwen(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
    packed = ViPyloQwen(folder, device="cpu")
    assert not plain[0]._packs
    inputs = inputs_of(plain, picture)
    np.testing.assert_allclose(packed.encode(inputs), plain.encode(inputs), atol=1e-5)


def test_vectors_and_token_ids_are_those_of_stock(folder: Path, picture: Picture) -> None:
    ours, stock = ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    inputs = inputs_of(ours, picture)
    left, right = (model.preprocess(inputs) for model in (ours, stock))
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "num_images_per_sample"):
        assert torch.equal(left[key], torch.as_tensor(right[key])), key
    for prompt in (None, "ocr"):
        allowed = [item for item in inputs if prompt is None or "<" not in str(item)]
        vectors = [model.encode(allowed, prompt_name=prompt) for model in (ours, stock)]
        np.testing.assert_allclose(*vectors, atol=1e-5)
    assert list(ours.state_dict()) == list(stock.state_dict())


def test_what_stock_saves_is_loaded(folder: Path, picture: Picture, tmp_path: Path) -> None:
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    left, right = ViPyloQwen(folder, device="cpu"), ViPyloQwen(tmp_path, device="cpu")
    inputs = inputs_of(left, picture)
    np.testing.assert_array_equal(left.encode(inputs), right.encode(inputs))


def test_a_step_of_training_is_kept(folder: Path, picture: Picture, tmp_path: Path) -> None:
    model = ViPyloQwen(folder, device="cpu")
    inputs = inputs_of(model, picture)
    columns = [model.preprocess(part) for part in ([inputs[1], inputs[4], inputs[6]], ["a", "b", "c"])]
    before = model.encode(inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    sum(PrefixRoutedLoss(model)(columns, None).values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model[0].model.visual.parameters())
    optimizer.step()
    after = model.encode(inputs)
    assert np.abs(after - before).max() > 1e-3
    model.save_pretrained(str(tmp_path), create_model_card=False)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(stock.encode(inputs), after, atol=1e-5)
    np.testing.assert_allclose(ViPyloQwen(tmp_path, device="cpu").encode(inputs), after, atol=1e-6)


def test_an_adapter_is_packed_as_well(folder: Path, picture: Picture) -> None:
    from peft import LoraConfig

    model = ViPyloQwen(folder, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "qkv", "proj"], init_lora_weights=False))
    results = []
    for packed in (True, False):
        model[0].packed = packed
        results.append(values_and_gradients(model, inputs_of(model, picture)))
    for left, right in zip(*results, strict=True):
        assert (left - right).abs().max().item() <= 1e-5


def test_the_vision_cache_keeps_all_that_a_tower_gives(folder: Path, picture: Picture, tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    model = ViPyloQwen(folder, device="cpu")
    inputs = inputs_of(model, picture)
    expected = model.encode(inputs)
    model[0].model.visual.requires_grad_(False)
    model[0].vision_cache = VisionCache.of(model[0].model.visual, model[0].image_processor, tmp_path)
    for _ in range(2):
        np.testing.assert_allclose(model.encode(inputs), expected, atol=1e-5)
    assert len(model[0].vision_cache) == 3


def test_a_rank_without_images_runs_the_whole_tower(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_forward, "runs_together", lambda module: True)
    model = ViPyloQwen(folder, device="cpu")
    for packed in (True, False):
        model[0].packed = packed
        model.zero_grad()
        model(model.preprocess(["a", "b c"]))["sentence_embedding"].sum().backward()
        assert all((parameter.grad == 0).all() for parameter in model[0].model.visual.parameters())


def test_copies_are_packed(folder: Path, picture: Picture) -> None:
    model = ViPyloQwen(folder, device="cpu")
    inputs = inputs_of(model, picture)
    expected = model.encode(inputs)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again[0]._packs
        np.testing.assert_allclose(again.encode(inputs), expected, atol=1e-6)


def test_the_saved_folder_names_the_processor(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    named = json.loads((folder / "processor_config.json").read_text())["processor_class"]
    assert named == BACKBONES[kind].processor_class


def test_another_type_is_refused_by_name(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    allowed = r"'qwen2_vl' \(Qwen2-VL\), 'qwen2_5_vl' \(Qwen2.5-VL\), 'qwen3_vl' \(Qwen3-VL\)"
    with pytest.raises(ValueError, match=f"holds a model of type 'bert'; allowed is {allowed}"):
        ViPyloQwen.create(tmp_path)

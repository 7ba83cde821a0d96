"""QLoRA on a CPU, by bitsandbytes: a run trains on a base in 4 bits and leaves, and measures, a folder of floats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import nn

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train import run
from sentence_vipyloqwen.train.evaluation import evaluate
from sentence_vipyloqwen.train.recipe import Recipe, load_recipe

INPUTS = ["a", "<ocr> b", "<instr> c d"]


@pytest.fixture
def recipe(base: Path, tmp_path: Path, picture: Callable[..., Image.Image]) -> Callable[..., Recipe]:
    """A recipe of a few steps on records with images and without; evaluated before, during and after."""
    records: list[dict[str, Any]] = []
    for i in range(4):
        picture(56, 56, seed=i).save(tmp_path / f"{i}.png")
        records += [
            {"task": "ocr", "anchor": {"image": [f"{i}.png"], "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}"},
        ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))

    def make(**settings: Any) -> Recipe:
        given = {"base": str(base), "train": str(data), "eval": str(data), "output": str(tmp_path / "run")}
        small = {"embedding_dim": 16, "batch_size": 2, "max_steps": 3, "eval_steps": 1, "learning_rate": 1e-2}
        return load_recipe(None, {**given, **small, "tuning": "qlora", "lora_r": 4, **settings})

    return make


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ViPyloQwen]:
    """The models that runs train."""
    models: list[ViPyloQwen] = []
    make = run.make_model

    def keep(*args: Any) -> ViPyloQwen:
        models.append(make(*args))
        return models[-1]

    monkeypatch.setattr(run, "make_model", keep)
    return models


def four_bit_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def test_a_run_trains_on_four_bits_and_measures_the_floats_it_leaves(
    recipe: Callable[..., Recipe], made: list[ViPyloQwen], tmp_path: Path
) -> None:
    result = run.train(recipe(), device="cpu")
    trained = made[0]
    layers = four_bit_layers(trained)
    assert len(layers) == 2 * 7
    assert all("language_model.layers" in name for name in layers)
    updates = {name: value for name, value in trained.named_parameters() if "lora_B" in name}
    assert len(updates) == 2 * 7
    assert all(value.abs().max() > 0 for value in updates.values())  # it began at 0

    assert four_bit_layers(result.model) == []
    assert (
        result.after.to_dict()
        == evaluate(ViPyloQwen(result.model_path, device="cpu"), tmp_path / "train.jsonl").to_dict()
    )
    vectors = ViPyloQwen(result.model_path, device="cpu").encode(INPUTS)
    np.testing.assert_allclose(
        SentenceTransformer(str(result.model_path), device="cpu").encode(INPUTS), vectors, atol=1e-5
    )
    untrained = ViPyloQwen(tmp_path / "run" / "base", device="cpu").encode(INPUTS)
    assert np.abs(untrained - vectors).max() > 1e-2
    assert (trained.encode(INPUTS) * vectors).sum(1).min() > 0.9  # what 4 bits round away is little


def test_the_gradients_are_those_of_the_base_in_floats_but_for_the_rounding(
    recipe: Callable[..., Recipe], made: list[ViPyloQwen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in a step after an evaluation, which must not change what the layers in 4 bits are."""
    found: list[torch.Tensor] = []
    step = SentenceTransformerTrainer.training_step

    def watched(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, model, *args, **kwargs)
        found.append(torch.cat([value.grad.flatten() for name, value in model.named_parameters() if "lora_B" in name]))
        return loss

    monkeypatch.setattr(SentenceTransformerTrainer, "training_step", watched)
    for tuning in ("qlora", "lora"):
        settings = {"tuning": tuning, "max_steps": 2, "learning_rate": 1e-6, "lora_dropout": 0.0}
        run.train(recipe(**settings, output=str(tmp_path / tuning)), device="cpu")
    assert len(found) == 4
    for quantised, plain in zip(found[:2], found[2:], strict=True):
        assert torch.cosine_similarity(quantised, plain, dim=0) > 0.9


def test_a_run_goes_on_to_the_bit(
    recipe: Callable[..., Recipe], made: list[ViPyloQwen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"save_steps": 1, "merge": False, "eval_steps": 0, "eval": None}
    whole = run.train(recipe(**settings, output=str(tmp_path / "whole")), device="cpu").model_path
    step = SentenceTransformerTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformerTrainer, "training_step", killed)
        run.train(recipe(**settings), device="cpu")
    resumed = run.train(recipe(**settings), device="cpu").model_path
    weights = [ViPyloQwen(path, device="cpu").state_dict() for path in (whole, resumed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

"""LoRA through a whole run: what is trained, resumed, saved and merged."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import Trainer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train import adapters
from sentence_vipyloqwen.train.adapters import AdapterTrainer, four_bits, load_adapter_state
from sentence_vipyloqwen.train.checkpoints import complete_checkpoints
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train

Make = Callable[..., Recipe]
Picture = Callable[..., Image.Image]
LORA = {"tuning": "lora", "lora_r": 4, "lora_alpha": 8, "max_steps": 4, "frozen": (), "learning_rates": {}}


@pytest.fixture
def inputs(picture: Picture) -> list[Any]:
    return ["a", "<ocr> a", {"image": picture(), "text": "<vqa_single> b"}, {"image": [picture(), picture(seed=1)]}]


def test_a_merged_adapter_is_a_portable_folder(recipe: Make, data: Path, inputs: list[Any], base: Path) -> None:
    result = train(recipe(**LORA, eval=str(data / "train.jsonl")), device="cpu")
    names = {path.name for path in result.model_path.rglob("*")}
    assert "adapter_config.json" not in names
    assert "model.safetensors" in names
    expected = result.model.encode(inputs)
    stock = SentenceTransformer(str(result.model_path), device="cpu").encode(inputs)
    assert (stock * expected).sum(1).min() > 0.9999
    np.testing.assert_allclose(ViPyloQwen(result.model_path, device="cpu").encode(inputs), expected, atol=1e-5)
    fresh = ViPyloQwen.create(base, 16, seed=42, device="cpu")
    assert np.abs(fresh.encode(inputs) - expected).max() > 1e-3
    # The adapter alone, which names its base.
    adapter = data / "run" / "adapter"
    assert not (adapter / "model.safetensors").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        data / "run" / "base"
    )
    np.testing.assert_allclose(ViPyloQwen(adapter, device="cpu").encode(inputs), expected, atol=1e-6)


def test_what_an_adapter_trains(recipe: Make, data: Path) -> None:
    model = train(recipe(**LORA, merge=False), device="cpu").model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "trainable_tokens" in name or "linear" in name for name in trained)
    assert any("language_model.layers.1.mlp.down_proj.lora_A" in name for name in trained)
    assert not any("visual" in name for name in trained)
    base = ViPyloQwen(data / "run" / "base", device="cpu").state_dict()
    now = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    frozen = [name for name in base if name in now and "linear" not in name and "embed_tokens" not in name]
    assert len(frozen) > 20
    assert all(torch.equal(base[name], now[name]) for name in frozen)


def test_the_query_of_attention_pooling_is_trained_and_saved_beside_an_adapter(
    recipe: Make, data: Path, inputs: list[Any]
) -> None:
    """As the dense head is: in the merged folder, in the adapter's, and on resuming from a checkpoint."""
    settings = {**LORA, "pooling": "attention", "save_steps": 2}
    result = train(recipe(**settings), device="cpu")
    query, expected = result.model[1].query, result.model.encode(inputs)
    assert query.any()
    merged, adapter = ViPyloQwen(result.model_path, device="cpu"), ViPyloQwen(data / "run" / "adapter", device="cpu")
    assert torch.equal(merged[1].query, query) and torch.equal(adapter[1].query, query)
    np.testing.assert_allclose(merged.encode(inputs), expected, atol=1e-5)
    stock = SentenceTransformer(str(result.model_path), device="cpu", trust_remote_code=True)
    assert (stock.encode(inputs) * expected).sum(1).min() > 0.9999

    base = ViPyloQwen(data / "run" / "base", device="cpu")
    assert not base[1].query.any()
    adapters.add_lora(base, r=4, alpha=8, dropout=0.0)
    load_adapter_state(base, data / "run" / "checkpoints" / "checkpoint-2")
    assert base[1].query.any() and not torch.equal(base[1].query, query)


def test_a_folder_of_the_adapter_alone_needs_its_base(recipe: Make, data: Path, inputs: list[Any]) -> None:
    result = train(recipe(**LORA, merge=False), device="cpu")
    assert (result.model_path / "adapter_model.safetensors").exists()
    assert not (data / "run" / "adapter").exists()
    stock = SentenceTransformer(str(result.model_path), device="cpu").encode(inputs)
    assert (stock * result.model.encode(inputs)).sum(1).min() > 0.9999


def test_a_run_with_an_adapter_goes_on_to_the_bit(recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout included. Resuming reads adapter and head, never a second base."""
    settings = {**LORA, "merge": False, "save_steps": 2, "lora_dropout": 0.2}
    whole = train(recipe(**settings, output=str(data / "whole")), device="cpu").model.state_dict()
    step = SentenceTransformerTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformerTrainer, "training_step", killed)
        train(recipe(**settings), device="cpu")
    loaded: list[Path] = []
    usual = load_adapter_state
    monkeypatch.setattr(
        adapters, "load_adapter_state", lambda model, folder: (loaded.append(folder), usual(model, folder))
    )
    resumed = train(recipe(**settings), device="cpu").model.state_dict()
    assert loaded == [data / "run" / "checkpoints" / "checkpoint-2"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_best_adapter_becomes_the_model(
    recipe: Make, data: Path, inputs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.4])
    monkeypatch.setattr(
        "sentence_vipyloqwen.train.evaluation.TasksEvaluator.__call__",
        lambda self, *args, **kwargs: {"tasks_mean": next(values)},
    )
    settings = {**LORA, "eval": str(data / "train.jsonl"), "eval_steps": 2, "best_metric": "mean"}
    model = train(recipe(**settings), device="cpu").model
    best, last = (
        ViPyloQwen(path, device="cpu").encode(inputs) for path in complete_checkpoints(data / "run" / "checkpoints")
    )
    np.testing.assert_allclose(model.encode(inputs), best, atol=1e-6)
    assert np.abs(best - last).max() > 1e-4


def test_a_finished_model_is_its_own_base(recipe: Make, data: Path, folder: Path) -> None:
    settings = {**LORA, "base": str(folder), "max_steps": 1, "embedding_dim": 32, "max_seq_length": None}
    train(recipe(**settings), device="cpu")
    assert not (data / "run" / "base").exists()
    with pytest.raises(ValueError, match="Setting embedding_dim is 16; the finished model .* has 32 and keeps it"):
        train(recipe(**{**settings, "embedding_dim": 16, "output": str(data / "other")}), device="cpu")


def test_another_adapter_is_refused(recipe: Make, data: Path, folder: Path) -> None:
    train(recipe(**{**LORA, "max_steps": 1}), device="cpu")
    model = ViPyloQwen(data / "run" / "base", device="cpu")
    adapters.add_lora(model, r=4, alpha=8, dropout=0.0, targets=r".*q_proj")
    with pytest.raises(ValueError, match="its adapter differs from the model's in"):
        load_adapter_state(model, data / "run" / "adapter")


def test_qlora_is_refused_where_its_library_lacks_it(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trains with it: `tests/integration/test_qlora.py`."""

    def quantize_4bit(values: torch.Tensor, quant_type: str) -> None:
        raise NotImplementedError(f"no {quant_type} on {values.device.type}")

    library = SimpleNamespace(__version__="0.1", functional=SimpleNamespace(quantize_4bit=quantize_4bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    told = "tuning is 'qlora'; bitsandbytes 0.1 has no NF4 for the device 'cpu': no nf4 on cpu. Allowed here are 'lora'"
    with pytest.raises(ValueError, match=told):
        train(recipe(**{**LORA, "tuning": "qlora"}), device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'sentence-vipyloqwen\[qlora\]'"):
        four_bits(torch.device("cpu"))


def test_the_seam_by_which_weights_are_loaded_is_where_it_was() -> None:
    """Called in `train` on resuming; the child names its argument as transformers does."""
    assert "self._load_from_checkpoint(resume_from_checkpoint" in inspect.getsource(Trainer.train)
    assert "_load_from_checkpoint" in vars(AdapterTrainer)

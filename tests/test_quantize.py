"""Dynamic int8 linear layers: close to float32, inference only, the folder left as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from torchao.quantization import Int8Tensor

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import VectorIndex, fingerprint

Picture = Callable[..., Image.Image]


@pytest.fixture
def quantized(folder: Path) -> ViPyloQwen:
    return ViPyloQwen(folder, quantize="int8")


def inputs_of(kind: str, picture: Picture) -> list[Any]:
    a, b = picture(70, 90, seed=1), picture(130, 60, seed=2)
    return {
        "texts": ["Số tiền tổng cộng là bao nhiêu?", "What colour is the shape?", "发票总金额是多少？", "red"],
        "images": [a, b, picture(56, 56, seed=3)],
        "mixes": [
            {"image": a, "text": "ba ảnh"},
            {"image": [a, b], "text": "which?"},
            {"image": [b, a, b], "text": ""},
        ],
    }[kind]


@pytest.mark.parametrize("kind", ["texts", "images", "mixes"])
def test_close_to_float32(model: ViPyloQwen, quantized: ViPyloQwen, picture: Picture, kind: str) -> None:
    inputs = inputs_of(kind, picture)
    exact, approximate = model.encode(inputs), quantized.encode(inputs)
    assert (exact * approximate).sum(1).min() > 0.99
    assert np.abs(exact - approximate).max() > 1e-5  # it does compute in int8
    np.testing.assert_allclose(np.linalg.norm(approximate, axis=1), 1, atol=1e-5)


def test_a_vector_does_not_depend_on_the_rest_of_the_batch(quantized: ViPyloQwen, picture: Picture) -> None:
    inputs = [item for kind in ("texts", "images", "mixes") for item in inputs_of(kind, picture)]
    together = quantized.encode(inputs)
    alone = np.stack([quantized.encode(item) for item in inputs])
    assert (together * alone).sum(1).min() > 0.9999


def test_linear_layers_of_both_towers_are_int8_and_the_head_is_float(quantized: ViPyloQwen) -> None:
    linears = {name: module for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    backbone = {name: module for name, module in linears.items() if name.startswith("0.")}
    assert any("visual" in name for name in backbone) and any("language_model" in name for name in backbone)
    for module in backbone.values():
        assert isinstance(module.weight, Int8Tensor) and module.weight.qdata.dtype == torch.int8
    heads = [module for name, module in linears.items() if name not in backbone]
    assert heads and all(type(head.weight.data) is torch.Tensor for head in heads)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_the_folder_is_left_as_it_was(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ViPyloQwen(folder, quantize="int8").encode("một")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_copies_and_pickles_give_the_same_vectors(quantized: ViPyloQwen) -> None:
    expected = quantized.encode("hóa đơn")
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        np.testing.assert_array_equal(other.encode("hóa đơn"), expected)
        assert other.quantization == quantized.quantization


def test_an_unknown_mode_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"quantize is 'int4'; allowed are None and 'int8'"):
        ViPyloQwen(folder, quantize="int4")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_is_refused_before_anything_is_loaded(device: Any) -> None:
    with pytest.raises(ValueError, match='runs on "cpu" only'):
        ViPyloQwen("no/such/folder", quantize="int8", device=device)


def test_torchao_missing_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name, name="torchao")

    monkeypatch.setattr("sentence_vipyloqwen.extras.importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"sentence-vipyloqwen\[int8\]"):
        ViPyloQwen(folder, quantize="int8")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: model.train(), "cannot be trained"),
        (lambda model: model.to("cuda"), 'runs on "cpu" only'),
        (lambda model: model.to(device="meta"), 'runs on "cpu" only'),
        (lambda model: model.to(torch.bfloat16), "cast to torch.bfloat16"),
        (lambda model: model.cuda(), "moved to a GPU"),
        (lambda model: model.encode("a", device="meta"), 'runs on "cpu" only'),
        (lambda model: model.start_multi_process_pool(["cpu", "cpu"]), "shared by several processes"),
        (lambda model: model.load_adapter("folder"), "given an adapter"),
        (lambda model: model.add_adapter(LoraConfig(target_modules=["q_proj"])), "given an adapter"),
    ],
)
def test_inference_on_a_cpu_only(quantized: ViPyloQwen, act: Callable[[ViPyloQwen], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(quantized)
    assert quantized.encode("vẫn chạy").shape == (32,)


@pytest.mark.parametrize("save", ["save", "save_pretrained"])
def test_saving_is_refused_and_nothing_is_written(quantized: ViPyloQwen, tmp_path: Path, save: str) -> None:
    with pytest.raises(ValueError, match="cannot be saved"):
        getattr(quantized, save)(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_trainer_is_refused(quantized: ViPyloQwen, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="cannot be trained"):
        SentenceTransformerTrainer(quantized, arguments, rows, loss=MultipleNegativesRankingLoss(quantized)).train()


def test_a_model_with_an_adapter_is_refused(model: ViPyloQwen, tmp_path: Path) -> None:
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path), create_model_card=False)
    with pytest.raises(ValueError, match="merge the adapter"):
        ViPyloQwen(tmp_path, quantize="int8")


def test_the_fingerprint_says_that_it_is_quantized_and_of_what(model: ViPyloQwen, quantized: ViPyloQwen) -> None:
    exact, approximate = fingerprint(model), fingerprint(quantized)
    assert exact.differences(approximate) == ["processing.quantize"]
    assert approximate.processing["quantize"] == "int8"
    assert "quantize" not in exact.processing
    assert exact != approximate and approximate.may_query(exact) and exact.may_query(approximate)


def test_an_index_is_queried_by_the_same_model_quantized_and_by_no_other(
    model: ViPyloQwen, quantized: ViPyloQwen, folder: Path, tmp_path: Path
) -> None:
    texts = ["hóa đơn tiền điện", "electricity bill", "a red circle", "电费账单"]
    VectorIndex.build(model, [{"text": text} for text in texts], tmp_path / "index")
    index = VectorIndex.load(tmp_path / "index", quantized)
    for row, text in enumerate(texts):
        assert index.search(text, k=1)[0].score > 0.99, row
    stranger = ViPyloQwen(folder, device="cpu")
    with torch.no_grad():
        next(stranger.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="weights"):
        VectorIndex.load(tmp_path / "index", stranger)


def test_the_float_index_is_the_same_for_stock_sentence_transformers(folder: Path, quantized: ViPyloQwen) -> None:
    assert fingerprint(quantized).may_query(fingerprint(SentenceTransformer(str(folder), device="cpu")))

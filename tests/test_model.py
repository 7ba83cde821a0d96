"""The artefact: what we save, plain Sentence Transformers loads, and gives the same vectors."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, BertConfig

from sentence_vipyloqwen import TASKS, ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base

Picture = Callable[..., Image.Image]


def every_kind(picture: Picture, tmp_path: Path) -> list[Any]:
    """Inputs that stock Sentence Transformers accepts, of every kind."""
    a, b = picture(70, 90, seed=1), picture(130, 60, seed=2)
    a.save(tmp_path / "a.png")
    return [
        "Số tiền tổng cộng là bao nhiêu?",
        "<ocr> Số tiền?",
        "  <instr>  tóm tắt",
        {"text": "hello"},
        a,
        np.asarray(b),
        {"image": a},
        {"image": str(tmp_path / "a.png")},
        {"image": a, "text": "<vqa_single> what is it?"},
        {"text": "<vqa_single> what is it?", "image": a},
        {"image": [a, b], "text": "<vqa_multi> which?"},
        {"image": [a, b, a], "text": "ba ảnh"},
        {"image": [a, b, a, b, a], "text": ""},
        {"image": b, "text": "<image> trước <image> sau"},
        {"image": [], "text": "发票总金额是多少？"},
    ]


def test_plain_sentence_transformers_gives_the_same_vectors(folder: Path, picture: Picture, tmp_path: Path) -> None:
    inputs = every_kind(picture, tmp_path)
    ours = ViPyloQwen(folder, device="cpu").encode(inputs, batch_size=32)
    stock_model = SentenceTransformer(str(folder), device="cpu")
    stock = stock_model.encode(inputs, batch_size=32)
    assert type(stock_model[0]).__module__.startswith("sentence_transformers.")
    assert (ours * stock).sum(1).min() > 0.9999
    for vectors in (ours, stock):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("prompt_name", [*TASKS, "query"])
def test_prompts_agree_with_stock_and_with_literal_prefixes(
    folder: Path, picture: Picture, tmp_path: Path, prompt_name: str
) -> None:
    inputs = [item for item in every_kind(picture, tmp_path) if "<" not in str(item)]
    ours, stock = ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    prompted = ours.encode(inputs, prompt_name=prompt_name)
    assert (prompted * stock.encode(inputs, prompt_name=prompt_name)).sum(1).min() > 0.9999
    literal = ours.encode([ours.prompts[prompt_name] + item for item in inputs if isinstance(item, str)])
    texts = [index for index, item in enumerate(inputs) if isinstance(item, str)]
    np.testing.assert_allclose(prompted[texts], literal, atol=1e-6)


def test_the_token_ids_are_the_stock_ones(folder: Path, picture: Picture, tmp_path: Path) -> None:
    inputs = every_kind(picture, tmp_path)
    ours = ViPyloQwen(folder, device="cpu").preprocess(inputs)
    stock = SentenceTransformer(str(folder), device="cpu").preprocess(inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "num_images_per_sample"):
        assert torch.equal(ours[key], torch.as_tensor(stock[key])), key


def test_truncation_is_the_stock_one(folder: Path, picture: Picture) -> None:
    item = {"image": picture(), "text": "<ocr> " + "một hai ba " * 30}
    limit = {"processing_kwargs": {"text": {"max_length": 20}}}
    ours, stock = ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    left, right = (model.preprocess([item], **limit)["input_ids"] for model in (ours, stock))
    assert torch.equal(left, torch.as_tensor(right))
    assert left.shape == (1, 20)


def test_modules_json_names_stock_classes_only(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].split(".")[0] for module in modules] == ["sentence_transformers"] * 4
    assert [module["type"].split(".")[-1] for module in modules] == ["Transformer", "Pooling", "Dense", "Normalize"]
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert config["model_type"] == "SentenceTransformer"
    assert {name: config["prompts"][name] for name in TASKS} == {name: f"<{name}> " for name in TASKS}
    assert "sentence_vipyloqwen" not in "".join(p.read_text() for p in folder.rglob("*.json"))


def test_what_stock_saves_ours_loads(folder: Path, picture: Picture, tmp_path: Path) -> None:
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "x"), create_model_card=False)
    inputs = ["a", {"image": picture(), "text": "<ocr> b"}]
    left, right = (ViPyloQwen(path, device="cpu").encode(inputs) for path in (folder, tmp_path / "x"))
    np.testing.assert_array_equal(left, right)


def test_state_dict_keys_are_the_stock_ones(folder: Path) -> None:
    ours, stock = ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    assert list(ours.state_dict()) == list(stock.state_dict())


def test_create_starts_the_new_rows_at_the_mean(base: Path) -> None:
    model = ViPyloQwen.create(base, 16, device="cpu")
    weight = model[0].model.get_input_embeddings().weight
    ids = list(model.task_token_ids.values())
    assert weight.shape[0] == len(model.tokenizer)
    torch.testing.assert_close(weight[ids], weight[: min(ids)].mean(0).expand(5, -1))


def test_create_never_shrinks_the_embedding(tmp_path: Path) -> None:
    """Qwen2-VL-2B has 151,936 rows for 151,657 tokens: the new tokens take spare rows."""
    base = make_tiny_base(tmp_path, ["a b c"] * 5, vocab_size=300, hidden_size=64, layers=1, vision_size=32)
    rows = 20
    _pad_embedding(base, rows)
    model = ViPyloQwen.create(base, 16, device="cpu")
    weight = model[0].model.get_input_embeddings().weight
    known = len(model.tokenizer) - 5
    assert weight.shape[0] == known + rows
    torch.testing.assert_close(weight[known : known + 5], weight[:known].mean(0).expand(5, -1))
    assert (weight[known + 5 :] == 7).all()


def _pad_embedding(base: Path, rows: int) -> None:
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = torch.cat([weights[name], torch.full((rows, weights[name].shape[1]), 7.0)])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(weights[name])
    config.save_pretrained(base)


def test_create_takes_dimension_seed_dtype_and_attention(base: Path) -> None:
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "device": "cpu"}
    model = ViPyloQwen.create(base, 16, seed=1, **options)
    assert model.get_embedding_dimension() == 16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model[0].model.config._attn_implementation == "eager"
    again, other = (ViPyloQwen.create(base, 16, seed=seed, **options) for seed in (1, 2))
    assert torch.equal(model[2].linear.weight, again[2].linear.weight)
    assert not torch.equal(model[2].linear.weight, other[2].linear.weight)
    assert ViPyloQwen.create(base, device="cpu").get_embedding_dimension() == 1024


def test_the_dense_head_keeps_angles_where_they_fit(base: Path) -> None:
    weight = ViPyloQwen.create(base, 128, device="cpu")[2].linear.weight  # 64 -> 128
    torch.testing.assert_close(weight.T @ weight, torch.eye(64), atol=1e-5, rtol=0)


def test_create_refuses_an_impossible_pixel_budget(base: Path) -> None:
    with pytest.raises(ValueError, match="min_pixels is 5000 and max_pixels 4000; allowed is"):
        ViPyloQwen.create(base, 16, min_pixels=5000, max_pixels=4000, device="cpu")


def test_create_refuses_what_is_no_checkpoint_of_qwen2_vl(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a finished model .*load it with ViPyloQwen"):
        ViPyloQwen.create(folder)
    with pytest.raises(ValueError, match="embedding_dim is 0"):
        ViPyloQwen.create(folder, 0)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'bert'; allowed is 'qwen2_vl'"):
        ViPyloQwen.create(tmp_path)


def test_loading_refuses_a_bare_checkpoint(base: Path) -> None:
    with pytest.raises(ValueError, match="has no modules.json.*ViPyloQwen.create"):
        ViPyloQwen(base)


def test_loading_never_runs_code_nor_unpickles(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never runs code from a model folder"):
        ViPyloQwen(folder, trust_remote_code=True)
    for file in ("model.safetensors", "2_DenseHead/model.safetensors"):
        path = tmp_path / file.replace("/", "-")
        shutil.copytree(folder, path)
        (path / file).rename((path / file).with_name("pytorch_model.bin"))
        with pytest.raises((ValueError, OSError), match="safetensors"):
            ViPyloQwen(path, device="cpu")
    for options in (
        {"processor_kwargs": {"trust_remote_code": True}},
        {"config_kwargs": {"trust_remote_code": True}},
        {"model_kwargs": {"use_safetensors": False}},
    ):
        with pytest.raises(ValueError, match="Code of a folder is never run, nor are pickled weights loaded"):
            ViPyloQwen(folder, device="cpu", **options)
    with pytest.raises(ValueError, match="backend is 'onnx'; allowed is 'torch'"):
        ViPyloQwen(folder, device="cpu", backend="onnx")
    with pytest.raises(ValueError, match="Only safetensors are saved"):
        ViPyloQwen(folder, device="cpu").save_pretrained(str(tmp_path / "y"), safe_serialization=False)


def test_code_of_a_folder_is_not_imported(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    shutil.copytree(folder, path)
    (path / "evil.py").write_text("raise SystemExit('ran code from the folder')")
    modules = json.loads((path / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(Exception, match="trust_remote_code"):
        ViPyloQwen(path, device="cpu")


def test_the_seams_of_sentence_transformers_are_where_we_hold_them() -> None:
    """If one of these moves, our override would silently do nothing."""
    for name in ("_load_module_class_from_ref", "_inference", "_input_length", "_load_default_modules"):
        assert name in ViPyloQwen.__dict__
        assert any(name in parent.__dict__ for parent in SentenceTransformer.__mro__), name


def test_encode_names_the_callers_place_in_an_error(model: ViPyloQwen) -> None:
    inputs: list[Any] = ["long " * 50, "b", {"image": "missing.png"}, "d"]
    with pytest.raises(ValueError, match="Input 2, image 0: cannot read the image 'missing.png'"):
        model.encode(inputs, batch_size=1)
    with pytest.raises(ValueError, match="Input 3 is empty"):
        model.encode([*inputs[:2], "x", ""])


def test_a_lora_adapter_keeps_the_task_tokens(model: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trained = [name for name, parameter in model[0].named_parameters() if parameter.requires_grad]
    assert any("lora" in name for name in trained)
    assert any("token" in name for name in trained)
    with torch.no_grad():
        for parameter in model[0].parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()

    inputs = ["<ocr> a", "<instr> a", "a", {"image": picture(), "text": "<vqa_multi> b"}]
    expected = model.eval().encode(inputs)
    np.testing.assert_allclose(ViPyloQwen(tmp_path, device="cpu").encode(inputs), expected, atol=1e-6)
    stock = SentenceTransformer(str(tmp_path), device="cpu").encode(inputs)
    assert (stock * expected).sum(1).min() > 0.9999


def test_an_adapter_needs_a_saved_model(base: Path) -> None:
    """It names its base, and the bare checkpoint has no task tokens."""
    from peft import LoraConfig

    with pytest.raises(ValueError, match="has no task tokens: save this model with save_pretrained, load it"):
        ViPyloQwen.create(base, 16, device="cpu").add_adapter(LoraConfig(target_modules=["q_proj"]))


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # makes `import torchvision` fail
from PIL import Image
from sentence_vipyloqwen import ViPyloQwen
model = ViPyloQwen(sys.argv[1], device="cpu")
inputs = ["xin chào", Image.new("RGB", (60, 60), "red"), {"text": "<ocr> a", "image": Image.new("L", (9, 9))}]
vectors = model.encode(inputs)
assert vectors.shape == (3, 32), vectors.shape
"""

WITHOUT_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise SystemExit("importing the package touched the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sentence_vipyloqwen
"""


@pytest.mark.parametrize("script", [WITHOUT_TORCHVISION, WITHOUT_NETWORK], ids=["torchvision", "network"])
def test_what_the_package_does_without(folder: Path, script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_model_can_be_sent_to_another_process(model: ViPyloQwen) -> None:
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(copy.encode("a"), model.encode("a"), atol=1e-6)


def test_what_is_pushed_to_the_hub_is_the_portable_folder(
    model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Hub's client is replaced by one that keeps the folder it is handed."""
    uploaded = tmp_path / "hub"

    def keep(self: HfApi, *, folder_path: str, **kwargs: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, uploaded)
        return SimpleNamespace(commit_url="https://example.com/commit")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", keep)
    model.push_to_hub("someone/a-model", replace_model_card=True)

    assert "sentence_vipyloqwen" not in (uploaded / "modules.json").read_text()
    np.testing.assert_allclose(ViPyloQwen(uploaded, device="cpu").encode("a"), model.encode("a"), atol=1e-6)
    assert (SentenceTransformer(str(uploaded), device="cpu").encode("a") * model.encode("a")).sum() > 0.9999
    card = (uploaded / "README.md").read_text(encoding="utf-8")
    assert "someone/a-model" in card
    assert "vipyloqwen" in card

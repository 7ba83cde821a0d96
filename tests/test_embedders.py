"""Embedders that stock Sentence Transformers made: loaded into the packed runtime, they give the same vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.modules.rendering import CHAT_TEMPLATE

Picture = Callable[..., Image.Image]

QWEN_TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}\
<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Qwen2-VL's own, without its words for videos."""


def embedder(
    base: Path, folder: Path, pooling_mode: str, dense: bool, processing: dict[str, Any] | None = None, **changed: Any
) -> Path:
    """A folder that stock Sentence Transformers saved, its tokenizer with this template and these settings."""
    shutil.copytree(base, folder / "base")
    (folder / "base" / "chat_template.jinja").write_text(changed.pop("template", QWEN_TEMPLATE), encoding="utf-8")
    if changed:
        file = folder / "base" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    transformer = Transformer(str(folder / "base"), processing_kwargs=processing)
    width = transformer.get_embedding_dimension()
    head = [Dense(width, 24)] if dense else []  # with a bias, and tanh
    modules = [transformer, Pooling(width, pooling_mode), *head, Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"find": "Find what answers the question."}, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture(scope="module", params=["mean", "lasttoken", "lasttoken-dense", "mean-prompt", "lasttoken-left"])
def elsewhere(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this package had no part in."""
    mode, _, more = request.param.partition("-")
    processing = {"chat_template": {"add_generation_prompt": True}} if more == "prompt" else None
    side = {"padding_side": "left"} if more == "left" else {}
    return embedder(base, tmp_path_factory.mktemp("elsewhere"), mode, more == "dense", processing, **side)


def inputs_of(picture: Picture) -> list[Any]:
    """Of every kind; the sides of the pictures are multiples of 28, so that nothing depends on who resizes."""
    a, b = picture(56, 84, seed=1), picture(112, 56, seed=2)
    return [
        "Số tiền tổng cộng là bao nhiêu?",
        "<ocr> <image> is plain text here",
        {"text": "hello"},
        a,
        {"image": a, "text": "what is it?"},
        {"image": a, "text": "a red circle"},
        {"text": "what is it?", "image": a},
        {"image": [a, b], "text": "which?"},
        {"image": [a, b, a, b, a]},
        {"text": "ba ảnh", "image": [b, a, b]},
        "Số tiền tổng cộng là bao nhiêu?",
    ]


@pytest.mark.parametrize("prompt_name", [None, "find"])
def test_vectors_are_those_of_stock(elsewhere: Path, picture: Picture, prompt_name: str | None) -> None:
    ours, stock = ViPyloQwen(elsewhere, device="cpu"), SentenceTransformer(str(elsewhere), device="cpu")
    assert ours[0]._packs
    left, right = (model.encode(inputs_of(picture), prompt_name=prompt_name) for model in (ours, stock))
    np.testing.assert_allclose(left, right, atol=1e-5)
    assert left.shape[1] == stock.get_embedding_dimension()


def test_token_ids_are_those_of_stock(elsewhere: Path, picture: Picture) -> None:
    ours, stock = ViPyloQwen(elsewhere, device="cpu"), SentenceTransformer(str(elsewhere), device="cpu")
    for limit in (None, {"text": {"max_length": 24}}):
        inputs = [item for item in inputs_of(picture) if limit is None or isinstance(item, str)]
        left, right = (model.preprocess(inputs, prompt="Find.", processing_kwargs=limit) for model in (ours, stock))
        for row in range(len(inputs)):
            rows = [side["input_ids"][row][side["attention_mask"][row].bool()] for side in (left, right)]
            assert rows[0].tolist() == rows[1].tolist()


def test_gradients_are_those_of_stock(elsewhere: Path, picture: Picture) -> None:
    gradients = []
    for model in (ViPyloQwen(elsewhere, device="cpu"), SentenceTransformer(str(elsewhere), device="cpu")):
        columns = [model.preprocess(part) for part in (inputs_of(picture)[3:6], ["a", "b c", "d"])]
        MultipleNegativesRankingLoss(model)(columns, None).backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-4 * max(1, gradient.abs().max()), name


def test_a_saved_folder_is_still_that_embedder(elsewhere: Path, picture: Picture, tmp_path: Path) -> None:
    model = ViPyloQwen(elsewhere, device="cpu")
    expected = model.encode(inputs_of(picture), prompt_name="find")
    model.save_pretrained(str(tmp_path), create_model_card=False)
    for again in (ViPyloQwen(tmp_path, device="cpu"), SentenceTransformer(str(tmp_path), device="cpu")):
        np.testing.assert_allclose(again.encode(inputs_of(picture), prompt_name="find"), expected, atol=1e-5)


def test_rows_share_what_they_begin_with(base: Path, picture: Picture, tmp_path: Path) -> None:
    model = ViPyloQwen(embedder(base, tmp_path, "lasttoken", dense=False), device="cpu")
    page = picture()
    features = model.preprocess([{"image": page, "text": text} for text in ("a b", "c", "d")])
    packing = model[0]._plan(features)
    assert packing.segments.parents == (-1, 0, 0, 0)
    assert len(packing.images) == 1


def test_our_tokens_with_another_template(base: Path, picture: Picture, tmp_path: Path) -> None:
    ours = ViPyloQwen.create(base, 16, device="cpu")
    ours.tokenizer.chat_template = QWEN_TEMPLATE
    ours.save_pretrained(str(tmp_path), create_model_card=False)
    left, right = (kind(str(tmp_path), device="cpu") for kind in (ViPyloQwen, SentenceTransformer))
    np.testing.assert_allclose(left.encode(inputs_of(picture)), right.encode(inputs_of(picture)), atol=1e-5)


def test_what_has_no_tasks_is_not_routed(base: Path, tmp_path: Path) -> None:
    model = ViPyloQwen(embedder(base, tmp_path, "mean", dense=False), device="cpu")
    assert model.task_token_ids == {}
    with pytest.raises(ValueError, match="The tokenizer lacks the tokens .*ViPyloQwen.create"):
        PrefixRoutedLoss(model)


def test_an_adapter_needs_no_task_tokens(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = ViPyloQwen(embedder(base, tmp_path, "mean", dense=False), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapted"), create_model_card=False)
    loaded = ViPyloQwen(tmp_path / "adapted", device="cpu")
    np.testing.assert_allclose(loaded.encode("a b"), model.eval().encode("a b"), atol=1e-6)


def test_errors_name_the_input(base: Path, picture: Picture, tmp_path: Path) -> None:
    model = ViPyloQwen(embedder(base, tmp_path, "mean", dense=False), device="cpu")
    with pytest.raises(ValueError, match=r"Input 1 has 0 images, but 1 image tokens .* is <\|image_pad\|> written"):
        model.encode(["a", "<|image_pad|>"])
    model.max_seq_length = 20
    with pytest.raises(ValueError, match="Input 1: its 5 images end beyond the limit of 20 tokens"):
        model.encode(["a", {"image": [picture()] * 5}])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"transformer_task": "text-generation"}, "transformer_task = 'text-generation'"),
        ({"modality_config": {"text": {}}}, "modality_config = {'text': {}}"),
        ({"processing_kwargs": {"image": {"size": 3}}}, "processing_kwargs = {'image': {'size': 3}}"),
    ],
)
def test_a_configuration_that_is_not_followed_is_refused(
    folder: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    file = tmp_path / "x" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=f"is configured by {said}; allowed are feature extraction"):
        ViPyloQwen(tmp_path / "x", device="cpu")


def test_without_task_tokens_a_folder_needs_a_template(folder: Path, base: Path, tmp_path: Path) -> None:
    made = embedder(base, tmp_path, "mean", dense=False, template=CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="The tokenizer lacks the tokens"):
        ViPyloQwen(made, device="cpu")
    assert torch.is_tensor(ViPyloQwen(folder, device="cpu").preprocess(["a"])["input_ids"])

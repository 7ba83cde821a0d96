from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import Fingerprint, fingerprint


def test_same_model_same_fingerprint(make_model):
    assert fingerprint(make_model()) == fingerprint(make_model())


def test_json_round_trip(model):
    taken = fingerprint(model)
    assert Fingerprint.from_dict(json.loads(json.dumps(taken.to_dict()))) == taken


def test_one_bit_of_one_weight_counts(make_model):
    model = make_model()
    before = fingerprint(model)
    with torch.no_grad():
        model[0].table.view(torch.int32)[3, 5] ^= 1
    assert before.differences(fingerprint(model)) == ["weights"]


def test_bfloat16_weights_can_be_hashed(make_model):
    half, full = fingerprint(make_model(dtype=torch.bfloat16)), fingerprint(make_model())
    assert half.differences(full) == ["weights"]
    assert half == fingerprint(make_model(dtype=torch.bfloat16))


def test_memory_layout_of_a_weight_does_not_count(make_model):
    model = make_model()
    before = fingerprint(model)
    model[0].table.data = model[0].table.data.t().contiguous().t()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda model: setattr(model, "truncate_dim", 8), "dim"),
        (lambda model: model.prompts.update(ocr="<ocr>"), "prompts"),
        (lambda model: setattr(model, "default_prompt_name", "ocr"), "default_prompt_name"),
        (lambda model: setattr(model[0], "max_seq_length", 5), "processing.max_seq_length"),
        (lambda model: setattr(model[0], "pooling_mode", ("cls", "mean")), "processing.modules"),
    ],
)
def test_each_fact_counts_and_is_named(make_model, change, fact):
    model = make_model()
    before = fingerprint(model)
    change(model)
    assert before.differences(fingerprint(model)) == [fact]


def image_processor(max_pixels: int) -> SimpleNamespace:
    return SimpleNamespace(size={"shortest_edge": 3136, "longest_edge": max_pixels})


def test_image_processor_is_found_in_our_module_and_in_a_stock_processor(make_model):
    ours, stock, other = make_model(), make_model(), make_model()
    ours[0].image_processor = image_processor(1_003_520)
    stock[0].processor = SimpleNamespace(image_processor=image_processor(1_003_520))
    other[0].image_processor = image_processor(50_176)
    assert fingerprint(ours).processing["min_pixels"] == 3136
    assert fingerprint(ours) == fingerprint(stock)
    assert fingerprint(ours).differences(fingerprint(other)) == ["processing.max_pixels"]


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("rescale_factor", 1 / 127.5),
        ("resample", Image.Resampling.BILINEAR),
        ("patch_size", 16),
        ("merge_size", 1),
    ],
)
def test_each_fact_of_the_image_processor_counts(make_model, fact, value):
    known = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.3, 0.3, 0.3), "rescale_factor": 1 / 255}
    known |= {"resample": Image.Resampling.BICUBIC, "patch_size": 14, "merge_size": 2}
    ours, same, other = make_model(), make_model(), make_model()
    ours[0].image_processor = SimpleNamespace(**known)
    same[0].image_processor = SimpleNamespace(**known | {"image_mean": [0.1, 0.2, 0.3], "resample": 3})
    other[0].image_processor = SimpleNamespace(**known | {fact: value})
    assert fingerprint(ours) == fingerprint(same)
    assert fingerprint(ours).differences(fingerprint(other)) == [f"processing.{fact}"]


def test_vocabulary_counts_whatever_its_order(make_model):
    models = [make_model() for _ in range(3)]
    for model, vocabulary in zip(models, ({"a": 0, "đ": 1}, {"đ": 1, "a": 0}, {"a": 1, "đ": 0}), strict=True):
        model[0].tokenizer = SimpleNamespace(get_vocab=lambda vocabulary=vocabulary: vocabulary)
    first, same, other = map(fingerprint, models)
    assert first == same
    assert first.differences(other) == ["processing.vocabulary"]


def test_empty_prompts_do_not_count(make_model):
    model = make_model()
    before = fingerprint(model)
    model.prompts["query"], model.prompts["passage"] = "", ""
    assert fingerprint(model) == before


def test_ours_and_stock_agree_on_a_saved_model(folder):
    ours, stock = (
        fingerprint(ViPyloQwen(folder, device="cpu")),
        fingerprint(SentenceTransformer(str(folder), device="cpu")),
    )
    assert ours.differences(stock) == []
    assert ours == stock
    assert {"min_pixels", "max_pixels", "max_seq_length", "vocabulary"} <= set(ours.processing)
    facts = {"image_mean", "image_std", "rescale_factor", "resample", "patch_size", "merge_size"}
    assert facts <= set(ours.processing)
    assert json.loads(json.dumps(ours.processing)) == ours.processing
    assert type(ours.processing["resample"]) is int
    assert {"pooling_mode": "mean", "include_prompt": True} in ours.processing["modules"]


def test_unknown_dimension_is_refused(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model[0], "get_embedding_dimension", lambda: None)
    with pytest.raises(ValueError, match="embedding dimension"):
        fingerprint(model)


def test_fields_of_another_release_are_refused(model):
    data = fingerprint(model).to_dict()
    del data["prompts"]
    with pytest.raises(ValueError, match="fields.*prompts"):
        Fingerprint.from_dict(data)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sentence_vipyloqwen import ViPyloQwen

Picture = Callable[..., Image.Image]


def mixed(picture: Picture) -> list[Any]:
    a, b = picture(56, 84, seed=1), picture(100, 60, seed=2)
    return ["xin chào", a, {"image": [a, b], "text": "<ocr> tổng"}, {"text": "<instr> x"}, {"image": [b] * 5}]


def test_features_are_the_stock_ones_and_the_keys(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))
    rows, length = features["input_ids"].shape
    assert rows == 5
    assert features["attention_mask"].shape == features["mm_token_type_ids"].shape == (5, length)
    assert features["num_images_per_sample"].tolist() == [0, 1, 2, 0, 5]
    assert features["image_grid_thw"].shape == (8, 3)
    assert features["pixel_values"].shape == (int(features["image_grid_thw"].prod(1).sum()), 1176)
    assert features["image_keys"].shape == (5, 5)
    assert (features["image_keys"] != 0).sum(1).tolist() == [0, 1, 2, 0, 5]
    assert features["image_keys"][1, 0] == features["image_keys"][2, 0]


def test_padding_is_on_the_right(model: ViPyloQwen, picture: Picture) -> None:
    mask = model.preprocess(mixed(picture))["attention_mask"]
    assert mask[:, 0].all()
    assert (mask.diff(dim=1) <= 0).all()


def test_token_types_mark_the_image_tokens(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))
    per_row = torch.stack([part.prod(1).sum() // 4 for part in features["image_grid_thw"].split([0, 1, 2, 0, 5])])
    assert features["mm_token_type_ids"].sum(1).tolist() == per_row.tolist()


def test_text_alone_has_no_pixels_but_keys(model: ViPyloQwen) -> None:
    features = model.preprocess(["a", "b c"])
    assert "pixel_values" not in features
    assert not features["image_keys"].any()
    assert features["image_keys"].shape == (2, 5)


def test_a_row_does_not_depend_on_its_neighbours(model: ViPyloQwen, picture: Picture) -> None:
    inputs = mixed(picture)
    together = model.encode(inputs, batch_size=8)
    alone = np.stack([model.encode(item) for item in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_limit_of_a_call_cuts_text(model: ViPyloQwen) -> None:
    text = "một hai ba bốn năm sáu bảy " * 10
    for options in ({"processing_kwargs": {"text": {"max_length": 7}}}, {"max_length": 7}):
        assert model.preprocess([text], **options)["input_ids"].shape == (1, 7)
    with pytest.raises(ValueError, match=r"processing_kwargs has \['image.size'\]; allowed is"):
        model.preprocess([text], processing_kwargs={"image": {"size": 3}})
    for limit in (0, -1, "5"):
        with pytest.raises(ValueError, match=f"max_length is {limit!r}; allowed is a whole number"):
            model.preprocess([text], processing_kwargs={"text": {"max_length": limit}})


def test_max_seq_length_is_kept_in_the_folder(model: ViPyloQwen, tmp_path: Path) -> None:
    assert model.max_seq_length == 8192
    model.max_seq_length = 11
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert ViPyloQwen(tmp_path, device="cpu").max_seq_length == 11


def test_images_over_the_limit_are_an_error(model: ViPyloQwen, picture: Picture) -> None:
    model.max_seq_length = 20
    with pytest.raises(ValueError, match="Input 1: its 5 images and prefix take"):
        model.encode(["a", {"image": [picture()] * 5, "text": "<ocr> a"}])


def test_five_images_of_the_largest_size_fit_the_default_limit(model: ViPyloQwen) -> None:
    processor = model[0].image_processor
    patches = processor.get_number_of_image_patches(4000, 4000)
    assert 5 * (patches // 4 + 2) + 1 < model.max_seq_length


def test_the_pixel_budget_of_create_holds(base: Path, picture: Picture) -> None:
    model = ViPyloQwen.create(base, 16, min_pixels=28 * 28 * 9, max_pixels=28 * 28 * 16, device="cpu")
    grids = model.preprocess([picture(20, 20), picture(400, 500)])["image_grid_thw"]
    tokens = (grids.prod(1) // 4).tolist()
    assert tokens[0] >= 9
    assert tokens[1] <= 16


def test_the_pixel_budget_can_be_set_when_loading(folder: Path, picture: Picture) -> None:
    loaded = ViPyloQwen(folder, device="cpu", processor_kwargs={"max_pixels": 28 * 28 * 6})
    assert loaded.preprocess([picture(400, 500)])["image_grid_thw"].prod() // 4 <= 6


def test_errors_name_input_and_image(model: ViPyloQwen, picture: Picture) -> None:
    with pytest.raises(ValueError, match="Input 1, image 1: cannot read the image 'missing.png'"):
        model.encode([picture(), {"image": [picture(), "missing.png"]}])


def test_a_type_error_within_is_not_taken_for_a_missing_argument(
    model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentence Transformers answers a TypeError of `preprocess` by calling again without the prompt."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(type(model[0]), "_preprocess", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.encode("a", prompt_name="ocr")


def test_two_dimensional_arrays_are_grey_images(model: ViPyloQwen) -> None:
    grey = np.full((56, 56), 100, np.uint8)
    np.testing.assert_array_equal(model.encode(grey), model.encode(Image.fromarray(grey).convert("RGB")))


def test_token_embeddings_come_without_padding(model: ViPyloQwen) -> None:
    short, long = model.encode(["a", "một hai ba bốn"], output_value="token_embeddings")
    lengths = model.preprocess(["a", "một hai ba bốn"])["attention_mask"].sum(1).tolist()
    assert [len(short), len(long)] == lengths


def test_gradient_checkpointing_changes_nothing(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(dict(features))["sentence_embedding"].pow(3).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for left, right in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(left, right)

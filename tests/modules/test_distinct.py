"""Equal inputs are merged, whatever form they come in; what differs, be it by one tag, is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sentence_vipyloqwen.modules.distinct import distinct_inputs, source_key
from sentence_vipyloqwen.modules.inputs import parse_inputs

Picture = Callable[..., Image.Image]


def places(inputs: list[Any]) -> list[int]:
    return distinct_inputs(parse_inputs(inputs)).places


def test_equal_inputs_have_one_place(picture: Picture) -> None:
    image, array = picture(), np.asarray(picture(seed=1))
    inputs = ["a", image, array, {"text": "a"}, {"image": image.copy()}, array.copy(), "<ocr> a", "  <ocr> a"]
    assert places(inputs) == [0, 1, 2, 0, 1, 2, 3, 3]


def test_a_path_and_its_name_are_one_image() -> None:
    assert places([Path("a.png"), {"image": "a.png"}, {"image": [Path("a.png")]}, "a.png"]) == [0, 0, 0, 1]


def test_equal_images_become_one_object(picture: Picture) -> None:
    found = distinct_inputs(parse_inputs([picture(), {"image": picture(), "text": "a"}]))
    assert found.places == [0, 1]
    assert found.inputs[0].images[0] is found.inputs[1].images[0]
    assert found.image_keys[0] == found.image_keys[1]


def test_what_differs_is_not_merged(picture: Picture) -> None:
    image = picture(56, 56)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    grey = np.full((56, 56), 7, np.uint8)
    palette = Image.fromarray(grey).convert("P")
    other_palette = palette.copy()
    other_palette.putpalette([255 - value for value in palette.getpalette() or []])
    seen_through = palette.copy()
    seen_through.info["transparency"] = 7
    pictures = [image, turned, grey, grey.reshape(28, 112), palette, other_palette, seen_through]
    inputs = [*pictures, torch.from_numpy(grey), "a", "<ocr> a", "<ocr>a", {"image": image, "text": "a"}]
    assert places(inputs) == list(range(len(inputs)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_that_is_not_decoded_goes_by_its_object(tmp_path: Path, picture: Picture, kind: str) -> None:
    picture().save(tmp_path / "x", kind)
    one, other = (Image.open(tmp_path / "x") for _ in range(2))
    assert places([one, other, one]) == [0, 1, 0]
    one.load()
    other.load()
    assert source_key(one) == source_key(other)


def test_a_closed_picture_is_named() -> None:
    closed = Image.new("RGB", (28, 28))
    closed.close()
    with pytest.raises(ValueError, match="Input 1, image 0: cannot read the image <PIL image 28x28"):
        places(["a", closed])

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sentence_vipyloqwen.modules.inputs import parse_inputs


@pytest.fixture
def image(picture: Callable[..., Image.Image]) -> Image.Image:
    return picture()


def test_each_kind_of_input_is_read(image: Image.Image) -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    inputs = ["a", image, array, torch.zeros(3, 4, 4), Path("x.png"), {"text": "a"}, {"image": "x.png", "text": "a"}]
    parsed = parse_inputs(inputs)
    assert [item.text for item in parsed] == ["a", "", "", "", "", "a", "a"]
    assert [len(item.images) for item in parsed] == [0, 1, 1, 1, 1, 0, 1]


def test_a_bare_string_is_text_even_if_it_names_a_file(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "x.png")
    for text in (str(tmp_path / "x.png"), "https://example.com/x.png", "data:image/png;base64,AAAA"):
        assert parse_inputs([text])[0].images == ()


def test_images_come_first_whatever_the_order_of_the_keys(image: Image.Image) -> None:
    first, second = parse_inputs([{"image": image, "text": "a"}, {"text": "a", "image": [image]}])
    assert first == second


def test_a_prompt_and_a_literal_prefix_are_the_same_input(image: Image.Image) -> None:
    for item in ("a b", {"image": image, "text": "a b"}):
        literal = {**item, "text": "<ocr> a b"} if isinstance(item, dict) else "<ocr> a b"
        assert parse_inputs([item], prompt="<ocr> ") == parse_inputs([literal])


def test_a_prefix_is_not_doubled_by_its_prompt() -> None:
    assert parse_inputs(["<ocr> a"], prompt="<ocr> ") == parse_inputs(["<ocr> a"])
    with pytest.raises(ValueError, match="Input 1 bears the prefix <instr>"):
        parse_inputs(["a", "<instr> a"], prompt="<ocr> ")


def test_the_space_after_a_prefix_belongs_to_the_text() -> None:
    spaced, tight, late = parse_inputs(["  <ocr> a", "<ocr>a", "a <ocr>"])
    assert (spaced.task.name, spaced.text) == ("ocr", " a")
    assert (tight.task.name, tight.text) == ("ocr", "a")
    assert (late.task.name, late.text) == ("general", "a <ocr>")


def test_image_placeholders_are_dropped(image: Image.Image) -> None:
    assert parse_inputs([{"image": image, "text": "<image><ocr> a <image> b"}])[0].text == " a  b"


def test_none_stands_for_absent() -> None:
    assert parse_inputs([{"text": "a", "image": None}])[0] == parse_inputs(["a"])[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "Input 1 is empty"),
        ("  \n", "Input 1 is empty"),
        ("<image>", "Input 1 is empty"),
        ({}, "Input 1 is empty"),
        ({"text": "", "image": []}, "Input 1 is empty"),
        ({"image": ["a.png"] * 6}, "Input 1 has 6 images; at most 5"),
        ({"text": "a", "images": []}, r"Input 1 has the keys \['images'\]; allowed are \['text', 'image'\]"),
        ({"text": ["a", "b"]}, "Input 1: 'text' is of type list; allowed is one str"),
        ({"image": ["a.png", 3]}, "Input 1, image 1 is of type int; allowed is a PIL image"),
        (3, "Input 1 is of type int; allowed is a str"),
        (None, "Input 1 is of type NoneType"),
        ("a \ud800", "Input 1: its text is not valid Unicode"),
        (["a"], "Input 1 is of type list"),
    ],
)
def test_a_bad_input_is_named(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_inputs(["fine", bad])


def test_an_input_is_empty_whatever_the_prompt() -> None:
    with pytest.raises(ValueError, match="Input 0 is empty"):
        parse_inputs([""], prompt="<ocr> ")

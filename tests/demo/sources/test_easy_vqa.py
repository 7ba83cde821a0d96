"""What is composed from easy-vqa agrees with its pictures."""

from __future__ import annotations

import random

import easy_vqa as package
import pytest
from PIL import Image

from sentence_vipyloqwen.demo.sources import easy_vqa

HUES = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (139, 69, 19),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def pictures() -> list[easy_vqa.Picture]:
    return easy_vqa.load_pictures("test", 1000)


def test_every_official_test_question_is_asked_once(pictures: list[easy_vqa.Picture]) -> None:
    records = easy_vqa.single_records(pictures, 100, random.Random(0))
    asked = [(r["anchor"]["text"], r["positive"], r["anchor"]["image"][0].split("/")[-1]) for r in records]
    official = [(q, a, f"{number}.png") for q, a, number in zip(*package.get_test_questions(), strict=True)]
    assert sorted(asked) == sorted(official) and len(asked) == 9673


def test_no_fact_contradicts_a_question(pictures: list[easy_vqa.Picture]) -> None:
    for picture in pictures:
        for _, answer in picture.questions:
            if answer in easy_vqa.SHAPES:
                assert answer == picture.shape
            if answer in easy_vqa.COLORS:
                assert answer == picture.color
    assert sum(bool(picture.shape and picture.color) for picture in pictures) == 888


def test_colours_read_off_the_questions_are_those_of_the_pixels(pictures: list[easy_vqa.Picture]) -> None:
    for picture in [picture for picture in pictures if picture.color][::10]:
        image = Image.open(picture.path).convert("RGB")
        background, *others = [color for _, color in sorted(image.getcolors(4096), reverse=True)]
        ink = background if max(background) < 200 or min(background) < 100 else others[0]
        nearest = min(HUES, key=lambda name: sum((a - b) ** 2 for a, b in zip(HUES[name], ink, strict=True)))
        assert nearest == picture.color


def test_a_negative_is_another_answer_of_the_same_kind(pictures: list[easy_vqa.Picture]) -> None:
    kinds = (easy_vqa.SHAPES, easy_vqa.COLORS, easy_vqa.TRUTHS)
    for record in easy_vqa.single_records(pictures[:50], 100, random.Random(0)):
        assert record["negative"] != record["positive"]
        assert any({record["negative"], record["positive"]} <= kind.keys() for kind in kinds)


def test_turns_end_with_a_question_of_the_picture(pictures: list[easy_vqa.Picture]) -> None:
    by_name = {picture.name: picture for picture in pictures}
    records = easy_vqa.multi_records(pictures, 200, random.Random(0))
    turns = [record for record in records if record["domain"] == "easy-vqa-turns"]
    assert len(turns) == 100
    for record in turns:
        text, picture = record["anchor"]["text"], by_name[record["anchor"]["image"][0]]
        exchanges = list(zip(text[::2], [*text[1::2], record["positive"]], strict=True))
        assert 2 <= len(exchanges) <= 3 and set(exchanges) <= set(picture.questions)


def test_questions_on_several_images_are_answered_by_the_image_meant(pictures: list[easy_vqa.Picture]) -> None:
    by_name = {picture.name: picture for picture in pictures}
    records = easy_vqa.multi_records(pictures, 600, random.Random(0))
    meant = {"first": 0, "second": 1, "third": 2}
    checked = 0
    for record in records:
        words = record["anchor"]["text"].split() if isinstance(record["anchor"]["text"], str) else []
        shown = [by_name[name] for name in record["anchor"]["image"]]
        if "images" in words:
            fact = words[-1].rstrip("?")
            values = [getattr(picture, fact) for picture in shown[:2]]
            assert record["positive"] == ("yes" if values[0] == values[1] else "no")
        elif words and words[-1] == "image?":
            assert record["positive"] == getattr(shown[meant[words[-2]]], words[1])
            checked += 1
    assert checked > 30


def test_captions_in_three_languages() -> None:
    picture = easy_vqa.Picture(None, "", (), "circle", "red")
    assert [picture.caption(lang) for lang in easy_vqa.LANGUAGES] == [
        "một hình tròn màu đỏ",
        "a red circle",
        "一个红色的圆形",
    ]


def test_more_images_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="1001 images were asked for; easy-vqa's test split has 1000"):
        easy_vqa.load_pictures("test", 1001)

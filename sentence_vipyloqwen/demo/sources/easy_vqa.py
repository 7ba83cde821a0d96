"""Real pictures with questions: the PyPI package `easy-vqa` (Victor Zhou, MIT licence), 64x64 images of one shape.

Its own split is kept: 4,000 images and 38,575 questions to train on, 1,000 images and 9,673 questions to test on,
without an image in common. The answers are a closed set of 13 (three shapes, eight colours, yes and no), so train and
eval share them, as they share the wording of the questions and the captions (24 combinations in three languages).

Questions of several turns and of several images, and the captions, are composed here from the package's own questions
and answers: the shape and colour of an image are read off them (see `read_facts`), never off the pixels.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import easy_vqa

from sentence_vipyloqwen.demo.sources import Record, draw

LANGUAGES = ("vi", "en", "zh")
SHAPES = {
    "circle": {"en": "circle", "vi": "hình tròn", "zh": "圆形"},
    "rectangle": {"en": "rectangle", "vi": "hình chữ nhật", "zh": "长方形"},
    "triangle": {"en": "triangle", "vi": "hình tam giác", "zh": "三角形"},
}
COLORS = {
    "black": {"en": "black", "vi": "màu đen", "zh": "黑色"},
    "blue": {"en": "blue", "vi": "màu xanh dương", "zh": "蓝色"},
    "brown": {"en": "brown", "vi": "màu nâu", "zh": "棕色"},
    "gray": {"en": "gray", "vi": "màu xám", "zh": "灰色"},
    "green": {"en": "green", "vi": "màu xanh lá cây", "zh": "绿色"},
    "red": {"en": "red", "vi": "màu đỏ", "zh": "红色"},
    "teal": {"en": "teal", "vi": "màu xanh mòng két", "zh": "蓝绿色"},
    "yellow": {"en": "yellow", "vi": "màu vàng", "zh": "黄色"},
}
TRUTHS = {
    "yes": {"en": "yes", "vi": "có", "zh": "是"},
    "no": {"en": "no", "vi": "không", "zh": "否"},
}
ANSWERS = {**SHAPES, **COLORS, **TRUTHS}

_CAPTION = {"en": "a {color} {shape}", "vi": "một {shape} {color}", "zh": "一个{color}的{shape}"}
_ORDINALS = {"en": ("first", "second", "third"), "vi": ("nhất", "hai", "ba"), "zh": ("一", "二", "三")}
_NTH_IMAGE = {
    "color": {
        "en": "What color is the shape in the {nth} image?",
        "vi": "Hình trong ảnh thứ {nth} có màu gì?",
        "zh": "第{nth}张图片中的图形是什么颜色？",
    },
    "shape": {
        "en": "What shape is in the {nth} image?",
        "vi": "Ảnh thứ {nth} có hình gì?",
        "zh": "第{nth}张图片中是什么图形？",
    },
}
_SAME = {
    "color": {
        "en": "Do the first two images show the same color?",
        "vi": "Hai ảnh đầu có cùng màu không?",
        "zh": "前两张图片的颜色相同吗？",
    },
    "shape": {
        "en": "Do the first two images show the same shape?",
        "vi": "Hai ảnh đầu có cùng loại hình không?",
        "zh": "前两张图片的图形相同吗？",
    },
}


@dataclass(frozen=True)
class Picture:
    """One image of easy-vqa with its questions.

    Attributes:
        path: The image inside the installed package.
        name: Its path in the demo's folder.
        questions: (question, answer) pairs.
        shape: `"circle"`, `"rectangle"` or `"triangle"`; `None` where the questions do not tell.
        color: One of eight colours, `None` likewise.
    """

    path: Path
    name: str
    questions: tuple[tuple[str, str], ...]
    shape: str | None
    color: str | None

    def caption(self, lang: str) -> str:
        """What is to be seen, such as "một hình tròn màu đỏ"."""
        assert self.shape and self.color
        return _CAPTION[lang].format(shape=SHAPES[self.shape][lang], color=COLORS[self.color][lang])


def load_pictures(split: str, count: int) -> list[Picture]:
    """The first `count` images of easy-vqa's own `"train"` or `"test"` split.

    Raises:
        ValueError: If there are fewer.
    """
    paths, questions = {
        "train": (easy_vqa.get_train_image_paths, easy_vqa.get_train_questions),
        "test": (easy_vqa.get_test_image_paths, easy_vqa.get_test_questions),
    }[split]
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*questions(), strict=True):
        asked[image_id].append((question, answer))
    if count > len(paths()):
        raise ValueError(f"{count} images were asked for; easy-vqa's {split} split has {len(paths())}.")
    pictures = []
    for image_id, path in sorted(paths().items())[:count]:
        name = f"images/easy-vqa/{split}/{image_id}.png"
        pictures.append(Picture(Path(path), name, tuple(asked[image_id]), *read_facts(asked[image_id])))
    return pictures


def read_facts(questions: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Read the shape and the colour of an image off its questions and answers.

    An answer that names one is that fact; a question that takes one for granted ("what color is the triangle?") or
    that is affirmed ("is there a red shape?" yes; "is no circle present?" no) states it; and where all values but one
    were denied, that one is left.

    >>> read_facts([("what is the red shape?", "circle")])
    ('circle', 'red')
    >>> denials = [("is there not a circle?", "yes"), ("is a triangle present?", "no")]
    >>> read_facts([*denials, ("is there a blue shape?", "yes")])
    ('rectangle', 'blue')
    """
    stated, denied = set(), set()
    for question, answer in questions:
        words = re.findall(r"\w+", question)
        named = {word for word in words if word in SHAPES or word in COLORS}
        if answer not in TRUTHS:
            stated |= named | {answer}
        elif (answer == "yes") != bool({"not", "no"} & set(words)):
            stated |= named
        else:
            denied |= named
    return _only(SHAPES, stated, denied), _only(COLORS, stated, denied)


def _only(values: Iterable[str], stated: set[str], denied: set[str]) -> str | None:
    found = [value for value in values if value in stated] or [value for value in values if value not in denied]
    return found[0] if len(found) == 1 else None


def same_kind(answer: str, rng: random.Random) -> str:
    """Another answer to the same kind of question: another shape, another colour, or the opposite."""
    kind = next(kind for kind in (SHAPES, COLORS, TRUTHS) if answer in kind)
    return rng.choice([other for other in kind if other != answer])


def single_records(pictures: Sequence[Picture], most: int, rng: random.Random) -> list[Record]:
    """Up to `most` questions of every picture, as the package asks them: task `vqa_single`."""
    return [
        {
            "task": "vqa_single",
            "anchor": {"image": [picture.name], "text": question},
            "positive": answer,
            "negative": same_kind(answer, rng),
            "lang": "en",
            "domain": "easy-vqa",
        }
        for picture in pictures
        for question, answer in rng.sample(picture.questions, min(most, len(picture.questions)))
    ]


@dataclass(frozen=True)
class MultiQuestion:
    """A question of several turns or on several images: task `vqa_multi`."""

    images: tuple[str, ...]
    turns: tuple[str, ...]
    positive: str
    negative: str
    lang: str
    domain: str
    keys: frozenset[str] = field(default=frozenset(), compare=False)  # nothing open: the images keep the splits apart

    def record(self) -> Record:
        """This question as a record."""
        text = list(self.turns) if len(self.turns) > 1 else self.turns[0]
        return {
            "task": "vqa_multi",
            "anchor": {"image": list(self.images), "text": text},
            "positive": self.positive,
            "negative": self.negative,
            "lang": self.lang,
            "domain": self.domain,
        }


def multi_records(pictures: Sequence[Picture], count: int, rng: random.Random) -> list[Record]:
    """`count` questions, half of several turns on one image, half on two or three images."""
    talkative = [picture for picture in pictures if len(picture.questions) > 1]
    known = [picture for picture in pictures if picture.shape and picture.color]
    turns = draw(lambda: _turns(rng.choice(talkative), rng), count // 2)
    images = draw(lambda: _several_images(rng.sample(known, rng.choice((2, 3))), rng), count - count // 2)
    return [question.record() for question in (*turns, *images)]


def _turns(picture: Picture, rng: random.Random) -> MultiQuestion:
    exchanges = rng.sample(picture.questions, min(len(picture.questions), rng.choice((2, 3))))
    *earlier, (question, answer) = exchanges
    turns = (*(turn for exchange in earlier for turn in exchange), question)
    return MultiQuestion((picture.name,), turns, answer, same_kind(answer, rng), "en", "easy-vqa-turns")


def _several_images(pictures: Sequence[Picture], rng: random.Random) -> MultiQuestion:
    lang = rng.choices(LANGUAGES, weights=(1, 2, 1))[0]
    fact = rng.choice(("color", "shape"))
    values = [getattr(picture, fact) for picture in pictures]
    if rng.random() < 0.25:
        question, answer = _SAME[fact][lang], "yes" if values[0] == values[1] else "no"
    else:
        nth = rng.randrange(len(pictures))
        question, answer = _NTH_IMAGE[fact][lang].format(nth=_ORDINALS[lang][nth]), values[nth]
    others = [value for value in dict.fromkeys(values) if value != answer]  # what another image shows is the hardest
    negative = rng.choice(others) if others and answer not in TRUTHS else same_kind(answer, rng)
    names = tuple(picture.name for picture in pictures)
    return MultiQuestion(names, (question,), ANSWERS[answer][lang], ANSWERS[negative][lang], lang, "easy-vqa-images")


def caption_records(pictures: Sequence[Picture], count: int, rng: random.Random) -> list[Record]:
    """Captions without a prefix, one picture in all three languages: `count` records, fewer if the pictures run out."""
    known = [picture for picture in pictures if picture.shape and picture.color]
    chosen = rng.sample(known, min(len(known), -(-count // len(LANGUAGES))))
    records = [
        {
            "task": "general",
            "anchor": {"image": [picture.name]},
            "positive": picture.caption(lang),
            "lang": lang,
            "domain": "caption",
        }
        for picture in chosen
        for lang in LANGUAGES
    ]
    return records[:count]

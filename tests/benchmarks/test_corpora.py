from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from corpora import COPIES, LARGE, PAGE, QUESTIONS_PER_PAGE, Draw, encode_corpora, train_corpora
from PIL import Image


def test_texts_are_distinct_and_their_lengths_log_uniform() -> None:
    texts = Draw().texts(1000)
    lengths = np.array([len(text.split()) for text in texts])
    assert len(set(texts)) == 1000
    assert lengths.min() >= 3 and lengths.max() <= 300
    assert abs((lengths <= 30).mean() - 0.5) < 0.05  # 30 is the geometric middle of 3 and 300


def test_pictures_measure_112_to_480_pixels_a_side() -> None:
    sides = [side for picture in Draw().pictures(50) for side in picture.size]
    assert 112 <= min(sides) < 150 and 440 < max(sides) <= 480


def test_eight_questions_stand_on_each_page_shuffled() -> None:
    rows = Draw().pages(3)
    assert {row["image"].size for row in rows} == {PAGE}
    assert list(Counter(id(row["image"]) for row in rows).values()) == [QUESTIONS_PER_PAGE] * 3
    assert len({row["text"] for row in rows}) == 3 * QUESTIONS_PER_PAGE
    assert len({id(row["image"]) for row in rows[:QUESTIONS_PER_PAGE]}) > 1


def test_each_duplicate_occurs_as_often_as_stated() -> None:
    rows = Draw().duplicates(6)
    counts = Counter((row["text"], id(row.get("image"))) for row in rows)
    assert list(counts.values()) == [COPIES] * 6
    assert sum("image" in row for row in rows) == 3 * COPIES


def test_rows_scale_the_corpora() -> None:
    sizes = {name: len(inputs) for name, inputs in encode_corpora(16).items()}
    assert sizes == {
        "text": 8,
        "many-texts": 32,
        "images": 4,
        "mixed": 4,
        "several": 2,
        "shared": 4 * QUESTIONS_PER_PAGE,
        "duplicates": 4 * COPIES,
        "single": 2,
    }
    batches = {name: [len(column) for column in columns] for name, columns in train_corpora(16).items()}
    assert batches == {"text": [8, 8], "mixed": [8, 8], "shared": [16, 16]}


def test_the_same_seed_draws_the_same() -> None:
    assert encode_corpora(4)["text"] == encode_corpora(4)["text"]
    first, second = (encode_corpora(4)["images"][0] for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_large_images_are_files(tmp_path: Path) -> None:
    first, second = Draw().large_images(tmp_path, 2)
    with Image.open(first["image"]) as image:
        assert image.size == LARGE
    assert Path(first["image"]).read_bytes() != Path(second["image"]).read_bytes()

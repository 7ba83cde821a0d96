"""What the index's tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parent))

from hash_model import make_hash_model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., SentenceTransformer]:
    return make_hash_model


@pytest.fixture(scope="session")
def model(make_model) -> SentenceTransformer:
    return make_model()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    def paint(color: str | tuple[int, ...] = "red", size: tuple[int, int] = (40, 20), mode: str = "RGB"):
        return Image.new(mode, size, color)

    return paint

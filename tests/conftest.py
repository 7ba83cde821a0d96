"""Tiny models and pictures, made offline; nothing here reaches a network."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="vipyloqwen-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base

CORPUS = (
    "Xin chào thế giới! Số tiền tổng cộng phải thanh toán là bao nhiêu?",
    "Hóa đơn số 0123, ngày 25 tháng 12 năm 2024, tổng cộng 1.250.000 đ.",
    "What colour is the shape? Is there a red circle in the image?",
    "一个红色的圆形。发票总金额是多少？",
)


def pytest_configure() -> None:
    torch.set_num_threads(1)  # pytest-xdist runs a process on each core
    disable_progress_bar()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL checkpoint."""
    sizes = {"hidden_size": 64, "layers": 2, "vision_size": 32, "vision_layers": 1}
    return make_tiny_base(tmp_path_factory.mktemp("base"), CORPUS * 20, vocab_size=400, **sizes)


@pytest.fixture(scope="session")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model, saved."""
    path = tmp_path_factory.mktemp("model")
    ViPyloQwen.create(base, embedding_dim=32, device="cpu").save_pretrained(str(path), create_model_card=False)
    return path


@pytest.fixture
def model(folder: Path) -> ViPyloQwen:
    """A finished model, loaded anew: a test may change it."""
    return ViPyloQwen(folder, device="cpu")


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """Make a smooth picture, different for each seed."""

    def make(height: int = 56, width: int = 84, seed: int = 0) -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    return make

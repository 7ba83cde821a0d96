"""Records of every task, and a recipe of a few steps on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train.recipe import Recipe, load_recipe

Picture = Callable[..., Image.Image]


@pytest.fixture
def data(tmp_path: Path, picture: Picture) -> Path:
    """Records of every task: with and without images, negatives, scores, and several turns."""
    for seed in range(4):
        picture(56, 56, seed=seed).save(tmp_path / f"{seed}.png")
    records: list[dict[str, Any]] = []
    for i in range(4):
        image = [f"{i}.png"]
        records += [
            {"task": "ocr", "anchor": {"image": image, "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "ocr", "anchor": {"image": image, "text": "Ngày?"}, "positive": f"ngày {i}", "negative": f"{i}"},
            {"task": "vqa_single", "anchor": {"image": image, "text": "what?"}, "positive": "red" if i % 2 else "blue"},
            {
                "task": "vqa_multi",
                "anchor": {"image": [*image, "0.png"], "text": ["a?", "b", "c?"]},
                "positive": f"c{i}",
            },
            {"task": "text_pair", "anchor": f"câu {i}", "positive": f"sentence {i}", "score": i / 4},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}", "lang": "vi"},
            {"anchor": {"image": image}, "positive": f"một hình {i}", "domain": "caption"},
        ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return tmp_path


@pytest.fixture
def recipe(base: Path, data: Path) -> Callable[..., Recipe]:
    def make(**settings: Any) -> Recipe:
        given = {"base": str(base), "train": str(data / "train.jsonl"), "output": str(data / "run")}
        small = {"embedding_dim": 16, "batch_size": 2, "max_steps": 6, "logging_steps": 2, "learning_rate": 1e-3}
        return load_recipe("tiny.yaml", {**given, **small, **settings})

    return make


@pytest.fixture
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights of a saved model."""
    return lambda path: ViPyloQwen(path, device="cpu").state_dict()

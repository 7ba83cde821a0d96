"""A recipe of two steps on a few records, and hand-made runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sentence_vipyloqwen.train.recipe import Recipe, load_recipe

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory, picture: Picture) -> Path:
    """Records of every task."""
    folder = tmp_path_factory.mktemp("records")
    lines: list[dict[str, Any]] = []
    for i in range(4):
        picture(56, 56, seed=i).save(folder / f"{i}.png")
        image = [f"{i}.png"]
        lines += [
            {"task": "ocr", "anchor": {"image": image, "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "vqa_single", "anchor": {"image": image, "text": "what?"}, "positive": "red" if i % 2 else "blue"},
            {"task": "vqa_multi", "anchor": {"image": image, "text": ["a?", "b?"]}, "positive": f"c{i}"},
            {"task": "text_pair", "anchor": f"câu {i}", "positive": f"sentence {i}", "score": i / 4},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}"},
            {"anchor": {"image": image}, "positive": f"một hình {i}"},
        ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="session")
def make_recipe(base: Path, records: Path) -> Callable[..., Recipe]:
    """The reference of an ablation."""

    def make(output: Path, **settings: Any) -> Recipe:
        given = {"base": str(base), "train": str(records), "eval": str(records), "output": str(output)}
        small = {"embedding_dim": 16, "batch_size": 4, "max_steps": 2, "logging_steps": 1, "seed": 5, "workers": 0}
        return load_recipe("tiny.yaml", {**given, **small, **settings})

    return make


@pytest.fixture
def run_of() -> Callable[..., dict[str, Any]]:
    """A raw run, made by hand: its mean, and the figures of its tasks."""

    def make(variant: str, seed: int, mean: float | None, **tasks: float | None) -> dict[str, Any]:
        measured = {name: {"headline": "ndcg@10", "metrics": {"ndcg@10": value}} for name, value in tasks.items()}
        failed = mean is None
        return {
            "variant": variant,
            "seed": seed,
            "settings": {"max_steps": 7, "batch_size": 4, "accumulation": 2, "seed": seed},
            "data": {},
            "before": None,
            "after": None if failed else {"mean": mean, "tasks": measured},
            "curves": {name: [(1, 3.0), (2, 2.0 - mean)] for name in tasks} if mean is not None else {},
            "failure": "not finite" if failed else None,
            "seconds": 36.0,
            "versions": {"torch": "2.0"},
            "machine": {"cores": 2, "accelerator": None},
        }

    return make

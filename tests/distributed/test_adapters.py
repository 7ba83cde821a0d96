"""An adapter trained on two ranks is the one that a single process trains on the same batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.run import train


@pytest.fixture
def settings(base: Path, tmp_path: Path, picture: Callable[..., Image.Image]) -> Callable[..., dict[str, Any]]:
    """A recipe with an adapter on records with images and without."""
    from run_workers import settings_of

    records: list[dict[str, Any]] = []
    for i in range(8):
        picture(56, 56, seed=i).save(tmp_path / f"{i}.png")
        records += [
            {"task": "ocr", "anchor": {"image": [f"{i}.png"], "text": "Số tiền?"}, "positive": f"{i}.000 đ"},
            {"task": "instr", "anchor": f"Dịch: {i}", "positive": f"translated {i}"},
        ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    lora = {"tuning": "lora", "lora_r": 4, "lora_dropout": 0.0, "learning_rate": 1e-2}
    return lambda name, **more: {**settings_of(base, data, tmp_path / name), **lora, **more}


def test_an_adapter_trained_under_full_shard_is_that_of_one_process(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """And what it leaves is portable: the adapter, and the model with it merged."""
    import run_workers
    from ranks import run_ranks

    train(load_recipe(None, settings("alone", batch_size=4)), device="cpu")
    (tmp_path / "ranks").mkdir()
    run_ranks(tmp_path / "ranks", run_workers.sharded, settings("sharded"))
    found, expected = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("sharded", "alone")
    )
    assert found.keys() == expected.keys()
    assert all((found[name] - value).abs().max() < 1e-3 for name, value in expected.items())
    inputs = ["<instr> a", {"image": str(tmp_path / "1.png"), "text": "<ocr> b"}]
    merged = ViPyloQwen(tmp_path / "sharded" / "model", device="cpu").encode(inputs)
    apart = ViPyloQwen(tmp_path / "sharded" / "adapter", device="cpu").encode(inputs)
    stock = SentenceTransformer(str(tmp_path / "sharded" / "model"), device="cpu").encode(inputs)
    np.testing.assert_allclose(apart, merged, atol=1e-5)
    np.testing.assert_allclose(stock, merged, atol=1e-5)


def test_two_ranks_train_the_adapter_of_one_process_and_go_on_to_the_bit(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One rank is sent SIGTERM in step 3; both end there, and go on from the adapter alone."""
    import run_workers
    from ranks import run_ranks

    def on_ranks(name: str, *args: Any) -> list[Any]:
        folder = tmp_path / f"ranks-{name}"
        folder.mkdir()
        return run_ranks(folder, *args)

    def adapter(name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    train(load_recipe(None, settings("alone", batch_size=4)), device="cpu")  # ranks share their negatives
    on_ranks("whole", run_workers.whole, settings("whole"))
    found, expected = adapter("whole"), adapter("alone")
    assert found.keys() == expected.keys()
    assert all(
        (found[name] - value).abs().max() < 1e-3 for name, value in expected.items()
    )  # Adam on rounded gradients
    assert max(value.abs().max() for name, value in found.items() if "lora_B" in name) > 1e-2  # it began at 0

    told = on_ranks("stopped", run_workers.signalled, settings("run"), 1, 3)
    assert all("Step 3 is saved in" in message for message in told)
    assert not list((tmp_path / "run" / "checkpoints").glob("*/model.safetensors"))
    on_ranks("resumed", run_workers.whole, settings("run"))
    assert all(torch.equal(value, found[name]) for name, value in adapter("run").items())

    inputs = ["<instr> a", {"image": tmp_path / "1.png", "text": "<ocr> b"}]
    merged, apart = (ViPyloQwen(tmp_path / "run" / name, device="cpu").encode(inputs) for name in ("model", "adapter"))
    np.testing.assert_allclose(apart, merged, atol=1e-5)

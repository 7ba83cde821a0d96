"""Training through the trainer on two ranks, replicated and sharded, against one process with the same global batches.

One rank's batches are texts of two columns, the other's images of three.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_workers
import torch
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train.evaluation import evaluate
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.record_lines import read_records
from sentence_vipyloqwen.train.trainer import ViPyloQwenTrainer, copy_without_weights, fill

SHARDED_KINDS = {"FSDPViPyloQwen", "FSDPQwen2VLDecoderLayer", "FSDPQwen2VLVisionBlock"}
Run = Callable[..., list[Any]]
TOLERANCE = 1e-4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two batches of texts, and two of images with an explicit negative."""
    records: list[dict[str, Any]] = []
    for i in range(4):
        rank_workers.picture(i).save(tmp_path / f"{i}.png")
        records += [
            {"task": "instr", "anchor": f"Dịch: câu {i}", "positive": f"sentence {i}"},
            {"task": "ocr", "anchor": {"image": [f"{i}.png"], "text": "?"}, "positive": f"{i} đ", "negative": f"{i}"},
        ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def alone(folder: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What one process comes to by a loss."""
    return lambda loss="plain": rank_workers.train_by_trainer(folder, data, tmp_path / "alone", "alone", loss=loss)


def assert_equal_training(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for entry, expected in zip(found["log"], alone["log"], strict=True):
        assert entry.keys() == expected.keys()
        for name in expected.keys() - {"epoch"}:  # alone, an epoch has twice the batches
            if not name.endswith(("runtime", "per_second")):
                assert entry[name] == pytest.approx(expected[name], abs=2e-4), name
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == alone[kind].keys()
        for name, value in alone[kind].items():
            assert (found[kind][name] - value).abs().max() <= TOLERANCE * max(1.0, value.abs().max().item()), name


def assert_saved(saved: Path, data: Path, trained: dict[str, Any]) -> None:
    inputs = [record.anchor.as_input() for record in read_records(data)]
    for model in (ViPyloQwen(saved, device="cpu"), SentenceTransformer(str(saved), device="cpu")):
        assert abs(model.encode(inputs) - trained["embeddings"]).max() < TOLERANCE


@pytest.mark.parametrize("loss", ["plain", "cached"])
def test_replicated_ranks_train_as_one_process_does(
    folder: Path, data: Path, alone: Callable[..., dict[str, Any]], run: Run, tmp_path: Path, loss: str
) -> None:
    output = tmp_path / "output"
    results = run(rank_workers.train_by_trainer, folder, data, output, "ddp", loss=loss)
    expected = alone()
    for result in results:
        assert_equal_training(result, expected)
    assert [result["saves"] for result in results] == [3, 0]  # two checkpoints and the model, by rank 0
    assert_saved(output / "model", data, results[0])


@pytest.mark.parametrize(
    ("config", "loss", "environment"),
    [
        ("fsdp2_4x_h100.yaml", "plain", {}),
        (
            "fsdp2_4x_h100.yaml",
            "matryoshka",
            {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        ),
        ("fsdp2_multi_node.yaml", "cached", {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
    ],
)
def test_sharded_ranks_train_as_one_process_does(
    folder: Path,
    data: Path,
    alone: Callable[..., dict[str, Any]],
    run: Run,
    tmp_path: Path,
    config: str,
    loss: str,
    environment: dict[str, str],
) -> None:
    output = tmp_path / "output"
    results = run(
        rank_workers.train_by_trainer, folder, data, output, "sharded", config, loss=loss, environment=environment
    )
    expected = alone("matryoshka") if loss == "matryoshka" else alone()
    for result in results:
        assert_equal_training(result, expected)
        assert result["kinds"] >= SHARDED_KINDS
    assert [result["saves"] for result in results] == [3, 0]
    assert_saved(output / "model", data, results[0])
    assert_saved(output / "checkpoint-2", data, results[0])


def test_sharded_ranks_compute_in_bfloat16_and_keep_float32(
    folder: Path, data: Path, alone: Callable[..., dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    result, _ = run(rank_workers.train_by_trainer, folder, data, output, "sharded", "fsdp2_4x_h100.yaml", bf16=True)
    found, expected = (next(e["loss"] for e in of["log"] if "loss" in e) for of in (result, alone()))
    assert found == pytest.approx(expected, rel=0.03)
    assert found != expected
    assert {weight.dtype for weight in result["weights"].values()} == {torch.float32}
    assert {weight.dtype for weight in ViPyloQwen(output / "model", device="cpu").parameters()} == {torch.float32}


@pytest.mark.parametrize("how", ["ddp", "sharded"])
def test_ranks_go_on_from_a_checkpoint(folder: Path, data: Path, run: Run, tmp_path: Path, how: str) -> None:
    config = "fsdp2_4x_h100.yaml"
    run = partial(run, rank_workers.train_by_trainer, folder, data, how=how, config=config, optimizer="adamw_torch")
    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-1")
    assert [entry["step"] for entry in resumed[0]["log"] if "loss" in entry] == [1, 2]  # the first from the checkpoint
    for before, after in zip(whole, resumed, strict=True):
        assert after["weights"].keys() == before["weights"].keys()
        assert all(torch.equal(after["weights"][name], value) for name, value in before["weights"].items())


@pytest.mark.parametrize("config", [None, "fsdp2_4x_h100.yaml"])
def test_a_recipe_runs_from_data_to_model_on_several_ranks(
    base: Path, data: Path, run: Run, tmp_path: Path, config: str | None
) -> None:
    files = {"base": str(base), "train": str(data), "eval": str(data), "output": str(tmp_path / "output")}
    sizes = {"embedding_dim": 16, "batch_size": 2, "max_steps": 2, "eval_steps": 1, "save_steps": 1}
    settings = {**files, **sizes, "logging_steps": 1, "workers": 0}
    paths = run(rank_workers.train_by_recipe, load_recipe("tiny.yaml", settings), config)
    assert paths == [tmp_path / "output" / "model"] * 2
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text(encoding="utf-8"))
    after = evaluate(ViPyloQwen(paths[0], device="cpu"), data)
    assert metrics["after"]["mean"] == pytest.approx(after.mean, abs=1e-6)
    assert SentenceTransformer(str(paths[0]), device="cpu").encode("xin chào").shape == (16,)
    log = [json.loads(line) for line in (tmp_path / "output" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]


def test_a_sharded_model_is_refused(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sentence_vipyloqwen.train.trainer.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="sharded"):
        ViPyloQwenTrainer(model)


def test_a_copy_without_weights_takes_no_memory_and_can_be_filled(model: ViPyloQwen) -> None:
    copy = copy_without_weights(model)
    assert {parameter.device.type for parameter in copy.parameters()} == {"meta"}
    whole = fill(copy, model.state_dict())
    assert (whole.encode("xin chào") == model.encode("xin chào")).all()
    assert {parameter.device.type for parameter in copy.parameters()} == {"meta"}
    assert whole.model_card_data is model.model_card_data

"""A whole run through the stock trainer: what it leaves behind, checkpoints, and going on after an end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerState

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen, load_tasks
from sentence_vipyloqwen.train.build import make_arguments, make_loss
from sentence_vipyloqwen.train.progress import TrainingProgress
from sentence_vipyloqwen.train.recipe import Recipe, load_recipe
from sentence_vipyloqwen.train.run import train

Picture = Callable[..., Image.Image]


def test_a_run_leaves_model_log_metrics_and_recipe(recipe: Callable[..., Recipe], data: Path) -> None:
    result = train(recipe(eval=str(data / "train.jsonl"), eval_steps=3, save_steps=3), device="cpu")
    output = data / "run"
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]
    for entry in losses:
        rows = {name: value for name, value in entry.items() if name.endswith("/rows")}
        sums = [value * entry[name.replace("rows", "loss")] for name, value in rows.items()]
        assert sum(rows.values()) == 2 * 2
        assert sum(sums) / sum(rows.values()) == pytest.approx(entry["loss"], abs=1e-4)
    assert [entry["step"] for entry in log if "eval_tasks_mean" in entry] == [3, 6]
    metrics = json.loads((output / "metrics.json").read_text())
    assert set(metrics) == {"before", "after"}
    assert set(metrics["after"]["tasks"]) == {"ocr", "vqa_single", "vqa_multi", "text_pair", "instr", "general"}
    assert load_recipe(output / "recipe.yaml").max_steps == 6
    assert result.model_path == output / "model"
    assert (result.model_path / "README.md").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_are_started_once_however_many_epochs(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    started: list[object] = []
    start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda process: (started.append(process), start(process)))
    train(recipe(epochs=3, max_steps=0, workers=workers), device="cpu")
    assert len(started) == workers


def test_training_changes_every_part_of_the_model(recipe: Callable[..., Recipe], base: Path) -> None:
    before = ViPyloQwen.create(base, 16, seed=42, device="cpu").state_dict()
    after = train(recipe(), device="cpu").model.state_dict()
    for part in ("visual", "language_model", "linear"):
        changed = [name for name in before if part in name and not torch.equal(before[name], after[name])]
        assert changed, part


def test_a_learning_rate_of_its_own(recipe: Callable[..., Recipe], base: Path) -> None:
    before = ViPyloQwen.create(base, 16, seed=42, device="cpu").state_dict()
    after = train(recipe(learning_rates={"visual": 0.0}), device="cpu").model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "visual" in name)
    assert not torch.equal(before["2.linear.weight"], after["2.linear.weight"])


def test_frozen_parameters_stay_as_they_are(recipe: Callable[..., Recipe], base: Path) -> None:
    before = ViPyloQwen.create(base, 16, seed=42, device="cpu").state_dict()
    after = train(recipe(frozen=["visual.(blocks|patch_embed)"]), device="cpu").model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "visual.blocks" in name or "patch_embed" in name} <= still
    assert not any("language_model.layers" in name or "merger" in name for name in still)
    with pytest.raises(ValueError, match="no parameter of the model has 'vision_tower' in its name"):
        train(recipe(frozen="vision_tower", output="unused"), device="cpu")


def test_a_checkpoint_of_the_trainer_is_a_portable_folder(
    recipe: Callable[..., Recipe], data: Path, picture: Picture
) -> None:
    model = train(recipe(save_steps=6), device="cpu").model
    checkpoint = data / "run" / "checkpoints" / "checkpoint-6"
    assert {entry["type"].split(".")[0] for entry in json.loads((checkpoint / "modules.json").read_text())} == {
        "sentence_transformers"
    }
    inputs = ["a", {"image": picture(), "text": "<ocr> b"}, {"image": [picture(), picture(seed=1)], "text": "c"}]
    expected = model.encode(inputs)
    np.testing.assert_allclose(ViPyloQwen(checkpoint, device="cpu").encode(inputs), expected, atol=1e-6)
    stock = SentenceTransformer(str(checkpoint), device="cpu").encode(inputs)
    assert (stock * expected).sum(1).min() > 0.9999
    np.testing.assert_allclose(np.linalg.norm(stock, axis=1), 1, atol=1e-5)


def test_a_run_that_ended_early_goes_on(
    recipe: Callable[..., Recipe], data: Path, weights: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint of step 3, the run ends with the weights of one that was left alone."""
    whole = weights(train(recipe(save_steps=3, output=str(data / "whole")), device="cpu").model_path)

    step = SentenceTransformerTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformerTrainer, "training_step", killed)
        train(recipe(save_steps=3), device="cpu")
    resumed = weights(train(recipe(save_steps=3), device="cpu").model_path)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_folder_of_another_run_is_not_mixed_up(recipe: Callable[..., Recipe], data: Path) -> None:
    train(recipe(save_steps=3), device="cpu")
    with pytest.raises(ValueError, match="run of other settings .*seed: 42 -> 7"):
        train(recipe(save_steps=3, seed=7), device="cpu")
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run"):
        train(recipe(save_steps=3, resume=False), device="cpu")


def test_a_run_without_checkpoints_is_not_mixed_up_either(recipe: Callable[..., Recipe], data: Path) -> None:
    train(recipe(max_steps=2), device="cpu")
    log = (data / "run" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="run of other settings .*seed: 42 -> 7"):
        train(recipe(max_steps=2, seed=7), device="cpu")
    with pytest.raises(ValueError, match="earlier run: resume it or choose another"):
        train(recipe(max_steps=2, resume=False), device="cpu")
    assert (data / "run" / "log.jsonl").read_text() == log
    train(recipe(max_steps=2), device="cpu")
    assert len((data / "run" / "log.jsonl").read_text().splitlines()) == len(log.splitlines())


def test_a_run_that_has_ended_takes_no_further_step(
    recipe: Callable[..., Recipe], data: Path, weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    first = weights(train(recipe(save_steps=3), device="cpu").model_path)
    again = weights(train(recipe(save_steps=3), device="cpu").model_path)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_checkpoints_of_something_else_are_left_alone(recipe: Callable[..., Recipe], data: Path) -> None:
    foreign = data / "run" / "checkpoints" / "checkpoint-500"
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds checkpoints of something else"):
        train(recipe(), device="cpu")
    assert foreign.is_dir()


def test_the_same_files_written_in_another_way_are_the_same_run(
    recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(max_steps=2), device="cpu")
    monkeypatch.chdir(data)
    assert train(recipe(max_steps=2, train="./train.jsonl", output="run"), device="cpu").model_path == Path("run/model")


def test_other_records_under_the_same_name_are_another_run(recipe: Callable[..., Recipe], data: Path) -> None:
    train(recipe(save_steps=3), device="cpu")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[:-4]))
    with pytest.raises(ValueError, match="train.jsonl are not those that the run in .* began with"):
        train(recipe(save_steps=3), device="cpu")


def test_a_run_goes_on_with_as_many_processes_as_before(recipe: Callable[..., Recipe], data: Path) -> None:
    train(recipe(save_steps=3), device="cpu")
    origin = json.loads((data / "run" / "data.json").read_text())
    assert origin["processes"] == 1
    (data / "run" / "data.json").write_text(json.dumps({**origin, "processes": 4}))
    with pytest.raises(
        ValueError, match=r"run in .*run began with 4 process\(es\); got 1\. .*: go on with 4, or choose"
    ):
        train(recipe(save_steps=3), device="cpu")


@pytest.mark.parametrize("digests", [None, []])
def test_a_run_of_an_earlier_version_goes_on(
    recipe: Callable[..., Recipe], data: Path, caplog: pytest.LogCaptureFixture, digests: list[str] | None
) -> None:
    """It left no data.json, and then one that was a list of hashes alone."""
    train(recipe(max_steps=2, save_steps=2), device="cpu")
    file = data / "run" / "data.json"
    known = json.loads(file.read_text())["digests"]
    if digests is None:
        file.unlink()
    else:
        file.write_text(json.dumps(known))
    with caplog.at_level("WARNING"):
        train(recipe(max_steps=2, save_steps=2), device="cpu")
    assert ("it is not checked whether" in caplog.text) is (digests is None)
    assert json.loads(file.read_text()) == {"digests": known, "processes": 1}


def test_what_was_measured_before_survives_a_kill(
    recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(max_steps=2, save_steps=1, eval=str(data / "train.jsonl"))
    metrics = data / "run" / "metrics.json"
    stopped: list[bool] = []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = SentenceTransformerTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformerTrainer, "training_step", killed)
        patch.setattr(TrainingProgress, "stop", lambda self: stopped.append(True))
        train(settings, device="cpu")
    assert stopped
    before = json.loads(metrics.read_text())
    assert set(before) == {"before"}
    for _ in range(2):  # the resumed run, and its repetition
        assert train(settings, device="cpu").before is None
        after = json.loads(metrics.read_text())
        assert set(after) == {"before", "after"}
        assert after["before"] == before["before"]


def test_only_the_first_process_writes(
    recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentenceTransformerTrainer, "is_world_process_zero", lambda self: False)
    train(recipe(max_steps=1), device="cpu")
    for name in ("recipe.yaml", "data.json", "model"):
        assert not (data / "run" / name).exists()


def test_a_finished_model_is_trained_on(recipe: Callable[..., Recipe], folder: Path) -> None:
    sizes = {"embedding_dim": 32, "max_seq_length": None, "max_pixels": 1280 * 28 * 28}
    result = train(recipe(base=str(folder), max_steps=1, matryoshka_dims=[32, 16], **sizes), device="cpu")
    assert result.model.get_embedding_dimension() == 32
    for name, value in (("embedding_dim", 16), ("max_seq_length", 512), ("min_pixels", 784), ("max_pixels", 78400)):
        other = recipe(base=str(folder), output="unused", **{**sizes, name: value})
        with pytest.raises(ValueError, match=f"Setting {name} is {value}; the finished model .* keeps it"):
            train(other, device="cpu")


def test_weights_are_trained_in_float32_unless_told_otherwise(
    recipe: Callable[..., Recipe], base: Path, data: Path
) -> None:
    ViPyloQwen.create(base, 16, dtype="bfloat16", device="cpu").save_pretrained(str(data / "half"))
    settings = {"base": str(data / "half"), "dtype": None, "max_seq_length": None, "max_steps": 1, "bf16": True}
    model = train(recipe(**settings, eval=str(data / "train.jsonl")), device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_trainer_gets_every_setting_of_the_published_run(data: Path) -> None:
    recipe = load_recipe("viPyloqwen-2b.yaml", {"train": "t.jsonl", "eval": "e.jsonl", "output": str(data)})
    arguments = make_arguments(recipe, data, "cpu")
    expected = {
        "num_train_epochs": 2,
        "max_steps": -1,
        "per_device_train_batch_size": 24,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.001,
        "max_grad_norm": 1.0,
        "bf16": True,
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_strategy": "steps",
        "save_steps": 1000,
        "logging_steps": 10,
        "dataloader_num_workers": 4,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert recipe.dtype == "float32"
    assert arguments.get_warmup_steps(1000) == 50


def test_the_loss_gets_every_setting(recipe: Callable[..., Recipe], model: ViPyloQwen) -> None:
    options = {
        "temperature": 0.5,
        "weights": {"vqa_multi": {"triplet": 3.0}},
        "margins": {"ocr": 0.4},
        "negatives": "all",
        "pair_weight": "uniform",
        "triplet_scale": "temperature",
        "hidden_prefixes": ["ocr"],
    }
    got = make_loss(recipe(**options, gather_negatives=True), model).get_config_dict()
    assert got.pop("gather_across_devices")
    usual = PrefixRoutedLoss(model).get_config_dict()
    assert set(got) == set(options)
    assert got.pop("weights") == {**usual["weights"], "vqa_multi": {**usual["weights"]["vqa_multi"], "triplet": 3.0}}
    assert got.pop("margins") == {**usual["margins"], "ocr": 0.4}
    assert got == {name: value for name, value in options.items() if name not in ("weights", "margins")}


def test_the_log_is_strict_json(tmp_path: Path) -> None:
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(quiet=True))
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=True)
    logs = {"loss": float("nan"), "ocr/triplet": float("inf"), "learning_rate": 0.5}
    progress.on_log(None, state, None, logs)
    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert entry.pop("memory_gb") > 0
    assert entry == {"step": 1, "loss": None, "ocr/triplet": None, "learning_rate": 0.5}


def test_the_bar_can_be_stopped_at_any_time(tmp_path: Path) -> None:
    progress = TrainingProgress(tmp_path / "log.jsonl", Console(file=io.StringIO(), force_terminal=True))
    progress.stop()
    progress.on_train_begin(None, TrainerState(max_steps=2, is_world_process_zero=True), None)
    assert progress.bar.live.is_started
    progress.stop()
    progress.stop()
    assert not progress.bar.live.is_started


@pytest.mark.parametrize("kind", [ViPyloQwen, SentenceTransformer])
def test_the_stock_trainer_trains_either_model(kind: type, folder: Path, data: Path) -> None:
    """Section 6 of the design: the stock trainer, the loss, the data; nothing else."""
    model = kind(str(folder), device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(data / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = load_tasks(data / "train.jsonl", cache_dir=data / "cache")
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=PrefixRoutedLoss(model))
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(value.isfinite().all() for value in model.state_dict().values())

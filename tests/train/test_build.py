"""What a recipe becomes: samplers, loss, trainer, trackers."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch.nn import functional as F
from transformers import TrainerCallback

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.modules.vision_cache import VisionCache
from sentence_vipyloqwen.train import build
from sentence_vipyloqwen.train.adapters import AdapterTrainer
from sentence_vipyloqwen.train.build import make_arguments, make_loss, make_model, make_trackers, trainer_class
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train
from sentence_vipyloqwen.train.sampling import Phase, SplitBatchSampler, TaskMixBatchSampler
from sentence_vipyloqwen.train.trainer import ViPyloQwenTrainer

Make = Callable[..., Recipe]


def test_rows_are_dealt_by_our_sampler_whatever_deals_the_tasks(recipe: Make, data: Path) -> None:
    """Those of Sentence Transformers keep 45 bytes a row, and do not go on in a later epoch on several ranks."""
    for settings in ({}, {"sampling": "round_robin"}, {"mixed_batches": True}):
        arguments = make_arguments(recipe(**settings), data, "cpu")
        assert arguments.batch_sampler.func is SplitBatchSampler
        mix = arguments.multi_dataset_batch_sampler
        assert mix == "round_robin" if settings.get("sampling") else mix.func is TaskMixBatchSampler


@pytest.mark.parametrize(
    "settings",
    [
        {"mix": {"text": 1, "multimodal": 2}},
        {"mix_temperature": 0.5},
        {"curriculum": [{"until": 1.0, "mix": {"text": 1}}]},
        {"gather_negatives": True},
    ],
)
def test_a_mix_of_tasks_takes_our_samplers(recipe: Make, data: Path, settings: dict[str, Any]) -> None:
    made = recipe(**settings, group_images=4, no_duplicates=True)
    arguments = make_arguments(made, data, "cpu")
    mix, rows = arguments.multi_dataset_batch_sampler, arguments.batch_sampler
    assert (mix.func, rows.func) == (TaskMixBatchSampler, SplitBatchSampler)
    assert rows.keywords == {"group_images": 4, "no_duplicates": True}
    assert mix.keywords["mix"] == (made.mix or None)
    assert mix.keywords["temperature"] == made.mix_temperature
    assert mix.keywords["curriculum"] == tuple(Phase(**phase) for phase in made.curriculum)
    assert pickle.loads(pickle.dumps(mix)).keywords == mix.keywords


def test_a_new_model_pools_as_asked_and_a_finished_one_as_it_did(
    recipe: Make, data: Path, folder: Path, tmp_path: Path
) -> None:
    made = recipe(pooling="lasttoken")
    model = make_model(made, make_arguments(made, data, "cpu"), data, "cpu")
    model.save_pretrained(str(tmp_path / "last"))
    tokens = model(model.preprocess(["một hai"]), padded_output=True)["token_embeddings"][0, -1]
    expected = F.normalize(model[2].linear(tokens), dim=0).detach().numpy()
    for loaded in (ViPyloQwen, SentenceTransformer):
        vector = loaded(str(tmp_path / "last"), device="cpu").encode("một hai")
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    other = recipe(base=str(folder), embedding_dim=None, max_seq_length=None, pooling="lasttoken")
    with pytest.raises(ValueError, match="Setting pooling is lasttoken; the finished model .* has mean and keeps it"):
        make_model(other, make_arguments(other, data, "cpu"), data, "cpu")


def test_attention_pooling_begins_as_the_mean_and_is_trained(recipe: Make, data: Path) -> None:
    inputs = ["a", "<ocr> một hai ba", "<instr> bốn năm"]
    made = recipe(pooling="attention", max_steps=2)
    mean, attention = (make_model(of, make_arguments(of, data, "cpu"), data, "cpu") for of in (recipe(), made))
    np.testing.assert_allclose(attention.encode(inputs), mean.encode(inputs), atol=1e-6)
    result = train(made, device="cpu")
    query = result.model[1].query
    assert query.any() and query.isfinite().all()
    loaded = ViPyloQwen(result.model_path, device="cpu")
    assert torch.equal(loaded[1].query, query)
    np.testing.assert_allclose(loaded.encode(inputs), result.model.encode(inputs), atol=1e-6)
    goes_on = recipe(base=str(result.model_path), pooling="attention", output=str(data / "more"), max_steps=2)
    assert not torch.equal(train(goes_on, device="cpu").model[1].query, query)
    other = recipe(base=str(result.model_path), pooling="mean")
    with pytest.raises(ValueError, match="Setting pooling is mean; the finished model .* has attention and keeps it"):
        make_model(other, make_arguments(other, data, "cpu"), data, "cpu")


def test_attention_pooling_has_the_dtype_of_its_model(recipe: Make, data: Path) -> None:
    made = recipe(pooling="attention", dtype="bfloat16")
    model = make_model(made, make_arguments(made, data, "cpu"), data, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_run_with_attention_pooling_goes_on_to_the_bit(recipe: Make, data: Path) -> None:
    settings = {"pooling": "attention", "save_steps": 2}
    whole = train(recipe(**settings, output=str(data / "whole")), device="cpu").model.state_dict()
    train(recipe(**settings), device="cpu")
    last = data / "run" / "checkpoints" / "checkpoint-6"
    shutil.rmtree(last)
    shutil.rmtree(data / "run" / "model")
    resumed = train(recipe(**settings), device="cpu").model.state_dict()
    assert last.is_dir()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_round_robin_deals_the_batches_of_groups(recipe: Make, data: Path) -> None:
    arguments = make_arguments(recipe(group_images=4, sampling="round_robin"), data, "cpu")
    assert arguments.multi_dataset_batch_sampler == "round_robin"
    assert arguments.batch_sampler.keywords == {"group_images": 4, "no_duplicates": False}


def test_parts_of_a_batch_take_the_cached_loss(recipe: Make, model: ViPyloQwen) -> None:
    assert type(make_loss(recipe(), model)) is PrefixRoutedLoss
    by_rows = make_loss(recipe(loss_mini_batch_size=8, gather_negatives=True, temperature=0.1), model)
    assert isinstance(by_rows, CachedPrefixRoutedLoss)
    assert (by_rows.mini_batch_size, by_rows.mini_batch_num_tokens) == (8, None)
    assert (by_rows.gather_across_devices, by_rows.temperature) == (True, 0.1)
    by_tokens = make_loss(recipe(loss_mini_batch_tokens=512), model)
    assert by_tokens.mini_batch_num_tokens == 512
    nested = make_loss(recipe(loss_mini_batch_size=8, matryoshka_dims=[16, 8]), model)
    assert isinstance(nested, MatryoshkaLoss)
    assert isinstance(nested.loss, CachedPrefixRoutedLoss)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_mini_batch_size": 1, "batch_size": 4, "matryoshka_dims": [16, 8], "gather_negatives": True},
        {"mixed_batches": True, "gather_negatives": True, "group_images": 2, "batch_size": 4},
        {"mix_temperature": 0.0, "accumulation": 2},
    ],
)
def test_a_run_with_these_settings_trains(recipe: Make, data: Path, settings: dict[str, Any]) -> None:
    result = train(recipe(**settings, max_steps=2), device="cpu")
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


def test_the_stock_trainer_serves_one_process(recipe: Make) -> None:
    one, four = SimpleNamespace(world_size=1), SimpleNamespace(world_size=4)
    assert trainer_class(recipe(), one) is SentenceTransformerTrainer
    assert trainer_class(recipe(), four) is ViPyloQwenTrainer
    assert trainer_class(recipe(tuning="lora"), one) is AdapterTrainer
    assert issubclass(AdapterTrainer, ViPyloQwenTrainer)


class Tracker(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.logging_dir: str | None = None
        self.told: list[dict[str, Any]] = []
        made.append(self)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.told.append(dict(logs or {}))


made: list[Tracker] = []


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard and W&B are there, trackio is not."""
    made.clear()
    monkeypatch.setattr(build, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    monkeypatch.setattr(build, "get_reporting_integration_callbacks", lambda names: [Tracker for _ in names])


def test_tensorboard_is_there_by_default_where_it_is_installed(
    installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tracker,) = make_trackers(("auto",), tmp_path)
    assert tracker.logging_dir == str(tmp_path / "tensorboard")
    assert make_trackers(("none",), tmp_path) == []
    assert len(make_trackers(("tensorboard", "wandb"), tmp_path)) == 2
    with pytest.raises(ImportError, match=r"report_to names \['trackio'\], not installed; .* pip install trackio"):
        make_trackers(("trackio",), tmp_path)
    monkeypatch.setattr(build, "get_available_reporting_integrations", list)
    assert make_trackers(("auto",), tmp_path) == []


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paper is not supported, only"):
        make_trackers(("paper",), tmp_path)


def test_a_tracker_is_told_losses_rates_and_metrics(installed: None, recipe: Make, data: Path) -> None:
    train(recipe(max_steps=2, eval=str(data / "train.jsonl"), eval_steps=2), device="cpu")
    told = {name for logs in made[0].told for name in logs}
    assert {"loss", "ocr/info_nce", "rows_per_second", "memory_gb", "eval_tasks_mean", "eval_ocr_recall@1"} <= told


def test_images_stay_closed_where_the_loss_runs_in_parts(recipe: Make, data: Path) -> None:
    for settings, lazy in (
        ({}, False),
        ({"loss_mini_batch_size": 2}, True),
        ({"loss_mini_batch_tokens": 99}, True),
        ({"loss_mini_batch_size": 2, "lazy_images": False}, False),
        ({"lazy_images": True}, True),
    ):
        made = recipe(**settings)
        model = build.make_model(made, make_arguments(made, data, "cpu"), data, "cpu")
        assert model[0].lazy_images is lazy


def test_broken_images_are_skipped_where_the_recipe_says_so(recipe: Make, data: Path) -> None:
    (data / "3.png").write_bytes(b"broken")
    train(recipe(max_steps=1, on_error="skip"), device="cpu")
    with pytest.raises(ValueError, match="3.png"):
        train(recipe(max_steps=20, output=str(data / "other")), device="cpu")


def test_a_vision_cache_is_filled_once_for_all_runs(recipe: Make, data: Path, weights: Callable[..., Any]) -> None:
    settings = {"frozen": ["visual"], "vision_cache": str(data / "features"), "max_steps": 12}
    plain = train(recipe(frozen=["visual"], max_steps=12, output=str(data / "plain")), device="cpu")
    cold = train(recipe(**settings, output=str(data / "cold")), device="cpu")
    (folder,) = (data / "features").iterdir()
    cache = VisionCache(folder, merge_size=2)
    assert len(cache) == 4
    cache.close()
    warm = train(recipe(**settings, output=str(data / "warm")), device="cpu")
    assert cold.model[0].vision_cache is None
    expected = weights(plain.model_path)
    for run in (cold, warm):
        for name, weight in weights(run.model_path).items():
            assert (weight - expected[name]).abs().max() <= 1e-4, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"needs a frozen vision tower; .*frozen: \[visual\]"),
        (
            {"frozen": ["visual"], "attn_implementation": "eager"},
            "needs packed batches; .*'eager'",
        ),
    ],
)
def test_a_vision_cache_that_cannot_serve_is_refused(
    recipe: Make, data: Path, settings: dict[str, Any], message: str
) -> None:
    made = recipe(vision_cache=str(data / "features"), **settings)
    with pytest.raises(ValueError, match=message):
        build.make_model(made, make_arguments(made, data, "cpu"), data, "cpu")

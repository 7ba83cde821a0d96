"""Ends of a run that is not over: signals, NaN, a full disk."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainerControl

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.train import interruption
from sentence_vipyloqwen.train.batches import BatchWatch, NonFiniteStep, gradients_are_finite
from sentence_vipyloqwen.train.checkpoints import CheckpointKeeper, best_of, complete_checkpoints, step_of
from sentence_vipyloqwen.train.interruption import (
    ProcessLost,
    StopOnSignal,
    TrainingInterrupted,
    explaining,
    is_disk_full,
)
from sentence_vipyloqwen.train.progress import LOG_FILE, read_log
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train

Make = Callable[..., Recipe]
Weights = Callable[[Path], dict[str, torch.Tensor]]


def steps(data: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(data / "run" / "checkpoints")]


def during_step(monkeypatch: pytest.MonkeyPatch, step: int, work: Callable[[], Any]) -> None:
    """Do something in the middle of a training step."""
    usual = SentenceTransformerTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            work()
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformerTrainer, "training_step", training_step)


# --- Signals ---


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(
    recipe: Make, data: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    whole = weights(train(recipe(output=str(data / "whole")), device="cpu").model_path)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        during_step(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingInterrupted, match=r"Step 3 is saved in .*checkpoint-3: the same command") as stop:
            train(recipe(), device="cpu")  # no checkpoints were asked for; one is written all the same
    assert stop.value.exit_code == code
    assert steps(data) == [3]
    assert signal.getsignal(number) == before
    assert (data / "run" / "training.html").exists()
    resumed = weights(train(recipe(), device="cpu").model_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses, parts = (
        {entry["step"]: entry["loss"] for entry in read_log(data / output / LOG_FILE) if "loss" in entry}
        for output in ("whole", "run")
    )
    assert (list(losses), list(parts)) == ([2, 4, 6], [2, 3, 4, 6])  # an entry every two steps, and one at the end
    assert losses[4] == pytest.approx((parts[3] + parts[4]) / 2)


def test_a_signal_during_an_evaluation_ends_it_there(recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"tasks_mean": 0.5}

    monkeypatch.setattr("sentence_vipyloqwen.train.evaluation.TasksEvaluator.__call__", evaluate)
    with pytest.raises(TrainingInterrupted, match="Step 2 is saved"):
        train(recipe(eval=str(data / "train.jsonl"), eval_steps=2), device="cpu")
    assert steps(data) == [2]


def test_a_signal_at_an_evaluation_loses_neither_it_nor_the_best_checkpoint(
    recipe: Make, data: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of the step in which the signal comes is the best."""
    values = {2: 0.2, 4: 0.5, 6: 0.4}
    monkeypatch.setattr(
        "sentence_vipyloqwen.train.evaluation.TasksEvaluator.__call__",
        lambda self, model, output_path=None, epoch=-1, steps=-1: {"tasks_mean": values[steps]},
    )
    settings = {"eval": str(data / "train.jsonl"), "eval_steps": 2, "best_metric": "mean", "save_steps": 6}
    whole = train(recipe(**settings, output=str(data / "whole")), device="cpu").model_path
    with monkeypatch.context() as patch:
        during_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TrainingInterrupted, match="Step 4 is saved"):
            train(recipe(**settings), device="cpu")
    resumed = train(recipe(**settings), device="cpu").model_path
    curves, best = [], []
    for output in (whole.parent, resumed.parent):
        entries = read_log(output / LOG_FILE)
        curves.append([(entry["step"], entry["eval_tasks_mean"]) for entry in entries if "eval_tasks_mean" in entry])
        best.append(best_of(complete_checkpoints(output / "checkpoints")[-1]))
    assert curves == [sorted(values.items())] * 2
    assert [path.name for path in best if path] == ["checkpoint-4"] * 2
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_signal_ends_at_once() -> None:
    stop = StopOnSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_may_come_twice() -> None:
    """From the scheduler, which signals every process of a job, and from the launcher, which hands it on."""
    stop = StopOnSignal()
    with stop.listening():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_launcher_s_sigterm_does_not_cut_off_what_a_process_says_of_a_lost_one(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal()
    try:
        with pytest.raises(ProcessLost, match="another process"), stop.listening(), explaining(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("writev [127.0.0.1]:4211: Broken pipe")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_rank_s_signal_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "any_rank", lambda flag: True)
    stop, control = StopOnSignal(), TrainerControl(should_evaluate=True)
    stop.on_step_end(None, None, control)
    assert control == TrainerControl(should_log=True, should_save=True, should_evaluate=True, should_training_stop=True)
    assert stop.received == signal.SIGTERM


def test_outside_the_main_thread_nothing_is_heard() -> None:
    before = signal.getsignal(signal.SIGTERM)
    heard: list[Any] = []

    def work() -> None:
        with StopOnSignal().listening():
            heard.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [before]


def test_a_worker_outlives_the_signal_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals every process of a job: a worker that died of it would end the step under way."""
    alarms: list[int] = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    stop = StopOnSignal()
    owner = os.getpid()
    with stop.listening():
        monkeypatch.setattr(os, "getpid", lambda: owner + 1)
        signal.raise_signal(signal.SIGINT)
        assert alarms == []
        signal.raise_signal(signal.SIGTERM)
        assert alarms == [interruption.WORKER_GRACE]
    assert stop.received == 0


def test_the_command_line_ends_with_the_signal_s_code(recipe: Make, data: Path) -> None:
    """The whole process group is signalled at step 2, workers too, as by a terminal or a scheduler."""
    (data / "r.yaml").write_text(recipe(workers=1).to_yaml())
    script = f"""
import os, signal, sys
from sentence_transformers import SentenceTransformerTrainer as Trainer
from sentence_vipyloqwen.cli import main
step = Trainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == 1:
        os.killpg(os.getpgid(0), signal.SIGTERM)
    return step(self, *args, **kwargs)
Trainer.training_step = killed
sys.argv = ["vipyloqwen", "train", "--recipe", {str(data / "r.yaml")!r}, "--device", "cpu"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 143, done.stderr[-2000:]
    assert "Signal 15. Step 2 is saved in" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(data) == [2]


# --- NaN ---


class Poisoned(PrefixRoutedLoss):
    """Gives NaN at the third batch."""

    poison = float("nan")
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        Poisoned.calls += 1
        terms = super().forward(*args, **kwargs)
        return terms * self.poison if Poisoned.calls == 3 else terms


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(
    recipe: Make, data: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    train(recipe(save_steps=2, keep_checkpoints=9, output=str(data / "good")), device="cpu")
    good = weights(data / "good" / "checkpoints" / "checkpoint-2")
    monkeypatch.setattr(Poisoned, "calls", 0)
    monkeypatch.setattr(Poisoned, "poison", poison)
    monkeypatch.setattr("sentence_vipyloqwen.train.build.PrefixRoutedLoss", Poisoned)
    with pytest.raises(NonFiniteStep, match="the loss of step 3 is NaN or infinite, so the step was not taken"):
        train(recipe(), device="cpu")
    folder = data / "run" / "stopped" / "step-3"
    saved = weights(folder / "model")
    assert all(torch.equal(good[name], value) for name, value in saved.items())
    batch = folder / "rank-0-batch-0"
    assert not list(folder.rglob("*.pt"))
    tensors = load_file(batch / "features.safetensors")
    assert {"anchor.input_ids", "anchor.attention_mask", "anchor.image_keys", "positive.input_ids"} <= set(tensors)
    rows = json.loads((batch / "rows.json").read_text())
    assert any(value in ("nan", "inf") for value in rows["loss"].values())
    assert len(rows["rows"]) == len(tensors["anchor.input_ids"]) == 2
    assert set(rows["rows"][0]) >= {"anchor", "positive"}
    # The batch can be run again.
    model = ViPyloQwen(folder / "model", device="cpu")
    features = [
        {name.removeprefix(f"{column}."): value for name, value in tensors.items() if name.startswith(f"{column}.")}
        for column in ("anchor", "positive")
    ]
    terms = PrefixRoutedLoss(model)(features, tensors.get("labels"))
    assert torch.stack(list(terms.values())).isfinite().all()


def test_every_batch_of_an_accumulated_step_is_written(
    recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Poisoned, "calls", 0)
    monkeypatch.setattr("sentence_vipyloqwen.train.build.PrefixRoutedLoss", Poisoned)
    with pytest.raises(NonFiniteStep, match="step 2"):
        train(recipe(accumulation=2), device="cpu")
    assert len(list((data / "run" / "stopped" / "step-2").glob("rank-0-batch-*/rows.json"))) == 2


def test_images_of_a_batch_that_is_opened_in_parts_are_named(
    recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sentence_vipyloqwen.train.batches.gradients_are_finite", lambda model: False)
    settings = {"loss_mini_batch_size": 2, "batch_size": 4, "mix": {"text": 0, "multimodal": 1}}
    with pytest.raises(NonFiniteStep, match="the gradient of step 1"):
        train(recipe(**settings), device="cpu")
    batch = data / "run" / "stopped" / "step-1" / "rank-0-batch-0"
    rows = json.loads((batch / "rows.json").read_text())["rows"]
    assert all(f"{data}/" in row["anchor.images"][0] for row in rows)
    assert len(rows) == len(load_file(batch / "features.safetensors")["anchor.input_ids"])


def test_a_gradient_that_is_no_number_stops_the_run(recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if self.state.global_step == 1:
            self.model[2].linear.weight.grad[0, 0] = float("inf")
        return loss

    step = SentenceTransformerTrainer.training_step
    monkeypatch.setattr(SentenceTransformerTrainer, "training_step", spoil)
    with pytest.raises(NonFiniteStep, match="the gradient of step 2 is NaN or infinite"):
        train(recipe(), device="cpu")
    assert (data / "run" / "stopped" / "step-2" / "model" / "modules.json").exists()


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (3e38, True), (float("inf"), False), (float("nan"), False)])
def test_gradients_are_asked_one_by_one(value: float, finite: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert gradients_are_finite(model)
    model[1].bias.grad = torch.tensor([0.0, value])
    assert gradients_are_finite(model) is finite


def test_a_batch_is_let_go_of_when_its_step_is_done() -> None:
    """Its pixels, too: the next step needs the room."""

    class Sum(nn.Module):
        def forward(self, columns: Any, labels: Any = None) -> Any:
            return {"sum": sum(features["pixel_values"].sum() for features in columns)}

    loss = Sum()
    watch = BatchWatch(loss)
    for training in (True, False):  # an evaluation keeps nothing at all
        pixels = torch.ones(2, requires_grad=True)
        alive = weakref.ref(pixels)
        with torch.set_grad_enabled(training):
            loss([{"pixel_values": pixels}])
        assert len(watch.batches) == training
        watch.forget()
        del pixels
        gc.collect()
        assert alive() is None


# --- A full disk ---


def test_a_full_disk_ends_with_what_to_do_and_the_checkpoint_before(
    recipe: Make, data: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "keep_checkpoints": 1}
    whole = weights(train(recipe(**settings, output=str(data / "whole")), device="cpu").model_path)
    save = torch.save

    def full(value: Any, path: str) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="the disk is full .* make room and run the same command") as stop:
            train(recipe(**settings), device="cpu")
    assert stop.value.errno == errno.ENOSPC
    assert steps(data) == [2]
    assert [path.name for path in (data / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = weights(train(recipe(**settings), device="cpu").model_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), True),
        (caused(RuntimeError("while saving"), OSError(errno.ENOSPC, "x")), True),
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_full_disk_is_known_in_every_shape(error: Exception, full: bool, tmp_path: Path) -> None:
    assert is_disk_full(error) is full
    with pytest.raises(OSError if full else type(error)) as raised, explaining(tmp_path):
        raise error
    assert (raised.value is error) is not full


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistBackendError("NCCL"), True),
        (torch.distributed.DistError(), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4211"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_a_lost_process_is_told_of(error: Exception, lost: bool, tmp_path: Path) -> None:
    with pytest.raises(ProcessLost if lost else type(error)) as raised, explaining(tmp_path):
        raise error
    assert ("another process of this training ended" in str(raised.value)) is lost


def test_an_end_while_sealing_is_an_end_with_the_checkpoint_before(
    recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal came, and then the disk was full: the message names the checkpoint that there is."""
    during_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    usual = CheckpointKeeper.on_save

    def full(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(CheckpointKeeper, "on_save", full)
    with pytest.raises(TrainingInterrupted, match=r"Step 2 is saved in .* \(.*the disk is full"):
        train(recipe(save_steps=2), device="cpu")
    assert steps(data) == [2]

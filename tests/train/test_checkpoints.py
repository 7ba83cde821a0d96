"""Kills at every stage of writing a checkpoint, and at random moments: nothing that was complete is lost."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer
from transformers import Trainer, TrainerControl, TrainerState

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train.checkpoints import (
    MARKER,
    CheckpointKeeper,
    best_of,
    clean,
    complete_checkpoints,
    delete,
    is_complete,
    rotate,
    seal,
    step_of,
    stopped_early,
)
from sentence_vipyloqwen.train.evaluation import TasksEvaluator
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train

Weights = Callable[[Path], dict[str, torch.Tensor]]
KILLED = 9


def in_a_child(work: Callable[[], Any]) -> int:
    """Do a piece of work in a forked process; its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def die_at_event(number: int, folder: Path) -> None:
    """Have this process die, without any cleaning up, at its n-th change to what is in a folder."""
    changes = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in changes and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os._exit(KILLED)

    sys.addaudithook(audit)


def write_checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    """What the trainer leaves, in small."""
    path = folder / f"checkpoint-{step}"
    (path / "2_Dense").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"w" * 100)
    (path / "2_Dense" / "model.safetensors").write_bytes(b"h" * 10)
    (path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None, "stateful_callbacks": {}}))
    if sealed:
        seal(path)
    return path


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(folder)]


# --- What is complete ---


def test_a_checkpoint_is_complete_when_every_file_of_the_marker_is_there(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5, sealed=False)
    assert not is_complete(path)
    seal(path)
    assert is_complete(path)
    assert json.loads((path / MARKER).read_text())["files"]["2_Dense/model.safetensors"] == 10
    (path / "2_Dense" / "model.safetensors").write_bytes(b"h" * 9)
    assert not is_complete(path)
    (path / "2_Dense" / "model.safetensors").unlink()
    assert not is_complete(path)
    (path / MARKER).write_text("{")
    assert not is_complete(path)


def test_checkpoints_are_ordered_by_step_and_others_are_left_alone(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "none") == []
    for step in (10, 9, 100):
        write_checkpoint(tmp_path, step)
    for name in ("checkpoint-x", "checkpoint-7.bak", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert steps(tmp_path) == [9, 10, 100]
    assert clean(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 7


def test_what_was_left_half_written_is_cleaned_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 5)
    half = write_checkpoint(tmp_path, 10, sealed=False)
    with caplog.at_level(logging.WARNING):
        assert clean(tmp_path) == [half]
    assert not half.exists()
    assert steps(tmp_path) == [5]
    assert f"Deleting {half}: it was not written to its end." in caplog.text


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(2, None, [4, 5]), (1, None, [5]), (1, 2, [2, 5]), (2, 2, [2, 5]), (3, 2, [2, 4, 5]), (9, 1, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, kept: list[int]) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    half = write_checkpoint(tmp_path, 6, sealed=False)
    rotate(tmp_path, keep, tmp_path / f"checkpoint-{best}" if best else None)
    assert steps(tmp_path) == kept
    assert half.exists()  # neither counted nor touched


def test_nothing_to_rotate(tmp_path: Path) -> None:
    rotate(tmp_path / "none", 1)
    write_checkpoint(tmp_path, 1, sealed=False)
    rotate(tmp_path, 1)
    assert clean(tmp_path)


# --- A kill at each stage of our own part ---


@pytest.mark.parametrize("work", ["save", "delete"])
def test_a_kill_at_every_change_on_the_disk_leaves_a_complete_checkpoint(tmp_path: Path, work: str) -> None:
    """Sealing checkpoint 6 and deleting 4 for it: killed at each of its changes in turn, until it goes through."""
    state = TrainerState(global_step=6, is_world_process_zero=True)
    survived = []
    for event in range(1, 99):
        folder = tmp_path / str(event)
        write_checkpoint(folder, 4)
        write_checkpoint(folder, 5)
        write_checkpoint(folder, 6, sealed=False)

        def work_and_die(folder: Path = folder, event: int = event) -> None:
            die_at_event(event, folder)
            if work == "delete":
                delete(folder / "checkpoint-4")
            else:
                CheckpointKeeper(2).on_save(SimpleNamespace(output_dir=str(folder)), state, TrainerControl())

        code = in_a_child(work_and_die)
        survived.append(steps(folder))
        for path in complete_checkpoints(folder):
            assert (path / "2_Dense" / "model.safetensors").stat().st_size == 10
        clean(folder)
        assert len(list(folder.iterdir())) == len(steps(folder)) == len(survived[-1])
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert all(5 in found for found in survived)
    if work == "save":
        assert survived[0] == [4, 5]
        assert [4, 5, 6] in survived
        assert survived[-1] == [5, 6]
        assert len(survived) > 8
    else:
        assert survived[0] == [4, 5]
        assert survived[-1] == [5]


# --- A kill at each stage of the trainer's part ---


STAGES = ("before", "model", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sealed")


def kill_at(stage: str, step: int) -> None:
    """Have this process die in the middle of writing a file of a step's checkpoint, or before or after all."""
    save, torch_save = SentenceTransformerTrainer.save_model, torch.save
    to_json, on_save = TrainerState.save_to_json, CheckpointKeeper.on_save

    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == step and stage == "before":
            os._exit(KILLED)
        save(self, output_dir, *args, **kwargs)
        if self.state.global_step == step and stage == "model":
            weights = Path(str(output_dir), "model.safetensors")
            weights.write_bytes(weights.read_bytes()[:1000])
            os._exit(KILLED)

    def half_file(value: Any, path: str) -> None:
        if f"checkpoint-{step}/" in str(path) and Path(path).name == stage:
            Path(path).write_bytes(b"half")
            os._exit(KILLED)
        torch_save(value, path)

    def half_state(self: TrainerState, path: str) -> None:
        if f"checkpoint-{step}/" in str(path) and stage == "trainer_state.json":
            Path(path).write_text('{"global_step": ')
            os._exit(KILLED)
        to_json(self, path)

    def sealed(self: CheckpointKeeper, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        on_save(self, args, state, *rest, **kwargs)
        if state.global_step == step and stage == "sealed":
            os._exit(KILLED)

    SentenceTransformerTrainer.save_model = save_model
    torch.save = half_file
    TrainerState.save_to_json = half_state
    CheckpointKeeper.on_save = sealed


def test_a_kill_while_the_trainer_writes_a_checkpoint_loses_nothing(
    recipe: Callable[..., Recipe], data: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """One run, killed at each stage of its second checkpoint in turn; then left alone."""
    settings = {"max_steps": 3, "save_steps": 1, "keep_checkpoints": 1}
    whole = weights(train(recipe(**settings, output=str(data / "whole")), device="cpu").model_path)
    folder = data / "run" / "checkpoints"

    def run_and_die(stage: str) -> None:
        kill_at(stage, step=2)
        train(recipe(**settings), device="cpu")

    for stage in STAGES:
        assert in_a_child(lambda stage=stage: run_and_die(stage)) == KILLED, stage
        assert steps(folder) == ([2] if stage == "sealed" else [1]), stage
        if stage != "before":
            assert (folder / "checkpoint-2").exists()
    result = train(recipe(**settings), device="cpu")
    resumed = weights(result.model_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert steps(folder) == [3]
    log = [json.loads(line) for line in (data / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2]


# --- Random kills ---


MOMENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")


def kill_in_step(moment: str, done: int) -> None:
    """SIGKILL after so many steps, at a moment of the next."""
    usual = getattr(CheckpointKeeper, moment)

    def die(self: Any, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == done:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(self, args, state, *rest, **kwargs)

    setattr(CheckpointKeeper, moment, die)


def kill_in_evaluation(texts: int) -> None:
    """SIGKILL in the first evaluation of the training, when so many inputs have been embedded."""
    usual, seen = TasksEvaluator.__call__, 0

    def evaluate(self: TasksEvaluator, model: ViPyloQwen, *args: Any, **kwargs: Any) -> dict[str, float]:
        def count(module: Any, arguments: Any) -> None:
            nonlocal seen
            seen += len(arguments[0]["input_ids"])
            if seen >= texts:
                os.kill(os.getpid(), signal.SIGKILL)

        model.register_forward_pre_hook(count)
        return usual(self, model, *args, **kwargs)

    TasksEvaluator.__call__ = evaluate


def kill_worker(done: int) -> None:
    """SIGKILL to the process that prepares batches, as by a lack of memory, after so many steps."""
    usual = CheckpointKeeper.on_step_begin

    def on_step_begin(self: Any, args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == done:
            for worker in multiprocessing.active_children():
                worker.kill()
        usual(self, args, state, *rest, **kwargs)

    CheckpointKeeper.on_step_begin = on_step_begin


def test_kills_at_random_moments_change_nothing(recipe: Callable[..., Recipe], data: Path, weights: Weights) -> None:
    """Seeded moments of one training: in steps, in evaluations, while a checkpoint is written; or a worker's end."""
    settings = {
        "max_steps": 12,
        "save_steps": 2,
        "workers": 1,
        "group_images": 2,
        "eval": str(data / "train.jsonl"),
        "eval_steps": 3,
        "best_metric": "mean",
        "curriculum": [
            {"until": 0.5, "mix": {"text": 2, "multimodal": 1}},
            {"until": 1, "mix": {"text": 1, "multimodal": 2}},
        ],
    }
    whole = weights(train(recipe(**settings, output=str(data / "whole")), device="cpu").model_path)
    rng = random.Random(4)
    folder = data / "run" / "checkpoints"
    kinds = ["step", "step", "step", "saving", "saving", "evaluation", "evaluation", "worker"]
    rng.shuffle(kinds)
    killed = []
    for kind in kinds:
        done = min(11, max([0, *steps(folder)]) + rng.randint(0, 3))
        kill = {
            "step": partial(kill_in_step, rng.choice(MOMENTS), done),
            "saving": partial(die_at_event, rng.randint(1, 40), folder),
            "evaluation": partial(kill_in_evaluation, rng.randint(1, 30)),
            "worker": partial(kill_worker, done),
        }[kind]

        def run_and_die(kill: Callable[[], None] = kill) -> None:
            kill()
            train(recipe(**settings), device="cpu")

        code = {"saving": KILLED, "worker": 1}.get(kind, -signal.SIGKILL)  # the training ends by itself with its worker
        assert in_a_child(run_and_die) == code, (kind, done)
        killed.append((kind, done, steps(folder)))
    resumed = weights(train(recipe(**settings), device="cpu").model_path)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), (name, killed)
    assert len({tuple(found) for *_, found in killed}) > 3, killed  # the kills came all over the training


# --- The best, and the end of patience ---


def test_the_best_checkpoint_becomes_the_model(
    recipe: Callable[..., Recipe], data: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four evaluations is the best, at a step where no checkpoint is due; two worse ones end the run."""
    values = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(
        "sentence_vipyloqwen.train.evaluation.TasksEvaluator.__call__",
        lambda self, *args, **kwargs: {"tasks_mean": 1.0, "ocr_recall@1": next(values)},
    )
    settings = recipe(
        eval=str(data / "train.jsonl"),
        max_steps=20,
        eval_steps=1,
        save_steps=3,
        best_metric="ocr/recall@1",
        patience=2,
        keep_checkpoints=2,
    )
    result = train(settings, device="cpu")
    folder = data / "run" / "checkpoints"
    assert steps(folder) == [2, 4]
    assert best_of(folder / "checkpoint-4") == folder / "checkpoint-2"
    best, model = weights(folder / "checkpoint-2"), weights(result.model_path)
    assert all(torch.equal(best[name], value) for name, value in model.items())
    assert all(torch.equal(best[name], value) for name, value in result.model.state_dict().items())
    last = weights(folder / "checkpoint-4")
    assert not all(torch.equal(last[name], value) for name, value in model.items())

    assert stopped_early(folder / "checkpoint-4")
    again = train(settings, device="cpu")  # its patience has ended: no further step, no further evaluation
    assert next(values) == 0.9
    assert all(torch.equal(best[name], value) for name, value in again.model.state_dict().items())


def test_patience_is_not_renewed_by_a_kill(
    recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.4, 0.3, 0.2])
    monkeypatch.setattr(
        "sentence_vipyloqwen.train.evaluation.TasksEvaluator.__call__",
        lambda self, *args, **kwargs: {"tasks_mean": next(values)},
    )
    given = {"eval": str(data / "train.jsonl"), "eval_steps": 1, "best_metric": "mean", "patience": 2}
    settings = recipe(**given, max_steps=9, save_steps=0)  # a checkpoint at each evaluation
    step = SentenceTransformerTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SentenceTransformerTrainer, "training_step", killed)
        train(settings, device="cpu")
    train(settings, device="cpu")
    assert steps(data / "run" / "checkpoints")[-1] == 3
    assert next(values) == 0.2


def test_a_metric_that_the_records_do_not_give_is_refused_before_the_first_step(
    recipe: Callable[..., Recipe], data: Path
) -> None:
    settings = recipe(eval=str(data / "train.jsonl"), eval_steps=1, best_metric="ocr/spearman")
    with pytest.raises(
        ValueError, match=r"best_metric is 'ocr/spearman'; the records of .* give \['mean', 'text_pair/spearman'"
    ):
        train(settings, device="cpu")
    assert steps(data / "run" / "checkpoints") == []


# --- The seams ---


def test_the_trainer_saves_and_calls_in_the_order_that_sealing_needs() -> None:
    """`on_save` follows the last file; a best checkpoint is loaded by `_load_from_checkpoint`."""
    import inspect

    source = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert source.index("self._save_checkpoint(") < source.index("callback_handler.on_save(")
    assert source.index("self._evaluate(") < source.index("if self.control.should_save")
    assert "checkpoint_path" in inspect.signature(SentenceTransformerTrainer._load_from_checkpoint).parameters

"""`vipyloqwen train`: what it prints, and how it ends."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sentence_vipyloqwen import cli
from sentence_vipyloqwen.cli import shared, training
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.interruption import ProcessLost, TrainingInterrupted
from sentence_vipyloqwen.train.recipe import load_recipe, recipe_text, shipped_recipes

COMMAND = ("train", "--base", "b", "--train", "t.jsonl", "--output", "runs/a")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line as the console script does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_a_recipe_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "train", "--show") == 0
    shown = capsys.readouterr().out
    assert shown == recipe_text("viPyloqwen-2b.yaml")
    assert yaml.safe_load(shown)["base"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert run(monkeypatch, "train", "--recipe", "tiny.yaml", "--show") == 0
    assert capsys.readouterr().out == recipe_text("tiny.yaml")


def test_help_teaches_what_a_newcomer_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "--help") == 0
    told = capsys.readouterr().out
    for name in ("mix", "curriculum", "vision_cache", "loss_mini_batch_tokens", "save_steps", *shipped_recipes()):
        assert name in told
    assert "--recipe viPyloqwen-2b.yaml --show" in " ".join(told.split())


def test_every_setting_in_the_help_may_be_given() -> None:
    lines = re.findall(r"`([a-z_]+=.*?)`", " ".join((training.train.__doc__ or "").split()))
    pairs = [pair for line in lines for pair in (shlex.split(line) if line.count("=") > 1 else [line])]
    assert len(pairs) > 15
    always = {"base": "b", "train": "t.jsonl", "output": "o", "eval": "e.jsonl", "eval_steps": 1, "best_metric": "mean"}
    for pair in pairs:
        beside = always | ({"frozen": ["visual"]} if "vision_cache" in pair else {})
        load_recipe(overrides=beside | shared.parse_settings([pair]))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingInterrupted("Step 7 is saved", 15), 143),
        (TrainingInterrupted("Step 7 is saved", 2), 130),
        (NonFiniteStep("the loss of step 7 is NaN"), 1),
        (ProcessLost("another process ended"), 1),
        (OSError(28, "the disk is full"), 1),
    ],
)
def test_an_early_end_is_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def train(recipe: object, device: str | None) -> None:
        raise error

    monkeypatch.setattr("sentence_vipyloqwen.train.run.train", train)
    assert run(monkeypatch, *COMMAND) == code
    told = capsys.readouterr().err
    assert str(error) in told.replace("\n", " ")
    assert "Traceback" not in told


def test_one_process_of_several_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = SimpleNamespace(after=None, model_path=Path("runs/a/model"))
    monkeypatch.setattr("sentence_vipyloqwen.train.run.train", lambda recipe, device: result)
    assert run(monkeypatch, *COMMAND) == 0
    told = capsys.readouterr().out
    assert "Saved runs/a/model" in told
    assert "runs/a/training.html" in told
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, *COMMAND) == 0
    assert capsys.readouterr().out == ""

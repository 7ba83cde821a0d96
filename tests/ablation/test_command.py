"""`vipyloqwen ablate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sentence_vipyloqwen import cli
from sentence_vipyloqwen.ablation.variants import VARIANTS
from sentence_vipyloqwen.train.interruption import TrainingInterrupted


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the console script does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", "ablate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_table_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--list") == 0
    told = capsys.readouterr().out
    for name in VARIANTS:
        assert f" {name} " in told


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--retry-failed", "is left out, with the reason", "lacks memory is kept as one that failed"):
        assert words in told
    for words in ("--seeds", "--list", "results.json", "grad_cache.batch_size=256", "goes on from the last checkpoint"):
        assert words in told


def test_an_ablation_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, records: Path, tmp_path: Path
) -> None:
    small = [f"--set={pair}" for pair in ("embedding_dim=16", "max_steps=2", "batch_size=4", "in_batch.batch_size=2")]
    files = ["--base", base, "--train", records, "--eval", records, "--output", tmp_path]
    chosen = ["--variant", "in_batch", "--seeds", 1, "--device", "cpu"]
    about = ["--about", "Pages."]
    assert run(monkeypatch, *files, *chosen, *small, *about, "--set", "in_batch.accumulation=1") == 0
    told = capsys.readouterr().out
    assert "1/2  full, seed 42: none: the recipe as it is" in told
    assert "2/2  in_batch, seed 42" in told
    assert f"Questions, answers, every run: {tmp_path / 'ablation.html'}" in told
    settings = [of["settings"] for of in json.loads((tmp_path / "results.json").read_text())["runs"]]
    assert [(of["batch_size"], of["max_steps"]) for of in settings] == [(4, 2), (2, 4)]
    (tmp_path / "ablation.html").unlink()
    assert run(monkeypatch, "--redraw", "--output", tmp_path) == 0
    assert "<p>Pages.</p>" in (tmp_path / "ablation.html").read_text()


def test_failed_runs_are_tried_again_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, base: Path, records: Path, tmp_path: Path
) -> None:
    given: list[bool] = []

    def ablated(recipe: Any, variants: Any, *, retry_failed: bool, **options: Any) -> None:
        given.append(retry_failed)
        raise TrainingInterrupted("enough", 15)

    monkeypatch.setattr("sentence_vipyloqwen.ablation.runs.ablate", ablated)
    files = ["--base", base, "--train", records, "--eval", records, "--output", tmp_path]
    for more in ([], ["--retry-failed"]):
        assert run(monkeypatch, *files, *more) == 143
    assert given == [False, True]


def test_errors_and_early_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = ["--base", "b", "--train", "t", "--eval", "e", "--output", tmp_path]
    for arguments, message in (
        (["--redraw"], "--redraw needs --output"),
        (["--redraw", "--output", tmp_path], "holds no results.json"),
        (["--base", "b"], "The recipe lacks ['train', 'output']"),
        ([*files, "--variant", "nothing"], "Unknown variants ['nothing']; allowed are"),
        ([*files, "--set", "nothing.seed=1"], "Settings are given for the variants ['nothing']"),
    ):
        assert run(monkeypatch, *arguments) == 1
        assert message in capsys.readouterr().err

    def interrupted(*arguments: Any, **options: Any) -> Callable[..., Any]:
        raise TrainingInterrupted("Step 7 is saved", 15)

    monkeypatch.setattr("sentence_vipyloqwen.ablation.runs.ablate", interrupted)
    assert run(monkeypatch, *files) == 143
    assert "Step 7 is saved" in capsys.readouterr().err

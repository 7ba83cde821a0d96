from __future__ import annotations

import gc
import json
from pathlib import Path

import data_scale
import numpy as np
import pytest
from data_scale import Measured

from sentence_vipyloqwen.train.validation import validate


def test_records_are_good_of_all_tasks_and_always_the_same(tmp_path: Path) -> None:
    data_scale.make_images(tmp_path / "images", 10)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        data_scale.write_records(tmp_path / "data" / name, 400, 10)
    report = validate(tmp_path / "data" / "a", decode_images=True)
    assert report.ok and report.records == 400 and set(report.tasks) == set(data_scale.TASKS)
    lines = (tmp_path / "data" / "a").read_bytes()
    assert lines == (tmp_path / "data" / "b").read_bytes()
    shown = [row["anchor"] for row in map(json.loads, lines.splitlines()) if row["task"] in data_scale.WITH_IMAGES]
    assert len({anchor["image"] for anchor in shown}) == 10
    assert 0.5 < len(shown) / 400 < 0.7


def test_memory_is_told_apart_and_counted_from_where_it_stood() -> None:
    held: list[np.ndarray] = []

    def stage() -> None:
        held.append(np.ones(10_000_000))  # 80 MB
        data_scale.time.sleep(10 * data_scale.SAMPLE_SECONDS)

    measured = data_scale.watched(stage)
    assert 70e6 < measured.own < 120e6
    assert measured.mapped < 20e6
    assert 0 < measured.cpu_seconds <= measured.seconds * 2


def test_a_failing_stage_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        data_scale.watched(lambda: data_scale.check(tmp_path / "no.jsonl"))


def test_a_line_of_the_table() -> None:
    measured = Measured(seconds=2.0, cpu_seconds=1.0, own=3_000_000, mapped=0)
    line = data_scale.line(100_000, "validate", measured, 100_000, 10**9)
    assert line == ["100,000", "validate", "2.0", "1.0", "50.0", "3", "0", "1,000"]
    assert data_scale.line(1, "second load", measured, 1, 0)[4] == ""
    assert len(line) == len(data_scale.COLUMNS)


def test_a_stage_runs_in_a_process_of_its_own() -> None:
    assert data_scale.apart(gc.collect).own < 50e6


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_scale, "apart", data_scale.watched)
    arguments = ["--rows", "60", "--reads", "50", "--images", "3", "--photographs", "1"]
    options = data_scale.parser().parse_args(arguments)
    lines = data_scale.run(tmp_path, options)
    assert [line[1] for line in lines] == ["validate", "first load", "second load", "shuffled read"]
    assert "## Records at scale" in capsys.readouterr().out
    assert not (tmp_path / "60").exists()

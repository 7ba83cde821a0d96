from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


def test_encode_vs_stock_prints_a_ratio_for_each_kind_of_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "encode_vs_stock.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--rows", "4", "--rounds", "1"])
    runpy.run_path(str(script), run_name="__main__")
    table = capsys.readouterr().out
    for row in ("text", "images", "mixed"):
        assert row in table

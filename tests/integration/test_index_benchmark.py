"""The benchmark of the index beside its peer, which `make test` does without."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_usearch_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "1000", "--dim", "16", "--rounds", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["index.py", *sizes, "--kind", "HNSW", "usearch"])
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / "index.py"), run_name="__main__")
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    recalls = {name: float(cells[-1]) for name, *cells in lines if name != "kind"}  # a table after each kind
    assert set(recalls) == {"HNSW", "usearch"}
    assert min(recalls.values()) > 0.9

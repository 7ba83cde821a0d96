"""The benchmark of the index runs as it stands, on few vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import index as benchmark
import pytest


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *kinds: str) -> dict[str, list[str]]:
    """Its table: the first cell of a line -> the others."""
    output = folder / "results.md"
    sizes = ["--rows", "1000", "--dim", "16", "--rounds", "1", "--folder", folder, "--output", output]
    monkeypatch.setattr(sys, "argv", ["index.py", *map(str, sizes), "--kind", *kinds])
    benchmark.main()
    rows = [line.strip("| ").split(" | ") for line in output.read_text(encoding="utf-8").splitlines() if "|" in line]
    assert rows[0] == list(benchmark.COLUMNS)
    return {name: cells for name, *cells in rows[2:]}


def test_ours_beside_plain_faiss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = run(monkeypatch, tmp_path, "Flat", "IVF,SQ8")
    assert [cells[0] for cells in table.values()] == ["Flat", "IVF16,SQ8"]
    assert table["Flat"][-1] == "1.000"


def test_the_peer_comes_with_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    with pytest.raises(ImportError, match=r"sentence-vipyloqwen\[benchmarks\]"):
        run(monkeypatch, tmp_path, "usearch")

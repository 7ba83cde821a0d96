"""Ranks import what they run: these modules must be on the path of the tests' processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[Any]]:
    """`run(function, *args)` on every rank of a gloo group: see `ranks.run_ranks`."""
    from ranks import run_ranks

    folder = tmp_path / "ranks"
    folder.mkdir()
    return partial(run_ranks, folder)

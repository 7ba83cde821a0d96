"""The losses of tasks are means over the rows of all ranks, and every rank logs the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_ranks_log_the_mean_of_all_their_rows(folder: Path, run: Callable[..., list[Any]]) -> None:
    import task_loss_workers

    (first, own), (second, other) = run(task_loss_workers.logged, folder)
    assert first == second
    assert {name: first[name] for name in first if name.endswith("rows")} == {"instr/rows": 3, "ocr/rows": 2}
    instr = (2 * own["instr/info_nce"] + 3 * other["instr/info_nce"]) / 3
    assert first["instr/info_nce"] == pytest.approx(instr, abs=1e-5)
    assert first["ocr/triplet"] == pytest.approx(3 * other["ocr/triplet"] / 2, abs=1e-5)

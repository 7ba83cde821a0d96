"""Two ranks that gather negatives compute the loss and the gradients of one process with both parts of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loss_workers
import pytest
import torch
from loss_workers import KINDS, PARTS, RAGGED, make_loss, whole
from rank_workers import load
from ranks import run_ranks
from torch import Tensor

Run = Callable[..., list[Any]]
NAMES = [*PARTS, "ragged"]


def alone(folder: Path, name: str, sizes: tuple[int, ...] | None = None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The step of one process."""
    model = load(folder, packed=True)
    parts = RAGGED if name == "ragged" else PARTS[name]
    return loss_workers.step(model, make_loss(model, "plain", gather=False, sizes=sizes), whole(parts))


def assert_mean_of_terms(terms: list[Mapping[str, float]], expected: Mapping[str, float]) -> None:
    assert list(terms[0]) == list(terms[1]) == list(expected)
    mean = {name: (terms[0][name] + terms[1][name]) / 2 for name in expected}
    assert mean == pytest.approx(expected, abs=2e-6)


def assert_equal_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, gradient in found.items():  # ranks have zeros where one process has none: the tower shown no image
        reference = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, reference, atol=2e-6, rtol=1e-3, msg=lambda text, at=name: f"{at}: {text}")
    assert expected.keys() <= found.keys()


@pytest.fixture(scope="module")
def steps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """Each rank's steps, all of one start of the ranks."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), loss_workers.every_step, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_one_process(steps: Any, folder: Path, name: str, kind: str) -> None:
    terms, gradients = alone(folder, name)
    found = [rank[name, kind] for rank in steps]
    assert_mean_of_terms([of_rank[0] for of_rank in found], terms)
    for of_rank in found:
        assert_equal_gradients(of_rank[1], gradients)


def test_ranks_run_the_same_number_of_forwards(steps: Any) -> None:
    for key, of_first in steps[0].items():
        assert of_first[2] == steps[1][key][2]
    assert steps[0]["ragged", "plain"][2] == 3  # two columns and an idle pass, beside three columns


def test_negatives_of_the_other_rank_count(steps: Any, folder: Path) -> None:
    """The rows of one task on both ranks: contrasted apart, their loss would be another."""
    name = "one task, unlike rows, equal content"
    model = load(folder, packed=True)
    apart = [loss_workers.step(model, make_loss(model, "plain", gather=False), part)[0] for part in PARTS[name]]
    together = [rank[name, "plain"][0] for rank in steps]
    rows = [len(part.columns[0]) for part in PARTS[name]]
    for term in ("ocr/info_nce", "ocr/triplet"):
        sums = [sum(count * terms[term] for count, terms in zip(rows, apart, strict=True)) / sum(rows)]
        assert sum(terms[term] for terms in together) / 2 > sums[0] + 1e-3


def test_matryoshka_around_them(folder: Path, run: Run) -> None:
    terms, gradients = alone(folder, "texts beside images", sizes=(32, 16))
    results = run(loss_workers.matryoshka_steps, folder)
    for kind in results[0]:
        assert_mean_of_terms([rank[kind][0] for rank in results], terms)
        assert_equal_gradients(results[0][kind][1], gradients)


def test_sharded_ranks_with_unequal_mini_batches_end_and_agree(folder: Path, run: Run) -> None:
    terms, gradients = alone(folder, "ragged")
    results = run(loss_workers.sharded_steps, folder)
    for kind in KINDS:
        assert_mean_of_terms([rank[kind][0] for rank in results], terms)
        assert_equal_gradients(results[0][kind][1], gradients)


def test_an_error_of_one_rank_is_raised_by_all(folder: Path, run: Run) -> None:
    first, second = run(loss_workers.bad_scores, folder)
    message = "Scores of text pairs must lie in [0, 1]; got 4 to 4."
    assert second == [message] * len(KINDS)
    assert first == [f"rank 1: {message}"] * len(KINDS)


def test_evaluation_gathers_too(folder: Path, run: Run) -> None:
    assert_mean_of_terms(run(loss_workers.evaluate, folder), alone(folder, "ragged")[0])

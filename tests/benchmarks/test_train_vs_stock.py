from __future__ import annotations

import sys
from pathlib import Path

import common
import measure
import pytest
import torch
import train_vs_stock
from corpora import QUESTIONS_PER_PAGE, train_corpora
from flops import Work, useful_work

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import PrefixRoutedLoss

TINY = ["--hidden-size", "64", "--layers", "1", "--vision-size", "32", "--vision-layers", "1", "--threads", "1"]


def test_every_batch_is_compared_and_the_numbers_are_consistent(tmp_path: Path) -> None:
    options = train_vs_stock.parser().parse_args([*TINY, "--rows", "4", "--rounds", "2"])
    results = train_vs_stock.run(tmp_path, options)
    assert [(result.name, result.rows) for result in results] == [
        ("text", 2),
        ("mixed", 2),
        ("shared", QUESTIONS_PER_PAGE),
    ]
    for result in results:
        pairs = zip(result.seconds["stock"], result.seconds["ours"], strict=True)
        assert result.times_faster() == [stock / ours for stock, ours in pairs]
        assert result.cosine >= measure.LOWEST_COSINE
        assert len(result.shares()) == 2 and min(result.shares()) > 0


def test_the_work_of_a_step_is_three_forwards_of_both_columns(model: ViPyloQwen) -> None:
    columns = train_corpora(8)["shared"]
    result = train_vs_stock.compare(model, model, "shared", columns, rounds=1)
    anchors, positives = (useful_work(model, column) for column in columns)
    assert result.work == Work(3 * (anchors.language + positives.language), 3 * anchors.vision)


def test_gradients_that_disagree_stop_the_run(model: ViPyloQwen, folder: Path) -> None:
    other = ViPyloQwen(folder, device="cpu")
    torch.nn.init.normal_(other[2].linear.weight, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="gradients, text: the sides disagree"):
        train_vs_stock.compare(other, model, "text", train_corpora(4)["text"], rounds=1)


def test_a_step_leaves_the_gradients_of_its_own_rows_alone(model: ViPyloQwen) -> None:
    """Two steps do not add up."""
    loss, columns = PrefixRoutedLoss(model), train_corpora(4)["text"]
    gradients = []
    for _ in range(2):
        train_vs_stock.step(loss, columns)
        gradients.append(model[2].linear.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_its_section_goes_into_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results.md"
    arguments = ["--rows", "3", "--rounds", "1", "--corpus", "text", "--output", str(output), *TINY]
    monkeypatch.setattr(sys, "argv", ["train_vs_stock.py", *arguments])
    train_vs_stock.main()
    written = output.read_text(encoding="utf-8")
    assert written.startswith(f"{common.HEAD}\n## Training step, against stock")
    assert "MB: with PrefixRoutedLoss on both sides" in written
    assert "| text | 2 |" in written and "`python benchmarks/train_vs_stock.py --rows 3" in written

from __future__ import annotations

import socket
import sys
from pathlib import Path
from statistics import median

import encode_vs_stock
import measure
import pytest
import torch
from corpora import COPIES, QUESTIONS_PER_PAGE, Draw

from sentence_vipyloqwen import ViPyloQwen

TINY = ["--hidden-size", "64", "--layers", "1", "--vision-size", "32", "--vision-layers", "1", "--threads", "1"]


def options(*arguments: str) -> object:
    return encode_vs_stock.parser().parse_args([*TINY, "--no-int8", *arguments])


def test_every_corpus_is_compared_and_the_numbers_are_consistent(tmp_path: Path) -> None:
    names = [name for name in encode_vs_stock.CORPORA if name != "memory"]
    results = encode_vs_stock.speed(tmp_path, names, options("--rows", "4", "--rounds", "1"))
    assert [result.name for result in results] == names
    assert [result.rows for result in results] == [2, 8, 2, 2, 2, 2 * QUESTIONS_PER_PAGE, 2 * COPIES, 2]
    for result in results:
        pairs = zip(result.seconds["stock"], result.seconds["ours"], strict=True)
        assert result.times_faster() == [stock / ours for stock, ours in pairs]
        assert set(result.seconds) == set(result.megabytes) == {"stock", "ours"}
        assert result.cosine >= measure.LOWEST_COSINE
        assert result.work.language > 0 and (result.work.vision > 0) == ("text" not in result.name)
        assert result.shares() == [result.work.seconds(result.rates[0]) / result.seconds["ours"][0]]
        assert result.tokens["stock"] >= result.tokens["ours"] > 0


def test_the_file_says_what_was_run_and_names_no_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.md"
    output.write_text("# Benchmarks\n\n## Another\n\nkept\n", encoding="utf-8")
    arguments = ["--rows", "3", "--rounds", "1", "--corpus", "text", "--no-int8", "--output", str(output), *TINY]
    monkeypatch.setattr(sys, "argv", ["/somewhere/encode_vs_stock.py", *arguments])
    encode_vs_stock.main()
    written = output.read_text(encoding="utf-8")
    assert written.startswith("# Benchmarks\n\n## Another\n\nkept\n\n## Encode, against stock")
    assert written.partition("## Encode")[2] in capsys.readouterr().out
    assert f"torch {torch.__version__}" in written and "threads used: 1" in written
    assert "`python benchmarks/encode_vs_stock.py --rows 3 --rounds 1 --corpus text --no-int8 --output FILE" in written
    assert not any(word in written for word in (str(tmp_path), "/somewhere", socket.gethostname()))


def test_a_quantised_model_has_two_columns_of_its_own(model: ViPyloQwen) -> None:
    """Our own model stands in for it: the same vectors."""
    models = {"stock": model, "ours": model, "int8": model}
    result = encode_vs_stock.compare(models, "text", Draw().texts(3), batch_size=2, rounds=2)
    assert result.int8_cosine == pytest.approx(1)
    assert len(result.line()) == len(measure.COLUMNS + encode_vs_stock.INT8_COLUMNS)
    over_ours = [ours / int8 for ours, int8 in zip(result.seconds["ours"], result.seconds["int8"], strict=True)]
    assert result.line()[-3:] == [measure.spread(result.times_faster("int8")), measure.spread(over_ours), "1.0000"]


def test_vectors_that_disagree_stop_the_run(model: ViPyloQwen, folder: Path) -> None:
    other = ViPyloQwen(folder, device="cpu")
    torch.nn.init.normal_(other[2].linear.weight, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="text: the sides disagree"):
        encode_vs_stock.compare({"stock": other, "ours": model}, "text", Draw().texts(2), batch_size=2, rounds=1)


def test_memory_is_measured_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_vs_stock, "MEMORY_BATCHES", (2,))
    (result,) = encode_vs_stock.memory(tmp_path, options("--memory-images", "2"))
    (stock, stock_seconds), (ours, our_seconds) = result["stock"], result["ours"]
    assert result["batch_size"] == 2 and ours > 0
    assert stock > 2 * 4800 * 1176 * 4 / 1e6  # two images of 60 x 80 patches, 1176 float32 each
    ratio = f"{stock_seconds / our_seconds:.2f}"
    line = f"| 2 | {stock:.0f} | {ours:.0f} | {stock_seconds:.1f} | {our_seconds:.1f} | {ratio} |"
    assert line in capsys.readouterr().out


def test_help_explains_the_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["encode_vs_stock.py", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        encode_vs_stock.main()
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("times faster", "share of rate", "Examples:", "--memory-images"))


def test_the_table_shows_the_median_of_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = encode_vs_stock.speed(tmp_path, ["text"], options("--rows", "3", "--rounds", "3"))
    ratios = result.times_faster()
    expected = f"| text | 2 | {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
    assert expected in capsys.readouterr().out

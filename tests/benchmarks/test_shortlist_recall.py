from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
import shortlist_recall


def test_the_examples_of_docstrings() -> None:
    outcome = doctest.testmod(shortlist_recall)
    assert outcome.failed == 0 and outcome.attempted > 0


def test_shortlists_of_a_model_are_measured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few items, so that all of them are candidates: everything is found."""
    items, records, output = (tmp_path / name for name in ("train.jsonl", "records.jsonl", "results.md"))
    items.write_text("".join(json.dumps({"anchor": f"hóa đơn {n}", "positive": "hóa đơn"}) + "\n" for n in range(29)))
    records.write_text("".join(json.dumps({"anchor": f"số {n}", "positive": f"{n}"}) + "\n" for n in range(6)))
    arguments = [str(folder), str(items), str(records), "--queries", "4", "--threads", "1", "--output", str(output)]
    lines = shortlist_recall.run(shortlist_recall.parser().parse_args(arguments))
    assert lines == [[kind, 30, "1.0000", "1.0000"] for kind in ("MRL16", "MRL8", "binary")]
    assert "30 items, 4 queries, 32 dimensions; the model was not trained for fewer" in output.read_text("utf-8")
    assert output.read_text("utf-8").partition("## ")[2] in capsys.readouterr().out

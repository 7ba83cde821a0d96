"""The pictures of the READMEs are made, in Chromium, from what a small demo leaves."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.demo.data import DemoSizes, build_demo_data
from sentence_vipyloqwen.index import SearchResult, write_report

SCRIPT = Path(__file__).parents[2] / "docs" / "make_pictures.py"


@pytest.fixture
def demo(folder: Path, tmp_path: Path) -> Path:
    """What `make demo` leaves, small, with an untrained model."""
    demo = tmp_path / "demo-output"
    data = build_demo_data(demo / "data", sizes=DemoSizes().scaled(0.01))
    shutil.copytree(folder, demo / "training" / "model")
    index = VectorIndex.build(ViPyloQwen(folder, device="cpu"), data.items, demo / "index")
    queries = ("một", "hai", "ba", "bốn")
    write_report(demo / "search.html", [SearchResult(query, index.search(query, k=3)) for query in queries])
    return demo


def test_the_pictures_are_made(demo: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    for make, name in (("make_results", "results.png"), ("make_ui", "ui.png")):
        script[make].__globals__["DOCS"] = tmp_path
        with script["browser"]() as chromium:
            script[make](chromium, demo)
        with Image.open(tmp_path / name) as picture:
            assert picture.width == script["WIDTH"]
            assert 400 < picture.height < 4000
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100  # it shows something

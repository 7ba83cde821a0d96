"""The drawings of the READMEs are what `docs/draw_method.py` draws, and what they say of the tasks is so."""

from __future__ import annotations

import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from sentence_vipyloqwen.model import EMBEDDING_DIM
from sentence_vipyloqwen.tasks import ALL_TASKS, TRIPLET

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"
READMES = {"method.svg": "README.md", "method.vi.svg": "README.vi.md"}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "draw_method.py"))


@pytest.fixture(params=READMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def drawing(name: str) -> Element:
    return ElementTree.parse(ROOT / "docs" / name).getroot()


def said(element: Element) -> str:
    return "".join(element.itertext()).strip()


def test_the_drawing_is_what_the_script_draws(script: Mapping[str, Any], name: str) -> None:
    assert script["draw"](script["DRAWINGS"][name]) == (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_every_drawing_is_shown(script: Mapping[str, Any], name: str) -> None:
    assert script["DRAWINGS"].keys() == READMES.keys()
    assert f"](docs/{name})" in (ROOT / READMES[name]).read_text(encoding="utf-8")


def test_both_languages_have_the_same_words(script: Mapping[str, Any]) -> None:
    assert script["ENGLISH"].keys() == script["VIETNAMESE"].keys()


def test_the_drawing_needs_nothing_else(drawing: Element) -> None:
    assert drawing.tag == f"{SVG}svg"
    assert not {"script", "image", "foreignObject"} & {element.tag.removeprefix(SVG) for element in drawing.iter()}
    links = [value for element in drawing.iter() for key, value in element.items() if key.endswith("href")]
    ids = {f"#{element.get('id')}" for element in drawing.iter() if element.get("id")}
    assert links
    assert set(links) <= ids
    assert not re.search(r"@import|url\((?!#)", ElementTree.tostring(drawing, encoding="unicode"))


def test_the_tasks_and_their_terms_are_those_of_the_table(
    script: Mapping[str, Any], name: str, drawing: Element
) -> None:
    rows = {row.get("data-task"): row for row in drawing.iter(f"{SVG}g") if row.get("data-task")}
    assert list(rows) == list(ALL_TASKS)
    for task in ALL_TASKS.values():
        row = rows[task.name]
        assert said(row.find(f"{SVG}text")) == (task.token or script["DRAWINGS"][name]["none"])
        terms = {cell.get("data-term"): said(cell) for cell in row.findall(f"{SVG}g")}
        assert {term: weight(note) for term, note in terms.items()} == dict(task.weights)
        margins = {term: margin(note) for term, note in terms.items()}
        assert margins == {term: task.margin if term == TRIPLET else None for term in task.weights}


def weight(note: str) -> float:
    written = re.search(r"×([\d.]+)", note)
    return float(written[1]) if written else 1.0


def margin(note: str) -> float | None:
    written = re.search(r"\(([\d.]+)\)", note)
    return float(written[1]) if written else None


def test_a_dot_stands_below_the_name_of_its_term(drawing: Element) -> None:
    heads = {said(spans[0]): text for text in drawing.iter(f"{SVG}text") if (spans := text.findall(f"{SVG}tspan"))}
    cells = [cell for cell in drawing.iter(f"{SVG}g") if cell.get("data-term")]
    assert len(cells) == sum(len(task.weights) for task in ALL_TASKS.values())
    for cell in cells:
        offset = float(cell.find(f"{SVG}circle").get("cx")) - float(heads[cell.get("data-term")].get("x"))
        assert 0 < offset < 10


def test_the_dimensions_are_the_default(drawing: Element) -> None:
    assert f"{EMBEDDING_DIM} " in said(drawing)
    assert "{" not in "".join(said(text) for text in drawing.iter(f"{SVG}text"))


def test_what_rows_share_stands_once(script: Mapping[str, Any]) -> None:
    """As in the package's packing: the stretches of the rows cover the sequence, and only the shared image twice."""
    packed = script["pack"](script["ENGLISH"], 0.0, 700.0)
    assert packed.tokens[-1].x + packed.tokens[-1].width == pytest.approx(700, abs=0.2)
    readers = [
        sum(left - 0.1 <= token.x < right for row in packed.rows for left, right in row) for token in packed.tokens
    ]
    shared = [token.kind == "image" and token.text == "page" for token in packed.tokens]
    assert readers == [1 + is_shared for is_shared in shared]
    assert [token.kind for token in packed.tokens].count("prefix") == 2

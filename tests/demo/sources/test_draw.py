"""Drawing at random without repeats and without what is reserved."""

from __future__ import annotations

import importlib
import importlib.util
import random

import pytest

from sentence_vipyloqwen.demo import sources
from sentence_vipyloqwen.demo.sources import draw, keys_of
from sentence_vipyloqwen.demo.sources.documents import Line


def test_draw_gives_different_values_without_reserved_keys() -> None:
    rng = random.Random(0)
    drawn = draw(lambda: Line(rng.choice("abcdef")), 4, reserved={"a", "b"})
    assert keys_of(drawn) == set("cdef") and len(drawn) == 4


def test_draw_names_what_was_asked_when_the_source_runs_dry() -> None:
    with pytest.raises(ValueError, match="asked for 3 different values, but the source holds about 1"):
        draw(lambda: Line("a"), 3)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "babel" else found(name, *rest)
    )
    with pytest.raises(ImportError, match=r"needs babel: pip install 'sentence-vipyloqwen\[demo\]'"):
        sources.check_packages()

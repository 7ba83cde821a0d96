"""Where the demo's data comes from: one module a source, all of it installed with pip, nothing downloaded at run time.

| module | source | licence |
|---|---|---|
| `easy_vqa` | the images and questions of the PyPI package `easy-vqa` | MIT |
| `cldr` | names, dates and amounts of Unicode's CLDR, in the PyPI package `babel` | Unicode-3.0, BSD-3-Clause |
| `documents` | pages that we render in the DejaVu fonts of the PyPI package `matplotlib` | Bitstream Vera licence |
| `vietnamese` | words and names that we wrote down | this project's |
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Set
from typing import Any, Protocol, TypeVar

Record = dict[str, Any]
"""One training record, as DESIGN.md section 6 defines it."""

_PACKAGES = {"easy_vqa": "easy-vqa", "babel": "babel", "matplotlib": "matplotlib"}
_ATTEMPTS_PER_DRAW = 200


def check_packages() -> None:
    """Refuse to go on without a package that the data come from; called once, when this package is imported."""
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo's data needs {', '.join(missing)}: pip install 'sentence-vipyloqwen[demo]'")


check_packages()


class Drawable(Hashable, Protocol):
    """What a source draws at random: equal values are duplicates, and `keys` are the texts that it lays claim to."""

    @property
    def keys(self) -> Set[str]:
        """Open-set texts and contents of this value; train and eval share none of them."""


T = TypeVar("T", bound=Drawable)


def draw(make: Callable[[], T], count: int, reserved: Set[str] = frozenset()) -> list[T]:
    """Call `make` until it has given `count` different values, none of which touches a reserved key.

    Args:
        make: Makes one value at random.
        count: How many values to return.
        reserved: Keys that belong to the other split.

    Raises:
        ValueError: If `make` hardly ever gives anything new any more.
    """
    drawn: dict[T, None] = {}  # a set that keeps its order, so that equal seeds give equal files
    for _ in range(count * _ATTEMPTS_PER_DRAW):
        if len(drawn) == count:
            break
        value = make()
        if reserved.isdisjoint(value.keys):
            drawn[value] = None
    if len(drawn) < count:
        raise ValueError(f"asked for {count} different values, but the source holds about {len(drawn)}; ask for fewer")
    return list(drawn)


def keys_of(values: list[T]) -> frozenset[str]:
    """All keys of `values`."""
    return frozenset().union(*(value.keys for value in values))

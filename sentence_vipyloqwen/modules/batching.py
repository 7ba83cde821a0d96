"""Which rows run together: batches by tokens and patches, with what shares an image side by side.

Nothing is computed here and nothing opened: a plan follows from lengths and image identities alone, and does not depend
on the order in which the rows come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

TOKEN_BUDGETS: Mapping[str, int] = {"cpu": 1024}
"""Device type -> language-model tokens of a forward pass, where none are named: on a CPU, what keeps its tensors
below the size from which the allocator maps and unmaps memory at every operation."""

ACCELERATOR_TOKEN_BUDGET = 16384
"""The same for a device type that `TOKEN_BUDGETS` lacks."""

PATCHES_PER_TOKEN = 4
"""A vision token is merged of 2 x 2 patches, so that by default a batch of images alone meets both budgets at once."""

KeyPath: TypeAlias = tuple[str, ...]
"""Keys of the images that head a row, up to one of them: rows with the same path share its tokens."""


@dataclass(frozen=True)
class PlannedImage:
    """An image as a plan sees it.

    Attributes:
        key: Its identity; equal images have equal keys.
        tokens: Tokens that it takes in a row, start and end tokens included.
        patches: Patches that the vision tower reads.
    """

    key: str
    tokens: int
    patches: int


@dataclass(frozen=True)
class PlannedRow:
    """A row as a plan sees it.

    Attributes:
        images: The images that head it.
        text_tokens: Tokens behind the images, prefix included.
        content: Anything that tells it from rows of the same images and length, so that plans ignore their order.
    """

    images: tuple[PlannedImage, ...]
    text_tokens: int
    content: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.text_tokens + sum(image.tokens for image in self.images)

    def steps(self) -> Iterator[tuple[KeyPath, PlannedImage]]:
        """Each image with the path that leads to it."""
        keys = tuple(image.key for image in self.images)
        for place, image in enumerate(self.images):
            yield keys[: place + 1], image


@dataclass(frozen=True)
class Load:
    """What a batch holds, or the most that it may.

    Attributes:
        rows: Rows.
        tokens: Language-model tokens; leading images that several rows have in common count once.
        patches: Vision patches; an image counts once, wherever it stands.
    """

    rows: int
    tokens: int
    patches: int

    @classmethod
    def of(cls, rows: Iterable[PlannedRow]) -> Load:
        """The load of these rows as one batch."""
        return _Batch().load_with(list(rows))

    def fits(self, budget: Load) -> bool:
        """Whether none of the three exceeds the budget's."""
        return self.rows <= budget.rows and self.tokens <= budget.tokens and self.patches <= budget.patches

    def beside(self, shared: Load) -> Load:
        """This budget for rows whose shared images alone exceed it: half of its tokens may stand beside them as text.

        Else each row on such a page would be a batch of its own, and run the page again.
        """
        if shared.fits(self):
            return self
        return Load(self.rows, shared.tokens + self.tokens // 2, max(self.patches, shared.patches))

    def halved(self, failed: Mapping[int, PlannedRow]) -> Load:
        """This budget, halved, and so far that a batch of these rows, two or more, is split.

        In rows only where shared images would hold them together: see :meth:`beside`.
        """
        load = Load.of(failed.values())
        tokens, patches = min(self.tokens, load.tokens), min(self.patches, load.patches or self.patches)
        half = Load(self.rows, max(1, tokens // 2), max(1, patches // 2))
        if len(plan_batches(failed, half)) > 1:
            return half
        return Load(max(1, load.rows // 2), half.tokens, half.patches)


def batch_budget(device_type: str, batch_size: int, token_budget: int | None, patch_budget: int | None) -> Load:
    """What a batch may hold: the caller's bounds, and defaults where there are none.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        batch_size: Most rows.
        token_budget: Most language-model tokens; by default 1024 on a CPU and 16384 elsewhere.
        patch_budget: Most vision patches; by default 4 times the token budget.

    Raises:
        ValueError: If a budget is no whole number of at least 1.
    """
    for name, value in (("token_budget", token_budget), ("patch_budget", patch_budget)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} is {value!r}; allowed is a whole number of at least 1.")
    tokens = token_budget or TOKEN_BUDGETS.get(device_type, ACCELERATOR_TOKEN_BUDGET)
    return Load(batch_size, tokens, patch_budget or PATCHES_PER_TOKEN * tokens)


def plan_batches(rows: Mapping[int, PlannedRow], budget: Load) -> list[list[int]]:
    """Form batches within a budget, the longest rows first, so that memory peaks at once.

    1. Sort by length, descending; rows that share leading images stay together and go by the longest of them.
    2. Fill one batch after the other. Rows that share images enter the same batch if any batch can hold them all;
       else they are split over consecutive ones, where images that exceed the budget leave room for half of it in text.
       A row that alone exceeds the budget is a batch of its own.

    Args:
        rows: Anything that names a row -> the row.
        budget: The most that a batch may hold.

    Returns:
        For each batch the names of its rows; every row occurs once.

    >>> page = PlannedImage("page", tokens=66, patches=256)
    >>> rows = [PlannedRow((), 30), PlannedRow((page,), 5), PlannedRow((), 40), PlannedRow((page,), 9)]
    >>> plan_batches(dict(enumerate(rows)), Load(rows=8, tokens=100, patches=400))
    [[3, 1], [2, 0]]
    """
    batches = [_Batch()]
    ordered = [(name, rows[name]) for name in _sorted(rows)]  # 1
    for group in _split(ordered, depth=0):  # 2
        if group[0][1].images:
            _place(group, 1, batches, budget)
        else:
            _place_text(*group[0], batches, budget)
    return [batch.names for batch in batches if batch.names]


_Group: TypeAlias = Sequence[tuple[int, PlannedRow]]


@dataclass
class _Batch:
    names: list[int] = field(default_factory=list)
    load: Load = field(default_factory=lambda: Load(0, 0, 0))
    paths: set[KeyPath] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    head: KeyPath = ()  # the images of its first row

    def load_with(self, rows: Sequence[PlannedRow]) -> Load:
        steps = [step for row in rows for step in row.steps()]
        tokens = {path: image.tokens for path, image in steps if path not in self.paths}
        patches = {image.key: image.patches for _, image in steps if image.key not in self.images}
        return Load(
            self.load.rows + len(rows),
            self.load.tokens + sum(tokens.values()) + sum(row.text_tokens for row in rows),
            self.load.patches + sum(patches.values()),
        )

    def add(self, group: _Group, load: Load) -> None:
        if not self.names:
            self.head = tuple(image.key for image in group[0][1].images)
        self.load = load
        for name, row in group:
            self.names.append(name)
            self.paths.update(path for path, _ in row.steps())
            self.images.update(image.key for image in row.images)


def _sorted(rows: Mapping[int, PlannedRow]) -> list[int]:
    longest: dict[KeyPath, int] = {}
    for row in rows.values():
        for path, _ in row.steps():
            longest[path] = max(longest.get(path, 0), row.length)

    def order(name: int) -> list[tuple[int, str, tuple[str, ...]]]:
        row = rows[name]
        if not row.images:
            return [(-row.text_tokens, "", row.content)]
        return [*((-longest[path], image.key, ()) for path, image in row.steps()), (-row.length, "", row.content)]

    return sorted(rows, key=order)


def _split(group: _Group, depth: int) -> Iterator[_Group]:
    """Runs of rows whose next image is the same, and each row that has no further one by itself."""
    for key, run in groupby(group, key=lambda item: item[1].images[depth].key if depth < len(item[1].images) else None):
        if key is None:
            yield from ([item] for item in run)
        else:
            yield list(run)


def _place_text(name: int, row: PlannedRow, batches: list[_Batch], budget: Load) -> None:
    """Put a row without images into the last batch or a new one: what :func:`_place` would do, at a tenth of its cost.

    There may be a hundred thousand of them.
    """
    load = batches[-1].load
    load = Load(load.rows + 1, load.tokens + row.text_tokens, load.patches)
    if not load.fits(budget):
        batches.append(_Batch())
        load = Load(1, row.text_tokens, 0)
    batches[-1].names.append(name)
    batches[-1].load = load


def _place(group: _Group, depth: int, batches: list[_Batch], budget: Load) -> None:
    """Put rows that share `depth` - 1 images, and perhaps one more, into the last batch, a new one, or several."""
    rows = [row for _, row in group]
    shared = rows[0].images[: depth - 1]
    bound = budget.beside(Load.of([PlannedRow(shared, text_tokens=0)]))
    shared_by_last = batches[-1].head[: len(shared)] == tuple(image.key for image in shared)
    load, alone = batches[-1].load_with(rows), Load.of(rows)
    if load.fits(bound if shared_by_last else budget):
        batches[-1].add(group, load)
    elif alone.fits(bound) or len(group) == 1:
        batches.append(_Batch())
        batches[-1].add(group, alone)
    else:
        for part in _split(group, depth):
            _place(part, depth + 1, batches, budget)

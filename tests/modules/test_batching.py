"""Batches: every row once, bounds kept, sharing rows together, and the same plan whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sentence_vipyloqwen.modules import batching
from sentence_vipyloqwen.modules.batching import (
    Load,
    PlannedImage,
    PlannedRow,
    _Batch,
    _place,
    _sorted,
    _split,
    batch_budget,
    plan_batches,
)

IMAGES = [
    PlannedImage(key, tokens=patches // 4 + 2, patches=patches)
    for key, patches in zip("abcd", (4, 16, 16, 64), strict=True)
]

SPLIT_BEHIND_ANOTHER = [("d", 1), ("ddaa", 23), ("aaadd", 2), ("aaadd", 19)]
"""Keys and text tokens of rows; the two that share images follow one that does not."""

planned_rows = st.lists(
    st.builds(
        PlannedRow,
        images=st.lists(st.sampled_from(IMAGES), max_size=5).map(tuple),
        text_tokens=st.integers(1, 40),
        content=st.text("xy", max_size=2).map(lambda text: (text,)),
    ),
    max_size=30,
)
budgets = st.builds(Load, rows=st.integers(1, 8), tokens=st.integers(1, 120), patches=st.integers(1, 200))


def plan(rows: Sequence[PlannedRow], budget: Load) -> list[list[PlannedRow]]:
    return [[rows[name] for name in batch] for batch in plan_batches(dict(enumerate(rows)), budget)]


@given(planned_rows, budgets)
def test_every_row_occurs_once_and_no_batch_is_empty(rows: list[PlannedRow], budget: Load) -> None:
    batches = plan_batches(dict(enumerate(rows)), budget)
    assert sorted(name for batch in batches for name in batch) == list(range(len(rows)))
    assert all(batches)


@given(planned_rows, budgets)
@example(
    [PlannedRow(tuple(IMAGES["abcd".index(key)] for key in keys), text) for keys, text in SPLIT_BEHIND_ANOTHER],
    Load(rows=2, tokens=76, patches=1),
)
def test_only_images_that_all_rows_share_exceed_the_budget(rows: list[PlannedRow], budget: Load) -> None:
    for batch in plan(rows, budget):
        paths = zip(*(row.images for row in batch), strict=False)
        shared = tuple(images[0] for images in takewhile(lambda images: len(set(images)) == 1, paths))
        roomy = budget.beside(Load.of([PlannedRow(shared, 0)]))
        assert len(batch) == 1 or Load.of(batch).fits(roomy if shared else budget)


def test_a_page_that_fills_the_budget_leaves_room_for_questions() -> None:
    page = PlannedImage("page", tokens=1000, patches=4000)
    rows = [PlannedRow((page,), 10) for _ in range(8)]
    assert [len(batch) for batch in plan(rows, Load(rows=32, tokens=100, patches=400))] == [5, 3]


@given(planned_rows, budgets)
def test_rows_that_share_leading_images_are_neighbours(rows: list[PlannedRow], budget: Load) -> None:
    ordered = [row for batch in plan(rows, budget) for row in batch]
    for path in {path for row in rows for path, _ in row.steps()}:
        places = [place for place, row in enumerate(ordered) if path in dict(row.steps())]
        assert places == list(range(places[0], places[-1] + 1))


@given(planned_rows, budgets)
def test_rows_of_one_first_image_share_a_batch_if_any_can_hold_them(rows: list[PlannedRow], budget: Load) -> None:
    batches = plan(rows, budget)
    for image in IMAGES:
        group = [row for row in rows if row.images[:1] == (image,)]
        touched = [batch for batch in batches if any(row.images[:1] == (image,) for row in batch)]
        if group and Load.of(group).fits(budget):
            assert len(touched) == 1


@given(planned_rows, budgets, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: list[PlannedRow], budget: Load, random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    assert plan(shuffled, budget) == plan(rows, budget)


@given(st.lists(st.integers(1, 50), min_size=1), budgets)
def test_without_images_the_longest_come_first_and_batches_are_full(lengths: list[int], budget: Load) -> None:
    batches = plan([PlannedRow((), length) for length in lengths], budget)
    assert [row.length for batch in batches for row in batch] == sorted(lengths, reverse=True)
    for batch, following in pairwise(batches):
        assert not Load.of([*batch, following[0]]).fits(budget)


@given(planned_rows, budgets)
def test_rows_without_images_are_placed_as_any_other(rows: list[PlannedRow], budget: Load) -> None:
    batches = [_Batch()]
    ordered = [(name, rows[name]) for name in _sorted(dict(enumerate(rows)))]
    for group in _split(ordered, depth=0):
        _place(group, 1, batches, budget)
    expected = [batch.names for batch in batches if batch.names]
    assert plan_batches(dict(enumerate(rows)), budget) == expected


def test_texts_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a hundred thousand, and the other way takes ten times as long."""
    monkeypatch.setattr(batching, "_place", None)
    rows = {name: PlannedRow((), 10, (str(name),)) for name in range(100)}
    assert [len(batch) for batch in plan_batches(rows, Load(32, 200, 800))] == [20] * 5


def test_shared_images_count_once() -> None:
    a, b, _, _ = IMAGES  # 3 tokens of 4 patches, 6 of 16
    one, two, turned = (PlannedRow(images, 10) for images in ((a,), (a, b), (b, a)))
    assert Load.of([one]) == Load(1, 13, 4)
    assert Load.of([one, one, two]) == Load(3, 3 + 6 + 30, 20)
    assert Load.of([two, turned]) == Load(2, 9 + 9 + 20, 20)  # after another image an image's tokens are others
    assert Load.of([PlannedRow((a, a), 1)]) == Load(1, 7, 4)


def test_a_batch_takes_what_adds_nothing_new() -> None:
    a, b, c, d = IMAGES  # 4, 16, 16 and 64 patches
    rows = [PlannedRow(images, 1) for images in ((a, d), (b, d), (c, d, d))]
    assert [len(batch) for batch in plan(rows, Load(rows=9, tokens=999, patches=4 + 16 + 16 + 64))] == [3]
    assert [len(batch) for batch in plan(rows, Load(rows=9, tokens=999, patches=4 + 16 + 16 + 63))] == [2, 1]


def test_a_group_beyond_a_batch_is_split_into_consecutive_ones() -> None:
    rows = [PlannedRow((IMAGES[0],), 5, (str(number),)) for number in range(5)] + [PlannedRow((), 20)]
    sizes = [[len(row.images) for row in batch] for batch in plan(rows, Load(rows=2, tokens=100, patches=100))]
    assert sizes == [[0, 1], [1, 1], [1, 1]]


def test_a_split_group_pays_for_its_image_once_in_each_batch() -> None:
    page = PlannedImage("page", tokens=66, patches=256)
    rows = [PlannedRow((page,), 5, (str(number),)) for number in range(25)]
    assert [len(batch) for batch in plan(rows, Load(rows=99, tokens=66 + 10 * 5, patches=256))] == [10, 10, 5]


def test_a_halved_budget_splits_what_failed() -> None:
    budget = Load(32, 4096, 16384)
    pages = [PlannedImage(key, tokens=900, patches=3600) for key in "ab"]
    texts = [PlannedRow((), 50)] * 2
    on_pages = [PlannedRow((page,), 100) for page in pages]
    assert budget.halved(dict(enumerate(texts))) == Load(32, 50, 8192)
    assert budget.halved(dict(enumerate(on_pages))) == Load(32, 1000, 3600)
    assert Load(2, 5, 1).halved(dict(enumerate(texts))) == Load(2, 2, 1)


@pytest.mark.parametrize("fitting", [1, 2, 4, 8])
def test_questions_on_a_page_are_halved_each_time(fitting: int) -> None:
    """The page alone exceeds the halved budget, which gives room for text beside it."""
    page = PlannedImage("page", tokens=1282, patches=5120)
    rows = {name: PlannedRow((page,), 10, (str(name),)) for name in range(32)}
    budget, largest = Load(32, 16384, 65536), [32]
    while largest[-1] > fitting:
        budget = budget.halved(rows if largest == [32] else dict(list(rows.items())[: largest[-1]]))
        largest.append(max(len(batch) for batch in plan_batches(rows, budget)))
    assert largest == [32, 16, 8, 4, 2, 1][: largest.index(fitting) + 1]


@given(planned_rows.filter(lambda rows: len(rows) > 1), budgets)
def test_halving_always_splits(rows: list[PlannedRow], budget: Load) -> None:
    waiting = dict(enumerate(rows))
    for failed in (batch for batch in plan_batches(waiting, budget) if len(batch) > 1):
        smaller = budget.halved({name: waiting[name] for name in failed})
        assert not [batch for batch in plan_batches(waiting, smaller) if set(failed) <= set(batch)]


def test_default_budgets() -> None:
    assert batch_budget("cpu", 32, None, None) == Load(32, 1024, 4096)
    assert batch_budget("cuda", 8, None, None) == Load(8, 16384, 65536)
    assert batch_budget("cpu", 32, 100, None) == Load(32, 100, 400)
    assert batch_budget("cpu", 32, 100, 7) == Load(32, 100, 7)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9"])
@pytest.mark.parametrize("name", ["token_budget", "patch_budget"])
def test_a_budget_is_a_positive_whole_number(name: str, value: Any) -> None:
    budgets = {"token_budget": None, "patch_budget": None, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed is a whole number of at least 1"):
        batch_budget("cpu", 32, **budgets)

"""Sampling: every row once a cycle, shares kept exactly, and nothing but seed and epoch to tell the order."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler, skip_first_batches
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    MultiDatasetDefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train import sampling
from sentence_vipyloqwen.train.dataset import SIDE_FEATURES
from sentence_vipyloqwen.train.sampling import (
    DRAFT_CURRICULUM,
    Phase,
    SamplingCallback,
    TaskMixBatchSampler,
    apportion,
    grouped_batch_sampler,
    mixed_splits,
    task_mix_sampler,
)
from sentence_vipyloqwen.train.split_sampling import SplitBatchSampler, contents, first_images, has_images

SIZES = {"text_pair": 50, "instr": 31, "ocr": 24, "ocr.negatives_1": 72, "vqa_single": 9}
BATCH = 4
PICTURED = ("ocr", "vqa_single", "vqa_multi")


def side(text: str, *images: str) -> dict[str, Any]:
    return {"image": list(images), "text": text}


def table(rows: Sequence[dict[str, Any]]) -> Dataset:
    """A split with the columns that `load_tasks` gives."""
    return Dataset.from_list(rows, Features({n: Value("float64") if n == "score" else SIDE_FEATURES for n in rows[0]}))


def make_split(name: str, rows: int) -> Dataset:
    """Rows of different content, three to an image."""
    task = ALL_TASKS[name.split(".")[0]]

    def row(i: int) -> dict[str, Any]:
        images = [f"{name}-{i // 3}.png"] if task.name in PICTURED else []
        negative = {"negative_1": side(f"n{i}")} if "negatives" in name else {}
        score = {"score": 0.5} if name == "text_pair" else {}
        return {"anchor": side(f"{task.prompt}q{i}", *images), "positive": side(f"{name} p{i}"), **negative, **score}

    return table([row(i) for i in range(rows)])


@pytest.fixture(scope="module")
def splits() -> DatasetDict:
    return DatasetDict({name: make_split(name, rows) for name, rows in SIZES.items()})


def split_sampler(
    split: Dataset, batch_size: int = BATCH, *, drop_last: bool = False, seed: int = 0, **options: Any
) -> SplitBatchSampler:
    return grouped_batch_sampler(**options)(
        split, batch_size=batch_size, drop_last=drop_last, valid_label_columns=["label", "score"], seed=seed
    )


def mix_sampler(
    splits: DatasetDict, *, drop_last: bool = False, seed: int = 0, batch_size: int = BATCH, **options: Any
) -> TaskMixBatchSampler:
    samplers = [split_sampler(split, batch_size, drop_last=drop_last, seed=seed) for split in splits.values()]
    return task_mix_sampler(**options)(ConcatDataset(list(splits.values())), batch_samplers=samplers, seed=seed)


def epoch_of(sampler: TaskMixBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def split_of(splits: DatasetDict, batch: Sequence[int]) -> str:
    """The split that all rows of a batch belong to."""
    ends = np.cumsum([len(split) for split in splits.values()])
    (place,) = set(np.searchsorted(ends, batch, side="right").tolist())
    return list(splits)[place]


def turns_of(splits: DatasetDict, batches: Iterable[Sequence[int]]) -> list[str]:
    return [split_of(splits, batch) for batch in batches]


# --- One split ---


@pytest.mark.parametrize("options", [{}, {"group_images": 3}, {"no_duplicates": True}, {"group_images": 2}])
@pytest.mark.parametrize("name", ["instr", "ocr.negatives_1"])
def test_every_row_comes_once_a_cycle(splits: DatasetDict, name: str, options: dict[str, Any]) -> None:
    rows = SIZES[name]
    sampler = split_sampler(splits[name], 7, **options)
    for cycle in range(3):
        batches = list(sampler.cycle(cycle))
        assert len(batches) == len(sampler) == -(-rows // 7)
        assert sorted(chain(*batches)) == list(range(rows))
    sampler = split_sampler(splits[name], 7, drop_last=True, **options)
    batches = list(sampler.cycle(0))
    assert [len(batch) for batch in batches] == [7] * (rows // 7)
    assert len(set(chain(*batches))) == rows // 7 * 7


@pytest.mark.parametrize("options", [{}, {"group_images": 3}, {"no_duplicates": True}])
def test_the_order_follows_from_seed_and_cycle_alone(splits: DatasetDict, options: dict[str, Any]) -> None:
    def draw(seed: int, cycle: int, start: int = 0) -> list[list[int]]:
        return list(split_sampler(splits["ocr.negatives_1"], 5, seed=seed, **options).cycle(cycle, start))

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 3, 4) == draw(0, 3)[4:]
    orders = [list(chain(*draw(seed, cycle))) for seed, cycle in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in [*orders, range(72)]}) == 4
    sampler = split_sampler(splits["ocr.negatives_1"], 5, **options)
    sampler.set_epoch(1)
    assert list(sampler) == draw(0, 1)


def test_rows_of_an_image_stand_together() -> None:
    """Groups of 8 rows, runs of 4, batches of 8: two images in every batch, and rows without image by themselves."""
    rows = [{"anchor": side(f"q{i}", f"{i % 10}.png"), "positive": side(f"p{i}")} for i in range(80)]
    sampler = split_sampler(table(rows), 8, group_images=4)
    halves = set()
    for batch in chain(sampler.cycle(0), sampler.cycle(1)):
        first, second = batch[:4], batch[4:]
        assert len({row % 10 for row in first}) == len({row % 10 for row in second}) == 1
        halves |= {frozenset(first), frozenset(second)}
    assert len(halves) > 20  # the second cycle cuts the groups elsewhere
    pairs = [{row % 10 for row in batch} for batch in sampler.cycle(0)]
    assert sum(len(pair) == 2 for pair in pairs) > 5  # and the runs themselves are shuffled


def test_runs_are_no_longer_than_asked_and_cover_groups_of_any_size() -> None:
    sizes = [1, 2, 3, 5, 11, 1]
    images = [f"{image}.png" for image, size in enumerate(sizes) for _ in range(size)]
    rows = [{"anchor": side("q", image), "positive": side("p")} for image in images]
    rows += [{"anchor": side(f"q{i}"), "positive": side("p")} for i in range(7)]
    order = [row for batch in split_sampler(table(rows), 1, group_images=3).cycle(0) for row in batch]
    assert sorted(order) == list(range(30))
    image_of = [images[row] if row < len(images) else f"none {row}" for row in order]
    blocks = 1 + sum(before != after for before, after in zip(image_of, image_of[1:], strict=False))
    assert blocks <= sum(-(-size // 3) for size in sizes) + 7  # two runs of an image may meet by chance


def test_rows_are_grouped_by_the_first_image_also_behind_a_selection() -> None:
    anchors = [side("a", "x", "y"), side("b"), side("c", "y"), side("d", "x"), side("e", "x", "z", "y"), side("")]
    split = table([{"anchor": anchor, "positive": side("p")} for anchor in anchors])
    keys = first_images(split, "anchor")
    assert keys[0] == keys[3] == keys[4] != keys[2] != 0
    assert keys[1] == keys[5] == 0
    np.testing.assert_array_equal(first_images(split.select([4, 2, 5, 0]), "anchor"), keys[[4, 2, 5, 0]])
    np.testing.assert_array_equal(first_images(split.select(range(2, 5)), "anchor"), keys[2:5])


def test_columns_are_read_in_parts(splits: DatasetDict, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = (read(splits["ocr"], "anchor") for read in (first_images, contents))
    monkeypatch.setattr("sentence_vipyloqwen.train.split_sampling._ROWS_READ", 5)
    np.testing.assert_array_equal(first_images(splits["ocr"], "anchor"), images)
    np.testing.assert_array_equal(contents(splits["ocr"], "anchor"), texts)
    assert list(split_sampler(splits["ocr"], 7, no_duplicates=True).cycle(0))
    assert len(set(images.tolist())) == 8
    assert len(set(texts.tolist())) == 24


def test_content_is_images_and_text() -> None:
    sides = [side("a"), side("a", "x"), side("a", "x", "y"), side("", "x"), side("", "a"), side("a"), side("x")]
    keys = contents(table([{"anchor": each} for each in sides]), "anchor")
    assert len(set(keys.tolist())) == 6
    assert keys[0] == keys[5]
    assert contents(Dataset.from_dict({"anchor": ["a"]}), "anchor")[0] == keys[0]
    untyped = Dataset.from_list([{"anchor": side("a")}])  # its list of no image has no type
    assert contents(untyped, "anchor")[0] == keys[0]
    assert first_images(untyped, "anchor")[0] == 0
    assert list(split_sampler(untyped, 1, group_images=2, no_duplicates=True)) == [[0]]


def test_images_are_found_in_any_column(splits: DatasetDict) -> None:
    assert {name for name, split in splits.items() if has_images(split)} == {"ocr", "ocr.negatives_1", "vqa_single"}
    last = [{"anchor": side("a"), "positive": side("b")}] * 9 + [{"anchor": side("a"), "positive": side("", "x")}]
    assert has_images(table(last))
    assert not has_images(table(last[:9]))
    assert not has_images(Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}))


def conflicts(split: Dataset, batch: Sequence[int]) -> list[str]:
    """Contents that stand in two rows of a batch."""
    rows = [{str(value) for name, value in split[row].items() if name != "score"} for row in batch]
    return [content for content, count in Counter(chain(*rows)).items() if count > 1]


@pytest.mark.parametrize("options", [{}, {"group_images": 4}])
def test_no_content_stands_in_a_batch_twice(options: dict[str, Any]) -> None:
    """20 answers, unevenly frequent; some anchors are the positives of other rows."""
    rng = np.random.default_rng(0)
    answers = rng.choice(20, 400, p=np.linspace(1, 3, 20) / 40)
    rows = [{"anchor": side(f"q{i % 350}", f"{i // 8}"), "positive": side(f"a{a}")} for i, a in enumerate(answers)]
    rows += [{"anchor": side(f"a{i}"), "positive": side(f"other {i}")} for i in range(20)]
    split = table([{**row, "score": 1.0} for row in rows])
    assert any(conflicts(split, batch) for batch in split_sampler(split, 8).cycle(0))
    sampler = split_sampler(split, 8, drop_last=True, no_duplicates=True, **options)
    for cycle in range(2):
        batches = list(sampler.cycle(cycle))
        assert [len(batch) for batch in batches] == [8] * len(sampler)
        assert not any(conflicts(split, batch) for batch in batches)
        assert len(set(chain(*batches))) > 400


def test_rows_that_find_no_batch_are_left_out_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"anchor": side(f"q{i}"), "positive": side("yes" if i % 2 else f"p{i}")} for i in range(80)]
    split = table(rows)
    with caplog.at_level(logging.WARNING):
        batches = list(split_sampler(split, 4, no_duplicates=True).cycle(0))
    assert [len(batch) for batch in batches] == [4] * 20
    assert not any(conflicts(split, batch) for batch in batches)
    assert len(set(map(frozenset, batches))) == 20  # what is short comes from another order
    assert "rows too much alike" in caplog.text
    assert len(set(chain(*batches))) < 80


@pytest.mark.parametrize("rows", [40, 4000])
def test_a_batch_that_cannot_be_filled_is_refused(rows: int) -> None:
    split = table([{"anchor": side(f"q{i}"), "positive": side(f"p{i % 3}")} for i in range(rows)])
    with pytest.raises(ValueError, match=f"the {rows} rows of a split are too much alike to fill a batch of 4"):
        list(split_sampler(split, 4, no_duplicates=True).cycle(0))


def test_columns_that_cannot_be_compared_are_refused(splits: DatasetDict) -> None:
    pictures = Dataset.from_dict(
        {"anchor": [], "positive": []}, Features(anchor=ImageFeature(), positive=Value("string"))
    )
    numbers = Dataset.from_dict({"anchor": ["a"], "count": [1]})
    with pytest.raises(ValueError, match="column anchor: got struct.*bytes.*allowed: texts, or structs of image"):
        split_sampler(pictures, group_images=2)
    with pytest.raises(ValueError, match="column count: got int64"):
        split_sampler(numbers, no_duplicates=True)
    assert len(split_sampler(numbers, group_images=2)) == 1
    lists = Dataset.from_dict({"anchor": [["a"]]}, Features(anchor=List(Value("string"))))
    with pytest.raises(ValueError, match="column anchor: got list"):
        split_sampler(lists, no_duplicates=True)
    with pytest.raises(ValueError, match="group_images is -1; allowed: 0 or above"):
        grouped_batch_sampler(group_images=-1)


# --- The mix ---


def test_by_default_an_epoch_is_every_row_once_as_the_stock_sampler_counts(splits: DatasetDict) -> None:
    sampler = mix_sampler(splits)
    concatenated = ConcatDataset(list(splits.values()))
    stock = ProportionalBatchSampler(
        concatenated, [DefaultBatchSampler(RandomSampler(split), BATCH, False) for split in splits.values()]
    )
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == len(stock)
        assert sorted(chain(*batches)) == list(range(sum(SIZES.values())))
        assert Counter(turns_of(splits, batches)) == Counter(turns_of(splits, stock))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.5}, {"text_pair": 13**0.5, "instr": 8**0.5, "ocr": 24**0.5, "vqa_single": 3**0.5}),
        ({"temperature": 0.0}, {"text_pair": 1, "instr": 1, "ocr": 1, "vqa_single": 1}),
        (
            {"mix": {"text_pair": 0.1, "instr": 0.2, "ocr": 0.4, "vqa_single": 0.3}},
            {"text_pair": 1, "instr": 2, "ocr": 4, "vqa_single": 3},
        ),
        (
            {"mix": {"text": 3, "vqa_single": 1, "ocr": 0}},
            {"text_pair": 3 * 13 / 21, "instr": 3 * 8 / 21, "vqa_single": 1},
        ),
        (
            {"mix": {"text": 1, "multimodal": 1}, "temperature": 0},
            {"text_pair": 1, "instr": 1, "ocr": 1, "vqa_single": 1},
        ),
    ],
)
def test_shares_hold_at_every_moment(splits: DatasetDict, options: dict[str, Any], expected: dict[str, float]) -> None:
    """Splits of a task share what it has by their batches: `ocr` has 6 and 18."""
    total = sum(expected.values())
    shares = {task: weight / total for task, weight in expected.items()}
    by_split = {**shares, "ocr": shares.get("ocr", 0) / 4, "ocr.negatives_1": shares.get("ocr", 0) * 3 / 4}
    sampler = mix_sampler(splits, **options)
    drawn: Counter[str] = Counter()
    for epoch in range(8):
        for turn in turns_of(splits, epoch_of(sampler, epoch)):
            drawn[turn] += 1
            for name, share in by_split.items():
                assert abs(drawn[name] - share * drawn.total()) < 1 + len(splits) * share
        for name, share in by_split.items():
            assert abs(drawn[name] - share * drawn.total()) <= (1 + len(splits) * share) / 2 + 1e-9
    assert {name for name, share in by_split.items() if share} == set(drawn)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"mix": {"text": 0.2, "ocr": 0.3, "vqa_single": 0.5}},
        {
            "curriculum": [
                Phase(0.3, {"text": 1}),
                Phase(0.7, {"text": 1, "multimodal": 1}),
                Phase(1, {"multimodal": 1}),
            ]
        },
    ],
)
def test_a_split_goes_on_where_the_epoch_before_stopped(
    splits: DatasetDict, options: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over any epochs and phases, a row has been drawn as often as every other of its split, or once more."""
    monkeypatch.setattr(sampling, "get_world_size", lambda: ranks)
    sampler = mix_sampler(splits, **options)
    sampler.set_run(6 * len(sampler) // ranks, 1)
    starts = np.cumsum([0, *SIZES.values()])
    drawn: Counter[int] = Counter()
    for epoch in range(6):
        drawn.update(chain(*epoch_of(sampler, epoch)))
        for start, end in zip(starts, starts[1:], strict=False):
            times = [drawn[row] for row in range(start, end)]
            assert max(times) - min(times) <= 1
    assert min(drawn.values()) > 1


def test_the_sequence_follows_from_seed_and_epoch_alone(splits: DatasetDict) -> None:
    options = {"mix": {"text": 0.2, "multimodal": 0.8}}
    walked = mix_sampler(splits, **options)
    for epoch in range(4):
        assert epoch_of(walked, epoch) == epoch_of(mix_sampler(splits, **options), epoch)
    orders = [
        turns_of(splits, epoch_of(mix_sampler(splits, seed=seed), epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_apportionment_never_takes_a_turn_away() -> None:
    rng = np.random.default_rng(0)
    for parts in (1, 2, 3, 7):
        for shares in (rng.dirichlet(np.ones(parts)), np.full(parts, 1 / parts), np.eye(parts)[0]):
            before = np.zeros(parts, dtype=np.int64)
            for turns in range(60):
                counts = apportion(shares, turns)
                assert counts.sum() == turns
                assert (counts >= before).all()
                assert (counts[shares == 0] == 0).all()
                assert (np.abs(counts - shares * turns) <= 0.5 + shares * parts / 2).all()
                before = counts
    np.testing.assert_array_equal(apportion(np.array([0.125, 0.875]), 8 * 10**9), [10**9, 7 * 10**9])


def test_a_resumed_epoch_is_the_tail_of_the_whole(splits: DatasetDict) -> None:
    loader = DataLoader(range(sum(SIZES.values())), batch_sampler=mix_sampler(splits, temperature=0.5), collate_fn=list)
    loader.batch_sampler.set_epoch(2)
    whole = list(loader)
    loader = DataLoader(range(sum(SIZES.values())), batch_sampler=mix_sampler(splits, temperature=0.5), collate_fn=list)
    loader.batch_sampler.set_epoch(2)
    assert list(skip_first_batches(loader, 11)) == whole[11:]


# --- Several ranks ---


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "get_world_size", lambda: 2)


def shards(make: Callable[[], MultiDatasetDefaultBatchSampler], epoch: int) -> list[list[list[int]]]:
    """The batches of two ranks, each with a sampler of its own, as accelerate deals them out in training."""
    samplers = [make(), make()]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(BatchSamplerShard(sampler, 2, rank, even_batches=False)) for rank, sampler in enumerate(samplers)]


@pytest.mark.parametrize("options", [{}, {"mix": {"text": 0.5, "multimodal": 0.5}}])
def test_ranks_work_on_one_task_at_a_time(splits: DatasetDict, two_ranks: None, options: dict[str, Any]) -> None:
    for epoch in range(3):
        first, second = shards(lambda: mix_sampler(splits, drop_last=True, **options), epoch)
        assert len(first) == len(second) == len(mix_sampler(splits, drop_last=True, **options)) // 2
        assert turns_of(splits, first) == turns_of(splits, second)
        assert all(len(batch) == BATCH for batch in first + second)
        assert list(chain(*zip(first, second, strict=True))) == epoch_of(
            mix_sampler(splits, drop_last=True, **options), epoch
        )


def test_ranks_may_work_on_different_tasks(splits: DatasetDict, two_ranks: None) -> None:
    options = {"drop_last": True, "same_task_across_ranks": False, "temperature": 0.5}
    first, second = shards(lambda: mix_sampler(splits, **options), 0)
    whole = epoch_of(mix_sampler(splits, **options), 0)
    assert (first, second) == (whole[0::2][: len(second)], whole[1::2])
    assert turns_of(splits, first) != turns_of(splits, second)


def round_robin(splits: DatasetDict, *, drop_last: bool) -> RoundRobinBatchSampler:
    samplers = [split_sampler(split, drop_last=drop_last) for split in splits.values()]
    return RoundRobinBatchSampler(ConcatDataset(list(splits.values())), samplers)


@pytest.mark.parametrize("make", [mix_sampler, round_robin])
def test_the_callback_reaches_the_sampler_behind_both_wrappers(
    splits: DatasetDict, two_ranks: None, make: Callable[..., Any]
) -> None:
    """On two ranks, a run that goes on in the middle of its second epoch."""
    whole, _ = shards(lambda: make(splits, drop_last=True), 1)
    sampler = make(splits, drop_last=True)
    shard = BatchSamplerShard(sampler, 2, 0, even_batches=False)
    loader = DataLoader(range(sum(SIZES.values())), batch_sampler=SkipBatchSampler(shard, 5))
    arguments = SimpleNamespace(gradient_accumulation_steps=2)
    steps = -(-len(shard) // 2)
    state = SimpleNamespace(global_step=steps + 3, max_steps=3 * steps)
    full = DataLoader(range(sum(SIZES.values())), batch_sampler=shard)
    SamplingCallback().on_epoch_begin(arguments, state, None, train_dataloader=full)
    assert list(loader.batch_sampler) == whole[5:]


# --- Curriculum ---


def run_of(sampler: TaskMixBatchSampler, splits: DatasetDict, steps: int, accumulation: int) -> list[list[str]]:
    """The splits whose batches each optimiser step reads, in a run on one rank; an epoch's last may have fewer."""
    sampler.set_run(steps, accumulation)
    run: list[list[str]] = []
    for epoch in range(steps):
        turns = turns_of(splits, epoch_of(sampler, epoch))
        run += [turns[start : start + accumulation] for start in range(0, len(turns), accumulation)]
        if len(run) >= steps:
            break
    return run[:steps]


@pytest.mark.parametrize(("steps", "accumulation"), [(72, 1), (60, 5), (6, 8), (96, 2)])
def test_the_drafts_begin_with_text_and_end_with_two_thirds_pictures(
    splits: DatasetDict, steps: int, accumulation: int
) -> None:
    run = run_of(mix_sampler(splits, curriculum=DRAFT_CURRICULUM), splits, steps, accumulation)
    assert len(DRAFT_CURRICULUM) == 6
    for number in range(6):
        phase = list(chain(*run[steps * number // 6 : steps * (number + 1) // 6]))
        pictured = sum(turn.split(".")[0] in PICTURED for turn in phase)
        expected = len(phase) * 2 / 3 * number / 5
        assert abs(pictured - expected) <= (0 if number == 0 else 3)


def test_a_curriculum_is_resumed_in_its_phase(splits: DatasetDict) -> None:
    phases = [Phase(0.4, {"text": 1}), Phase(1, {"ocr": 1, "vqa_single": 0})]
    sampler = mix_sampler(splits, curriculum=phases)
    sampler.set_run(90, 1)
    whole = epoch_of(sampler, 0) + epoch_of(sampler, 1)
    later = mix_sampler(splits, curriculum=phases)
    later.set_run(90, 1)
    assert epoch_of(later, 1) == whole[len(later) :]
    turns = turns_of(splits, whole)
    assert set(turns[:36]) == {"text_pair", "instr"}
    assert set(turns[36:]) == {"ocr", "ocr.negatives_1"}


def test_a_curriculum_on_two_ranks_changes_at_the_same_step(splits: DatasetDict, two_ranks: None) -> None:
    def make() -> TaskMixBatchSampler:
        sampler = mix_sampler(splits, drop_last=True, curriculum=[Phase(0.5, {"text": 1}), Phase(1, {"multimodal": 1})])
        sampler.set_run(20, 1)
        return sampler

    for rank in shards(make, 0):
        turns = turns_of(splits, rank)
        assert set(turns[:10]) == {"text_pair", "instr"}
        assert set(turns[10:]) == {"ocr", "ocr.negatives_1", "vqa_single"}


def test_a_curriculum_needs_the_length_of_the_run(splits: DatasetDict) -> None:
    with pytest.raises(ValueError, match=r"length of the run is not known.*callbacks=\[SamplingCallback"):
        next(iter(mix_sampler(splits, curriculum=DRAFT_CURRICULUM)))


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"ocr2": 1.0}}, "mix: got 'ocr2'; allowed: text_pair, instr"),
        ({"mix": {"ocr": -1}}, "mix: ocr has the weight -1; allowed: 0 or above"),
        ({"mix": {"ocr": "high"}}, "mix: ocr has the weight 'high'"),
        ({"mix": {"ocr": float("nan")}}, "mix: ocr has the weight nan"),
        ({"mix": {"ocr": 0}}, "allowed: at least one weight above 0"),
        ({"mix": {}}, "allowed: at least one weight above 0"),
        ({"mix": {"ocr": 1}, "curriculum": DRAFT_CURRICULUM}, "there is a curriculum; allowed: one of them"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0 or above"),
        ({"curriculum": DRAFT_CURRICULUM[:5]}, "allowed: rising, the last 1"),
        ({"curriculum": DRAFT_CURRICULUM[::-1]}, "allowed: rising, the last 1"),
        ({"mix": {"ocr": 1}}, "mix: does not name text_pair, instr, vqa_single of the data"),
        ({"mix": {"text": 1, "multimodal": 1, "ocr": 1}}, "covers ocr twice; allowed: once"),
        ({"mix": {"text": 1, "multimodal": 1, "vqa_multi": 1}}, "got 'vqa_multi', of which the data fills no batch"),
        ({"curriculum": [Phase(1, {"text": 1})]}, "does not name ocr, vqa_single of the data"),
    ],
)
def test_what_does_not_fit_is_refused(splits: DatasetDict, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_sampler(splits, **options)


def test_a_phase_is_checked() -> None:
    for until in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"until is {until}; allowed: above 0, up to 1"):
            Phase(until, {"ocr": 1})
    with pytest.raises(ValueError, match="Phase until 0.5: got 'vqa'"):
        Phase(0.5, {"vqa": 1})


def test_splits_that_fill_no_batch(splits: DatasetDict, caplog: pytest.LogCaptureFixture, two_ranks: None) -> None:
    with caplog.at_level(logging.WARNING):
        sampler = mix_sampler(splits, drop_last=True, batch_size=16, temperature=0)
    assert "Splits of [9] rows fill no batch of 16 and are not trained on" in caplog.text
    turns = turns_of(splits, chain(*(epoch_of(sampler, epoch) for epoch in range(4))))
    assert set(turns) == {"text_pair", "instr", "ocr", "ocr.negatives_1"}
    with pytest.raises(
        ValueError, match="'vqa_single', of which the data fills no batch; allowed here: text_pair, instr, ocr"
    ):
        mix_sampler(splits, drop_last=True, batch_size=16, mix={"text": 1, "ocr": 1, "vqa_single": 1})
    with pytest.raises(ValueError, match=r"batches of 60 rows: the splits fill \[0, 0, 0, 1, 0\].*at least 2 in all"):
        mix_sampler(splits, drop_last=True, batch_size=60)


def test_the_stock_sampler_of_rows_is_refused(splits: DatasetDict) -> None:
    stock = [DefaultBatchSampler(RandomSampler(split), BATCH, False) for split in splits.values()]
    with pytest.raises(ValueError, match="batch_sampler: got DefaultBatchSampler; allowed: grouped_batch_sampler"):
        task_mix_sampler()(ConcatDataset(list(splits.values())), batch_samplers=stock, seed=0)


# --- Mixed batches ---


def test_splits_of_equal_columns_are_mixed(splits: DatasetDict) -> None:
    mixed = mixed_splits(splits)
    assert mixed.num_rows == {"text_pair": 50, "instr+ocr+vqa_single": 64, "ocr.negatives_1": 72}
    together = mixed["instr+ocr+vqa_single"]
    assert together[:] == {
        name: [row for split in ("instr", "ocr", "vqa_single") for row in splits[split][name]]
        for name in ("anchor", "positive")
    }
    batches = turns_of(mixed, epoch_of(mix_sampler(mixed), 0))
    assert Counter(batches) == {"text_pair": 13, "instr+ocr+vqa_single": 16, "ocr.negatives_1": 18}
    with pytest.raises(ValueError, match=r"split of 64 rows: got the tasks \['instr', 'ocr', 'vqa_single'\]"):
        mix_sampler(mixed, temperature=0.5)


# --- The real trainer ---


def test_the_arguments_can_be_pickled() -> None:
    """The trainer saves its arguments with every checkpoint."""
    made = pickle.loads(pickle.dumps(task_mix_sampler(curriculum=DRAFT_CURRICULUM)))
    assert made.keywords == task_mix_sampler(curriculum=DRAFT_CURRICULUM).keywords
    assert (
        pickle.loads(pickle.dumps(grouped_batch_sampler(4, True))).keywords == grouped_batch_sampler(4, True).keywords
    )


class Recorder:
    """A collator that notes the anchors of every batch."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator
        self.valid_label_columns = collator.valid_label_columns
        self.anchors: list[list[str]] = []

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        self.anchors.append([row["anchor"]["text"] for row in features])
        return self.collator(features)


@pytest.fixture
def trainer(
    folder: Path, tmp_path: Path, picture: Callable[..., Image.Image]
) -> Callable[[], tuple[SentenceTransformerTrainer, Recorder]]:
    """A trainer of 8 steps in two epochs of 12 batches, which saves the fifth: the middle of the second epoch."""

    def split(name: str, rows: int) -> Dataset:
        made = make_split(name, rows).to_list()
        for row in made:
            row["anchor"]["image"] = [str(tmp_path / image) for image in row["anchor"]["image"]]
            for path in row["anchor"]["image"]:
                picture(56, 56).save(path)
        return table(made)

    splits = DatasetDict({"instr": split("instr", 12), "ocr": split("ocr", 6), "vqa_single": split("vqa_single", 6)})

    def make() -> tuple[SentenceTransformerTrainer, Recorder]:
        model = ViPyloQwen(folder, device="cpu")
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            batch_sampler=grouped_batch_sampler(group_images=2, no_duplicates=True),
            multi_dataset_batch_sampler=task_mix_sampler(
                curriculum=[Phase(0.25, {"text": 1}), Phase(1, {"text": 1, "multimodal": 2})]
            ),
            save_strategy="steps",
            save_steps=5,
            logging_steps=100,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        made = SentenceTransformerTrainer(
            model, arguments, train_dataset=splits, loss=PrefixRoutedLoss(model), callbacks=[SamplingCallback()]
        )
        recorder = Recorder(made.data_collator)
        made.data_collator = recorder
        return made, recorder

    return make


def test_a_run_of_the_stock_trainer_follows_the_curriculum_and_resumes(
    trainer: Callable[[], tuple[SentenceTransformerTrainer, Recorder]], tmp_path: Path
) -> None:
    whole, recorded = trainer()
    whole.train()
    assert whole.state.global_step == 8
    tasks = [{text.split(">")[0] for text in batch} for batch in recorded.anchors]
    assert all(len(batch) == 1 for batch in tasks)
    assert tasks[:6] == [{"<instr"}] * 6
    assert Counter(chain(*tasks[6:])) == {"<instr": 6, "<ocr": 6, "<vqa_single": 6}

    resumed, again = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert again.anchors == recorded.anchors[15:]
    expected = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_single_dataset_needs_no_mix(splits: DatasetDict) -> None:
    sampler = split_sampler(splits["ocr"], 8)
    loader = DataLoader(splits["ocr"], batch_sampler=sampler, collate_fn=list)
    arguments, state = SimpleNamespace(gradient_accumulation_steps=2), SimpleNamespace(global_step=2, max_steps=9)
    SamplingCallback().on_epoch_begin(arguments, state, None, train_dataloader=loader)
    assert sampler.epoch == 1
    assert list(islice(sampler, 1)) == list(islice(sampler.cycle(1), 1))

"""The plan of a packed batch: the drawn example, positions against transformers, what is shared and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules import packing as packing_module
from sentence_vipyloqwen.modules.packing import Packing, pack

START, PAD, END = 1, 2, 3  # in these tests' vocabulary; words are 10 and more
Features = dict[str, Tensor]


def batch(rows: list[tuple[list[tuple[int, int, int]], list[int]]]) -> Features:
    """Features of rows, each a list of images (key, rows and columns of merged tokens) and a list of words."""
    ids = [
        [token for _, height, width in images for token in (START, *[PAD] * height * width, END)] + words
        for images, words in rows
    ]
    longest = max(map(len, ids))
    shown = [image for images, _ in rows for image in images]
    features = {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        "image_keys": torch.tensor([[key for key, *_ in images] + [0] * (5 - len(images)) for images, _ in rows]),
    }
    if shown:
        features["image_grid_thw"] = torch.tensor([[1, 2 * height, 2 * width] for _, height, width in shown])
        features["num_images_per_sample"] = torch.tensor([len(images) for images, _ in rows])
    return features


def plan(features: Features) -> Packing:
    return pack(features, merge_size=2, image_pad=PAD)


A, B = (77, 1, 2), (88, 1, 1)
DRAWN = [([A], [10, 11, 12]), ([A], [13, 14]), ([A, B], [15, 16]), ([], [20, 21, 22]), ([], [20, 21, 22])]


def test_the_drawn_batch() -> None:
    packing = plan(batch(DRAWN))
    assert packing.segments.lengths == (3, 4, 2, 3, 5)
    assert packing.segments.parents == (-1, -1, 1, 1, 1)
    tokens = batch(DRAWN)["input_ids"].flatten()[packing.source]
    words, page = [20, 21, 22], [START, PAD, PAD, END]
    assert tokens.tolist() == [*words, *page, 13, 14, 10, 11, 12, START, PAD, END, 15, 16]
    assert packing.lengths.tolist() == [7, 6, 9, 3, 3]
    assert packing.image_tokens.tolist() == [4, 5, 13]
    assert packing.images == (3, 0)  # B before A: fewer patches
    assert packing.grids == ((1, 2, 2), (1, 2, 4))
    assert packing.vision_rows.tolist() == [1, 2, 0]
    time, height, width = packing.positions[:, 0, 3:7]
    assert (time.tolist(), height.tolist(), width.tolist()) == ([0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3])


def test_the_mean_of_the_drawn_batch() -> None:
    packing = plan(batch(DRAWN))
    tokens = torch.arange(17.0)[:, None]
    page = 3 + 4 + 5 + 6
    expected = [(page + 9 + 10 + 11) / 7, (page + 7 + 8) / 6, (page + 12 + 13 + 14 + 15 + 16) / 9, 1, 1]
    torch.testing.assert_close(packing.mean(tokens)[:, 0], torch.tensor(expected))
    assert packing.mean(tokens.bfloat16()).dtype == torch.bfloat16


def test_a_mean_in_half_precision_is_summed_in_float32() -> None:
    packing = plan(batch([([], list(range(10, 3010)))]))
    assert packing.mean(torch.ones(3000, 1, dtype=torch.bfloat16)).item() == 1  # a bfloat16 sum would stop at 256


images = st.builds(lambda key, height: (key, height, 1 + key % 3), st.integers(1, 4), st.just(2))
row = st.tuples(st.lists(images, max_size=5), st.lists(st.integers(10, 13), max_size=6)).filter(any)
batches = st.lists(row, min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(batches)
def test_padding_the_packed_tokens_gives_the_batch_back(rows: list[Any]) -> None:
    features = batch(rows)
    packing = plan(features)
    packed = features["input_ids"].flatten()[packing.source]
    padded = packing.pad(packed[:, None].float())[..., 0]
    assert torch.equal(padded.long(), features["input_ids"])
    means = [row[: int(length)].mean() for row, length in zip(padded, packing.lengths, strict=True)]
    torch.testing.assert_close(packing.mean(packed[:, None].float())[:, 0], torch.stack(means))


@settings(max_examples=80, deadline=None)
@given(batches)
def test_nothing_stands_twice(rows: list[Any]) -> None:
    packing = plan(batch(rows))
    steps = {
        (*(key for key, *_ in images[:depth]), depth > len(images) and tuple(words))
        for images, words in rows
        for depth in range(1, len(images) + 1 + bool(words))
    }
    sizes = {key: 2 + height * width for images, _ in rows for key, height, width in images}
    tokens = sum(len(last) if isinstance(last, tuple) else sizes[path[-1]] for *path, last in steps)
    assert len(packing.source) == tokens
    assert len(packing.images) == len({key for images, _ in rows for key, *_ in images})


@settings(max_examples=40, deadline=None)
@given(batches)
def test_positions_are_those_of_transformers(positions_of: Any, rows: list[Any]) -> None:
    features = batch(rows)
    packing = plan(features)
    ours = torch.stack([packing.pad(axis[0][:, None].float())[..., 0].long() for axis in packing.positions])
    assert torch.equal(ours, positions_of(features) * features["attention_mask"])


@pytest.fixture(scope="module")
def positions_of(folder: Any) -> Any:
    """transformers' own M-RoPE positions, (3, B, L)."""
    transformer = ViPyloQwen(folder, device="cpu")[0].model

    def positions(features: Features) -> Tensor:
        ids = features["input_ids"]
        return transformer.get_rope_index(
            ids, (ids == PAD).int(), features.get("image_grid_thw"), attention_mask=features["attention_mask"]
        )[0]

    return positions


@settings(max_examples=40, deadline=None)
@given(batches)
def test_a_varlen_kernel_reads_at_most_twice_the_rows_as_keys(rows: list[Any]) -> None:
    packing = plan(batch(rows))
    assert packing.segments.varlen(torch.device("cpu")).cu_seqlens_k[-1] <= 2 * packing.lengths.sum()


def padded_on_the_left(features: Features) -> Features:
    lengths = features["attention_mask"].sum(dim=1)
    moved = {
        name: torch.stack([row.roll(len(row) - int(length)) for row, length in zip(value, lengths, strict=True)])
        for name, value in features.items()
        if name in ("input_ids", "attention_mask")
    }
    return features | moved


@settings(max_examples=40, deadline=None)
@given(batches)
def test_padding_may_stand_on_the_left(rows: list[Any]) -> None:
    right, left = plan(batch(rows)), plan(padded_on_the_left(batch(rows)))
    features = padded_on_the_left(batch(rows))
    packed = features["input_ids"].flatten()[left.source]
    assert torch.equal(packed, batch(rows)["input_ids"].flatten()[right.source])
    assert torch.equal(left.positions, right.positions)
    assert torch.equal(left.vision_rows, right.vision_rows)
    assert torch.equal(left.pad(packed[:, None].float())[..., 0].long(), features["input_ids"])
    assert torch.equal(left.mean(packed[:, None].float()), right.mean(packed[:, None].float()))


@pytest.mark.parametrize(
    ("mask", "said"), [([1, 0, 1], "row 1 has a hole"), ([0, 0, 0], "row 1 has no token"), ([0, 1, 0], None)]
)
def test_a_row_is_one_stretch_of_tokens(mask: list[int], said: str | None) -> None:
    features = batch([([], [10, 11, 12]), ([], [13, 14, 15])])
    features["attention_mask"][1] = torch.tensor(mask)
    if said is None:
        assert features["input_ids"].flatten()[plan(features).source].tolist() == [14, 10, 11, 12]
    else:
        with pytest.raises(ValueError, match=f"{said}; allowed is one stretch of tokens, at least one"):
            plan(features)


@pytest.mark.parametrize("name", ["attention_mask", "num_images_per_sample"])
def test_a_missing_feature_is_named(name: str) -> None:
    features = batch([([A], [10])])
    del features[name]
    with pytest.raises(ValueError, match=f"have no {name}; they have "):
        plan(features)


def test_images_of_one_key_and_two_sizes_are_two() -> None:
    packing = plan(batch([([(77, 1, 2)], [10]), ([(77, 2, 1)], [11]), ([(77, 1, 2)], [12])]))
    assert packing.grids == ((1, 2, 4), (1, 4, 2))
    assert packing.segments.lengths == (5, 4, 1, 1)


def test_images_without_a_key_are_not_shared() -> None:
    features = batch([([A], [10]), ([A], [11])])
    del features["image_keys"]
    assert plan(features).segments.parents == (-1, -1)
    assert len(plan(features).images) == 2


def test_a_slice_may_have_lost_columns_of_keys() -> None:
    features = batch([([A, B], [10]), ([A, B], [11])])
    features["image_keys"] = features["image_keys"][:, :1]
    packing = plan(features)
    assert packing.segments.parents == (-1, 0, 0)
    assert len(packing.images) == 3  # A once; each B for itself


def test_a_row_of_nothing_but_a_shared_image() -> None:
    packing = plan(batch([([A], []), ([A], [10])]))
    assert packing.segments.lengths == (4, 1)
    assert packing.mean(torch.arange(5.0)[:, None])[:, 0].tolist() == [1.5, 2.0]


def test_text_may_stand_around_images() -> None:
    """As other models' templates set it: two rows share what they begin with, up to the token behind the image."""
    image = [START, PAD, PAD]
    rows = [[8, 9, *image, END, 10], [8, 9, *image, END, 11], [7, 9, *image, END, 10], [8, 9, *image, 4]]
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
    features = batch([([A], [10])] * 4) | {"input_ids": ids, "attention_mask": (ids > 0).long()}
    packing = plan(features)
    assert packing.segments.lengths == (6, 7, 6, 1, 1)
    assert packing.segments.parents == (-1, -1, -1, 2, 2)
    assert torch.equal(packing.pad(ids.flatten()[packing.source][:, None].float())[..., 0].long(), ids)
    assert packing.last(ids.flatten()[packing.source][:, None])[:, 0].tolist() == [10, 11, 10, 4]


def test_images_may_stand_side_by_side(positions_of: Any) -> None:
    ids = torch.tensor([[START, PAD, PAD, PAD, PAD, END, PAD, PAD]])
    grids = torch.tensor([[1, 2, 4]] * 3)
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grids}
    features |= {"num_images_per_sample": torch.tensor([3]), "image_keys": torch.tensor([[5, 5, 6]])}
    packing = plan(features)
    assert packing.segments.lengths == (8,)
    assert packing.vision_rows.tolist() == [0, 1, 0, 1, 2, 3]
    features |= {"input_ids": ids[:, [0, 1, 2, 5, 6, 7]], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    features |= {"image_grid_thw": grids[:2], "num_images_per_sample": torch.tensor([2])}
    assert torch.equal(plan(features).positions[:, 0], positions_of(features)[:, 0])


def test_the_tokens_of_an_image_stand_in_one_stretch() -> None:
    features = batch([([A], [10])])
    features["input_ids"] = features["input_ids"][:, [0, 1, 4, 2, 3]]
    with pytest.raises(ValueError, match="Row 0 has text within an image; its tokens belong in one stretch"):
        plan(features)


def test_image_tokens_must_be_as_many_as_the_images_make() -> None:
    features = batch([([A], [10])])
    features["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    with pytest.raises(ValueError, match="Row 0 has 2 image tokens; its images make 1"):
        plan(features)


def test_the_plan_takes_a_step_for_each_image_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int | bytes] = []
    step = packing_module._step
    monkeypatch.setattr(packing_module, "_step", lambda node, key, *args: steps.append(key) or step(node, key, *args))
    plan(batch([([A, B], np.arange(10, 4010).tolist()), ([(99, 30, 40)], []), ([], [10])]))
    assert len(steps) == 3 + 1 + 1

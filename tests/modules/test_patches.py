from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from sentence_vipyloqwen.modules.patches import CutImage, ImagePatchCache, cut, grid_of, to_pixel_values

Picture = Callable[..., Image.Image]
SIZES = [(1, 1), (3, 500), (500, 3), (28, 28), (56, 84), (57, 84), (113, 61), (400, 500), (900, 1200), (40, 4000)]


def check_against_transformers(image: Image.Image, processor: Qwen2VLImageProcessorPil) -> torch.Tensor:
    """The patches, after they were compared with the processor's own."""
    stock = processor(images=[image], return_tensors="pt")
    grid = grid_of(image.size, processor)
    assert stock["image_grid_thw"].tolist() == [[1, *grid]]
    patches = cut(image, grid, processor)
    assert patches.dtype == torch.uint8
    assert patches.shape == (grid[0] * grid[1], 588)
    torch.testing.assert_close(to_pixel_values(patches, processor), stock["pixel_values"], atol=1e-6, rtol=0)
    return patches


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_patches_are_those_of_transformers(picture: Picture, height: int, width: int) -> None:
    check_against_transformers(picture(height, width), Qwen2VLImageProcessorPil())


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), low=st.integers(1, 40), more=st.integers(0, 40))
def test_patches_are_those_of_transformers_whatever_the_budget(size: tuple[int, int], low: int, more: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if max(size) / min(size) <= 200:
        budget = {"min_pixels": low * 784, "max_pixels": (low + more) * 784}
        check_against_transformers(Image.fromarray(noise), Qwen2VLImageProcessorPil(**budget))


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [0.5, 1.0, 2.0]},
        {"image_mean": 0.5, "image_std": 0.25},
        {"resample": Image.Resampling.BILINEAR},
        {"patch_size": 16},
        {"merge_size": 1},
    ],
    ids=str,
)
def test_the_processor_says_how(picture: Picture, options: dict[str, Any]) -> None:
    processor, image = Qwen2VLImageProcessorPil(**options), picture(100, 170)
    stock = processor(images=[image], return_tensors="pt")
    patches = cut(image, grid_of(image.size, processor), processor)
    # Bytes that are not rescaled reach a thousand once they are divided by the deviation.
    torch.testing.assert_close(to_pixel_values(patches, processor), stock["pixel_values"], atol=1e-6, rtol=1e-6)


def test_each_frame_is_doubled_as_the_processor_says(picture: Picture) -> None:
    processor = Qwen2VLImageProcessorPil(temporal_patch_size=3)
    values = to_pixel_values(cut(picture(), grid_of((84, 56), processor), processor), processor)
    assert values.shape == (24, 3 * 588)
    first, second, third = values.view(24, 3, 3, 196).unbind(2)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_without_resizing_a_size_must_suit(picture: Picture) -> None:
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    check_against_transformers(picture(28 * 50, 28 * 60), processor)  # beyond the pixel budget
    with pytest.raises(ValueError, match="measures 85x56; without resizing, multiples of 28 are allowed"):
        grid_of((85, 56), processor)


def test_patches_of_a_block_stand_together() -> None:
    """Pixels that say where they are: row in red, column in green."""
    rows, columns = np.mgrid[0:56, 0:84]
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    patches = cut(image, (4, 6), Qwen2VLImageProcessorPil()).view(24, 3, 14, 14)
    corners = patches[:, :2, 0, 0] // 14  # patch row and column
    assert corners[:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert corners[12].tolist() == [2, 0]
    assert patches[0, 0, :, 0].tolist() == patches[0, 1, 0, :].tolist() == list(range(14))


@pytest.fixture
def cut_images() -> dict[str | int, CutImage]:
    """Five of 2352 bytes each."""
    return {name: CutImage(name, key, torch.zeros(4, 588, dtype=torch.uint8)) for key, name in enumerate("abcde", 1)}


def test_a_cache_holds_the_last_batch(cut_images: dict[str | int, CutImage]) -> None:
    cache = ImagePatchCache(spare_bytes=0)
    assert cache.get("a") is None
    cache.keep({name: cut_images[name] for name in "abc"})
    assert all(cache.get(name) is cut_images[name] for name in "abc")
    cache.keep({"d": cut_images["d"]})
    assert [cache.get(name) is None for name in "abcd"] == [True, True, True, False]


def test_beyond_the_last_batch_a_cache_holds_what_was_used_last(cut_images: dict[str | int, CutImage]) -> None:
    cache = ImagePatchCache(spare_bytes=2 * 2352)
    for batch in ("ab", "c", "a", "de"):
        cache.keep({name: cut_images[name] for name in batch})
    assert [name for name in "abcde" if cache.get(name)] == ["a", "c", "d", "e"]
    cache.keep({})
    assert [name for name in "abcde" if cache.get(name)] == ["d", "e"]


@given(st.lists(st.sets(st.sampled_from("abcde"))))
def test_a_cache_keeps_its_bound(batches: list[set[str]]) -> None:
    images = {name: CutImage(name, 1, torch.zeros(place, 588)) for place, name in enumerate("abcde", 1)}
    cache = ImagePatchCache(spare_bytes=4 * 2352)
    for batch in batches:
        cache.keep({name: images[name] for name in batch})
        assert all(cache.get(name) for name in batch)
        before = [name for name in images if cache.get(name) and name not in batch]
        assert sum(images[name].patches.nbytes for name in before) <= 4 * 2352

"""The output of a frozen tower, kept: the same loss and gradients, no image opened or computed twice."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.modules import opening, qwen2_vl, vision_cache
from sentence_vipyloqwen.modules.vision_cache import ShownImage, VisionCache

Picture = Callable[..., Image.Image]


@pytest.fixture
def frozen(model: ViPyloQwen) -> ViPyloQwen:
    model[0].model.visual.requires_grad_(False)
    return model


@pytest.fixture
def cache(frozen: ViPyloQwen, tmp_path: Path) -> Iterator[VisionCache]:
    made = VisionCache.of(frozen[0].model.visual, frozen[0].image_processor, tmp_path / "cache")
    yield made
    made.close()


@pytest.fixture
def columns(tmp_path: Path, picture: Picture) -> list[list[Any]]:
    """Three pages of two sizes, in seven rows; one row has two of them, one none."""
    paths = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    for seed, path in enumerate(paths):
        picture(56 + 28 * (seed % 2), seed=seed).save(path)
    anchors: list[Any] = [{"image": paths[row % 3], "text": f"<ocr> {row}"} for row in range(5)]
    anchors += [{"image": paths[:2], "text": "<ocr> hai"}, "<ocr> không"]
    return [anchors, [f"đáp {row}" for row in range(7)]]


def step(loss: torch.nn.Module, columns: list[list[Any]]) -> tuple[float, dict[str, Tensor]]:
    loss.zero_grad(set_to_none=True)
    terms = loss([loss.model.preprocess(column) for column in columns], None)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_loss_and_gradients_are_those_without_it(
    frozen: ViPyloQwen, cache: VisionCache, columns: list[list[Any]], lazy: bool, parts: bool
) -> None:
    loss = CachedPrefixRoutedLoss(frozen, mini_batch_size=2) if parts else PrefixRoutedLoss(frozen)
    expected = step(loss, columns)
    frozen[0].lazy_images, frozen[0].vision_cache = lazy, cache
    for _ in range(2):  # cold, then warm
        found = step(loss, columns)
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert found[1].keys() == expected[1].keys()
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][name], gradient, atol=2e-6, rtol=1e-3)
        assert len(cache) == 3


def test_what_is_held_is_neither_opened_nor_computed(
    frozen: ViPyloQwen, cache: VisionCache, columns: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen[0].lazy_images, frozen[0].vision_cache = True, cache
    loss = PrefixRoutedLoss(frozen)
    first = step(loss, columns)
    monkeypatch.setattr(opening, "open_image", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(qwen2_vl, "run_vision", lambda *_: pytest.fail("computed"))
    second = step(loss, columns)
    assert second[0] == first[0]
    assert all(torch.equal(gradient, first[1][name]) for name, gradient in second[1].items())


def test_encode_takes_from_it_too(frozen: ViPyloQwen, cache: VisionCache, columns: list[list[Any]]) -> None:
    expected = frozen.encode(columns[0])
    frozen[0].vision_cache = cache
    for _ in range(2):
        assert abs(frozen.encode(columns[0]) - expected).max() <= 1e-6
    assert len(cache) == 3


def test_a_copy_of_the_model_has_none(frozen: ViPyloQwen, cache: VisionCache) -> None:
    frozen[0].vision_cache = cache
    assert copy.deepcopy(frozen)[0].vision_cache is None


def test_another_tower_has_another_folder(frozen: ViPyloQwen, cache: VisionCache, tmp_path: Path) -> None:
    with torch.no_grad():
        next(frozen[0].model.visual.parameters()).add_(1)
    other = VisionCache.of(frozen[0].model.visual, frozen[0].image_processor, tmp_path / "cache")
    assert other.folder != cache.folder
    other.close()


def test_a_tower_that_is_trained_is_refused(model: ViPyloQwen, cache: VisionCache, columns: list[list[Any]]) -> None:
    model[0].vision_cache = cache
    model[0].model.visual.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen vision tower; 'patch_embed.* is trained.*frozen: \[visual\]"):
        step(PrefixRoutedLoss(model), columns)


def features_of(images: list[ShownImage]) -> Callable[[list[int]], Tensor]:
    """Of each image its key, for every merged token."""
    return lambda places: torch.cat([torch.full((4, 2), float(images[place].key)) for place in places])


def test_entries_are_by_content_size_and_precision(tmp_path: Path) -> None:
    cache = VisionCache(tmp_path, merge_size=2)
    one, same_key, none = ShownImage(7, (4, 4)), ShownImage(7, (2, 8)), ShownImage(0, (4, 4))
    images = [one, none, same_key]
    found = cache.features(images, features_of(images), torch.float32)
    assert found[:, 0].tolist() == [7.0] * 4 + [0.0] * 4 + [7.0] * 4
    assert len(cache) == 2  # what has no key is not kept
    cache.features([one], features_of([one]), torch.bfloat16)
    assert len(cache) == 3
    held = cache.features([same_key, one], lambda _: pytest.fail("computed"), torch.float32)
    assert held.tolist() == [[7.0, 7.0]] * 8
    cache.close()


def test_every_precision_comes_back_to_the_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cache = VisionCache(tmp_path / str(dtype), merge_size=2)
        features = torch.randn(4, 3).to(dtype)
        image = [ShownImage(5, (4, 4))]
        cache.features(image, lambda _, made=features: made, dtype)
        assert torch.equal(cache.features(image, lambda _: pytest.fail("computed"), dtype), features)
        cache.close()


def test_a_kill_loses_the_batch_under_way_alone(tmp_path: Path) -> None:
    cache, images = VisionCache(tmp_path, merge_size=2), [ShownImage(1, (4, 4)), ShownImage(2, (4, 4))]
    cache.features(images[:1], features_of(images[:1]), torch.float32)
    with pytest.raises(KeyboardInterrupt):
        cache.features(images, lambda _: (_ for _ in ()).throw(KeyboardInterrupt), torch.float32)
    cache.close()
    again = VisionCache(tmp_path, merge_size=2)
    assert len(again) == 1
    again.close()


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"total": 1 << 16}))
    cache, image = VisionCache(tmp_path, merge_size=2), [ShownImage(1, (4, 4))]
    with pytest.raises(OSError, match="filled the disk") as caught:
        cache.features(image, lambda _: torch.zeros(4, 1 << 16), torch.float32)
    assert caught.value.errno == errno.ENOSPC
    cache.close()

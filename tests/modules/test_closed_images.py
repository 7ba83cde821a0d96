"""Images that stay closed until their rows run: the same loss and gradients, fewer images in memory at once."""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor, nn

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.losses import cached_prefix_routed
from sentence_vipyloqwen.modules import opening, spool
from sentence_vipyloqwen.modules.closed_images import OpenedOnce, closed_key
from sentence_vipyloqwen.modules.vision_cache import VisionCache

Picture = Callable[..., Image.Image]
PAGES = 6


@pytest.fixture
def pages(tmp_path: Path, picture: Picture) -> list[str]:
    """Image files, of several sizes."""
    paths = [str(tmp_path / f"{seed}.png") for seed in range(PAGES)]
    for seed, path in enumerate(paths):
        picture(56 + 28 * (seed % 3), seed=seed).save(path)
    return paths


@pytest.fixture
def columns(pages: Sequence[str]) -> list[list[Any]]:
    """Two questions on each page, shuffled, a row of two pages and one of none."""
    anchors: list[Any] = [{"image": [pages[i % PAGES]], "text": f"<ocr> {i}"} for i in range(2 * PAGES)]
    anchors += [{"image": pages[:2], "text": "<ocr> both"}, {"text": "<ocr> none"}]
    return [anchors, [f"answer {i}" for i in range(len(anchors))]]


def step(loss: nn.Module, columns: Sequence[list[Any]]) -> tuple[float, dict[str, Tensor]]:
    loss.zero_grad(set_to_none=True)
    terms = loss([loss.model.preprocess(column) for column in columns], None)
    total = torch.stack(list(terms.values())).sum() if isinstance(terms, dict) else terms
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in loss.model.named_parameters() if p.grad is not None}


def assert_equal_steps(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        torch.testing.assert_close(found[1][name], expected[1][name], atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "make", [PrefixRoutedLoss, lambda model: CachedPrefixRoutedLoss(model, mini_batch_size=3)], ids=["plain", "cached"]
)
def test_loss_and_gradients_are_the_same(
    model: ViPyloQwen, columns: list[list[Any]], make: Callable[[ViPyloQwen], nn.Module], packed: bool
) -> None:
    model[0].packed = packed
    expected = step(make(model), columns)
    model[0].lazy_images = True
    assert_equal_steps(step(make(model), columns), expected)


def test_a_stock_cached_loss_slices_them_too(model: ViPyloQwen, columns: list[list[Any]]) -> None:
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    expected = step(loss, columns)
    model[0].lazy_images = True
    assert_equal_steps(step(loss, columns), expected)


class Alive:
    """Counts the opened images that are in memory at once, and how often one was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.opened = 0
        cut = opening.cut

        def counted(*args: Any) -> Tensor:
            patches = cut(*args)
            self.now, self.opened = self.now + 1, self.opened + 1
            self.most = max(self.most, self.now)
            weakref.finalize(patches.untyped_storage(), self._gone)
            return patches

        monkeypatch.setattr(opening, "cut", counted)

    def _gone(self) -> None:
        self.now -= 1


class Held:
    """Counts the patches that are handed to the model and still in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        patches = OpenedOnce.patches

        def counted(*args: Any) -> Any:
            found = patches(*args)
            for of_image in found.values():
                weakref.finalize(of_image.untyped_storage(), self._gone)
            self.now += len(found)
            self.most = max(self.most, self.now)
            return found

        monkeypatch.setattr(OpenedOnce, "patches", counted)

    def _gone(self) -> None:
        self.now -= 1


def test_only_the_images_of_a_mini_batch_are_open_at_once(
    model: ViPyloQwen, pages: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors = [{"image": [pages[i % PAGES]], "text": f"<ocr> {i}"} for i in range(2 * PAGES)]
    columns = [anchors, [f"answer {i}" for i in range(len(anchors))]]
    loss, alive = CachedPrefixRoutedLoss(model, mini_batch_size=2), Alive(monkeypatch)
    step(loss, columns)
    assert (alive.most, alive.opened) == (PAGES, PAGES)

    model[0].lazy_images = True
    alive.most = alive.opened = 0
    features = [model.preprocess(column) for column in columns]
    assert alive.opened == 0
    assert "pixel_values" not in features[0]
    terms = loss(features)
    assert (alive.most, alive.opened) == (1, PAGES)  # rows that share an image run together
    torch.stack(list(terms.values())).sum().backward()
    assert (alive.most, alive.opened) == (1, PAGES)  # the backward pass reads what the forward kept
    assert alive.now == 0
    assert "pixel_values" not in features[0]


@pytest.mark.parametrize("beside", [True, False], ids=["thread", "in turn"])
@pytest.mark.parametrize("spool_bytes", [10**8, 1], ids=["memory", "disk"])
def test_each_image_is_opened_once_a_step_and_few_are_held(
    model: ViPyloQwen, columns: list[list[Any]], monkeypatch: pytest.MonkeyPatch, beside: bool, spool_bytes: int
) -> None:
    """Also one that stands in several columns and mini-batches; loss and gradients are those of opened images."""
    columns = [*columns, [{"image": row["image"][:1]} if "image" in row else "" for row in columns[0]]]
    columns[2][-1] = "no image"
    loss = CachedPrefixRoutedLoss(model, mini_batch_size=2)
    expected = step(loss, columns)

    monkeypatch.setattr(cached_prefix_routed, "runs_beside", lambda device: beside)
    monkeypatch.setattr(spool, "SPOOL_BYTES", spool_bytes)
    held = Held(monkeypatch)
    model[0].lazy_images = True
    alive, threads = Alive(monkeypatch), threading.active_count()
    assert_equal_steps(step(loss, columns), expected)
    assert alive.opened == PAGES
    assert held.now == alive.now == 0
    assert held.most <= 3 * (2 if beside else 1)  # a row of two pages and another: three pages in a mini-batch
    assert threading.active_count() == threads


def test_passes_that_only_wait_for_other_ranks_open_nothing_anew(
    model: ViPyloQwen, pages: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that lacks forward passes shows a row of the positives again, whose image is open already."""
    columns = [[f"<ocr> {i}" for i in range(4)], [{"image": [page]} for page in pages[:4]]]
    loss = CachedPrefixRoutedLoss(model, mini_batch_size=1)
    expected = step(loss, columns)
    model[0].lazy_images = True
    monkeypatch.setattr(cached_prefix_routed, "missing_forwards", lambda own, device: 3)
    alive = Alive(monkeypatch)
    assert_equal_steps(step(loss, columns), expected)
    assert (alive.opened, alive.most) == (4, 1)


def test_the_next_images_are_opened_while_the_model_runs(
    model: ViPyloQwen, pages: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mini-batch ends only once the page of the second is open; by a loss that waited, never."""
    monkeypatch.setattr(cached_prefix_routed, "runs_beside", lambda device: True)
    opened, second = threading.Semaphore(0), []
    cut = opening.cut

    def counted(*args: Any) -> Tensor:
        opened.release()
        return cut(*args)

    def wait(*_: Any) -> None:
        if not second:
            second.append(all(opened.acquire(timeout=60) for _ in range(2)))

    monkeypatch.setattr(opening, "cut", counted)
    model[0].lazy_images = True
    features = [model.preprocess([{"image": [page], "text": "<ocr> a"} for page in pages]), model.preprocess(pages)]
    with model.register_forward_pre_hook(wait):
        CachedPrefixRoutedLoss(model, mini_batch_size=1)(features)
    assert second == [True]


def test_a_broken_image_is_named_whichever_thread_opens_it(
    model: ViPyloQwen, pages: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_prefix_routed, "runs_beside", lambda device: True)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pages[0]).read_bytes()[:200])
    model[0].lazy_images = True
    anchors = [{"image": [page]} for page in (*pages[:3], str(broken))]
    with pytest.raises(ValueError, match="Input 3, image 0: cannot decode the image .*broken.png"):
        step(CachedPrefixRoutedLoss(model, mini_batch_size=1), [anchors, list("abcd")])


def test_a_vision_cache_says_what_is_opened(
    model: ViPyloQwen, columns: list[list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive = Alive(monkeypatch)
    model[0].lazy_images = True
    tower = model[0].model.visual.requires_grad_(False)
    model[0].vision_cache = VisionCache.of(tower, model[0].image_processor, tmp_path)
    for _ in range(2):
        step(CachedPrefixRoutedLoss(model, mini_batch_size=2), columns)
    assert alive.opened == PAGES


def test_keys_are_those_of_content(pages: list[str], tmp_path: Path, picture: Picture) -> None:
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pages[0]).read_bytes())
    assert closed_key(copy) == closed_key(str(copy)) == closed_key(pages[0])
    assert len({closed_key(page) for page in pages}) == PAGES
    assert closed_key(picture(seed=1)) == closed_key(picture(seed=1).copy()) != closed_key(picture(seed=2))


def test_a_bad_image_is_named(model: ViPyloQwen, pages: Sequence[str], tmp_path: Path) -> None:
    model[0].lazy_images = True
    with pytest.raises(ValueError, match="Input 1, image 0: cannot read the image"):
        model.preprocess([{"image": [pages[0]]}, {"image": [str(tmp_path / "none.png")]}])
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pages[0]).read_bytes()[:200])
    features = model.preprocess([{"text": "a"}, {"image": [str(broken)]}])
    with pytest.raises(ValueError, match="Input 1, image 0: cannot decode the image .*broken.png"):
        model(features)


def test_encoding_opens_as_before(model: ViPyloQwen, pages: Sequence[str]) -> None:
    inputs = [{"image": [page]} for page in pages]
    expected = model.encode(inputs)
    model[0].lazy_images = True
    assert (model.encode(inputs) == expected).all()


def test_they_pass_data_loader_workers(model: ViPyloQwen, pages: Sequence[str]) -> None:
    model[0].lazy_images = True
    inputs = [{"image": [page], "text": "a"} for page in pages]
    features = model.preprocess(inputs)
    again = pickle.loads(pickle.dumps(features))
    torch.testing.assert_close(
        model(again)["sentence_embedding"], model(model.preprocess(inputs))["sentence_embedding"]
    )


def test_the_stock_trainer_trains_with_them(model: ViPyloQwen, pages: Sequence[str], tmp_path: Path) -> None:
    data = Dataset.from_dict(
        {
            "anchor": [{"image": [pages[i % PAGES]], "text": f"<ocr> {i}"} for i in range(8)],
            "positive": [{"image": [], "text": f"answer {i}"} for i in range(8)],
        }
    )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    weights = []
    for lazy in (False, True):
        model.load_state_dict(start)
        model[0].lazy_images = lazy
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        loss = CachedPrefixRoutedLoss(model, mini_batch_size=2)
        SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert any(not torch.equal(weights[1][name], start[name]) for name in start)
    for name in start:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-6, rtol=1e-4)

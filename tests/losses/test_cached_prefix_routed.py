"""Cached = uncached, in loss and gradients, whatever the batch holds and however it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, nn

from sentence_vipyloqwen import CachedPrefixRoutedLoss, PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.losses.rows import select_rows
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL

Picture = Callable[..., Image.Image]
Columns = Sequence[Sequence[Any]]
ANCHORS = ["<text_pair> a", "<instr> b một hai ba", "<ocr> c", "<vqa_single> d", "<vqa_multi> e", "f"]


def batches(picture: Picture) -> dict[str, tuple[Columns, Tensor | None]]:
    """Columns and scores of every mix of rows."""
    pages = [picture(seed=seed) for seed in range(3)]
    ocr = [{"image": [pages[i % 3]], "text": f"<ocr> {i}"} for i in range(7)]
    answers = ["một", "hai ba bốn", "năm", "sáu bảy", "tám", "chín mười", "mười một"]
    several = [{"image": pages[: 1 + i % 3], "text": f"<vqa_multi> {i}"} for i in range(4)]
    mixed = [ANCHORS[0], ANCHORS[1], {"image": [pages[0]], "text": ANCHORS[2]}, {"image": [pages[0]], "text": "g"}]
    nan = math.nan
    return {
        "homogeneous": ([[f"<instr> {text}" for text in answers], answers], None),
        "tasks mixed, negatives": ([ANCHORS, list("uvwxyz"), list("123456"), list("ghijkl")], None),
        "scores, some missing": (
            [[f"<text_pair> {t}" for t in "abcde"], [f"<text_pair> {t}" for t in "uvwxy"]],
            torch.tensor([0.1, nan, 1.0, nan, 0.5]),
        ),
        "shared images, negatives": ([ocr, answers, answers[::-1]], None),
        "several images": ([several, answers[:4]], None),
        "text and images": ([mixed, answers[:4]], torch.tensor([0.4, nan, nan, nan])),
        "images on both sides": ([ocr, [{"image": pages[2 - i % 3]} for i in range(7)]], None),
    }


NAMES = list(batches(lambda **_: Image.new("RGB", (56, 56))))


def step(loss: nn.Module, columns: Columns, scores: Tensor | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Terms and gradients of one step, scaled as a trainer's accumulation or scaler does it."""
    loss.zero_grad(set_to_none=True)
    terms = loss([loss.model.preprocess(column) for column in columns], scores)
    (torch.stack(list(terms.values())).sum() * 8).backward()
    gradients = {name: p.grad / 8 for name, p in loss.model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in terms.items()}, gradients


def assert_equal_steps(left: tuple[Any, Any], right: tuple[Any, Any]) -> None:
    assert left[0] == pytest.approx(right[0], abs=1e-6)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_cached_and_uncached_are_equal(model: ViPyloQwen, picture: Picture, name: str) -> None:
    columns, scores = batches(picture)[name]
    expected = step(PrefixRoutedLoss(model, negatives="all"), columns, scores)
    assert sum(gradient.abs().sum().item() for gradient in expected[1].values()) > 0
    for sizes in (
        {"mini_batch_size": 1},
        {"mini_batch_size": 3},
        {"mini_batch_size": 64},
        {"mini_batch_num_tokens": 40},
    ):
        loss = CachedPrefixRoutedLoss(model, negatives="all", **sizes)
        assert_equal_steps(step(loss, columns, scores), expected)


def rows_of(task: str, pages: Sequence[Image.Image]) -> list[tuple[Any, Any, Any, float]]:
    """Anchor, positive, negative and score of three rows of a task: two share an image, vqa_multi shows several."""
    prefix = f"<{task}> "
    shown = [[pages[0]], [pages[0]], [pages[1]]] if task != "vqa_multi" else [pages[:2], pages[:2], pages[::-1]]
    anchors = [{"image": images, "text": f"{prefix}{task} {i}"} for i, images in enumerate(shown)]
    if task in ("text_pair", "instr"):
        anchors[1] = {"text": f"{prefix}một hai ba bốn"}
    on_positive = prefix if task == "text_pair" else ""
    scores = [0.25, 1.0, 0.0] if task == "text_pair" else [math.nan] * 3
    return [
        (anchor, f"{on_positive}{task} trả lời {i}", f"{on_positive}{task} sai {i * 2}", scores[i])
        for i, anchor in enumerate(anchors)
    ]


TASKS = [name for name in ALL_TASKS if name != GENERAL.name]
MIXES = [mix for size in range(1, len(TASKS) + 1) for mix in combinations(TASKS, size)]


@pytest.mark.parametrize(
    ("mix", "negatives"), [*((mix, True) for mix in MIXES), *((mix, False) for mix in MIXES if len(mix) in (1, 5))]
)
def test_every_mix_of_tasks_with_images(
    model: ViPyloQwen, picture: Picture, mix: Sequence[str], negatives: bool
) -> None:
    """Each task alone, and all mixes of them, by images opened beforehand and by such as a mini-batch opens.

    All with an explicit negative; without one, each alone and all of them.
    """
    pages = [picture(seed=seed) for seed in range(3)]
    rows = [row for task in mix for row in rows_of(task, pages)]
    rows = rows[::2] + rows[1::2]  # rows of a task do not stand together
    anchors, positives, wrong, scores = (list(column) for column in zip(*rows, strict=True))
    columns = [anchors, positives, *([wrong] if negatives else [])]
    expected = step(PrefixRoutedLoss(model), columns, torch.tensor(scores))
    for task in mix:
        assert expected[0][f"{task}/info_nce"] > 0
    assert {name.partition("/")[0] for name, value in expected[0].items() if value} <= set(mix)
    for lazy, sizes in ((False, {"mini_batch_size": 2}), (True, {"mini_batch_num_tokens": 40})):
        model[0].lazy_images = lazy
        assert_equal_steps(step(CachedPrefixRoutedLoss(model, **sizes), columns, torch.tensor(scores)), expected)


def test_a_stock_model_is_cached_as_well(folder: Path, picture: Picture) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.padding_side = "left"
    columns = [[{"image": [picture()], "text": "<ocr> a"}, {"text": "<ocr> b c d"}, {"text": "e"}], list("xyz")]
    expected = step(PrefixRoutedLoss(model), columns, None)
    assert_equal_steps(step(CachedPrefixRoutedLoss(model, mini_batch_size=2), columns, None), expected)


@pytest.mark.parametrize("weights", [None, [1, 0.25]])
def test_matryoshka_around_it(model: ViPyloQwen, picture: Picture, weights: list[float] | None) -> None:
    columns, scores = batches(picture)["text and images"]
    plain = MatryoshkaLoss(model, PrefixRoutedLoss(model), [32, 16], weights)
    cached = MatryoshkaLoss(model, CachedPrefixRoutedLoss(model, mini_batch_size=2), [32, 16], weights)
    assert_equal_steps(step(cached, columns, scores), step(plain, columns, scores))


def test_dropout_is_the_same_in_both_passes(model: ViPyloQwen) -> None:
    """Embeddings that differ between the passes would have gradients of other embeddings."""
    seen: list[Tensor] = []

    class Noise(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            embedding = nn.functional.dropout(features["sentence_embedding"], 0.5)
            seen.append(embedding.detach())
            return {**features, "sentence_embedding": embedding}

    model.append(Noise())
    step(CachedPrefixRoutedLoss(model, mini_batch_size=2), [["<ocr> a", "<ocr> b", "<ocr> c"], list("xyz")], None)
    assert len(seen) == 8
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first, second)


def test_evaluation_has_the_same_terms_and_no_graph(model: ViPyloQwen, picture: Picture) -> None:
    columns, scores = batches(picture)["text and images"]
    features = [model.preprocess(column) for column in columns]
    with torch.no_grad():
        plain = PrefixRoutedLoss(model)([dict(column) for column in features], scores)
        cached = CachedPrefixRoutedLoss(model, mini_batch_size=2)([dict(column) for column in features], scores)
    assert list(cached) == list(plain)
    for name, value in cached.items():
        torch.testing.assert_close(value, plain[name])
        assert not value.requires_grad


def test_two_forwards_before_the_backwards_do_not_mix(model: ViPyloQwen) -> None:
    first = [["<ocr> a", "<ocr> b"], ["x", "y"]]
    second = [["<instr> a b", "<instr> c", "<instr> d"], ["u", "v", "w"]]
    loss = CachedPrefixRoutedLoss(model, mini_batch_size=1)
    expected = [step(loss, columns, None)[1] for columns in (first, second)]
    loss.zero_grad(set_to_none=True)
    totals = [
        torch.stack(list(loss([model.preprocess(c) for c in columns]).values())).sum() for columns in (first, second)
    ]
    for total in totals:
        total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], atol=2e-6, rtol=1e-3)


def mini_batches(model: ViPyloQwen, columns: Columns, **options: Any) -> list[Mapping[str, Any]]:
    """What the model is given in the first pass, as rows and tokens and images of each mini-batch."""
    seen: list[Mapping[str, Any]] = []
    loss = CachedPrefixRoutedLoss(model, **options)

    def watch(_: nn.Module, inputs: tuple[dict[str, Tensor], ...]) -> None:
        features = inputs[0]
        images = set(features["image_keys"].flatten().tolist()) - {0}
        tokens = features["attention_mask"].sum(dim=1).tolist()
        seen.append({"rows": len(features["input_ids"]), "tokens": tokens, "images": images})

    with model.register_forward_pre_hook(watch), torch.no_grad():
        loss([model.preprocess(column) for column in columns])
    return seen


def test_rows_that_share_an_image_run_together(model: ViPyloQwen, picture: Picture) -> None:
    pages = [picture(seed=seed) for seed in range(4)]
    anchors = [{"image": [pages[i % 4]], "text": f"<ocr> {i}"} for i in range(12)]
    seen = mini_batches(model, [anchors, [f"answer {i}" for i in range(12)]], mini_batch_size=4)
    with_images = [batch for batch in seen if batch["images"]]
    assert [batch["rows"] for batch in with_images] == [3, 3, 3, 3]
    assert all(len(batch["images"]) == 1 for batch in with_images)


def test_a_token_budget_counts_image_tokens_and_a_shared_image_once(model: ViPyloQwen, picture: Picture) -> None:
    page, other = picture(112, 112), picture(112, 112, seed=1)  # 16 tokens each, 18 with start and end
    same = [{"image": [page], "text": "<ocr> a"}] * 2
    length = len(model.preprocess(same)["input_ids"][0])
    texts = ["x", "y"]
    budget = length + (length - 18)
    together = mini_batches(model, [same, texts], mini_batch_num_tokens=budget)
    assert [batch["rows"] for batch in together if batch["images"]] == [2]
    apart = [{"image": [page], "text": "<ocr> a"}, {"image": [other], "text": "<ocr> a"}]
    separate = mini_batches(model, [apart, texts], mini_batch_num_tokens=budget)
    assert [batch["rows"] for batch in separate if batch["images"]] == [1, 1]


def test_selected_rows_have_their_own_images(model: ViPyloQwen, picture: Picture) -> None:
    pages = [picture(56 + 28 * seed, seed=seed) for seed in range(3)]
    rows = [
        {"image": pages[:2], "text": "a"},
        {"text": "b b b"},
        {"image": [pages[2]]},
        {"image": pages[1:], "text": "c"},
    ]
    everything = model.preprocess(rows)
    for places in ([3, 0], [1], [2, 1, 0], [0, 1, 2, 3]):
        selected, alone = select_rows(everything, places), model.preprocess([rows[place] for place in places])
        for key in ("image_keys", "pixel_values", "image_grid_thw"):
            assert (key in selected) == (key in alone)
            if key in alone:
                assert torch.equal(selected[key], alone[key])
        width = alone["input_ids"].shape[1]
        assert torch.equal(selected["input_ids"][:, :width], alone["input_ids"])
        assert not selected["attention_mask"][:, width:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batch_size": 0}, "mini_batch_size is 0; allowed is a whole number of at least 1"),
        ({"mini_batch_size": True}, "mini_batch_size is True"),
        ({"mini_batch_num_tokens": 1.5}, "mini_batch_num_tokens is 1.5"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_a_bad_option_is_named(model: ViPyloQwen, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachedPrefixRoutedLoss(model, **options)


def test_the_card_tells_its_options(model: ViPyloQwen) -> None:
    loss = CachedPrefixRoutedLoss(model, mini_batch_num_tokens=64, margins={"ocr": 0.4})
    config = loss.get_config_dict()
    assert config["mini_batch_num_tokens"] == 64
    assert config["mini_batch_size"] == 32
    assert config["gather_across_devices"] is False
    assert config["margins"]["ocr"] == 0.4
    assert "gao2021scaling" in loss.citation


def test_the_stock_trainer_logs_each_term(model: ViPyloQwen, tmp_path: Path) -> None:
    """The same figures as uncached, accumulation included, and the same weights after the steps."""
    data = Dataset.from_dict(
        {"anchor": [f"<ocr> {i}" for i in range(8)], "positive": [f"answer {i}" for i in range(8)]}
    )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    logs, weights = [], []
    for loss in (PrefixRoutedLoss(model), CachedPrefixRoutedLoss(model, mini_batch_size=2)):
        model.load_state_dict(start)
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if "/" in k or k == "loss"})
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
    assert logs[0]["ocr/info_nce"] > 0
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    for name in start:
        torch.testing.assert_close(weights[1][name], weights[0][name], atol=1e-6, rtol=1e-4)

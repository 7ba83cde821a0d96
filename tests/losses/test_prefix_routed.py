"""Routing: each row gets its own task's terms, on our model and on a stock one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch.nn import functional as F

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import CachedPrefixRoutedLoss, PrefixRoutedLoss
from sentence_vipyloqwen.losses.prefix_routed import BatchRows
from sentence_vipyloqwen.losses.rows import TASK_INDEX, content_keys, hide_prefixes, task_indices
from sentence_vipyloqwen.tasks import ALL_TASKS, TASKS

Picture = Callable[..., Image.Image]
ANCHORS = ["<text_pair> a", "<instr> b", "<ocr> c", "<vqa_single> d", "<vqa_multi> e", "f"]


def rows_of(tasks: Sequence[str], negatives: int = 0, scores: Sequence[float] | None = None) -> BatchRows:
    """Rows without equal content."""
    count = len(tasks)
    keys = torch.arange(count * (2 + negatives)).view(2 + negatives, count) + 1
    known = torch.tensor(scores if scores is not None else [math.nan] * count)
    return BatchRows(torch.tensor([TASK_INDEX[task] for task in tasks]), keys[0], keys[1], keys[2:].T, known)


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


def plane(*degrees: float) -> torch.Tensor:
    """Unit vectors in a plane."""
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@pytest.fixture
def loss(model: ViPyloQwen) -> PrefixRoutedLoss:
    return PrefixRoutedLoss(model)


def test_equal_embeddings_have_the_loss_of_chance(loss: PrefixRoutedLoss) -> None:
    """All cosines 1: InfoNCE = log B, cosine = 0, triplet = margin, MSE = (1 - s)^2."""
    same = torch.ones(4, 3)
    for task in ALL_TASKS.values():
        scores = [0.5] * 4 if task.name == "text_pair" else None
        terms = loss.compute_loss_from_embeddings([same, same], rows_of([task.name] * 4, scores=scores))
        weight = 0.5 if task.name == "text_pair" else 1.0  # a scored pair is weighed by its score
        expected = {"info_nce": weight * math.log(4), "score_mse": 0.25, "cosine": 0.0, "triplet": task.margin}
        for term, term_weight in task.weights.items():
            assert terms[f"{task.name}/{term}"].item() == pytest.approx(term_weight * expected[term], abs=1e-6)
        assert sum(value.item() != 0 for name, value in terms.items() if not name.startswith(task.name)) == 0


def test_the_routed_sum_of_a_mixed_batch(loss: PrefixRoutedLoss) -> None:
    """One row of each task has no negatives of its task: InfoNCE and triplet are 0, MSE and cosine remain."""
    anchors, positives = plane(0, 0, 0, 0, 0, 0), plane(60, 90, 0, 0, 0, 0)
    terms = loss.compute_loss_from_embeddings(
        [anchors, positives], rows_of(list(ALL_TASKS), scores=[0.5] + [math.nan] * 5)
    )
    assert terms["text_pair/score_mse"].item() == pytest.approx(0.25**2 / 6)
    assert terms["instr/cosine"].item() == pytest.approx(1 / 6)
    assert total(terms).item() == pytest.approx((0.25**2 + 1) / 6)


def test_the_explicit_negative_makes_the_triplet_and_the_hardest_of_several(loss: PrefixRoutedLoss) -> None:
    anchors, positives = plane(0, 180), plane(60, 120)
    easy, hard = plane(90, 90), plane(45, 135)
    for negatives, cosine in (
        ([easy], 0.0),
        ([easy, hard], math.cos(math.pi / 4)),
        ([hard, easy], math.cos(math.pi / 4)),
    ):
        rows = rows_of(["ocr"] * 2, len(negatives))
        terms = loss.compute_loss_from_embeddings([anchors, positives, *negatives], rows)
        assert terms["ocr/triplet"].item() == pytest.approx(max(0, 0.2 - 0.5 + cosine))


def test_without_an_explicit_negative_the_hardest_in_the_batch_counts(loss: PrefixRoutedLoss) -> None:
    anchors, positives = plane(0, 0, 0), plane(60, 70, 80)
    terms = loss.compute_loss_from_embeddings([anchors, positives], rows_of(["vqa_multi"] * 3))
    cosines = [math.cos(math.radians(angle)) for angle in (60, 70, 80)]
    hardest = [cosines[1], cosines[0], cosines[0]]
    expected = sum(max(0, 0.3 - p + n) for p, n in zip(cosines, hardest, strict=True)) / 3
    assert terms["vqa_multi/triplet"].item() == pytest.approx(1.5 * expected)


def test_mixed_and_homogeneous_batches_are_equal(loss: PrefixRoutedLoss) -> None:
    """Mean over rows: a mixed batch is the mean of its tasks' batches, weighed by their rows. Gradients too."""
    torch.manual_seed(0)
    counts = {"ocr": 3, "instr": 2, "text_pair": 4, "general": 1}
    tasks = [task for task, count in counts.items() for _ in range(count)]
    scores = [0.3 if task == "text_pair" else math.nan for task in tasks]
    data = [torch.randn(len(tasks), 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    everything = rows_of(tasks, 1, scores)
    mixed = total(loss.compute_loss_from_embeddings(data, everything))

    parts, start = [], 0
    for count in counts.values():
        part = slice(start, start + count)
        rows = BatchRows(*(getattr(everything, name)[part] for name in BatchRows.__dataclass_fields__))
        parts.append(count * total(loss.compute_loss_from_embeddings([column[part] for column in data], rows)))
        start += count
    separate = torch.stack(parts).sum() / len(tasks)
    # Explicit negatives of other rows are candidates as well; those of other tasks are not.
    torch.testing.assert_close(mixed, separate)
    for left, right in zip(torch.autograd.grad(mixed, data), torch.autograd.grad(separate, data), strict=True):
        torch.testing.assert_close(left, right)


def test_gradients_of_the_routed_sum_are_exact(loss: PrefixRoutedLoss) -> None:
    torch.manual_seed(1)
    tasks = list(ALL_TASKS) * 2
    rows = rows_of(tasks, 1, [0.7 if task == "text_pair" else math.nan for task in tasks])
    columns = [torch.randn(len(tasks), 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *c: total(loss.compute_loss_from_embeddings(c, rows)), columns)


def test_half_precision_is_raised_before_similarities_are_taken(loss: PrefixRoutedLoss) -> None:
    torch.manual_seed(0)
    anchors = F.normalize(torch.randn(4, 16), dim=1)
    columns = [anchors, F.normalize(anchors + 0.1 * torch.randn(4, 16), dim=1)]
    rows = rows_of(["ocr", "ocr", "instr", "instr"])
    half = [column.bfloat16() for column in columns]
    exact = loss.compute_loss_from_embeddings([column.float() for column in half], rows)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss.compute_loss_from_embeddings(half, rows)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name])


def test_a_false_negative_has_no_pull(loss: PrefixRoutedLoss) -> None:
    rows = rows_of(["general"] * 2)
    equal = BatchRows(rows.tasks, rows.anchor_keys, torch.tensor([7, 7]), rows.negative_keys, rows.scores)
    same = torch.ones(2, 3)
    assert total(loss.compute_loss_from_embeddings([same, same], rows)).item() == pytest.approx(math.log(2))
    assert total(loss.compute_loss_from_embeddings([same, same], equal)).item() == 0


def test_the_options(model: ViPyloQwen) -> None:
    same, rows = torch.ones(2, 3), rows_of(["ocr", "instr"])
    assert total(PrefixRoutedLoss(model).compute_loss_from_embeddings([same, same], rows)).item() == pytest.approx(
        0, abs=1e-6
    )
    every = PrefixRoutedLoss(model, negatives="all").compute_loss_from_embeddings([same, same], rows)
    assert total(every).item() == pytest.approx(math.log(2) + 0.2 / 2)

    pairs = rows_of(["text_pair"] * 2, scores=[0.5, math.nan])
    by_score = PrefixRoutedLoss(model).compute_loss_from_embeddings([same, same], pairs)
    uniform = PrefixRoutedLoss(model, pair_weight="uniform").compute_loss_from_embeddings([same, same], pairs)
    assert by_score["text_pair/info_nce"].item() == pytest.approx(0.75 * math.log(2))
    assert uniform["text_pair/info_nce"].item() == pytest.approx(math.log(2))

    columns = [plane(0, 90), plane(0, 90), plane(1, 91)]
    published = PrefixRoutedLoss(model, triplet_scale="temperature", temperature=0.1, margins={"ocr": 0.4})
    value = published.compute_loss_from_embeddings(columns, rows_of(["ocr"] * 2, 1))["ocr/triplet"].item()
    assert value == pytest.approx(0.4 - (1 - math.cos(math.radians(1))) / 0.1)

    weighed = PrefixRoutedLoss(model, weights={"ocr": {"triplet": 3, "info_nce": 0}})
    terms = weighed.compute_loss_from_embeddings([same, same], rows_of(["ocr"] * 2))
    assert terms["ocr/triplet"].item() == pytest.approx(0.6)
    assert terms["ocr/info_nce"].item() == 0
    assert weighed.get_config_dict()["weights"]["ocr"] == {"info_nce": 0, "triplet": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"weights": {"ocrr": {}}}, "Unknown task: 'ocrr'; allowed are"),
        ({"weights": {"ocr": {"cosin": 1}}}, "Unknown term of task 'ocr': 'cosin'; allowed are"),
        ({"weights": {"instr": {"triplet": 1}}}, "No margin is given for the triplet term of .'instr'."),
        ({"hidden_prefixes": ["general"]}, "Unknown task with a prefix: 'general'; allowed are"),
        ({"weights": {"ocr": {"triplet": -1}}}, "weight of ocr/triplet is -1"),
        ({"margins": {"instr": 0.1}}, "Unknown task with a margin: 'instr'"),
        ({"margins": {"ocr": -0.1}}, "margin of ocr is -0.1"),
        ({"negatives": "some"}, "negatives is 'some'; allowed are"),
        ({"pair_weight": "x"}, "pair_weight is 'x'"),
        ({"triplet_scale": "x"}, "triplet_scale is 'x'"),
    ],
)
def test_a_bad_option_is_named(model: ViPyloQwen, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixRoutedLoss(model, **options)


def sides(texts: Sequence[str], images: Sequence[Sequence[Image.Image]] | None = None) -> list[dict[str, Any]]:
    return [{"image": list(images[i]) if images else [], "text": text} for i, text in enumerate(texts)]


@pytest.fixture(params=["ours", "stock", "stock, left padding"])
def any_model(request: pytest.FixtureRequest, folder: Path) -> SentenceTransformer:
    if request.param == "ours":
        return ViPyloQwen(folder, device="cpu")
    stock = SentenceTransformer(str(folder), device="cpu")
    stock.tokenizer.padding_side = "left" if "left" in request.param else "right"
    return stock


def test_the_task_is_read_behind_the_images(any_model: SentenceTransformer, picture: Picture) -> None:
    images = [[], [picture()], [], [picture(), picture(seed=1)], [], [picture()]]
    loss = PrefixRoutedLoss(any_model)
    assert task_indices(any_model.preprocess(sides(ANCHORS, images)), loss.control).tolist() == [0, 1, 2, 3, 4, 5]
    alone = any_model.preprocess([{"image": [picture()]}, {"image": [picture()], "text": "a"}])
    assert task_indices(alone, loss.control).tolist() == [5, 5]


def test_content_keys_tell_content_apart(any_model: SentenceTransformer, picture: Picture) -> None:
    a, b = picture(seed=1), picture(seed=2)
    texts = ["x", "x", "x", "x", "y", "x", "x y", "y x", "x"]
    images = [[a], [a], [b], [a, b], [a], [], [], [], [b, a]]
    keys = content_keys(any_model.preprocess(sides(texts, images))).tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_content_keys_do_not_depend_on_the_batch(any_model: SentenceTransformer, picture: Picture) -> None:
    items = sides(["x", "một hai ba bốn năm"], [[picture()], []])
    together = content_keys(any_model.preprocess(items))
    alone = [content_keys(any_model.preprocess([item])).item() for item in items]
    assert together.tolist() == alone


def test_a_hidden_prefix_leaves_the_rest_as_it_would_be_without(
    any_model: SentenceTransformer, picture: Picture
) -> None:
    images = [[picture()], [], [picture(seed=1)], [], [picture(), picture(seed=1)], []]
    control = PrefixRoutedLoss(any_model).control
    seen = hide_prefixes(any_model.preprocess(sides(ANCHORS, images)), control, ["text_pair", "ocr", "vqa_multi"])
    bare = [" a", "<instr> b", " c", "<vqa_single> d", " e", "f"]
    rows = seen["attention_mask"].bool()
    kept = [ids[mask].tolist() for ids, mask in zip(seen["input_ids"], rows, strict=True)]
    expected = any_model.preprocess(sides(bare, images))
    rows = expected["attention_mask"].bool()
    assert kept == [ids[mask].tolist() for ids, mask in zip(expected["input_ids"], rows, strict=True)]
    torch.testing.assert_close(
        any_model(seen)["sentence_embedding"], any_model(expected)["sentence_embedding"], atol=1e-5, rtol=1e-4
    )


def test_the_loss_routes_by_a_prefix_that_the_model_never_sees(model: ViPyloQwen) -> None:
    columns = [model.preprocess(sides(ANCHORS)), model.preprocess(sides(list("uvwxyz")))]
    loss = PrefixRoutedLoss(model, negatives="all", hidden_prefixes=list(TASKS))
    bare = [model.preprocess(sides([" a", " b", " c", " d", " e", "f"])), columns[1]]
    embeddings = [model(dict(column))["sentence_embedding"] for column in bare]
    expected = loss.compute_loss_from_embeddings(embeddings, loss.read_rows(columns))
    terms = loss(columns)
    assert expected["ocr/triplet"] > 0
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name])
    cached = CachedPrefixRoutedLoss(model, mini_batch_size=2, negatives="all", hidden_prefixes=list(TASKS))(columns)
    torch.testing.assert_close(total(cached), total(expected))


def test_any_task_may_have_any_term(model: ViPyloQwen) -> None:
    loss = PrefixRoutedLoss(model, weights={"instr": {"triplet": 2}}, margins={"instr": 0.5})
    embeddings = [plane(0, 90), plane(60, 90)]  # the first is 60 degrees from its positive, 90 from its negative
    terms = loss.compute_loss_from_embeddings(embeddings, rows_of(["instr", "instr"]))
    first, second = 0.5 - (0.5 - 0), 0.5 - (1 - math.cos(math.pi / 6))
    assert terms["instr/triplet"].item() == pytest.approx(2 * (first + max(second, 0)) / 2)
    assert loss.margins == {"instr": 0.5, "ocr": 0.2, "vqa_single": 0.2, "vqa_multi": 0.3}


def test_both_models_have_the_same_loss_and_gradients(folder: Path, picture: Picture) -> None:
    images = [[picture(56, 56, seed=i)] for i in range(6)]  # of a size that no resizing touches
    labels = torch.tensor([0.4] + [math.nan] * 5)
    gradients = []
    for model in (ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")):
        columns = [sides(ANCHORS, images), sides(list("uvwxyz")), sides(list("123456"))]
        loss = PrefixRoutedLoss(model, negatives="all")
        terms = loss([model.preprocess(column) for column in columns], labels)
        total(terms).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    ours, stock = gradients
    assert ours.keys() == stock.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], stock[name], atol=1e-5, rtol=1e-3)


def test_the_keys_are_always_the_same_and_on_the_graph(loss: PrefixRoutedLoss, model: ViPyloQwen) -> None:
    names = None
    for text in ANCHORS:
        terms = loss([model.preprocess([text, text + "x"]), model.preprocess(["p", "q"])])
        assert all(value.requires_grad for value in terms.values())
        names = names or list(terms)
        assert list(terms) == names
    assert len(names or ()) == 11


def test_scores_out_of_range_are_refused(loss: PrefixRoutedLoss, model: ViPyloQwen) -> None:
    columns = [model.preprocess(["<text_pair> a", "<text_pair> b"])] * 2
    with pytest.raises(ValueError, match=r"Scores of text pairs must lie in \[0, 1\]; got 0.5 to 4"):
        loss(columns, torch.tensor([0.5, 4.0]))
    with pytest.raises(ValueError, match="got 4 to 4"):
        loss(columns, torch.tensor([math.nan, 4.0]))
    with pytest.raises(ValueError, match=r"Got 1 column\(s\); needed are anchor and positive"):
        loss(columns[:1])
    with pytest.raises(ValueError, match=r"Got 0 column\(s\)"):
        loss([])


def test_matryoshka_sums_the_terms_of_each_size(loss: PrefixRoutedLoss, model: ViPyloQwen) -> None:
    columns = [model.preprocess(["<ocr> a", "<ocr> b"]), model.preprocess(["p", "q"])]
    nested = MatryoshkaLoss(model, loss, [32, 16], [1, 0.5])([dict(c) for c in columns], None)
    embeddings = [model(dict(column))["sentence_embedding"] for column in columns]
    rows = loss.read_rows(columns)
    whole = loss.compute_loss_from_embeddings(embeddings, rows)
    half = loss.compute_loss_from_embeddings([F.normalize(e[:, :16], dim=1) for e in embeddings], rows)
    for name in whole:
        torch.testing.assert_close(nested[name], whole[name] + 0.5 * half[name])


def test_a_model_without_the_task_tokens_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="lacks the tokens"):
        PrefixRoutedLoss(SentenceTransformer(str(base), device="cpu"))

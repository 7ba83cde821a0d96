from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train import evaluation
from sentence_vipyloqwen.train.evaluation import Evaluation, TasksEvaluator, evaluate
from sentence_vipyloqwen.train.progress import read_log
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.record_lines import RecordError
from sentence_vipyloqwen.train.records import Record, Side
from sentence_vipyloqwen.train.run import train


class TinyInputModule(InputModule):
    """Embeds an input by a function of its text and image paths."""

    def __init__(self, vector: Callable[[str], Sequence[float]]) -> None:
        super().__init__()
        self.vector = vector
        self.seen: list[dict[str, Any]] = []

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text"), "message"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.seen += inputs
        keys = ["+".join([*item.get("image", []), (prompt or "") + item.get("text", "")]) for item in inputs]
        return {"vectors": torch.tensor([list(map(float, self.vector(key))) for key in keys])}

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**features, "sentence_embedding": features["vectors"]}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        pass


def tiny(vector: Callable[[str], Sequence[float]]) -> SentenceTransformer:
    return SentenceTransformer(modules=[TinyInputModule(vector)], device="cpu")


def by_table(table: Mapping[str, Sequence[float]]) -> SentenceTransformer:
    return tiny(table.__getitem__)


def hashed(text: str) -> Sequence[float]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(8)


def record(task: str, anchor: str, positive: str, **fields: Any) -> Record:
    """A record whose texts bear their prefix, as `read_records` makes it."""
    prompt = ALL_TASKS[task].prompt
    other = prompt if ALL_TASKS[task].prefix_on_positive else ""
    return Record(ALL_TASKS[task], Side(prompt + anchor), Side(other + positive), **fields)


def angle(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


# Candidates at 0, 10, 20 and 30 degrees; the queries lie at 1, 12 and 29, so that their answers rank 1st, 3rd and 1st.
CIRCLE = {f"p{i}": angle(10 * i) for i in range(4)} | {
    "<ocr> q0": angle(1),
    "<ocr> q1": angle(12),
    "<ocr> q3": angle(29),
}
ON_CIRCLE = [
    record("ocr", "q0", "p0", lang="vi", domain="invoice"),
    record("ocr", "q1", "p0", lang="vi"),
    record("ocr", "q1", "p2", lang="en"),
    record("ocr", "q3", "p3"),
    record("ocr", "q3", "p1"),
]


def test_retrieval_in_closed_form():
    ocr = evaluate(by_table(CIRCLE), ON_CIRCLE).tasks["ocr"]
    # q0: p0 is 1st. q1 (12 degrees): p1 first, then p2 (8 away) 2nd, p0 (12 away) 3rd. q3: p3 1st, p2 2nd, p1 3rd.
    assert (ocr.records, ocr.queries, ocr.candidates, ocr.closed_set, ocr.headline) == (5, 3, 4, False, "ndcg@10")
    ideal_of_two = 1 + 1 / math.log2(3)
    ndcg = [1, (1 / math.log2(3) + 1 / 2) / ideal_of_two, (1 + 1 / 2) / ideal_of_two]
    expected = {"recall@1": (1 + 0 + 0.5) / 3, "recall@5": 1, "recall@10": 1, "mrr": 2.5 / 3, "ndcg@10": sum(ndcg) / 3}
    assert ocr.metrics == pytest.approx(expected)


def test_breakdowns_average_over_their_queries_against_all_candidates():
    ocr = evaluate(by_table(CIRCLE), ON_CIRCLE).tasks["ocr"]
    assert {name: group.queries for name, group in ocr.lang.items()} == {"en": 1, "vi": 2}
    assert ocr.lang["vi"].metrics["mrr"] == pytest.approx((1 + 1 / 2) / 2)
    assert ocr.lang["en"].metrics["mrr"] == pytest.approx(1 / 2)
    assert {name: group.metrics["mrr"] for name, group in ocr.domain.items()} == {"invoice": 1}


def test_each_distinct_input_is_embedded_once_with_its_prefix_and_only_the_keys_it_has():
    model = tiny(hashed)
    shared = Record(ALL_TASKS["ocr"], Side("<ocr> q0", ("/a.png",)), Side("", ("/b.png",)))
    evaluate(model, [*ON_CIRCLE, shared, shared, record("general", "p0", "p1")])
    seen = model[0].seen
    texts = [{"text": text} for text in ("<ocr> q0", "<ocr> q1", "<ocr> q3", "p0", "p1", "p2", "p3")]
    images = [{"image": ["/a.png"], "text": "<ocr> q0"}, {"image": ["/b.png"]}]
    assert sorted(map(str, seen)) == sorted(map(str, texts + images))


def test_the_text_is_the_same_with_another_image_but_not_the_same_candidate():
    with_image = [Record(ALL_TASKS["ocr"], Side(f"<ocr> q{i}"), Side("p", (f"/{i}.png",))) for i in range(2)]
    assert evaluate(tiny(hashed), with_image).tasks["ocr"].candidates == 2


def test_a_closed_set_has_accuracy_beside_that_of_the_majority_answer():
    answers = {"yes": angle(0), "no": angle(90)}
    # 5 questions of 6 are about "yes"; the model answers "no" to the last two.
    questions = {f"<vqa_single> q{i}": angle(5 if i < 4 else 80) for i in range(6)}
    rows = [record("vqa_single", f"q{i}", "yes" if i < 5 else "no", lang="vi" if i > 2 else "en") for i in range(6)]
    small = evaluate(by_table(answers | questions), rows).tasks["vqa_single"]
    assert not small.closed_set, "two answers in six records do not recur five times each"
    rows = rows + [record("vqa_single", f"q{i}", "yes", id=f"again {i}") for i in range(4)]
    result = evaluate(by_table(answers | questions), rows).tasks["vqa_single"]
    assert (result.closed_set, result.records, result.queries, result.headline) == (True, 10, 6, "accuracy")
    assert result.metrics["accuracy"] == result.metrics["recall@1"] == pytest.approx(5 / 6)
    assert result.metrics["majority_accuracy"] == pytest.approx(5 / 6)
    assert result.lang["vi"].metrics["majority_accuracy"] == pytest.approx(2 / 3)


def test_a_closed_set_is_not_large():
    assert evaluation.is_closed_set(candidates=100, records=500)
    assert not evaluation.is_closed_set(candidates=101, records=100_000)


def test_pairs_are_correlated_with_their_scores():
    degrees = {"a": 0, "b": 30, "c": 60, "d": 90}
    model = by_table({f"<text_pair> {name}": angle(value) for name, value in degrees.items()})
    scores = {"b": 1.0, "c": 0.2, "d": 0.1}
    rows = [record("text_pair", "a", name, score=score, lang="vi") for name, score in scores.items()]
    result = evaluate(model, rows).tasks["text_pair"]
    cosines = [math.cos(math.radians(degrees[name])) for name in scores]
    assert result.metrics["spearman"] == pytest.approx(1)
    assert result.metrics["pearson"] == pytest.approx(np.corrcoef(cosines, list(scores.values()))[0, 1], abs=1e-5)
    assert (result.queries, result.candidates, result.headline) == (3, 0, "spearman")
    assert result.lang["vi"].metrics == result.metrics


def test_a_collapsed_model_scores_as_the_worst():
    rows = ON_CIRCLE + [record("text_pair", "a", f"b{i}", score=i / 9) for i in range(9)]
    noise = iter(1e-8 * np.random.default_rng(0).standard_normal((100, 8)))
    result = evaluate(tiny(lambda _: np.ones(8) + next(noise)), rows)
    assert result.tasks["ocr"].metrics["mrr"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 3) / 3)
    assert math.isnan(result.tasks["text_pair"].metrics["spearman"])
    assert result.mean == pytest.approx(result.tasks["ocr"].metrics["ndcg@10"] / 2)
    assert json.loads(result.to_json())["tasks"]["text_pair"]["metrics"]["spearman"] is None


def test_a_general_query_does_not_find_itself():
    rows = [record("general", "a", "b"), record("general", "b", "c")]
    degrees = {"a": angle(0), "b": angle(40), "c": angle(90)}
    assert evaluate(by_table(degrees), rows).tasks["general"].metrics["recall@1"] == 1


def test_a_positive_equal_to_its_anchor_stays_relevant():
    assert evaluate(tiny(hashed), [record("general", "a", "a")]).tasks["general"].metrics["recall@1"] == 1


def test_the_similarity_matrix_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch):
    rows = [record("ocr", f"q{i}", f"p{i % 7}") for i in range(40)]
    whole = evaluate(tiny(hashed), rows)
    monkeypatch.setattr(evaluation, "SIMILARITIES_PER_CHUNK", 20)
    assert evaluate(tiny(hashed), rows) == whole


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_records_does_not_matter(pairs: list[tuple[int, int]], random):
    rows = [record("ocr", f"q{query}", f"p{answer}") for query, answer in pairs]
    shuffled = random.sample(rows, len(rows))
    model = tiny(hashed)
    first, second = (evaluate(model, order).tasks["ocr"] for order in (rows, shuffled))
    assert first.metrics == pytest.approx(second.metrics)
    assert all(0 <= value <= 1 + 1e-12 for value in first.metrics.values())
    assert first.metrics["recall@1"] <= first.metrics["recall@5"] <= first.metrics["recall@10"]


def test_embeddings_that_are_not_finite_are_refused():
    model = tiny(lambda text: [float("nan") if "q1" in text else 1.0])
    with pytest.raises(ValueError, match=r"<ocr> q1.*not finite"):
        evaluate(model, ON_CIRCLE)


def test_a_file_is_read_as_the_trainer_reads_it(tmp_path: Path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"task": "ocr", "anchor": "q", "positive": "p"}\n{"anchor": "a", "positive": "b"}\n')
    result = evaluate(tiny(hashed), path)
    assert list(result.tasks) == ["ocr", "general"]
    path.write_text("{\n")
    with pytest.raises(RecordError, match=":1: not JSON"):
        evaluate(tiny(hashed), path)
    path.write_text("")
    with pytest.raises(ValueError, match=f"{path}: no record to evaluate"):
        evaluate(tiny(hashed), path)
    with pytest.raises(ValueError, match="records: no record to evaluate"):
        TasksEvaluator([])


def test_our_model_and_the_stock_one_of_its_folder_measure_alike(folder: Path, tmp_path: Path, picture):
    for i in range(4):
        picture(seed=i).save(tmp_path / f"{i}.png")
    lines = [
        *({"task": "ocr", "anchor": {"image": f"{i}.png", "text": "Số tiền?"}, "positive": f"{i} đ"} for i in range(4)),
        {"task": "vqa_multi", "anchor": {"image": ["0.png", "1.png"], "text": ["<image>a", "b"]}, "positive": "yes"},
        {"anchor": {"image": "2.png"}, "positive": "hai"},
        {"task": "text_pair", "anchor": "a", "positive": {"image": "3.png"}, "score": 0.5},
        {"task": "text_pair", "anchor": "a", "positive": "data:b", "score": 1},
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours = evaluate(ViPyloQwen(folder, device="cpu"), path).to_dict()
    assert ours == evaluate(SentenceTransformer(str(folder), device="cpu"), path).to_dict()
    assert list(ours["tasks"]) == ["text_pair", "ocr", "vqa_multi", "general"]


# --- The evaluator, JSON and the table ---


def pairs_and_circle() -> tuple[SentenceTransformer, list[Record]]:
    table = CIRCLE | {"<text_pair> a": angle(0), "<text_pair> b": angle(30), "<text_pair> c": angle(60)}
    pairs = [record("text_pair", "a", "b", score=0.9), record("text_pair", "a", "c", score=0.1)]
    return by_table(table), ON_CIRCLE + pairs


def test_the_evaluator_returns_flat_metrics_and_tells_the_model_card():
    model, rows = pairs_and_circle()
    evaluator = TasksEvaluator(rows, name="dev")
    metrics = evaluator(model, epoch=1, steps=2)
    result = evaluate(model, rows)
    assert evaluator.primary_metric == "dev_tasks_mean"
    assert metrics["dev_tasks_mean"] == result.mean == pytest.approx((1 + result.tasks["ocr"].metrics["ndcg@10"]) / 2)
    assert metrics["dev_ocr_recall@1"] == result.tasks["ocr"].metrics["recall@1"]
    assert metrics["dev_text_pair_spearman"] == pytest.approx(1)
    assert model.model_card_data.eval_results_dict[evaluator] == metrics
    assert model.model_card_data.format_eval_metrics()["eval_metrics"][0]["description"] == "Prefixed Tasks"


def test_fewer_dimensions_are_measured_as_a_model_cut_to_them_measures():
    """By the first numbers, normalised anew: neither their length nor what is cut away counts."""
    rows = [record("ocr", f"q{i}", f"p{i}") for i in range(6)] + [
        record("text_pair", f"a{i}", f"b{i}", score=i / 6) for i in range(6)
    ]
    model = tiny(hashed)
    result = evaluate(model, rows, dims=[2, 8, 4])
    assert list(result.dims) == [4, 2]  # its own size is no other
    for size, of_size in result.dims.items():
        cut = evaluate(SentenceTransformer(modules=list(model), device="cpu", truncate_dim=size), rows)
        assert of_size.to_dict() == cut.to_dict()
        assert of_size.mean != result.mean
    data = json.loads(result.to_json())
    assert {size: of_size["mean"] for size, of_size in data["dims"].items()} == {
        str(size): of_size.mean for size, of_size in result.dims.items()
    }
    assert sum(line.split()[:2] == ["4", "dims"] for line in rendered(result).splitlines()) == 2
    metrics = TasksEvaluator(rows, name="dev", dims=(4, 2))(model)
    assert metrics["dev_tasks_mean"] == result.mean
    assert metrics["dev_dim2_tasks_mean"] == result.dims[2].mean
    assert metrics["dev_dim4_ocr_ndcg@10"] == result.dims[4].tasks["ocr"].metrics["ndcg@10"]


def test_more_dimensions_than_there_are_cannot_be_measured():
    with pytest.raises(ValueError, match=r"dims has \[9, 0\]; allowed are sizes from 1 to the embedding's own, 8"):
        evaluate(tiny(hashed), [record("general", "a", "b")], dims=[0, 4, 9])


def test_without_a_name_metrics_begin_with_their_task():
    model, rows = pairs_and_circle()
    evaluator = TasksEvaluator(rows)
    assert {"tasks_mean", "ocr_recall@1", "ocr_mrr", "text_pair_pearson"} <= evaluator(model).keys()
    assert evaluator(model).keys() >= {evaluator.primary_metric}


def test_json_holds_counts_metrics_and_breakdowns():
    model, rows = pairs_and_circle()
    result = evaluate(model, rows)
    data = json.loads(result.to_json())
    assert data == result.to_dict()
    assert data["tasks"]["ocr"] | {"metrics": None, "lang": None, "domain": None} == {
        "queries": 3,
        "metrics": None,
        "records": 5,
        "candidates": 4,
        "closed_set": False,
        "lang": None,
        "domain": None,
        "headline": "ndcg@10",
    }
    assert data["tasks"]["ocr"]["lang"]["vi"]["queries"] == 2
    assert data["mean"] == result.mean


def test_the_table_has_a_row_for_each_task_and_group():
    model, rows = pairs_and_circle()
    text = rendered(evaluate(model, rows))
    lines = [line.split() for line in text.splitlines()]
    for row in (["text_pair", "2", "1.000*"], ["ocr", "3", "4", "0.500"], ["lang", "vi", "2", "0.500"]):
        assert any(line[: len(row)] == row for line in lines), text
    assert "acc" not in text, "no closed set, no column"


def test_the_table_shows_a_group_name_as_it_is():
    result = evaluate(tiny(hashed), [record("general", "a", "b", domain="[bold]")])
    assert "domain [bold]" in rendered(result)


def rendered(result: Evaluation) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table())
    return console.export_text()


def test_a_run_that_trains_several_sizes_measures_each(recipe: Callable[..., Recipe], data: Path):
    settings = {"matryoshka_dims": [16, 8], "eval": str(data / "train.jsonl"), "eval_steps": 2, "max_steps": 2}
    result = train(recipe(**settings), device="cpu")
    metrics = json.loads((data / "run" / "metrics.json").read_text())
    for when in ("before", "after"):
        assert list(metrics[when]["dims"]) == ["8"]
    assert metrics["after"]["dims"]["8"]["mean"] == result.after.dims[8].mean
    (entry,) = [entry for entry in read_log(data / "run" / "log.jsonl") if "eval_tasks_mean" in entry]
    assert entry["eval_dim8_tasks_mean"] == pytest.approx(result.after.dims[8].mean)
    assert "the same at 8 dimensions" in (data / "run" / "training.html").read_text(encoding="utf-8")


def test_prefixes_are_taken_off_as_if_they_had_been_forgotten() -> None:
    records = [
        Record(ALL_TASKS["ocr"], Side("<ocr> a"), Side("x")),
        Record(ALL_TASKS["instr"], Side("<instr> b"), Side("y")),
        Record(ALL_TASKS["text_pair"], Side("<text_pair> c"), Side("<text_pair> d"), score=0.5),
    ]
    evaluator = TasksEvaluator(records, hidden_prefixes=["ocr", "text_pair"])
    texts = [(record.anchor.text, record.positive.text) for record in evaluator.records]
    assert texts == [(" a", "x"), ("<instr> b", "y"), (" c", " d")]
    seen = by_table({" a": (1, 0), "x": (1, 0), " b": (1, 0), "y": (0, 1), "<instr> b": (0, 1), " c": (1, 0)})
    result = evaluate(seen, records[:2], hidden_prefixes=["ocr"])
    assert {name: task.metrics["recall@1"] for name, task in result.tasks.items()} == {"instr": 1.0, "ocr": 1.0}

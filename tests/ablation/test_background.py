"""What a reader is told before the figures, from runs made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_vipyloqwen.ablation.background import (
    TASK_WORDS,
    TERM_WORDS,
    reference_facts,
    reference_run,
    rows_a_step,
    settings_changed,
    task_rows,
)
from sentence_vipyloqwen.losses.prefix_routed import TERMS
from sentence_vipyloqwen.tasks import ALL_TASKS

RunOf = Callable[..., dict[str, Any]]


def with_settings(run: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**run, "settings": {**run["settings"], **settings}}


def test_every_task_and_term_has_its_words() -> None:
    assert set(TASK_WORDS) == set(ALL_TASKS)
    assert set(TERM_WORDS) == set(TERMS)


def test_tasks_have_the_loss_and_the_queries_of_the_reference(run_of: RunOf) -> None:
    run = with_settings(run_of("full", 0, 0.5, vqa_multi=0.5, text_pair=0.5), weights={"text_pair": {"info_nce": 0.5}})
    run["after"]["tasks"]["vqa_multi"]["queries"] = 1200
    run["rows"] = {"vqa_multi": 34000}
    multi, pair = task_rows([run_of("full", 1, None), run])
    assert multi == {
        "task": "vqa_multi",
        "prefix": "<vqa_multi>",
        "what goes in": "images and a conversation about them",
        "what is looked for": "the last answer",
        "loss": "info_nce + 1.5 triplet, margin 0.3",
        "measured by": "ndcg@10",
        "held-out queries": "1,200",
        "rows seen in training": "34,000",
    }
    assert (pair["loss"], pair["held-out queries"]) == ("0.5 info_nce + score_mse", "")
    assert "rows seen in training" not in task_rows([run_of("full", 0, 0.5, ocr=0.5)])[0]


def test_the_reference_is_told_by_its_settings(run_of: RunOf) -> None:
    run = with_settings(run_of("full", 0, 0.5), embedding_dim=128, learning_rates={"visual": 1e-4}, frozen=[])
    assert reference_facts([{**run, "parameters": 3301234}]) == {
        "size of the model": "3,301,234 parameters",
        "training": "7 steps of 8 rows: 56 rows",
        "embedding dimensions": "128",
        "learning rate of parts": "visual 0.0001",
    }
    assert reference_facts([with_settings(run, max_steps=0, epochs=1.5)])["training"] == "1.5 epochs, 8 rows a step"
    assert reference_facts([run_of("cut", 0, 0.5)]) == {}
    assert reference_run([run_of("full", 0, None), run]) is run


def test_settings_that_differ_from_the_reference_are_named(run_of: RunOf) -> None:
    runs = [
        run_of("full", 0, 0.5),
        with_settings(run_of("in_batch", 3, 0.5), batch_size=24, accumulation=8),
        with_settings(run_of("one_mix", 0, 0.5), weights={"ocr": {"info_nce": 1.0}}, pooling=None),
        with_settings(run_of("cut", 0, 0.5), evaluation={"cut": 8}),
    ]
    assert settings_changed(runs) == {
        "full": [],
        "in_batch": ["batch_size 24", "accumulation 8"],
        "one_mix": ["weights"],
    }
    assert settings_changed(runs[1:]) == {}
    assert rows_a_step(runs[1]["settings"]) == 192

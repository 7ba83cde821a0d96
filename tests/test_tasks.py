from __future__ import annotations

import pytest

from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, PROMPTS, TASK_TOKENS, TASKS, split_prefix


def test_the_table_is_the_published_one() -> None:
    table = {task.name: (task.token, dict(task.weights), task.margin) for task in ALL_TASKS.values()}
    assert table == {
        "text_pair": ("<text_pair>", {"info_nce": 1.0, "score_mse": 1.0}, None),
        "instr": ("<instr>", {"info_nce": 1.0, "cosine": 1.0}, None),
        "ocr": ("<ocr>", {"info_nce": 1.0, "triplet": 1.0}, 0.2),
        "vqa_single": ("<vqa_single>", {"info_nce": 1.0, "triplet": 1.0}, 0.2),
        "vqa_multi": ("<vqa_multi>", {"info_nce": 1.0, "triplet": 1.5}, 0.3),
        "general": (None, {"info_nce": 1.0}, None),
    }


def test_only_a_text_pair_bears_its_prefix_on_both_sides() -> None:
    assert [task.name for task in ALL_TASKS.values() if task.prefix_on_positive] == ["text_pair"]


def test_prompts_are_named_as_the_tasks() -> None:
    assert {name: f"<{name}> " for name in TASKS} == PROMPTS
    assert tuple(f"<{name}>" for name in TASKS) == TASK_TOKENS


@pytest.mark.parametrize(
    ("text", "task", "rest"),
    [
        ("<ocr> Tổng?", "ocr", " Tổng?"),
        ("  <vqa_multi>a", "vqa_multi", "a"),
        ("<ocr><instr> a", "ocr", "<instr> a"),
        ("Tổng? <ocr>", "general", "Tổng? <ocr>"),
        (" a", "general", " a"),
        ("", "general", ""),
    ],
)
def test_a_prefix_counts_at_the_head_only(text: str, task: str, rest: str) -> None:
    assert split_prefix(text) == (ALL_TASKS[task], rest)


def test_the_tables_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TASKS["new"] = GENERAL  # type: ignore[index]
    with pytest.raises(TypeError):
        GENERAL.weights["info_nce"] = 2  # type: ignore[index]

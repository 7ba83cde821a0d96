"""The model card that a run leaves in its model's folder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from torch.utils.data import ConcatDataset

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.model_card import CURVES_FILE
from sentence_vipyloqwen.train.card import _mix, write_model_card
from sentence_vipyloqwen.train.dataset import load_tasks
from sentence_vipyloqwen.train.evaluation import Evaluation, GroupResult, TaskResult
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.report import draw_curves
from sentence_vipyloqwen.train.run import TrainingResult, train
from sentence_vipyloqwen.train.sampling import grouped_batch_sampler, task_mix_sampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_stand_in import HubStandIn


@pytest.fixture
def result(recipe: Callable[..., Recipe], data: Path) -> TrainingResult:
    return train(recipe(eval=str(data / "train.jsonl"), eval_steps=3, save_steps=3, temperature=0.05), device="cpu")


def test_the_card_tells_the_whole_run(result: TrainingResult, data: Path) -> None:
    card = ModelCard.load(result.model_path / "README.md")
    text = card.text
    assert text.count("\n## Training Run\n") == 1
    for task, measured in result.after.tasks.items():
        before = result.before.tasks[task].metrics[measured.headline]
        values = " | ".join(f"{value:.3f}" for value in (before, measured.metrics[measured.headline]))
        among = measured.candidates or ""
        assert f"| {task} | {measured.headline} | {measured.queries} | {among} | {values} |" in text
    assert "InfoNCE at temperature 0.05" in text
    assert "### Data and Mix" in text
    assert (
        "<code>sentence_vipyloqwen.losses.prefix_routed.PrefixRoutedLoss</code>" in text
    )  # Sentence Transformers' part
    assert "### Training Logs" in text

    results = card.data.eval_results
    assert all(isinstance(of, EvalResult) for of in results)
    values = {of.metric_type: of.metric_value for of in results}
    assert values == {
        "tasks_mean": result.after.mean,
        **{f"{task}_{of.headline}": of.metrics[of.headline] for task, of in result.after.tasks.items()},
    }
    assert {of.dataset_name for of in results} == {"train.jsonl"}
    assert card.data.tags.count("generated_from_trainer") == 1


def test_the_card_tells_what_was_measured_in_each_language(result: TrainingResult) -> None:
    (before, after) = (of.tasks["instr"].lang["vi"].metrics["ndcg@10"] for of in (result.before, result.after))
    assert section(result.model_path, "Metrics by Language").splitlines()[-1] == (
        f"| instr | vi | ndcg@10 | 4 | 4 | {before:.3f} | {after:.3f} |"  # the one task whose records name theirs
    )
    assert ModelCard.load(result.model_path / "README.md").data.language == ["vi"]


def test_a_figure_that_is_undefined_is_left_blank(
    recipe: Callable[..., Recipe], model: ViPyloQwen, tmp_path: Path
) -> None:
    def measured(value: float) -> Evaluation:
        part = GroupResult(1, {"spearman": value})
        return Evaluation({"text_pair": TaskResult(3, {"spearman": value}, 3, 0, False, {"zh": part}, {})})

    made = recipe(eval="held-out.jsonl")
    write_model_card(model.model_card_data, model, tmp_path, made, before=measured(math.nan), after=measured(0.5))
    assert section(tmp_path, "Metrics by Task").endswith("| text_pair | spearman | 3 |  |  | 0.500 |")
    assert section(tmp_path, "Metrics by Language").endswith("| text_pair | zh | spearman | 1 |  |  | 0.500 |")


def test_the_recipe_in_the_card_names_no_folder_of_the_machine(result: TrainingResult, data: Path) -> None:
    text = (result.model_path / "README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert settings["train"] == ["train.jsonl"]
    assert settings["eval"] == "train.jsonl"
    assert settings["max_steps"] == 6
    assert "output" not in settings
    assert str(data) not in text


def test_the_curves_are_a_picture_beside_the_card(result: TrainingResult, data: Path) -> None:
    picture = (result.model_path / CURVES_FILE).read_text(encoding="utf-8")
    assert picture == draw_curves(data / "run")
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss", "Held-out records"} <= set(texts)
    assert any(text.startswith("ocr · ndcg@10: ") for text in texts)
    assert f'<img src="{CURVES_FILE}"' in (result.model_path / "README.md").read_text(encoding="utf-8")


def test_the_card_goes_along_when_the_model_is_saved_elsewhere(result: TrainingResult, tmp_path: Path) -> None:
    ViPyloQwen(result.model_path, device="cpu").save_pretrained(str(tmp_path / "copy"))
    for name in ("README.md", CURVES_FILE):
        assert (tmp_path / "copy" / name).read_bytes() == (result.model_path / name).read_bytes()


def test_a_run_without_evaluation_has_a_card_without_figures(recipe: Callable[..., Recipe], data: Path) -> None:
    path = train(recipe(), device="cpu").model_path
    text = (path / "README.md").read_text(encoding="utf-8")
    assert "### Recipe" in text
    assert "### Metrics by Task" not in text
    assert ModelCard.load(path / "README.md").data.eval_results is None


def section(path: Path, title: str) -> str:
    """The text of a section, up to the next."""
    text = (path / "README.md").read_text(encoding="utf-8")
    return text.partition(f"### {title}\n\n")[2].partition("\n#")[0].strip()


# The data has 8 rows of ocr (4 of them with a negative) and 4 of every other task: 4 and 2 batches.
ROWS = """
| records of | rows | share of rows |
|:--|--:|--:|
| text_pair | 4 | 14.3 % |
| instr | 4 | 14.3 % |
| ocr | 4 | 14.3 % |
| ocr.negatives_1 | 4 | 14.3 % |
| vqa_single | 4 | 14.3 % |
| vqa_multi | 4 | 14.3 % |
| general | 4 | 14.3 % |
""".strip()
TASKS_NAMED = "| text_pair | instr | ocr | vqa_single | vqa_multi | general |"
WITHIN = "\n`text` is every task without an image, `multimodal` every other; within them, a task of n batches weighs n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "Batches were drawn in proportion to the rows."),
        (
            {"sampling": "round_robin"},
            "Batches came in turn, one of each, until one had no more, however many rows each has.\n\n"
            "| text_pair | instr | ocr | ocr.negatives_1 | vqa_single | vqa_multi | general |\n"
            "|--:|--:|--:|--:|--:|--:|--:|\n"
            "| 14.3 % | 14.3 % | 14.3 % | 14.3 % | 14.3 % | 14.3 % | 14.3 % |",
        ),
        (
            {"mix": {"text": 3, "multimodal": 1}},
            f"Batches were drawn in these shares, however many rows each task has.{WITHIN}.\n\n"
            "| text | multimodal |\n|--:|--:|\n| 75.0 % | 25.0 % |",
        ),
        (
            {"mix": {"ocr": 3, "instr": 2, "text_pair": 0, "vqa_single": 0, "vqa_multi": 0, "general": 3}},
            "Batches were drawn in these shares, however many rows each task has.\n\n"
            "| ocr | instr | text_pair | vqa_single | vqa_multi | general |\n|--:|--:|--:|--:|--:|--:|\n"
            "| 37.5 % | 25.0 % | 0.0 % | 0.0 % | 0.0 % | 37.5 % |",
        ),
        (
            {"mix_temperature": 0.5},  # 2 of 2 + 5 * sqrt(2) turns, and sqrt(2)
            "Batches were drawn in these shares: a task of n batches weighs n ** 0.5.\n\n"
            f"{TASKS_NAMED}\n|--:|--:|--:|--:|--:|--:|\n| 15.6 % | 15.6 % | 22.0 % | 15.6 % | 15.6 % | 15.6 % |",
        ),
        (
            {"mix_temperature": 0},
            "Batches were drawn in these shares: a task of n batches weighs n ** 0.\n\n"
            f"{TASKS_NAMED}\n|--:|--:|--:|--:|--:|--:|\n| 16.7 % | 16.7 % | 16.7 % | 16.7 % | 16.7 % | 16.7 % |",
        ),
        (
            {"curriculum": [{"until": 0.4, "mix": {"text": 1}}, {"until": 1, "mix": {"multimodal": 2, "text": 3}}]},
            "Batches were drawn by a curriculum: in each phase, up to a share of the run's steps, in these shares."
            f"{WITHIN}.\n\n"
            "| until, of the steps | text | multimodal |\n|--:|--:|--:|\n"
            "| 40 % | 100.0 % | 0.0 % |\n| 100 % | 60.0 % | 40.0 % |",
        ),
        (
            {"curriculum": "drafts", "mix_temperature": 0.5},
            "Batches were drawn by a curriculum: in each phase, up to a share of the run's steps, in these shares."
            f"{WITHIN} ** 0.5.\n\n"
            "| until, of the steps | text | multimodal |\n|--:|--:|--:|\n"
            "| 17 % | 100.0 % | 0.0 % |\n| 33 % | 86.7 % | 13.3 % |\n| 50 % | 73.3 % | 26.7 % |\n"
            "| 67 % | 60.0 % | 40.0 % |\n| 83 % | 46.7 % | 53.3 % |\n| 100 % | 33.3 % | 66.7 % |",
        ),
    ],
)
def test_the_mix_is_the_one_that_was_in_force(
    settings: dict[str, Any], said: str, recipe: Callable[..., Recipe], model: ViPyloQwen, tmp_path: Path
) -> None:
    made = recipe(**settings)
    card = model.model_card_data
    card.train_datasets = [
        {"name": name, "size": len(split), "columns": ["a"], "loss": {"fullname": "x"}}
        for name, split in load_tasks(made.train).items()
    ]
    write_model_card(card, model, tmp_path, made)
    assert section(tmp_path, "Data and Mix") == f"{ROWS}\n\n{said}"


def test_a_run_tells_its_mix(recipe: Callable[..., Recipe]) -> None:
    path = train(recipe(max_steps=2, save_steps=0, mix={"text": 3, "multimodal": 1}), device="cpu").model_path
    said = section(path, "Data and Mix")
    assert said.startswith(f"{ROWS}\n\nBatches were drawn in these shares")
    assert said.endswith("\n\n| text | multimodal |\n|--:|--:|\n| 75.0 % | 25.0 % |")


def test_shares_are_those_that_the_sampler_keeps(recipe: Callable[..., Recipe]) -> None:
    """Over 100 epochs, the turns of each task are its share of them within rounding."""
    made = recipe(mix_temperature=0.5)
    splits = load_tasks(made.train)
    batches = [grouped_batch_sampler()(split, made.batch_size, False) for split in splits.values()]
    sampler = task_mix_sampler(temperature=made.mix_temperature)(ConcatDataset(splits.values()), batches)
    task_of_row = [name.partition(".")[0] for name, split in splits.items() for _ in range(len(split))]
    drawn: Counter[str] = Counter()
    for epoch in range(100):
        sampler.set_epoch(epoch)
        drawn.update(task_of_row[batch[0]] for batch in sampler)
    (phase,) = _mix(made, {name: len(split) for name, split in splits.items()})
    assert phase.shares == pytest.approx({task: count / drawn.total() for task, count in drawn.items()}, abs=1e-3)


def test_of_several_processes_no_batch_is_short(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(mix_temperature=2, batch_size=4)
    rows = {"ocr": 7, "ocr.negatives_2": 5, "instr": 6, "general": 3}
    assert _mix(made, rows)[0].shares == {"ocr": 16 / 21, "instr": 4 / 21, "general": 1 / 21}
    monkeypatch.setattr("sentence_vipyloqwen.train.card.get_world_size", lambda: 2)
    assert _mix(made, rows)[0].shares == {"ocr": 0.8, "instr": 0.2, "general": 0.0}


PUSH = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.train.recipe import load_recipe
from sentence_vipyloqwen.train.run import train

result = train(load_recipe(sys.argv[1]), device="cpu")
result.model.push_to_hub("someone/at-once")
ViPyloQwen(result.model_path, device="cpu").push_to_hub("someone/from-its-folder")
for name in ("at-once", "from-its-folder"):
    model = ViPyloQwen(f"someone/{name}", device="cpu", cache_folder=f"{sys.argv[2]}/cache")
    stock = SentenceTransformer(f"someone/{name}", device="cpu")
    np.testing.assert_allclose(model.encode("xin chào"), result.model.encode("xin chào"), atol=1e-6)
    np.testing.assert_allclose(stock.encode("xin chào"), result.model.encode("xin chào"), atol=1e-5)
    model.save_pretrained(f"{sys.argv[2]}/{name}")
"""


def test_a_push_of_a_trained_model_uploads_what_its_card_shows(
    recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    """Pushed from memory and from its folder, loaded from the Hub, and saved again."""
    made = recipe(eval=str(data / "train.jsonl"), eval_steps=3, save_steps=3)
    (tmp_path / "recipe.yaml").write_text(made.to_yaml(), encoding="utf-8")
    with HubStandIn(tmp_path / "hub") as hub:
        command = [sys.executable, "-c", PUSH, str(tmp_path / "recipe.yaml"), str(tmp_path)]
        done = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    after = json.loads((data / "run" / "metrics.json").read_text())["after"]["tasks"]
    curves = draw_curves(data / "run")
    for name in ("at-once", "from-its-folder"):
        folder = hub.folder(f"someone/{name}")
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert text in hub.validated
        assert f'ViPyloQwen("someone/{name}")' in text
        # 1. The figures, in the metadata and in the table.
        card = ModelCard.load(folder / "README.md")
        values = {of.metric_type: of.metric_value for of in card.data.eval_results}
        for task, measured in after.items():
            assert values[f"{task}_{measured['headline']}"] == measured["metrics"][measured["headline"]]
            assert f"| {task} | {measured['headline']} | {measured['queries']} |" in section(folder, "Metrics by Task")
        # 2. The recipe.
        settings = yaml.safe_load(section(folder, "Recipe").partition("```yaml\n")[2].partition("```")[0])
        assert settings["max_steps"] == 6
        assert settings["train"] == ["train.jsonl"]
        # 3. The curves, also where the model is loaded from the Hub and saved: they are had as the model is.
        assert f'{CURVES_FILE}" alt=' in section(folder, "Curves")
        assert (folder / CURVES_FILE).read_text(encoding="utf-8") == curves
        assert (tmp_path / name / CURVES_FILE).read_text(encoding="utf-8") == curves
        assert (tmp_path / name / "README.md").read_text(encoding="utf-8") == text
        (cached,) = (tmp_path / "cache").glob(f"models--someone--{name}/snapshots/*/{CURVES_FILE}")
        assert cached.read_text(encoding="utf-8") == curves
    assert hub.tokens == {"Bearer hf_stand_in"}


def test_nothing_is_drawn_of_a_run_without_a_log(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) == ""

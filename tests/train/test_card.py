"""The model card that a run leaves in its model's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.model_card import CURVES_FILE
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.report import draw_curves
from sentence_vipyloqwen.train.run import TrainingResult, train


@pytest.fixture
def result(recipe: Callable[..., Recipe], data: Path) -> TrainingResult:
    return train(recipe(eval=str(data / "train.jsonl"), eval_steps=3, save_steps=3, temperature=0.05), device="cpu")


def test_the_card_tells_the_whole_run(result: TrainingResult, data: Path) -> None:
    card = ModelCard.load(result.model_path / "README.md")
    text = card.text
    assert text.count("\n## Training Run\n") == 1
    for task, measured in result.after.tasks.items():
        before = result.before.tasks[task].metrics[measured.headline]
        values = [f"{value:.3f}" for value in (before, measured.metrics[measured.headline])]
        assert f"| {task} | {measured.headline} | {measured.queries} | {values[0]} | {values[1]} |" in text
    assert "InfoNCE at temperature 0.05" in text
    assert "### Data and Mix" in text
    assert (
        "<code>sentence_vipyloqwen.losses.prefix_routed.PrefixRoutedLoss</code>" in text
    )  # Sentence Transformers' part
    assert "### Training Logs" in text

    results = card.data.eval_results
    assert all(isinstance(of, EvalResult) for of in results)
    values = {of.metric_type: of.metric_value for of in results}
    assert values["tasks_mean"] == result.after.mean
    assert values["ocr_ndcg@10"] == result.after.tasks["ocr"].metrics["ndcg@10"]
    assert card.data.tags.count("generated_from_trainer") == 1


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


def test_nothing_is_drawn_of_a_run_without_a_log(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) == ""

"""The model card: valid metadata, the sections that every model needs, and what a push to the Hub uploads."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.demo.base_model import make_tiny_base
from sentence_vipyloqwen.losses.prefix_routed import Negatives, PairWeight, TripletScale
from sentence_vipyloqwen.model_card import (
    BASE_CITATIONS,
    CITATIONS,
    CURVES_FILE,
    LOSS_WORDS,
    Figure,
    MixPhase,
    TrainingNotes,
)
from sentence_vipyloqwen.modules.backbones import BACKBONES
from sentence_vipyloqwen.tasks import TASK_TOKENS, TASKS
from sentence_vipyloqwen.train.evaluation import TasksEvaluator
from sentence_vipyloqwen.train.records import parse_record

sys.path.insert(0, str(Path(__file__).parent))
from hub_stand_in import HubStandIn, find_problems
from test_embedders import embedder

SECTIONS = (
    "## Usage",
    "### Usage with the Plugin",
    "## Tasks and Prompts",
    "## Limits",
    "## Licence",
    "## Training Details",
    "## Citation",
)


def save(model: ViPyloQwen, folder: Path) -> ModelCard:
    model.save_pretrained(str(folder))
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def elsewhere(base: Path, tmp_path: Path) -> Path:
    """An embedder that this package had no part in, without a card."""
    return embedder(base, tmp_path / "elsewhere", "lasttoken", dense=False)


def train(model: ViPyloQwen, folder: Path) -> None:
    """A step of the stock trainer."""
    arguments = SentenceTransformerTrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss).train()


def test_the_metadata_is_what_the_hub_wants(model: ViPyloQwen, tmp_path: Path) -> None:
    data = save(model, tmp_path / "saved").data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.language == ["vi", "en", "zh"]
    assert {"sentence-transformers", "multimodal", "qwen2_vl", "vipyloqwen"} <= set(data.tags)
    assert len(data.tags) == len(set(data.tags))


def test_the_card_has_every_section_once_and_in_order(model: ViPyloQwen, tmp_path: Path) -> None:
    text = save(model, tmp_path / "saved").text
    lines = text.splitlines()
    places = [lines.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert all(lines.count(section) == 1 for section in SECTIONS)
    for task in TASKS.values():
        assert f"| {task.name} | `{task.token}` |" in text
    for citation in (*CITATIONS.values(), BASE_CITATIONS["qwen2_vl"]):
        assert citation.strip() in text
    assert "- An input holds at most five images, and 8,192 tokens. Only text is cut.\n" in text
    assert "[2, 32]" in text  # the dimensions of this model
    assert "## Training Run" not in text
    assert "This card knows of no training" in text


@pytest.mark.parametrize("made", ["folder", "elsewhere"])
def test_the_card_s_code_runs(
    made: str,
    request: pytest.FixtureRequest,
    picture: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "saved"
    text = save(ViPyloQwen(request.getfixturevalue(made), device="cpu"), saved).text
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    picture().save("invoice.png")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("sentence_transformers_model_id", str(saved)), names)
    width = ViPyloQwen(saved, device="cpu").get_embedding_dimension()
    shapes = [[3, width], [3, 3], [1, 1], [2, width]]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(("torch.Size", "("))] == [
        f"({', '.join(map(str, shape))})" if shape[1] == width else f"torch.Size({shape})" for shape in shapes
    ]


def test_the_card_of_an_embedder_from_elsewhere_knows_no_prefixes(elsewhere: Path, tmp_path: Path) -> None:
    card = save(ViPyloQwen(elsewhere, device="cpu"), tmp_path / "saved")
    for absent in (*TASK_TOKENS, "prompt_name", "Tasks and Prompts", "info_nce", "EraX", "Vietnamese", "initialised"):
        assert absent not in card.text
    assert 'model.encode([{"image": page, "text": "Số tiền?"}])' in card.text
    assert "of up to five images:" in card.text
    assert "How it was trained is not known here" in card.text
    assert "- An input holds at most five images. No limit of tokens is set: nothing is cut.\n" in card.text
    assert card.data.language is None  # it was not said, and is not made up
    assert BASE_CITATIONS["qwen2_vl"].strip() in card.text
    assert not any(citation.strip() in card.text for citation in CITATIONS.values())


def test_the_card_of_an_embedder_from_elsewhere_that_is_trained_on(elsewhere: Path, tmp_path: Path) -> None:
    told = ModelCardData(license="mit", language="fr", base_model="someone/first")
    ModelCard(f"---\n{told.to_yaml()}\n---\n").save(elsewhere / "README.md")
    model = ViPyloQwen(elsewhere, device="cpu")
    train(model, tmp_path / "training")
    card = save(model, tmp_path / "saved")
    assert "generated_from_trainer" in card.data.tags
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["fr"], "someone/first")
    assert "| records of | rows | share of rows |\n|:--|--:|--:|\n| unnamed | 2 | 100.0 % |\n" in card.text
    for absent in (*TASK_TOKENS, "prompt_name", "Tasks and Prompts", "EraX"):
        assert absent not in card.text
    assert BASE_CITATIONS["qwen2_vl"].strip() in card.text
    assert "MultipleNegativesRankingLoss" in card.text


def test_languages_that_are_given_are_kept(elsewhere: Path, tmp_path: Path) -> None:
    own = ViPyloQwen.model_card_data_class(language=["vi"])
    card = save(ViPyloQwen(elsewhere, device="cpu", model_card_data=own), tmp_path / "saved")
    assert card.data.language == ["vi"]


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_the_report_of_the_base_is_cited(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "layers": 1, "vision_size": 64, "vision_layers": 3}
    base = make_tiny_base(tmp_path / "base", ["hóa đơn", "a red circle"] * 9, **sizes, model_type=kind)
    text = save(ViPyloQwen.create(base, 16, device="cpu"), tmp_path / "saved").text
    assert f"#### {BACKBONES[kind].name}\n```bibtex\n{BASE_CITATIONS[kind].strip()}\n```" in text
    assert [other for other, citation in BASE_CITATIONS.items() if citation.strip() in text] == [kind]


def test_each_base_has_its_own_report() -> None:
    numbers = {kind: citation.partition("eprint = {")[2][:10] for kind, citation in BASE_CITATIONS.items()}
    assert numbers == {"qwen2_vl": "2409.12191", "qwen2_5_vl": "2502.13923", "qwen3_vl": "2511.21631"}
    assert numbers.keys() == BACKBONES.keys()


def test_base_and_licence_are_those_of_the_checkpoint_s_card(base: Path, tmp_path: Path) -> None:
    told = ModelCardData(license="mit", base_model="someone/first")
    copy = tmp_path / "base"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).symlink_to(file)
    ModelCard(f"---\n{told.to_yaml()}\n---\n").save(copy / "README.md")
    card = save(ViPyloQwen.create(copy, 16, device="cpu"), tmp_path / "saved")
    assert (card.data.license, card.data.base_model) == ("mit", "someone/first")
    assert "The weights are under `mit`" in card.text


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ([], ["vi", "en", "zh"]),  # nothing else is known
        (["en", "zh"], ["en", "zh"]),
        (["vi-VN", "en", "vi", "zh-Hans"], ["vi", "en", "zh"]),
        (["Vietnamese", "vi|en", "vi-en"], ["vi", "en", "zh"]),  # no codes: the Hub would refuse them
    ],
)
def test_the_languages_are_those_that_were_measured(
    named: list[str], known: list[str], model: ViPyloQwen, tmp_path: Path
) -> None:
    figures = [Figure(task, "ndcg@10", 1, None, 1, 9, language) for task in ("ocr", "instr") for language in named]
    model.model_card_data.set_notes(TrainingNotes("", by_language=figures))
    card = save(model, tmp_path / "saved")
    assert card.data.language == known
    measured = f"- Measured languages: {', '.join(named)}. How it does in others is not known here.\n"
    assert (measured in card.text) == bool(named)
    assert ("Vietnamese, English and Chinese" in card.text) == (not named)
    assert ("### Metrics by Language" in card.text) == bool(named)
    assert find_problems((tmp_path / "saved" / "README.md").read_text(encoding="utf-8")) == []


def test_what_was_measured_takes_no_language_away_that_is_given(folder: Path, elsewhere: Path, tmp_path: Path) -> None:
    notes = TrainingNotes("", by_language=[Figure("ocr", "ndcg@10", 1, None, 1, 9, "vi")])
    for source, given, known in ((folder, ["fr"], ["fr"]), (elsewhere, ["fr"], ["fr"]), (elsewhere, None, ["vi"])):
        own = ViPyloQwen.model_card_data_class(language=given)
        model = ViPyloQwen(source, device="cpu", model_card_data=own)
        model.model_card_data.set_notes(notes)
        model.model_card_data.register_model(model)
        assert save(model, tmp_path / "saved").data.language == known


def test_an_unknown_licence_is_not_made_up(base: Path, tmp_path: Path) -> None:
    card = save(ViPyloQwen.create(base, 16, device="cpu"), tmp_path / "saved")
    assert card.data.license is None
    assert card.data.base_model is None
    assert "which is not known here" in card.text


def test_weights_and_margins_are_those_of_the_loss(model: ViPyloQwen, tmp_path: Path) -> None:
    loss = PrefixRoutedLoss(
        model, temperature=0.05, weights={"ocr": {"triplet": 2}, "vqa_single": {"triplet": 0}}, margins={"ocr": 0.4}
    )
    model.model_card_data.set_losses([loss])
    card = save(model, tmp_path / "saved")
    assert "| ocr | `<ocr>` | the query | 1 · info_nce + 2 · triplet | 0.4 |" in card.text
    assert "| vqa_single | `<vqa_single>` | the query | 1 · info_nce |  |" in card.text
    assert "InfoNCE at temperature 0.05" in card.text
    assert (
        "\n\nIn this training, the rows of one task are each other's negatives; `info_nce` weighs a scored pair by its "
        "score; margins are in units of cosine.\n"
    ) in card.text
    assert "Representation Learning with Contrastive Predictive Coding" in card.text
    assert "loss:PrefixRoutedLoss" in card.data.tags


def test_options_of_the_loss_are_told_in_words(model: ViPyloQwen, tmp_path: Path) -> None:
    assert "In this training" not in save(model, tmp_path / "untrained").text
    loss = PrefixRoutedLoss(model, negatives="all", pair_weight="uniform", triplet_scale="temperature")
    model.model_card_data.set_losses([loss])
    assert (
        "\n\nIn this training, all rows, whatever their tasks, are each other's negatives; `info_nce` weighs every "
        "scored pair alike, whatever its score; margins are in units of cosine divided by the temperature.\n"
    ) in save(model, tmp_path / "trained").text


def test_every_option_of_the_loss_has_its_words() -> None:
    options = {"negatives": Negatives, "pair_weight": PairWeight, "triplet_scale": TripletScale}
    assert {option: tuple(words) for option, words in LOSS_WORDS.items()} == {
        option: get_args(allowed) for option, allowed in options.items()
    }


def test_the_speed_that_is_told_is_the_one_that_was_measured(model: ViPyloQwen, tmp_path: Path) -> None:
    results = (Path(__file__).parents[1] / "benchmarks" / "results.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in results.partition("\n## ")[2].partition("\n## ")[0].splitlines()]
    factors = {row[0].strip("| "): float(row[2].split()[0]) for row in rows if len(row) > 2 and row[1].isdigit()}
    repeated = [factors.pop(name) for name in ("shared", "duplicates")]
    text = " ".join(save(model, tmp_path / "saved").text.split())
    for held, words in ((factors.values(), "texts and images"), (repeated, "and")):
        assert f"{words} {min(held):.0f} to {max(held):.0f} times as fast" in text
    assert "with stock Sentence Transformers" in text
    assert "GPUs were not measured." in text


@pytest.fixture
def measured(model: ViPyloQwen) -> ViPyloQwen:
    """A model with the figures of a run."""
    evaluator = TasksEvaluator([parse_record(b'{"anchor": "a", "positive": "b"}', ".")])
    values = {"tasks_mean": 0.75, "ocr_ndcg@10": 0.5, "ocr_mrr": 0.25, "dim8_tasks_mean": 0.1, "instr_ndcg@10": 1.0}
    model.model_card_data.set_evaluation_metrics(evaluator, values)
    figures = [Figure(task, "ndcg@10", 1, None, 1) for task in ("ocr", "instr")]
    model.model_card_data.set_notes(TrainingNotes("", figures, evaluator=evaluator, evaluated="held-out_1.jsonl"))
    return model


def test_the_metadata_bear_the_headlines_and_name_their_data(measured: ViPyloQwen, tmp_path: Path) -> None:
    card = save(measured, tmp_path / "saved")
    results = [(of.dataset_name, of.metric_type, of.metric_value) for of in card.data.eval_results]
    assert results == [
        ("held-out_1.jsonl", "tasks_mean", 0.75),
        ("held-out_1.jsonl", "ocr_ndcg@10", 0.5),
        ("held-out_1.jsonl", "instr_ndcg@10", 1.0),
    ]
    assert card.data.metrics == ["tasks_mean", "ocr_ndcg@10", "instr_ndcg@10"]
    assert re.search(r"\| ocr_mrr +\| 0.25 +\|", card.text)  # the card itself keeps all
    assert re.search(r"\| dim8_tasks_mean +\| 0.1 +\|", card.text)


def test_what_another_evaluator_measured_stays_in_the_metadata(measured: ViPyloQwen, tmp_path: Path) -> None:
    other = EmbeddingSimilarityEvaluator(["a"], ["b"], [1.0], name="sts")
    measured.model_card_data.set_evaluation_metrics(other, {"sts_pearson_cosine": 0.3, "sts_spearman_cosine": 0.2})
    results = save(measured, tmp_path / "saved").data.eval_results
    assert [(of.dataset_name, of.metric_type) for of in results if "cosine" in of.metric_type] == [
        ("sts", "pearson_cosine"),
        ("sts", "spearman_cosine"),
    ]
    assert len(results) == 5


def test_the_figures_are_of_a_model_with_a_name(measured: ViPyloQwen, elsewhere: Path, tmp_path: Path) -> None:
    card = save(measured, tmp_path / "saved")
    assert card.data.model_name == "ViPyloQwen based on Qwen2-VL"
    assert "\n# ViPyloQwen based on Qwen2-VL\n" in card.text
    other = ViPyloQwen(elsewhere, device="cpu")
    other.model_card_data.base_model = "someone/first"
    text = save(other, tmp_path / "other").text
    assert "\n# ViPyloQwen based on someone/first\n" in text


def test_what_a_run_left_is_told_and_stays_with_the_folder(model: ViPyloQwen, tmp_path: Path) -> None:
    data = model.model_card_data
    figures = [Figure("ocr", "ndcg@10", 1200, 0.25, 0.5, 3400), Figure("text_pair", "spearman", 1, None, 1)]
    by_language = [
        Figure("ocr", "ndcg@10", 700, 0.125, 0.75, 3400, "vi"),
        Figure("ocr", "ndcg@10", 500, 0.5, None, 3400, "vi|en"),
    ]
    mix = [MixPhase(0.25, {"text": 1}), MixPhase(1, {"text": 0.75, "multimodal": 0.25})]
    data.set_notes(TrainingNotes("epochs: 3\n", figures, "By a curriculum.", mix, by_language))
    data.curves = "<svg/>"
    data.train_datasets = [{"name": "ocr", "size": 3000, "columns": ["a"], "loss": {"fullname": "x"}}]
    text = save(model, tmp_path / "first").text
    assert (
        "\n\n| task | metric | queries | candidates | before | after |\n|:--|:--|--:|--:|--:|--:|\n"
        "| ocr | ndcg@10 | 1,200 | 3,400 | 0.250 | 0.500 |\n| text_pair | spearman | 1 |  |  | 1.000 |\n\n"
    ) in text
    assert (
        "\n\n| task | language | metric | queries | candidates | before | after |\n|:--|:--|:--|--:|--:|--:|--:|\n"
        "| ocr | vi | ndcg@10 | 700 | 3,400 | 0.125 | 0.750 |\n"
        "| ocr | vi\\|en | ndcg@10 | 500 | 3,400 | 0.500 |  |\n\n"
    ) in text
    assert "| ocr | 3,000 | 100.0 % |" in text
    assert "\n\nBy a curriculum.\n\n| until, of the steps | text | multimodal |\n|--:|--:|--:|\n" in text
    assert "|--:|\n| 25 % | 100.0 % | 0.0 % |\n| 100 % | 75.0 % | 25.0 % |\n\n" in text
    assert "```yaml\nepochs: 3\n```" in text
    assert f'<img src="{CURVES_FILE}"' in text

    again = save(ViPyloQwen(tmp_path / "first", device="cpu"), tmp_path / "second").text
    assert again == text
    assert (tmp_path / "second" / CURVES_FILE).read_text() == "<svg/>"


def test_a_new_training_takes_over_from_what_an_earlier_one_left(model: ViPyloQwen, tmp_path: Path) -> None:
    model.model_card_data.notes = TrainingNotes("epochs: 3\n")
    model.model_card_data.curves = "<svg/>"
    save(model, tmp_path / "first")
    for trained in (model, ViPyloQwen(tmp_path / "first", device="cpu")):
        assert trained.model_card_data.curves
        train(trained, tmp_path / "training")
        text = save(trained, tmp_path / "second").text
        assert "### Data and Mix" in text
        assert "### Curves" not in text
        assert "### Recipe" not in text
        assert not (tmp_path / "second" / CURVES_FILE).exists()


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("too slow"),
        PermissionError("not yours"),
        HTTPError("the connection broke off"),  # of the client, and no OSError
        OfflineModeIsEnabled("offline"),
    ],
)
def test_a_picture_that_is_not_to_be_had_keeps_no_model_from_loading(
    error: Exception,
    model: ViPyloQwen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model.model_card_data.notes = TrainingNotes("epochs: 3\n")
    model.model_card_data.curves = "<svg/>"
    save(model, tmp_path / "saved")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("sentence_vipyloqwen.model_card.load_file_path", fail)
    with caplog.at_level(logging.WARNING):
        assert ViPyloQwen(tmp_path / "saved", device="cpu").model_card_data.curves == ""
    assert repr(error) in caplog.text


def test_nor_does_one_that_is_no_text(model: ViPyloQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.model_card_data.set_notes(TrainingNotes("epochs: 3\n"))
    model.model_card_data.curves = "<svg/>"
    save(model, tmp_path / "saved")
    (tmp_path / "saved" / CURVES_FILE).write_bytes(b"\xff")
    assert ViPyloQwen(tmp_path / "saved", device="cpu").model_card_data.curves == ""
    assert "UnicodeDecodeError" in caplog.text


def test_a_picture_that_the_card_does_not_show_is_not_asked_for(
    model: ViPyloQwen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "saved")
    asked: list[str] = []
    monkeypatch.setattr("sentence_vipyloqwen.model_card.load_file_path", lambda _, name, **__: asked.append(name))
    ViPyloQwen(tmp_path / "saved", device="cpu")
    assert asked == []


def test_card_data_of_ones_own_are_taken(folder: Path, tmp_path: Path) -> None:
    own = SentenceTransformerModelCardData(license="mit", language="fr", generate_widget_examples=False)
    card = save(ViPyloQwen(folder, device="cpu", model_card_data=own), tmp_path / "saved")
    assert (card.data.license, card.data.language) == ("mit", ["fr"])


def test_a_folder_s_id_stands_in_every_snippet(model: ViPyloQwen, tmp_path: Path) -> None:
    """A card that is saved again is not made anew: the private seam `_update_default_model_id` puts the id into it."""
    text = save(model, tmp_path / "first").text
    assert text.count('("sentence_transformers_model_id")') == 2
    again = ViPyloQwen(tmp_path / "first", device="cpu")
    again.save_pretrained(str(tmp_path / "second"), model_name="someone/a-model")
    text = (tmp_path / "second" / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer("someone/a-model")' in text
    assert 'ViPyloQwen("someone/a-model")' in text
    assert "sentence_transformers_model_id" not in text


PUSH = """
import sys
import mteb
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer
from sentence_vipyloqwen import ViPyloQwen

HfApi().create_repo("someone/base")
HfApi().upload_folder(repo_id="someone/base", folder_path=sys.argv[1])
model = ViPyloQwen.create("someone/base", 16, device="cpu")
print(model.push_to_hub("someone/a-model"))
vectors = [load("someone/a-model", device="cpu").encode("xin chào") for load in (SentenceTransformer, ViPyloQwen)]
assert vectors[0].shape == (16,)
assert abs(vectors[0] - model.encode("xin chào")).max() < 1e-5
assert abs(vectors[1] - model.encode("xin chào")).max() < 1e-6
model.model_card_data.license = "apache2"
try:
    model.push_to_hub("someone/refused")
except ValueError as error:
    print(error)
meta = mteb.get_model("someone/a-model", device="cpu").mteb_model_meta
assert set(meta.modalities) == {"image", "text"}
assert set(meta.languages) == {"eng-Latn", "vie-Latn", "zho-Hans"}
"""


@pytest.fixture
def hub(tmp_path: Path):
    """A server that answers as the Hub does, on this computer."""
    with HubStandIn(tmp_path / "hub") as stand_in:
        yield stand_in


def test_a_push_uploads_what_loads_from_the_hub(base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    """In a process of its own, as the Hub's client reads its endpoint once; mteb reads the same repository."""
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(base)], env=hub.environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.url}/someone/a-model/commit/" in done.stdout

    pushed = hub.folder("someone/a-model")
    assert {
        "README.md",
        "modules.json",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "2_DenseHead/model.safetensors",
    } <= {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    card = ModelCard.load(pushed / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.library_name == "sentence-transformers"
    assert card.data.language == ["vi", "en", "zh"]
    assert 'SentenceTransformer("someone/a-model")' in card.text
    assert 'ViPyloQwen("someone/a-model")' in card.text
    assert hub.tokens == {"Bearer hf_stand_in"}
    assert set(hub.validated) == {(pushed / "README.md").read_text(encoding="utf-8")}
    assert """"license" is 'apache2', which is none of the Hub's""" in done.stdout
    assert list(hub.folder("someone/refused").iterdir()) == []
    assert SentenceTransformer(str(pushed), device="cpu").get_embedding_dimension() == 16


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: apache2", "'apache2', which is none of the Hub's"),
        ("license: [mit]", "['mit'], which is none of the Hub's"),
        ("pipeline_tag: sentence-likeness", "'sentence-likeness', which is no task"),
        ("language: [vi, vn]", "'vn', which is no ISO 639 code"),
        ("language: no", "False, which is no ISO 639 code"),
        ("base_model: /data/base/model", "'/data/base/model'"),
        ("tags: [1]", "it must be a list of strings"),
        ("- license", "should be a dict"),
        ("license: [", "while parsing"),
        ("model-index: [{name: x, results: [{task: {type: a}}]}]", "Invalid `model_index`"),
        (
            "model-index: [{name: x, results: [{task: {type: a}, dataset: {type: d, name: d}, "
            "metrics: [{type: recall, value: .nan}]}]}]",
            "'recall' is nan, not a finite number",
        ),
    ],
)
def test_the_stand_in_refuses_what_the_hub_would(metadata: str, problem: str) -> None:
    (said,) = find_problems(f"---\n{metadata}\n---\n\n# Card\n")
    assert problem in said


def test_the_stand_in_takes_what_the_hub_would() -> None:
    told = "language: [vi, yue, multilingual]\nlicense: other\npipeline_tag: feature-extraction\nbase_model: a/b"
    assert find_problems(f"---\n{told}\n---\n\n# Card\n") == []
    assert find_problems("# Card\n") == ["there is no metadata"]

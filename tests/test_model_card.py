"""The model card: valid metadata, the sections that every model needs, and what a push to the Hub uploads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen
from sentence_vipyloqwen.model_card import CITATIONS, CURVES_FILE, Figure, TrainingNotes
from sentence_vipyloqwen.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parent))
from hub_stand_in import HubStandIn

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
    for citation in CITATIONS.values():
        assert citation.strip() in text
    assert "[2, 32]" in text  # the dimensions of this model
    assert "## Training Run" not in text
    assert "This card knows of no training" in text


def test_the_card_s_code_is_python(model: ViPyloQwen, tmp_path: Path) -> None:
    text = save(model, tmp_path / "saved").text
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


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


def test_an_unknown_licence_is_not_made_up(base: Path, tmp_path: Path) -> None:
    card = save(ViPyloQwen.create(base, 16, device="cpu"), tmp_path / "saved")
    assert card.data.license is None
    assert card.data.base_model is None
    assert "which is not known here" in card.text


def test_weights_and_margins_are_those_of_the_loss(model: ViPyloQwen, tmp_path: Path) -> None:
    loss = PrefixRoutedLoss(model, temperature=0.05, weights={"ocr": {"triplet": 2}}, margins={"ocr": 0.4})
    model.model_card_data.set_losses([loss])
    card = save(model, tmp_path / "saved")
    assert "| ocr | `<ocr>` | the query | 1 · info_nce + 2 · triplet | 0.4 |" in card.text
    assert "InfoNCE at temperature 0.05" in card.text
    assert "Representation Learning with Contrastive Predictive Coding" in card.text
    assert "loss:PrefixRoutedLoss" in card.data.tags


def test_what_a_run_left_is_told_and_stays_with_the_folder(model: ViPyloQwen, tmp_path: Path) -> None:
    data = model.model_card_data
    figures = [Figure("ocr", "ndcg@10", 1200, 0.25, 0.5), Figure("instr", "x", 1, None, 1)]
    data.notes = TrainingNotes("epochs: 3\n", figures)
    data.curves = "<svg/>"
    data.train_datasets = [{"name": "ocr", "size": 3000, "columns": ["a"], "loss": {"fullname": "x"}}]
    text = save(model, tmp_path / "first").text
    assert "| ocr | ndcg@10 | 1,200 | 0.250 | 0.500 |" in text
    assert "| instr | x | 1 |  | 1.000 |" in text
    assert "| ocr | 3,000 | 100.0 % |" in text
    assert "```yaml\nepochs: 3\n```" in text
    assert f'<img src="{CURVES_FILE}"' in text

    again = save(ViPyloQwen(tmp_path / "first", device="cpu"), tmp_path / "second").text
    assert again == text
    assert (tmp_path / "second" / CURVES_FILE).read_text() == "<svg/>"


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
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run([sys.executable, "-c", PUSH, str(base)], env=environment, capture_output=True, text=True)
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
    assert SentenceTransformer(str(pushed), device="cpu").get_embedding_dimension() == 16

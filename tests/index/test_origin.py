"""An index remembers where its model came from, and opens it from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions, VectorIndex, encode_share
from sentence_vipyloqwen.index.maintenance import compact_index, remove_items
from sentence_vipyloqwen.index.manifest import CHECKSUM, read_manifest, signed
from sentence_vipyloqwen.index.origin import load_origin, origin_of, place_of

ITEMS = [{"id": "a", "text": "một"}, {"id": "b", "text": "hai"}, {"id": "c", "text": "ba"}]
COMMIT = "c" * 40


@pytest.fixture
def home(folder: Path, tmp_path: Path) -> Path:
    """A folder that holds a model and an index which was built with it."""
    shutil.copytree(folder, tmp_path / "home" / "models" / "a")
    VectorIndex.build(load(tmp_path / "home" / "models" / "a"), ITEMS, tmp_path / "home" / "index")
    return tmp_path / "home"


def load(path: Path | str) -> ViPyloQwen:
    return ViPyloQwen(path, device="cpu")


def rewrite(index: Path, change: Callable[[dict], dict], sign: Callable[[dict], dict] = signed) -> None:
    path = index / "index.json"
    path.write_text(json.dumps(sign(change(json.loads(path.read_bytes())))), encoding="utf-8")


# --- what is remembered ---


def test_a_folder_is_remembered_from_the_index_or_from_the_root(folder: Path) -> None:
    model, folder = load(folder), folder.resolve()
    for index, expected in (
        (folder.with_name("index"), f"../{folder.name}"),
        (folder / "index", ".."),
        (folder.parent, f"./{folder.name}"),
        (Path("/", folder.parts[1], "index"), "/".join(("..", *folder.parts[2:]))),
        (Path("/somewhere/index"), str(folder)),
    ):
        assert origin_of(model, index) == expected
        assert place_of(expected, index) == folder


def test_a_folder_is_found_from_another_working_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "link").symlink_to("models/a")
    for source in ("models/a", "./models/a/", "link"):
        assert origin_of(load(source), home / "index") == "../models/a"
    model = load("models/a")
    monkeypatch.chdir(home / "index")
    assert origin_of(model, home / "index") is None  # it could be a Hub id as well


def test_a_hub_id_is_remembered_as_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--a-model"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    index = VectorIndex.build(load("someone/a-model"), ITEMS, tmp_path / "index")
    assert index.info()["model"] == "someone/a-model"
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    assert VectorIndex.load(tmp_path / "elsewhere", device="cpu").search("hai", k=1)[0].id == "b"
    shutil.rmtree(repository)
    with pytest.raises(ValueError, match="built with the model at someone/a-model, which cannot be loaded: give the"):
        VectorIndex.load(tmp_path / "elsewhere", device="cpu")


def test_a_model_made_in_memory_comes_from_nowhere(base: Path, make_model, tmp_path: Path) -> None:
    created = ViPyloQwen.create(base, embedding_dim=8, device="cpu")
    created.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    for model in (created, make_model(), ViPyloQwen(modules=list(created), device="cpu")):
        index = VectorIndex.build(model, ITEMS, tmp_path / "index", overwrite=True)
        assert index.info()["model"] is None
        with pytest.raises(ValueError, match=r"index does not say where its model is, .* in memory.*: give the model"):
            VectorIndex.load(tmp_path / "index", device="cpu")


def test_an_adapter_s_folder_is_remembered_and_not_its_base(home: Path) -> None:
    model = load(home / "models" / "a")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(home / "adapter"), create_model_card=False)
    index = VectorIndex.build(load(home / "adapter"), ITEMS, home / "tuned")
    assert index.info()["model"] == "../adapter"
    assert VectorIndex.load(home / "tuned", device="cpu").search("hai") == index.search("hai")


# --- opening ---


def test_it_opens_with_the_model_it_remembers(home: Path) -> None:
    given = VectorIndex.load(home / "index", load(home / "models" / "a"))
    found = VectorIndex.load(home / "index", device="cpu")
    assert found.info()["model"] == "../models/a"
    assert found.search("hai") == given.search("hai")
    assert found.add([{"id": "d", "text": "bốn"}]) == 1


def test_model_and_index_move_together(home: Path) -> None:
    for place in (home.with_name("moved"), home.with_name("deep") / "er" / "still"):
        place.parent.mkdir(exist_ok=True, parents=True)
        home = Path(shutil.move(home, place))
        assert VectorIndex.load(home / "index", device="cpu").search("hai", k=1)[0].id == "b"
        assert read_manifest(home / "index").model == "../models/a"


def test_a_link_to_an_index_finds_the_model(home: Path) -> None:
    (home.parent / "link").symlink_to(home / "index")
    assert len(VectorIndex.load(home.parent / "link", device="cpu")) == 3


def test_a_model_that_is_gone_is_named(home: Path) -> None:
    place = home / "models" / "a"
    shutil.move(place, home / "b")
    with pytest.raises(ValueError, match=f"built with the model at {place}, which is not there: give the model"):
        VectorIndex.load(home / "index", device="cpu")
    assert len(VectorIndex.load(home / "index", load(home / "b"))) == 3
    place.mkdir()
    with pytest.raises(ValueError, match=f"at {place}, which cannot be loaded: give the model.*has no modules.json"):
        VectorIndex.load(home / "index", device="cpu")


def test_another_model_in_its_place_is_refused_and_named(base: Path, home: Path) -> None:
    place = home / "models" / "a"
    shutil.rmtree(place)
    ViPyloQwen.create(base, embedding_dim=32, seed=1, device="cpu").save_pretrained(str(place))
    with pytest.raises(ValueError, match=f"the model at {place}, from which that one was loaded .*differ in: weights"):
        VectorIndex.load(home / "index", device="cpu")


def test_a_model_that_was_changed_since_it_was_loaded_is_refused_and_the_ways_told(home: Path) -> None:
    model = load(home / "models" / "a")
    with torch.no_grad():
        model[2].linear.weight.mul_(2).add_(0.1)
    VectorIndex.build(model, ITEMS, home / "other")
    with pytest.raises(ValueError, match=r"\(it may have been trained on, or loaded with other options.*in: weights"):
        VectorIndex.load(home / "other", device="cpu")


def test_vectors_that_were_cut_are_searched_by_vectors_cut_alike(home: Path) -> None:
    model = ViPyloQwen(home / "models" / "a", device="cpu", truncate_dim=8)
    given = VectorIndex.build(model, ITEMS, home / "short")
    found = VectorIndex.load(home / "short", device="cpu")
    assert found.info()["dim"] == 8
    assert found.search("hai") == given.search("hai")


def test_a_device_is_for_the_remembered_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device is 'cpu', but a model was given"):
        VectorIndex.load(home / "index", load(home / "models" / "a"), device="cpu")
    assert load_origin("../models/a", home / "index", 32, "meta").device.type == "meta"


# --- index.json ---


@pytest.mark.parametrize("version", [2, 3])
def test_an_index_json_without_the_field_is_read_and_gets_it_with_the_next_items(home: Path, version: int) -> None:
    def strip(data: dict) -> dict:
        del data["model"], data[CHECKSUM]
        return data | {"format_version": version}

    rewrite(home / "index", strip, signed if version == 3 else dict)
    assert read_manifest(home / "index").model is None
    with pytest.raises(ValueError, match="does not say where its model is"):
        VectorIndex.load(home / "index", device="cpu")
    remove_items(home / "index", ["a"])
    assert read_manifest(home / "index").model is None
    index = VectorIndex.load(home / "index", load(home / "models" / "a"))
    index.add([{"id": "d", "text": "bốn"}])
    assert index.info()["model"] == "../models/a"
    assert len(VectorIndex.load(home / "index", device="cpu")) == 3


def test_an_altered_field_is_caught_by_the_checksum(home: Path) -> None:
    for model in ("../models/b", None):
        rewrite(home / "index", lambda data, model=model: data | {"model": model}, dict)
        with pytest.raises(ValueError, match="it was altered after it was written"):
            VectorIndex.load(home / "index", device="cpu")


@pytest.mark.parametrize("model", [7, "", ["a"], {"path": "a"}, False])
def test_a_field_of_another_kind_is_refused(home: Path, model: object) -> None:
    rewrite(home / "index", lambda data: data | {"model": model})
    with pytest.raises(ValueError, match=r"index.json cannot be read: 'model' is .*allowed is a folder, a Hub id"):
        VectorIndex.load(home / "index", device="cpu")


def test_every_change_keeps_it(home: Path) -> None:
    index = VectorIndex.load(home / "index", device="cpu")
    for change in (
        lambda: index.add([{"id": "d", "text": "bốn"}]),
        lambda: index.update([{"id": "a", "text": "không"}]),
        lambda: index.remove(["b"]),
        lambda: index.compact(),
        lambda: remove_items(home / "index", ["c"]),
        lambda: compact_index(home / "index"),
    ):
        change()
        assert read_manifest(home / "index").model == "../models/a"


def test_the_model_that_adds_items_is_remembered_where_it_came_from_somewhere(home: Path) -> None:
    shutil.move(home / "models" / "a", home / "b")
    VectorIndex.load(home / "index", load(home / "b")).add([{"id": "d", "text": "bốn"}])
    assert read_manifest(home / "index").model == "../b"
    in_memory = load(home / "b")
    in_memory.tokenizer.name_or_path = ""
    VectorIndex.load(home / "index", in_memory).add([{"id": "e", "text": "năm"}])
    assert read_manifest(home / "index").model == "../b"
    VectorIndex.build(in_memory, ITEMS, home / "index", overwrite=True)
    assert read_manifest(home / "index").model is None


def test_a_build_of_shares_remembers_it(home: Path) -> None:
    model, options = load(home / "models" / "a"), EmbedOptions(shard_rows=1)
    for share in range(2):
        encode_share(model, ITEMS, home / "shared", share, 2, options)
    model.encode = lambda *_, **__: pytest.fail("embedded")
    VectorIndex.build(model, ITEMS, home / "shared", options)
    assert len(VectorIndex.load(home / "shared", device="cpu")) == 3

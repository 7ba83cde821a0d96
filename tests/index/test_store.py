from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import faiss
import pytest

from sentence_vipyloqwen.index import VectorIndex, store

OLD = [{"id": "old", "text": "cũ"}]
NEW = [{"id": "new", "text": "mới"}, {"id": "more", "text": "nữa"}]


def ids(folder: Path, model) -> list[str]:
    return [item["id"] for item in VectorIndex.load(folder, model).items]


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """An index, alone in its folder."""
    return VectorIndex.build(model, OLD, tmp_path / "index").folder


def test_files_are_those_of_the_description(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["index.faiss", "index.json", "items.jsonl"]
    manifest = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "sentence-vipyloqwen-index"
    assert manifest["format_version"] == 1
    assert (manifest["count"], manifest["dim"], manifest["metric"]) == (1, 32, "cosine")
    item = json.loads((folder / "items.jsonl").read_text(encoding="utf-8"))
    assert item == {"id": "old", "text": "cũ", "image": [], "metadata": {}}


# --- an existing folder -----------------------------------------------------------------------------------------------


def test_an_index_is_replaced_only_when_asked(model, folder, tmp_path):
    with pytest.raises(ValueError, match="index at .* already: pass overwrite=True"):
        VectorIndex.build(model, NEW, folder)
    assert ids(folder, model) == ["old"]
    VectorIndex.build(model, NEW, folder, overwrite=True)
    assert ids(folder, model) == ["new", "more"]
    assert os.listdir(tmp_path) == ["index"]


def test_a_folder_that_is_no_index_is_never_replaced(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(ValueError, match="exists and is no index"):
            VectorIndex.build(model, NEW, target, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_an_empty_folder_is_free(model, tmp_path):
    (tmp_path / "index").mkdir()
    VectorIndex.build(model, NEW, tmp_path / "index")
    assert ids(tmp_path / "index", model) == ["new", "more"]


def test_missing_parents_are_made(model, tmp_path):
    VectorIndex.build(model, NEW, tmp_path / "a" / "b" / "index")
    assert ids(tmp_path / "a" / "b" / "index", model) == ["new", "more"]


def test_a_link_to_an_index_keeps_pointing_at_it(model, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    VectorIndex.build(model, NEW, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert ids(folder, model) == ids(tmp_path / "link", model) == ["new", "more"]


# --- failures in the middle -------------------------------------------------------------------------------------------


class Cut(Exception):
    """The failure that a test injects."""


def fail(*args, **kwargs):
    raise Cut


@pytest.mark.parametrize(
    ("owner", "name"),
    [(store, "encode_item"), (store.faiss, "write_index"), (store, "_measure"), (store, "_flush"), (store, "_swap")],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_writing_leaves_things_as_they_were(
    model, folder, tmp_path, monkeypatch, owner, name, existing
):
    if not existing:
        shutil.rmtree(folder)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(owner, name, fail)
        VectorIndex.build(model, NEW, folder, overwrite=True)
    assert os.listdir(tmp_path) == (["index"] if existing else [])
    if existing:
        assert ids(folder, model) == ["old"]


def test_a_failure_of_the_model_leaves_the_old_index(make_model, model, folder, tmp_path, monkeypatch):
    broken = make_model()
    monkeypatch.setattr(broken, "encode", fail)
    with pytest.raises(Cut):
        VectorIndex.build(broken, NEW, folder, overwrite=True)
    assert os.listdir(tmp_path) == ["index"]
    assert ids(folder, model) == ["old"]


def test_a_failure_of_the_second_move_puts_the_old_index_back(model, folder, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse_draft(self, target):
        if ".new-" in self.name:
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_draft)
    with pytest.raises(PermissionError):
        VectorIndex.build(model, NEW, folder, overwrite=True)
    assert os.listdir(tmp_path) == ["index"]
    assert ids(folder, model) == ["old"]


class Killed(BaseException):
    """The end of the process: nothing in `_swap` catches it."""


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_process_killed_in_the_swap_leaves_a_whole_index(model, folder, monkeypatch, kill_at):
    """Killed before a rename: the reader sees the old index; the next build finds and replaces it."""
    draft = folder.with_name(".index.new-0")
    shutil.copytree(folder, draft)
    renames = iter(range(1, 3))
    rename = Path.rename

    def killed(self, target):
        if next(renames) == kill_at:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        store._swap(draft, folder)
    assert folder.exists() == (kill_at == 1)
    assert ids(folder, model) == ["old"]
    with pytest.raises(ValueError, match="already"):
        VectorIndex.build(model, NEW, folder)
    assert ids(folder, model) == ["old"]
    VectorIndex.build(model, NEW, folder, overwrite=True)
    assert ids(folder, model) == ["new", "more"]
    assert not folder.with_name(".index.old").exists()


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.faiss", "index.json", "items.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "garbage"])
def test_damaged_files_are_named(model, folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": content[:-7], "empty": b"", "garbage": b"\xff" * len(content)}[damage])
    with pytest.raises(ValueError, match=f"{name} (is missing|cannot be read|has .* bytes|was altered)"):
        VectorIndex.load(folder, model)


def test_an_altered_item_is_noticed(model, folder):
    path = folder / "items.jsonl"
    path.write_bytes(path.read_bytes().replace(b"old", b"odd"))
    with pytest.raises(ValueError, match="items.jsonl was altered"):
        VectorIndex.load(folder, model)


def resign(folder: Path, **changes) -> None:
    """Write an index.json that agrees with the files, but for ``changes``."""
    path = folder / "index.json"
    data = json.loads(path.read_bytes())
    files = {name: store._measure(folder / name) for name in ("index.faiss", "items.jsonl")}
    path.write_text(json.dumps(data | {"files": files} | changes), encoding="utf-8")


def test_files_that_do_not_belong_together(model, folder):
    with (folder / "items.jsonl").open("ab") as file:
        file.write(store.encode_item({"id": "b", "text": "b", "image": [], "metadata": {}}))
    resign(folder)
    with pytest.raises(ValueError, match="items.jsonl holds 2 items, index.json says 1"):
        VectorIndex.load(folder, model)
    faiss.write_index(faiss.IndexFlatIP(32), str(folder / "index.faiss"))
    resign(folder)
    with pytest.raises(ValueError, match="index.faiss holds 0 vectors of 32 dimensions, index.json says 1 of 32"):
        VectorIndex.load(folder, model)


def test_vectors_that_faiss_cannot_read(model, folder):
    (folder / "index.faiss").write_bytes(b"IxFI" + b"\0" * 9)
    resign(folder)
    with pytest.raises(ValueError, match="index.faiss cannot be read"):
        VectorIndex.load(folder, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "'format' is 'other'"),
        ({"format_version": 99}, "format version 99, this release reads 1"),
        ({"count": 0}, "the index is empty"),
        ({"surplus": 1}, "fields are .*surplus"),
        ({"fingerprint": {"weights": "x"}}, "fingerprint has the fields"),
    ],
)
def test_manifests_that_cannot_be_read(model, folder, changes, message):
    resign(folder, **changes)
    with pytest.raises(ValueError, match=f"index.json cannot be read: .*{message}"):
        VectorIndex.load(folder, model)


def test_no_folder_and_no_index(model, tmp_path):
    with pytest.raises(ValueError, match="no index at .*: no such folder"):
        VectorIndex.load(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="index.json is missing"):
        VectorIndex.load(tmp_path, model)


def test_manifest_is_read_without_a_model(folder):
    manifest = store.read_manifest(folder)
    assert manifest.count == 1
    assert manifest.fingerprint.dim == 32

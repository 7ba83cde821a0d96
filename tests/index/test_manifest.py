from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import dataset

from sentence_vipyloqwen.files import measure
from sentence_vipyloqwen.index import EmbedOptions, VectorIndex
from sentence_vipyloqwen.index.maintenance import verify_index
from sentence_vipyloqwen.index.manifest import CHECKSUM, read_manifest, signed

OLD = [{"id": "old", "text": "cũ", "metadata": {"trang": 1}}]
NEW = [{"id": "new", "text": "mới"}, {"id": "more", "text": "nữa"}]


def ids(folder: Path, model) -> list[str]:
    return [item["id"] for item in VectorIndex.load(folder, model).items]


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """An index, alone in its folder."""
    return VectorIndex.build(model, OLD, tmp_path / "index").folder


def the_shard(folder: Path, suffix: str = ".parquet") -> Path:
    (path,) = (folder / ("vectors" if suffix == ".faiss" else "shards")).iterdir()
    return path


def test_files_are_those_of_the_description(model, folder):
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["index.json", "shards", "vectors"]
    manifest = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert manifest["format"] == "sentence-vipyloqwen-index"
    assert manifest["format_version"] == 3
    assert (manifest["count"], manifest["dim"], manifest["metric"]) == (1, 32, "cosine")
    table = pq.read_table(the_shard(folder))
    assert table.column_names == ["id", "text", "image", "metadata", "vector"]
    row = table.to_pylist()[0]
    assert (row["id"], row["text"], row["image"], json.loads(row["metadata"])) == ("old", "cũ", [], {"trang": 1})
    expected = model.encode([{"text": "cũ"}], normalize_embeddings=True)[0]
    np.testing.assert_allclose(row["vector"], expected, atol=1e-6)


def test_other_tools_read_the_folder_of_shards(model, tmp_path):
    items = [{"id": f"{n:02}", "text": f"mục {n}"} for n in range(9)]
    index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=4))
    table = dataset.dataset(index.folder / "shards", format="parquet").to_table(filter=pc.field("id") > "05")
    assert sorted(table["id"].to_pylist()) == ["06", "07", "08"]
    assert table.schema.field("vector").type.list_size == 32


# --- an existing folder -----------------------------------------------------------------------------------------------


def test_an_index_is_replaced_only_when_asked(model, folder, tmp_path):
    with pytest.raises(ValueError, match="index at .* already: pass overwrite=True"):
        VectorIndex.build(model, NEW, folder)
    assert ids(folder, model) == ["old"]
    VectorIndex.build(model, NEW, folder, overwrite=True)
    assert ids(folder, model) == ["new", "more"]
    assert os.listdir(tmp_path) == ["index"]
    for part in ("shards", "vectors"):
        assert len(list((folder / part).iterdir())) == 1  # nothing of the old one is left


def test_a_folder_that_is_no_index_is_never_replaced(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(ValueError, match="exists and is no index"):
            VectorIndex.build(model, NEW, target, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


@pytest.mark.parametrize("place", ["empty", "a/b/index"])
def test_an_empty_folder_is_free_and_missing_parents_are_made(model, tmp_path, place):
    (tmp_path / "empty").mkdir()
    VectorIndex.build(model, NEW, tmp_path / place)
    assert ids(tmp_path / place, model) == ["new", "more"]


def test_a_link_to_an_index_keeps_pointing_at_it(model, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    VectorIndex.build(model, NEW, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert ids(folder, model) == ids(tmp_path / "link", model) == ["new", "more"]


def test_a_failure_of_the_model_leaves_the_old_index(make_model, model, folder, monkeypatch):
    broken = make_model()

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(broken, "encode", fail)
    with pytest.raises(RuntimeError, match="no"):
        VectorIndex.build(broken, NEW, folder, overwrite=True)
    assert ids(folder, model) == ["old"]
    verify_index(folder)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".faiss", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty", "garbage"])
def test_damaged_files_are_named_and_a_new_build_mends_them(model, folder, suffix, damage):
    path = folder / suffix if suffix == "index.json" else the_shard(folder, suffix)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": content[:-7], "empty": b"", "garbage": b"\xff" * len(content)}[damage])
    with pytest.raises(ValueError, match=f"{path.name} (is missing|cannot be read|has .* bytes|was altered)"):
        VectorIndex.load(folder, model)
    VectorIndex.build(model, OLD, folder, overwrite=True)
    assert ids(folder, model) == ["old"]
    assert verify_index(folder) == {"files": 2, "items": 1, "vectors": 1, "images": 0}


def test_an_altered_byte_is_noticed_unless_asked_not_to_look(model, folder):
    path = the_shard(folder, ".faiss")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.faiss was altered"):
        VectorIndex.load(folder, model)
    VectorIndex.load(folder, model, checksum=False)
    with pytest.raises(ValueError, match=r"\.faiss was altered"):
        verify_index(folder)


def resign(folder: Path, **changes) -> None:
    """Write an index.json that agrees with the files, but for ``changes``."""
    path = folder / "index.json"
    data = json.loads(path.read_bytes())
    files = {name: measure(folder / name) for name in data["files"]}
    path.write_text(json.dumps(signed(data | {"files": files} | changes)), encoding="utf-8")


def test_vectors_that_are_not_those_of_the_items(model, folder):
    path = the_shard(folder, ".faiss")
    index = faiss.IndexFlatIP(32)
    index.add(np.ones((1, 32), np.float32))
    faiss.write_index(index, str(path))
    resign(folder)
    with pytest.raises(ValueError, match="does not hold the vectors of shards"):
        verify_index(folder)
    faiss.write_index(faiss.IndexFlatIP(32), str(path))
    resign(folder)
    with pytest.raises(ValueError, match="holds 0 vectors of 32 dimensions; expected are 1 of 32"):
        VectorIndex.load(folder, model)
    path.write_bytes(b"IxFI" + b"\0" * 9)
    resign(folder)
    with pytest.raises(ValueError, match=r"\.faiss cannot be read"):
        VectorIndex.load(folder, model)


@pytest.mark.parametrize("bad", [np.nan, 2.0])
def test_verify_finds_a_vector_that_is_not_of_unit_length(folder, bad):
    path = the_shard(folder)
    table = pq.read_table(path)
    vectors = np.full((1, 32), bad, np.float32)
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 32)
    pq.write_table(table.set_column(4, "vector", column), path)
    index = faiss.IndexFlatIP(32)
    index.add(vectors)
    faiss.write_index(index, str(the_shard(folder, ".faiss")))
    resign(folder)
    with pytest.raises(ValueError, match="does not hold|vector of row 0 is not of unit length"):
        verify_index(folder)


def test_verify_finds_an_altered_image(model, tmp_path, picture):
    folder = VectorIndex.build(model, [{"image": picture("red")}], tmp_path / "index").folder
    assert verify_index(folder)["images"] == 1
    (image,) = (folder / "images").iterdir()
    picture("blue").save(image)
    with pytest.raises(ValueError, match=r"\.png was altered"):
        verify_index(folder)
    image.unlink()
    with pytest.raises(ValueError, match=r"\.png is missing"):
        verify_index(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "'format' is 'other'"),
        ({"format_version": 1}, "format version 1, this release reads 2 and 3"),
        ({"surplus": 1}, "fields are .*surplus"),
        ({"fingerprint": {"weights": "x"}}, "fingerprint has the fields"),
    ],
)
def test_manifests_that_cannot_be_read(model, folder, changes, message):
    resign(folder, **changes)
    with pytest.raises(ValueError, match=f"index.json cannot be read: .*{message}.*overwrite=True"):
        VectorIndex.load(folder, model)


@pytest.mark.parametrize("change", ["count", "rows", "version", "checksum", "none"])
def test_an_index_json_that_was_altered_is_refused(model, folder, change):
    path = folder / "index.json"
    data = json.loads(path.read_bytes())
    if change == "rows":
        data["shards"][0]["rows"] = 2
    elif change == "none":
        del data[CHECKSUM]
    else:
        key, value = {"count": ("count", 7), "version": ("format_version", 2), "checksum": (CHECKSUM, "0" * 32)}[change]
        data[key] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    for read in (lambda: VectorIndex.load(folder, model), lambda: verify_index(folder), lambda: read_manifest(folder)):
        with pytest.raises(ValueError, match=r"index.json cannot be read: (it was altered|its fields are).*overwrite"):
            read()
    VectorIndex.build(model, OLD, folder, overwrite=True)
    assert ids(folder, model) == ["old"]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_an_index_json_that_is_cut_short_is_refused(model, folder, part):
    path = folder / "index.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"index.json cannot be read: .*overwrite=True"):
        VectorIndex.load(folder, model)


def test_an_index_of_the_version_before_is_read_and_goes_on_as_one_of_this(model, folder):
    path = folder / "index.json"
    data = {key: value for key, value in json.loads(path.read_bytes()).items() if key != CHECKSUM}
    path.write_text(json.dumps(data | {"format_version": 2}), encoding="utf-8")
    index = VectorIndex.load(folder, model)
    index.add(NEW)
    assert ids(folder, model) == ["old", "new", "more"]
    assert json.loads(path.read_bytes())["format_version"] == 3
    assert CHECKSUM in index.info()


def test_no_folder_and_no_index(model, tmp_path):
    with pytest.raises(ValueError, match="no index at .*: no such folder"):
        VectorIndex.load(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="index.json is missing"):
        VectorIndex.load(tmp_path, model)


def test_manifest_is_read_without_a_model_and_the_folder_may_be_moved(model, folder, tmp_path):
    shutil.move(folder, tmp_path / "moved")
    manifest = read_manifest(tmp_path / "moved")
    assert manifest.count == 1
    assert manifest.fingerprint.dim == 32
    assert ids(tmp_path / "moved", model) == ["old"]

"""Folders, manifests and items that are not what a well-meant index has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sentence_vipyloqwen.files import measure
from sentence_vipyloqwen.index import VectorIndex, fingerprint
from sentence_vipyloqwen.index.manifest import signed

ITEMS = [{"id": "a", "text": "một"}, {"id": "b", "text": "hai"}]


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return VectorIndex.build(model, ITEMS, tmp_path / "index").folder


def change(folder: Path, **changes) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(signed(json.loads(path.read_bytes()) | changes)), encoding="utf-8")


@pytest.mark.parametrize("name", ["images/holiday.jpg", "images/2024.png", "shards/mine.parquet", "vectors/a.faiss"])
def test_a_folder_of_the_user_s_own_that_bears_our_names_is_refused(model, tmp_path, name):
    precious = tmp_path / "album" / name
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="album exists and is no index"):
            VectorIndex.build(model, ITEMS, tmp_path / "album", overwrite=overwrite)
    assert precious.read_bytes() == b"precious"
    assert list((tmp_path / "album").iterdir()) == [precious.parent]


def test_compaction_leaves_pictures_that_a_user_put_beside_ours(model, tmp_path, picture):
    index = VectorIndex.build(model, [{"id": "r", "image": picture("red")}, *ITEMS], tmp_path / "index")
    (ours,) = (index.folder / "images").iterdir()
    (index.folder / "images" / "holiday.jpg").write_bytes(b"precious")
    index.remove(["r"])
    index.compact()
    assert (index.folder / "images" / "holiday.jpg").read_bytes() == b"precious"
    assert not ours.exists()


@pytest.mark.parametrize("image", ["../secret.png", "images/../../secret.png", "secret.png", "images/secret.png", ""])
def test_an_item_s_image_never_leads_out_of_the_index(model, tmp_path, picture, image):
    picture("blue").save(tmp_path / "secret.png")
    index = VectorIndex.build(model, [{"id": "r", "image": picture("red")}], tmp_path / "index")
    (shard,) = (index.folder / "shards").glob("*.parquet")
    table = pq.read_table(shard)
    place = table.column_names.index("image")
    tampered = table.set_column(place, "image", pa.array([[image]], pa.list_(pa.string())))
    pq.write_table(tampered, shard)
    files = json.loads((index.folder / "index.json").read_bytes())["files"]
    change(index.folder, files=files | {f"shards/{shard.name}": measure(shard)})
    with pytest.raises(ValueError, match="which leads out of its images/"):
        VectorIndex.load(index.folder, model).search(Image.new("RGB", (40, 20)))


@pytest.mark.parametrize("part", ["shards", "deleted", "approximate"])
def test_a_manifest_never_names_files_elsewhere(model, folder, tmp_path, part):
    shutil.copytree(folder / "shards", tmp_path / "elsewhere")
    data = json.loads((folder / "index.json").read_bytes())
    name = data["shards"][0]["name"]
    outside = f"../../elsewhere/{name}"
    changes = {
        "shards": {"shards": [{"name": outside, "rows": 2}]},
        "deleted": {"deleted": f"deleted/{outside}.parquet"},
        "approximate": {"approximate": {"file": f"search/{outside}.faiss", "factory": "HNSW8", "rows": 2}},
    }[part]
    change(folder, **changes)
    with pytest.raises(ValueError, match=r"index.json cannot be read: it names the files \['.*\.\./\.\./elsewhere"):
        VectorIndex.load(folder, model)
    assert [path.stem for path in (tmp_path / "elsewhere").iterdir()] == [name]


def test_files_that_the_manifest_names_beside_its_shards_are_refused(model, folder, tmp_path):
    """They would be deleted with the next change."""
    (tmp_path / "thesis.tex").write_text("x")
    files = json.loads((folder / "index.json").read_bytes())["files"]
    change(folder, files=files | {"../thesis.tex": measure(tmp_path / "thesis.tex")})
    with pytest.raises(ValueError, match=r"it names the files \['../thesis.tex'\], which do not belong to an index"):
        VectorIndex.load(folder, model)


def test_numbers_beyond_64_bits_are_compared_as_text(model, tmp_path):
    items = [{"id": "x", "text": "a", "metadata": {"n": 2**70}}, {"id": "y", "text": "b", "metadata": {"n": 1}}]
    index = VectorIndex.build(model, items, tmp_path / "index")
    assert [hit.id for hit in index.search("a", where=f"n = '{2**70}'")] == ["x"]
    with pytest.raises(ValueError, match="where is"):
        index.search("a", where=f"n = {2**70}")


def test_a_quantised_model_may_search_an_index_but_not_write_into_it(model, make_model, folder):
    quantised = make_model()
    quantised.quantization = SimpleNamespace(mode="int8", float_weights=fingerprint(model).weights)
    index = VectorIndex.load(folder, quantised)
    assert index.search("hai", k=1)[0].id == "b"
    with pytest.raises(ValueError, match=r"may query .* \(processing.quantize\): add items with the model"):
        index.add([{"id": "c", "text": "ba"}])
    assert len(VectorIndex.load(folder, model)) == 2

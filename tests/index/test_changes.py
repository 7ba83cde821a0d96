"""Adding, replacing, removing, compacting; what a run that was killed left is used; writers one at a time."""

from __future__ import annotations

import json
from pathlib import Path

import dying
import numpy as np
import pyarrow.compute as pc
import pytest
from filelock import FileLock

from sentence_vipyloqwen.index import EmbedOptions, VectorIndex, kinds, writing
from sentence_vipyloqwen.index.maintenance import remove_items


def held(index: VectorIndex) -> dict[str, str]:
    return {item["id"]: item["text"] for item in index.items}


@pytest.fixture
def index(model, tmp_path) -> VectorIndex:
    items = [{"id": f"{n:02}", "text": f"mục {n}", "metadata": {"n": n}} for n in range(20)]
    return VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=6))


def test_shards_hold_so_many_rows(index):
    assert [shard["rows"] for shard in index.info()["shards"]] == [6, 6, 6, 2]


def test_added_items_are_found_here_and_by_who_loads_it(model, index):
    assert index.add([{"id": "new", "text": "biển số xe"}]) == 1
    for opened in (index, VectorIndex.load(index.folder, model)):
        assert opened.search("biển số xe", k=1)[0].id == "new"
        assert len(opened) == 21
        assert opened.get("new")["text"] == "biển số xe"


def test_an_id_that_is_taken_is_refused_and_nothing_is_added(index):
    with pytest.raises(ValueError, match="item 1: id '03' is taken by the index; an id must be unique"):
        index.add([{"id": "x", "text": "a"}, {"id": "03", "text": "b"}])
    assert len(index) == 20
    assert "x" not in held(index)


def test_update_replaces_by_id_in_one_step(model, index):
    assert index.update([{"id": "03", "text": "biển số xe"}, {"id": "x", "text": "mới"}]) == 2
    assert index.search("biển số xe", k=1)[0].id == "03"
    assert held(VectorIndex.load(index.folder, model)) == held(index)
    assert len(index) == len(held(index)) == 21
    assert index.verify()["items"] == 21
    index.compact()
    assert held(index)["03"] == "biển số xe"
    assert index.verify() == {"files": 2, "items": 21, "vectors": 21, "images": 0}


def test_removed_items_are_found_no_more(model, index):
    assert index.search("mục 7", k=1)[0].id == "07"
    assert index.remove(["07", "00", "19"]) == 3
    for opened in (index, VectorIndex.load(index.folder, model)):
        assert len(opened) == 17
        assert not {"07", "00", "19"} & {hit.id for hit in opened.search("mục 7", k=99)}
        assert len(opened.search("mục 7", k=99)) == 17
    with pytest.raises(ValueError, match=r"no items with the ids \['07'\]"):
        index.get("07")
    assert index.add([{"id": "07", "text": "lại"}]) == 1


def test_ids_that_are_not_there_remove_nothing(index):
    with pytest.raises(ValueError, match=r"no items with the ids \['nope'\] \(1 of 2\)"):
        index.remove(["03", "nope"])
    with pytest.raises(ValueError, match="ids is the str '03'; allowed is a list"):
        index.remove("03")
    assert len(index) == 20


def test_everything_may_be_removed(model, index):
    index.remove(list(held(index)))
    assert index.search("mục", k=3) == []
    index.compact()
    empty = VectorIndex.load(index.folder, model)
    assert (len(empty), empty.items, empty.search(["a", "b"])) == (0, [], [[], []])
    assert empty.verify() == {"files": 0, "items": 0, "vectors": 0, "images": 0}
    empty.add([{"id": "a", "text": "một"}])
    assert empty.search("một", k=1)[0].id == "a"


def test_compaction_keeps_the_results_and_drops_what_nothing_names(model, tmp_path, picture):
    items = [{"id": "red", "image": picture("red")}, {"id": "blue", "image": picture("blue")}, {"id": "t", "text": "a"}]
    index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=1))
    index.remove(["blue"])
    (index.folder / "shards" / ".draft-1.parquet").write_bytes(b"half")
    (index.folder / "shards" / "0123.parquet").write_bytes(b"of a run that was killed")
    before = index.search(picture("red"), k=9)
    index.compact()
    assert index.search(picture("red"), k=9) == before
    names = sorted(path.suffix for path in index.folder.rglob("*") if path.is_file() and path.name[0] != ".")
    assert names == [".faiss", ".json", ".parquet", ".png"]


def test_many_shards_are_joined(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MOST_SHARDS", 3)
    monkeypatch.setattr(writing, "JOINED_ROWS", 8)
    items = [{"id": f"{n:02}", "text": f"mục {n}"} for n in range(20)]
    index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=3))
    assert [shard["rows"] for shard in index.info()["shards"]] == [9, 9, 2]
    assert list(held(index)) == [item["id"] for item in items]
    index.verify()


# --- going on ---------------------------------------------------------------------------------------------------------


class Cut(BaseException):
    """The end of a run."""


def cut_after(model, calls: int, monkeypatch) -> list[int]:
    """Have the model's encode end the run after so many calls; how many inputs each call had."""
    encode, seen = model.encode, []

    def counting(inputs, **kwargs):
        if len(seen) == calls:
            raise Cut
        seen.append(len(inputs))
        return encode(inputs, **kwargs)

    monkeypatch.setattr(model, "encode", counting)
    return seen


@pytest.mark.parametrize("change", ["build", "add"])
def test_the_next_run_goes_on_from_the_last_shard(make_model, tmp_path, monkeypatch, change):
    items = [{"id": f"{n}", "text": f"mục {n}"} for n in range(10)]
    model = make_model()
    if change == "add":
        VectorIndex.build(model, [{"id": "first", "text": "đầu"}], tmp_path / "index")

    def run() -> VectorIndex:
        if change == "build":
            return VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=3))
        index = VectorIndex.load(tmp_path / "index", model)
        index.add(items, EmbedOptions(shard_rows=3))
        return index

    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(model, 2, patch)
        run()
    with monkeypatch.context() as patch:
        seen = cut_after(model, 99, patch)
        index = run()
    assert seen == [3, 1]  # of 3, 3, 3, 1
    assert set(held(index)) >= {item["id"] for item in items}
    index.verify()


def test_a_build_anew_embeds_only_shards_that_changed(make_model, tmp_path, monkeypatch, picture):
    model, path = make_model(), tmp_path / "p.png"
    picture("red").save(path)
    items = [{"id": f"{n}", "text": f"mục {n}"} for n in range(9)] + [{"id": "p", "image": str(path)}]
    VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=3))
    items[4]["text"] = "khác"
    picture("blue").save(path)  # the same name, another content
    with monkeypatch.context() as patch:
        seen = cut_after(model, 99, patch)
        index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(shard_rows=3), overwrite=True)
    assert seen == [3, 1]
    assert index.search("khác", k=1)[0].id == "4"
    assert index.search(picture("blue"), k=1)[0].score == 1.0


# --- several processes ------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_is_writing(model, index):
    with writing.locked(index.folder, "add"):
        for change in (
            lambda: remove_items(index.folder, ["03"]),
            index.compact,
            lambda: VectorIndex.build(model, [{"text": "a"}], index.folder, overwrite=True),
        ):
            with pytest.raises(ValueError, match=r"is being written by process \d+ on .* \(add\); .*one writer"):
                change()
        assert VectorIndex.load(index.folder, model).search("mục 7", k=1)[0].id == "07"  # readers are not
    lock = FileLock(index.folder / writing.LOCK_FILE)
    with lock, pytest.raises(ValueError, match="is being written by another process"):
        index.compact()


def test_a_change_begins_from_what_others_have_made_of_it(model, index):
    other = VectorIndex.load(index.folder, model)
    other.remove(["03"])
    other.compact()
    index.add([{"id": "x", "text": "mới"}])
    assert len(index) == 20
    assert "03" not in held(index)


def test_an_open_index_shows_what_others_have_made_of_it_when_asked(model, index, make_model):
    reader = VectorIndex.load(index.folder, model)
    assert not index.refresh()
    assert not reader.refresh()
    index.remove(["03"])
    index.add([{"id": "x", "text": "mới"}])
    index.compact()
    assert "03" in held(reader)  # it stays as it was opened, files of it that are gone from the folder included
    assert reader.search("mục 3", k=1)[0].id == "03"
    assert reader.refresh()
    assert not reader.refresh()
    assert held(reader) == held(index)
    assert reader.search("mới", k=1)[0].id == "x"
    VectorIndex.build(make_model(dim=16), [{"text": "a"}], index.folder, overwrite=True)
    with pytest.raises(ValueError, match="was built with the model"):
        reader.refresh()
    assert reader.search("mới", k=1)[0].id == "x"


def test_items_of_an_index_have_its_prompt(model, tmp_path):
    index = VectorIndex.build(model, [{"text": "số xe"}], tmp_path / "index", EmbedOptions(prompt_name="ocr"))
    index.add([{"id": "x", "text": "biển số"}])
    assert index.search("biển số", k=1, prompt_name="ocr")[0].score == 1.0
    index.update([{"id": "x", "text": "biển"}], EmbedOptions(prompt_name="ocr"))
    plain = VectorIndex.build(model, [{"text": "số xe"}], tmp_path / "plain")
    for other, name in ((index, "vqa"), (plain, "ocr")):
        with pytest.raises(ValueError, match=f"prompt_name is '{name}'; the items of this index have"):
            other.add([{"id": "y", "text": "a"}], EmbedOptions(prompt_name=name))


def test_a_reader_while_another_process_compacts(model, tmp_path):
    folder, acknowledged = tmp_path / "index", tmp_path / "acknowledged"
    dying.build(folder)
    process = dying.start(dying.keep_changing, folder, acknowledged)
    seen = 0
    while process.is_alive():
        index = VectorIndex.load(folder, model)
        assert index.search("mục 5 bản 0", k=1)[0].score == 1.0
        seen += 1
    process.join()
    assert process.exitcode == 0
    assert seen > 3


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[dict]:
    return [{"id": f"{n:04}", "text": f"từ{n % 40} chữ{n % 33} {n % 27}", "metadata": {"n": n}} for n in range(600)]


@pytest.mark.parametrize("kind", ["Flat", "HNSW", "IVF,SQ8", "IVF,PQ", "binary", "MRL16", "MRL16,HNSW16", "IVF4,Flat"])
def test_every_kind_scores_by_exact_cosines_and_finds_nearly_all(model, tmp_path, many, kind):
    exact = VectorIndex.build(model, many, tmp_path / "exact", kind="Flat")
    index = VectorIndex.build(model, many, tmp_path / "index", kind=kind)
    assert (index.info()["approximate"] is None) == (kind == "Flat")
    index = VectorIndex.load(tmp_path / "index", model)
    queries = [f"từ{n} chữ{n}" for n in range(20)]
    found = 0
    for hits, expected in zip(index.search(queries, k=5), exact.search(queries, k=5), strict=True):
        found += sum(hit.score >= expected[-1].score for hit in hits)
    # Random vectors say little by half of their dimensions; a trained model's say more.
    assert found / 100 >= (0.6 if "MRL" in kind else 0.9)
    (all_scores,) = exact.search(queries[:1], k=600)
    by_id = {hit.id: hit.score for hit in all_scores}
    assert all(hit.score == by_id[hit.id] for hit in index.search(queries[0], k=5))
    assert index.search(queries, k=5, exact=True) == exact.search(queries, k=5)
    assert len(index.search(queries[0], k=9999)) == 600
    assert index.search(queries[0], k=3, where="n < 50") == exact.search(queries[0], k=3, where="n < 50")


def test_rows_behind_an_approximate_index_are_compared_and_removed_ones_passed_over(model, tmp_path, many):
    index = VectorIndex.build(model, many, tmp_path / "index", kind="HNSW")
    index.add([{"id": "new", "text": "biển số xe"}])
    assert index.info()["approximate"]["rows"] == 600
    assert index.search("biển số xe", k=1)[0].id == "new"
    best = [hit.id for hit in index.search("từ3 chữ3 3", k=20)]
    index.remove(best)
    again = [hit.id for hit in index.search("từ3 chữ3 3", k=20)]
    assert len(again) == 20
    assert not set(best) & set(again)
    index.add([{"id": f"m{n}", "text": f"thêm {n}"} for n in range(200)])
    assert index.info()["approximate"]["rows"] == 801  # made anew: too many stood behind it


def test_the_default_kind_comes_from_the_count(monkeypatch, model, tmp_path, many):
    assert VectorIndex.build(model, many, tmp_path / "few").info()["approximate"] is None
    monkeypatch.setattr(kinds, "EXACT_UP_TO", 500)
    assert VectorIndex.build(model, many, tmp_path / "lot").info()["approximate"]["factory"] == "IVF8,SQ8"


@pytest.mark.parametrize("kind", ["Nope", "MRL99", "IVF,PQ,x", ""])
def test_a_kind_that_faiss_does_not_know(model, tmp_path, kind):
    with pytest.raises(ValueError, match=f"kind is {kind!r}.*allowed are auto, Flat"):
        VectorIndex.build(model, [{"text": "a"}], tmp_path / "index", kind=kind)
    assert not (tmp_path / "index").exists()


# --- conditions -------------------------------------------------------------------------------------------------------


def test_where_as_text_and_as_expression(index):
    for where in ("n >= 5 AND n < 9", (pc.field("n") >= 5) & (pc.field("n") < 9)):
        hits = index.search("mục 17", k=99, where=where)
        assert sorted(hit.id for hit in hits) == ["05", "06", "07", "08"]
    assert index.search("mục 17", where="n > 99") == []
    index.remove(["06"])
    assert sorted(hit.id for hit in index.search("mục 17", where="n BETWEEN 5 AND 8")) == ["05", "07", "08"]


def test_vectors_of_one_s_own(model, index):
    vectors = model.encode([{"text": "mục 3"}, {"text": "mục 4"}], normalize_embeddings=True)
    assert index.search_vectors(vectors, k=2) == index.search(["mục 3", "mục 4"], k=2)
    for wrong in (vectors[0], vectors[:, :5], np.full((1, 32), np.nan)):
        with pytest.raises(ValueError, match=r"allowed is \(Q, 32\), all finite"):
            index.search_vectors(wrong)
    for wrong, length in ((5 * vectors, "5"), (0 * vectors, "0")):
        with pytest.raises(ValueError, match=rf"vectors\[0\] is {length} long \(2 of 2 .* allowed are unit vectors"):
            index.search_vectors(wrong)


def test_ten_megabytes_of_metadata_come_back_as_they_were(model, tmp_path):
    metadata = {"dài": "ê" * 5_000_000, "số": [1, 2.5, None, {"x": True}]}
    index = VectorIndex.build(model, [{"id": "a", "text": "a", "metadata": metadata}], tmp_path / "index")
    assert VectorIndex.load(index.folder, model).items[0]["metadata"] == metadata


def test_bad_items_are_left_out_and_listed(model, tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [json.dumps({"id": "a", "text": "a"}).encode(), b"{", b'{"text": "\xff"}', b'{"id": "a", "text": "b"}']
    path.write_bytes(b"\n".join([*lines, json.dumps({"id": "b", "text": "b"}).encode()]))
    index = VectorIndex.build(model, path, tmp_path / "index", EmbedOptions(on_error="skip"))
    assert list(held(index)) == ["a", "b"]
    assert [Path(item.where).name for item in index.skipped] == ["items.jsonl:2", "items.jsonl:3", "items.jsonl:4"]
    for item, reason in zip(index.skipped, ("not JSON", "not UTF-8", "id 'a' is taken"), strict=True):
        assert reason in item.reason
    with pytest.raises(ValueError, match="on_error is 'pass'; allowed is one of"):
        index.add(path, EmbedOptions(on_error="pass"))

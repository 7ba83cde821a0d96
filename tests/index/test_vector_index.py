from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions, VectorIndex, fingerprint
from sentence_vipyloqwen.modules import images

TEXTS = [
    "hóa đơn số 12", "hợp đồng thuê nhà", "biển số xe", "tổng số tiền phải trả", "thời hạn thanh toán",
    "a red circle", "a blue square", "发票总金额", "合同期限", "tiền thuê nhà hàng tháng", "số tài khoản",
    "ngày ký hợp đồng",
]  # fmt: skip


def brute_force(model, items, query, k: int, prompt_name: str | None = None) -> list[tuple[str, float]]:
    """Ids and cosines of the best k, by plain numpy."""
    vectors = model.encode(items, normalize_embeddings=True)
    wanted = model.encode([query], normalize_embeddings=True, prompt_name=prompt_name)[0]
    cosines = (vectors @ wanted).tolist()
    return sorted(((str(i), c) for i, c in enumerate(cosines)), key=lambda pair: (-round(pair[1], 5), pair[0]))[:k]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def mixed(tmp_path, picture):
    """Items of every kind, as files, and what of each is embedded."""
    for name, color in (("đỏ.png", "red"), ("xanh.png", "blue"), ("vàng.jpg", "gold")):
        picture(color).save(tmp_path / name)
    red, blue, gold = (str(tmp_path / name) for name in ("đỏ.png", "xanh.png", "vàng.jpg"))
    inputs = [
        *({"text": text} for text in TEXTS),
        {"image": [red]},
        {"image": [blue], "text": "a blue square"},
        {"image": [red, blue, gold], "text": "ba màu"},
    ]
    items = [{"text": item.get("text"), "image": item.get("image", [])} for item in inputs]
    return items, inputs


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("loaded", [False, True])
def test_search_equals_brute_force(model, mixed, tmp_path, k, loaded, picture):
    items, inputs = mixed
    index = VectorIndex.build(model, items, tmp_path / "index")
    if loaded:
        index = VectorIndex.load(tmp_path / "index", model)
    for query in (
        {"text": "tiền thuê nhà"},
        {"image": [picture("red")]},
        {"text": "ba màu", "image": [picture("gold"), picture("blue")]},
    ):
        hits = index.search(query, k=k)
        expected = brute_force(model, inputs, query, k)
        assert [hit.id for hit in hits] == [id for id, _ in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [score for _, score in expected], atol=1e-5)
        assert [hit.rank for hit in hits] == list(range(1, min(k, len(items)) + 1))
        assert hits[0].item["text"] == (items[int(hits[0].id)]["text"] or "")


def test_prompt_name_is_the_same_as_the_prefix_in_the_text(model, tmp_path):
    index = VectorIndex.build(model, [{"text": text} for text in [*TEXTS, "<ocr> số tài khoản"]], tmp_path / "index")
    assert index.search("số tài khoản", prompt_name="ocr") == index.search("<ocr> số tài khoản")
    assert index.search("số tài khoản", prompt_name="ocr", k=1)[0].id == "12"
    assert index.search("số tài khoản", k=1)[0].id == "10"


def test_items_may_be_embedded_with_a_prompt(model, tmp_path):
    index = VectorIndex.build(model, [{"text": "số xe"}], tmp_path / "index", EmbedOptions(prompt_name="ocr"))
    assert index.search("số xe", prompt_name="ocr")[0].score == 1.0
    assert VectorIndex.load(tmp_path / "index", model).info()["prompt_name"] == "ocr"


def test_several_queries_give_a_list_of_lists(model, mixed, tmp_path, picture):
    index = VectorIndex.build(model, mixed[0], tmp_path / "index")
    path = tmp_path / "đỏ.png"
    queries = ["biển số xe", path, picture("red"), {"text": "ba màu"}, np.asarray(picture("red"))]
    results = index.search(queries, k=3)
    assert results == [index.search(query, k=3) for query in queries]
    assert results[1] == results[2] == results[4] == index.search({"image": str(path)}, k=3)
    assert index.search(tuple(queries), k=3) == results
    assert index.search([], k=3) == []


def test_text_that_looks_like_a_path_is_text(model, mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a name that is always the same, so that its hash is
    index = VectorIndex.build(model, mixed[0], tmp_path / "index")
    assert index.search("đỏ.png", k=1)[0].score < 0.99
    assert index.search(Path("đỏ.png"), k=1)[0].score == pytest.approx(1)


def test_equal_scores_stand_in_the_order_of_their_ids_also_at_the_cut(model, tmp_path):
    ids = [f"{number:03}" for number in np.random.default_rng(0).permutation(300)]
    items = [{"id": id, "text": "giống nhau"} for id in ids] + [{"id": "best", "text": "giống nhau thật"}]
    index = VectorIndex.build(model, items, tmp_path / "index")
    for k in (1, 2, 7, 150, 301):
        hits = index.search("giống nhau thật", k=k)
        assert [hit.id for hit in hits] == ["best", *sorted(ids)][:k]
    several = index.search(["giống nhau thật", "hóa đơn"] * 20, k=7)
    assert [[hit.id for hit in hits] for hits in several[::2]] == [["best", *sorted(ids)[:6]]] * 20


def test_scores_are_cosines(model, tmp_path):
    index = VectorIndex.build(model, [{"text": text} for text in TEXTS], tmp_path / "index")
    scores = [hit.score for hit in index.search(TEXTS[0], k=100)]
    assert scores[0] == 1.0
    assert all(-1 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, None])
def test_k_must_be_a_whole_number_from_1(model, tmp_path, k):
    index = VectorIndex.build(model, [{"text": "a"}], tmp_path / "index")
    with pytest.raises(ValueError, match=f"k is {k}; allowed"):
        index.search("a", k=k)


@pytest.mark.parametrize("query", ["", {}, {"text": ""}, {"image": []}, 7, None, {"title": "a"}])
def test_bad_queries_name_their_position(model, tmp_path, query):
    index = VectorIndex.build(model, [{"text": "a"}], tmp_path / "index")
    with pytest.raises(ValueError, match="Query 1"):
        index.search(["tốt", query])


def test_info_len_and_repr(model, tmp_path):
    index = VectorIndex.build(model, [{"text": text} for text in TEXTS], tmp_path / "index")
    assert len(index) == len(index.items) == 12
    assert index.info()["count"] == 12
    assert index.info()["dim"] == 32
    assert index.info()["metric"] == "cosine"
    assert index.info()["fingerprint"]["prompts"] == {"ocr": "<ocr> "}
    assert index.info() == VectorIndex.load(tmp_path / "index", model).info()
    assert "12 items, 32 dimensions" in repr(index)


# --- items ------------------------------------------------------------------------------------------------------------


def test_jsonl_with_image_paths_relative_to_it(model, tmp_path, picture, monkeypatch):
    (tmp_path / "dữ liệu").mkdir()
    picture("green").save(tmp_path / "dữ liệu" / "ảnh.png")
    rows = [
        {"id": "một", "text": "dòng\u2028một", "metadata": {"trang": 1, "nhãn": ["a", None, "日本"]}},
        {"id": 7, "image": "ảnh.png"},
        {"text": "không id"},
    ]
    path = write_jsonl(tmp_path / "dữ liệu" / "mục.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n")  # a byte order mark and an empty line
    monkeypatch.chdir(tmp_path)
    VectorIndex.build(model, "dữ liệu/mục.jsonl", tmp_path / "chỉ mục")
    monkeypatch.chdir("/")
    index = VectorIndex.load(tmp_path / "chỉ mục", model)
    image = str(tmp_path / "dữ liệu" / "ảnh.png")
    assert index.items == [
        {"id": "một", "text": "dòng\u2028một", "image": [], "metadata": {"trang": 1, "nhãn": ["a", None, "日本"]}},
        {"id": "7", "text": "", "image": [image], "metadata": {}},
        {"id": "2", "text": "không id", "image": [], "metadata": {}},
    ]


def test_images_without_a_file_are_kept_in_the_index(model, tmp_path, picture):
    buffer = io.BytesIO()
    picture("navy").save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    items = [
        {"image": picture("red")},
        {"image": [picture("red"), np.full((4, 6, 3), 200, np.uint8)]},
        {"image": uri},
        {"image": picture((0, 10, 20, 30), mode="CMYK")},
    ]
    index = VectorIndex.build(model, (item for item in items), tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "moved")
    moved = VectorIndex.load(tmp_path / "moved", model)
    assert len(list((tmp_path / "moved" / "images").iterdir())) == 4  # the red one is stored once
    for item, row in zip(items, moved.items, strict=True):
        assert all(Path(path).parent == tmp_path / "moved" / "images" for path in row["image"])
        assert moved.search({"image": item["image"]}, k=1)[0].item == row
        assert moved.search({"image": item["image"]}, k=1)[0].score == pytest.approx(1)
    assert Image.open(moved.items[2]["image"][0]).getpixel((0, 0)) == (0, 0, 128)
    assert len(index) == 4


def test_an_index_built_again_from_its_own_items_keeps_its_images(model, tmp_path, picture):
    folder = tmp_path / "index"
    VectorIndex.build(model, [{"id": "r", "image": picture("red")}, {"text": "chữ"}], folder)
    items = VectorIndex.load(folder, model).items
    again = VectorIndex.build(model, items, folder, overwrite=True)
    again.compact()
    assert Path(again.items[0]["image"][0]).is_file()
    assert VectorIndex.load(folder, model).search(picture("red"), k=1)[0].id == "r"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("chữ", "got a str"),
        ({"text": "a", "title": "b"}, r"unknown keys \['title'\].*'metadata'"),
        ({"id": "x"}, "nothing to embed"),
        ({"text": " \n"}, "nothing to embed"),
        ({"text": 5}, "'text' is a int; allowed is a str"),
        ({"text": "a", "id": ""}, "'id' is ''"),
        ({"text": "a", "id": 1.5}, "'id' is 1.5"),
        ({"text": "a", "id": True}, "'id' is True"),
        ({"text": "a", "metadata": [1]}, "'metadata' is a list; allowed is a dict"),
        ({"text": "a", "metadata": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"text": "a", "metadata": {"x": {1, 2}}}, "cannot be written as JSON.*set"),
        ({"text": "\ud800"}, "cannot be written as JSON.*surrogate"),
        ({"image": "không có.png"}, "no image file .*không có.png"),
        ({"image": "https://example.com/a.png"}, "URL.*download"),
        ({"image": 3}, "an image is a int; allowed"),
        ({"image": "data:image/png;base64,AAAA"}, "cannot read the image"),
        ({"image": ["a.png"] * 6}, "6 images; at most 5"),
        ({"id": "first", "text": "a"}, "id 'first' is taken by item 0"),
    ],
)
def test_bad_items_name_their_position(model, tmp_path, item, message):
    items = [{"id": "first", "text": "tốt"}, item]
    with pytest.raises(ValueError, match=f"^item 1: .*{message}"):
        VectorIndex.build(model, items, tmp_path / "index")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1]", "got a list"),
        (b'{"text": "a", "text": "b"}', "key 'text' occurs twice"),
        (b'{"text": "a", "metadata": {"x": [{"y": 1, "y": 1}]}}', "key 'y' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "metadata": ' + b'{"x":' * 100_000, "nested too deeply"),
        (b'{"id": "x", "text": "b"}', "id 'x' is taken by .*items.jsonl:1"),
    ],
)
def test_bad_lines_name_file_and_line(model, tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"id": "x", "text": "a"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"items.jsonl:3: .*{message}"):
        VectorIndex.build(model, path, tmp_path / "index")


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def test_metadata_nested_too_deeply_names_its_position(model, tmp_path):
    with pytest.raises(ValueError, match="^item 0: cannot be written as JSON.*recursion"):
        VectorIndex.build(model, [{"text": "a", "metadata": nested(100_000)}], tmp_path / "index")


@pytest.fixture
def bad_image(tmp_path, picture, monkeypatch) -> Callable[[str], str]:
    """Make a file that the header of an image rules out, and return its name."""

    def make(fault: str) -> str:
        path = tmp_path / "hỏng.png"
        picture("red", (402, 2) if fault == "long" else (40, 20)).save(path)
        if fault == "text":
            path.write_text("không phải ảnh", encoding="utf-8")
        elif fault == "cut":
            path.write_bytes(path.read_bytes()[:20])
        elif fault == "large":
            monkeypatch.setattr(images, "MAX_SOURCE_PIXELS", 799)
        elif fault == "bomb":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)  # Pillow refuses from twice as many
        return path.name

    return make


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("text", "cannot read the image .*hỏng.png.*cannot identify"),
        ("cut", "cannot read the image .*hỏng.png"),
        ("long", "hỏng.png' measures 402x2; the aspect ratio must be at most 200"),
        ("large", "hỏng.png' has 800 pixels; at most 799"),
        ("bomb", "the image .*hỏng.png.* is too large: .*decompression bomb"),
    ],
)
def test_a_broken_image_names_its_line_before_anything_is_embedded(
    make_model, tmp_path, monkeypatch, bad_image, fault, message
):
    model = make_model()
    monkeypatch.setattr(model, "encode", lambda *args, **kwargs: pytest.fail("embedded"))
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c", "image": [bad_image(fault)]}]
    path = write_jsonl(tmp_path / "items.jsonl", rows)
    with pytest.raises(ValueError, match=f"items.jsonl:3: .*{message}"):
        VectorIndex.build(model, path, tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^item 2: .*{message}"):
        VectorIndex.build(model, rows, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_position_as_id_collides_with_a_given_id(model, tmp_path):
    with pytest.raises(ValueError, match="item 1: id '1' is taken by item 0"):
        VectorIndex.build(model, [{"id": "1", "text": "a"}, {"text": "b"}], tmp_path / "index")


@pytest.mark.parametrize("kind", ["list", "file", "dict", "missing"])
def test_no_items_is_an_error(model, tmp_path, kind):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    items = {"list": [], "file": tmp_path / "empty.jsonl", "dict": {"text": "a"}, "missing": "không có.jsonl"}[kind]
    expected = {
        "list": "no items to index",
        "file": "no items to index in .*empty.jsonl",
        "dict": "one dict",
        "missing": "cannot read the items of không có.jsonl",
    }[kind]
    with pytest.raises(ValueError, match=expected):
        VectorIndex.build(model, items, tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_vector_without_direction_names_the_item(make_model, tmp_path, monkeypatch, bad):
    model = make_model()
    encode = model.encode

    def spoiled(inputs, **kwargs):
        vectors = encode(inputs, **kwargs)
        vectors[[item["text"] == "b" for item in inputs]] = bad
        return vectors

    monkeypatch.setattr(model, "encode", spoiled)
    items = [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}]
    with pytest.raises(ValueError, match="^item 1: .*NaN or infinite.*: item 'b'"):
        VectorIndex.build(model, items, tmp_path / "index")
    assert not any(tmp_path.iterdir())
    index = VectorIndex.build(model, items, tmp_path / "index", EmbedOptions(on_error="skip"))
    assert [item["id"] for item in index.items] == ["a"]
    assert [(skipped.where, skipped.id) for skipped in index.skipped] == [("item 1", "b")]
    assert "NaN or infinite" in index.skipped[0].reason


# --- another model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"truncate_dim": 16}, "dim"),
        ({"dim": 48}, "weights, dim"),
        ({"prompts": {}}, "prompts"),
        ({"max_seq_length": 9}, "processing.max_seq_length"),
    ],
)
def test_another_model_is_refused_with_both_fingerprints_and_the_way_out(model, make_model, tmp_path, change, fact):
    VectorIndex.build(model, [{"text": "a"}], tmp_path / "index")
    other = make_model(**change)
    with pytest.raises(ValueError) as caught:
        VectorIndex.load(tmp_path / "index", other)
    message = str(caught.value)
    assert fingerprint(model).digest in message
    assert fingerprint(other).digest in message
    assert f"differ in: {fact}." in message
    assert "overwrite=True" in message


def test_truncated_dimension_is_honoured(make_model, tmp_path):
    short = make_model(truncate_dim=8)
    VectorIndex.build(short, [{"text": text} for text in TEXTS], tmp_path / "index")
    index = VectorIndex.load(tmp_path / "index", make_model(truncate_dim=8))
    assert index.info()["dim"] == 8
    assert index.search(TEXTS[3], k=1)[0].id == "3"
    (shard,) = (tmp_path / "index" / "shards").glob("*.parquet")
    stored = np.stack(pq.read_table(shard)["vector"].to_numpy())
    assert stored.shape == (12, 8)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_an_index_of_ours_is_searched_by_the_stock_model_alike(folder, mixed, tmp_path, picture):
    items, inputs = mixed
    ours = ViPyloQwen(folder, device="cpu")
    index = VectorIndex.build(ours, items, tmp_path / "index")
    stock = VectorIndex.load(tmp_path / "index", SentenceTransformer(str(folder), device="cpu"))
    queries = ["hóa đơn số 12", tmp_path / "đỏ.png", {"text": "màu gì?", "image": [picture("red"), picture("blue")]}]
    for query, mine, theirs in zip(queries, index.search(queries, k=15), stock.search(queries, k=15), strict=True):
        by_id = {hit.id: hit.score for hit in theirs}
        np.testing.assert_allclose([hit.score for hit in mine], [by_id[hit.id] for hit in mine], atol=1e-3)
        assert mine[0].id == theirs[0].id, query
    asked = {"text": "màu gì?", "image": [picture("red")]}
    expected = brute_force(ours, inputs, asked, 5, "vqa_single")
    assert [hit.id for hit in index.search(asked, k=5, prompt_name="vqa_single")] == [id for id, _ in expected]

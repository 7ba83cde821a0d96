from __future__ import annotations

import sys
import zlib
from pathlib import Path

import datasets
import pytest
from PIL import Image

from sentence_vipyloqwen.index import EmbedOptions, VectorIndex
from sentence_vipyloqwen.index.items import read_items
from sentence_vipyloqwen.index.sources import Folder, located

WIDE = 200, 100  # points, and so pixels at 72 dpi


def write_pdf(path: Path, texts: list[str], size: tuple[int, int] = WIDE) -> None:
    """A PDF of a page for each text, written by hand."""
    pages = [3 + 2 * i for i in range(len(texts))]
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{' '.join(f'{n} 0 R' for n in pages)}]/Count {len(texts)}>>".encode(),
    ]
    font = b"<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>"
    for number, text in zip(pages, texts, strict=True):
        box = f"[0 0 {size[0]} {size[1]}]".encode()
        head = b"<</Type/Page/Parent 2 0 R/MediaBox%b/Resources<</Font%b>>/Contents %d 0 R>>"
        stream = zlib.compress(f"BT /F1 20 Tf 10 40 Td ({text}) Tj ET".encode())
        objects.append(head % (box, font, number + 1))
        objects.append(b"<</Length %d/Filter/FlateDecode>>stream\n%b\nendstream" % (len(stream), stream))
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj%b endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    body += b"xref\n0 %d\n0000000000 65535 f \n%btrailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (
        count,
        table,
        count,
        len(body),
    )
    path.write_bytes(body)


def items_of(source, index: Path, **options) -> dict[str, dict]:
    index.mkdir(exist_ok=True)
    return {item["id"]: item for _, item in read_items(source, index.resolve(), **options)}


def size_of(index: Path, item: dict) -> tuple[int, int]:
    with Image.open(index / item["image"][0]) as image:
        return image.size


@pytest.fixture
def folder(tmp_path: Path, picture) -> Path:
    """Files of every kind, some in a subfolder, one with a Vietnamese name."""
    folder = tmp_path / "tài liệu"
    (folder / "b").mkdir(parents=True)
    picture("red").save(folder / "ảnh.PNG")
    (folder / "b" / "ghi chú.txt").write_bytes("\ufeffHà Nội\r\nlà thủ đô".encode())
    (folder / "a.md").write_text("# Xin chào", encoding="utf-8")
    write_pdf(folder / "b" / "bill.pdf", ["first page", "second page"])
    return folder


def test_a_folder_is_its_files_and_pages_in_order(folder: Path, tmp_path: Path) -> None:
    items = items_of(folder, tmp_path / "index")
    assert list(items) == ["a.md", "b/bill.pdf#page=1", "b/bill.pdf#page=2", "b/ghi chú.txt", "ảnh.PNG"]
    assert items["a.md"] == {
        "id": "a.md",
        "text": "# Xin chào",
        "image": [],
        "metadata": {"kind": "text", "file": "a.md"},
    }
    assert items["b/ghi chú.txt"]["text"] == "Hà Nội\nlà thủ đô"
    assert items["ảnh.PNG"]["image"] == [str(folder / "ảnh.PNG")]  # stays where it is
    page = items["b/bill.pdf#page=2"]
    assert page["metadata"] == {"kind": "page", "file": "b/bill.pdf", "page": 2, "text": "second page"}
    assert page["text"] == ""  # a page is embedded as it looks
    assert page["image"][0].startswith("images/")


def test_a_folder_is_indexed_and_its_pages_are_found(model, folder: Path, tmp_path: Path) -> None:
    index = VectorIndex.build(model, folder, tmp_path / "index")
    assert len(index) == 5
    assert index.search("# Xin chào", k=1)[0].id == "a.md"
    found = index.search({"image": Image.open(index.get("b/bill.pdf#page=2")["image"][0])}, k=1)[0]
    assert (found.id, round(found.score, 5)) == ("b/bill.pdf#page=2", 1)
    assert [hit.id for hit in index.search("x", where="file = 'b/bill.pdf' AND page = 1")] == ["b/bill.pdf#page=1"]
    assert index.verify()["images"] == 2


def test_an_index_among_its_items_and_hidden_files_are_passed_over(model, folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / ".DS_Store").write_bytes(b"x")
    index = VectorIndex.build(model, folder, folder / "index")
    assert len(VectorIndex.build(model, folder, folder / "index", overwrite=True)) == len(index) == 5


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("z.docx", b"PK", "the kind of file '.docx' is not read; allowed are ('.png'"),
        ("Makefile", b"all:", "the kind of file '' is not read"),
        ("z.txt", b"\xff\xfe", "not UTF-8"),
        ("z.txt", b" \n", "the file is empty"),
        ("z.pdf", b"%PDF-1.4 nothing", "cannot be read as a PDF"),
        ("z.png", b"nothing", "cannot read the image"),
        ("z.tif", b"nothing", "cannot read the image"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(model, folder: Path, tmp_path: Path, name, content, reason) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="Makefile|z\\.") as error:
        VectorIndex.build(model, folder, tmp_path / "index")
    assert str(folder / name) in str(error.value)
    assert reason in str(error.value)
    index = VectorIndex.build(model, folder, tmp_path / "index", EmbedOptions(on_error="skip"))
    assert [(skipped.where, reason in skipped.reason) for skipped in index.skipped] == [(str(folder / name), True)]
    assert len(index) == 5


def test_a_pdf_alone(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["x"])
    assert list(items_of(tmp_path / "a.pdf", tmp_path / "index")) == ["a.pdf#page=1"]
    assert list(items_of(str(tmp_path / "a.pdf"), tmp_path / "index")) == ["a.pdf#page=1"]


@pytest.mark.parametrize(
    ("dpi", "max_pixels", "expected"),
    [
        (72, None, (200, 100)),
        (144, 784, (400, 200)),  # what is asked for counts
        (None, None, (556, 278)),  # 200 dpi
        (None, 20_000, (200, 100)),
        (None, 10**9, (556, 278)),
    ],
)
def test_pages_have_the_pixels_that_the_model_looks_at(tmp_path: Path, dpi, max_pixels, expected) -> None:
    write_pdf(tmp_path / "a.pdf", ["x"])
    items = items_of(Folder(tmp_path / "a.pdf", dpi=dpi), tmp_path / "index", max_pixels=max_pixels)
    assert size_of(tmp_path / "index", items["a.pdf#page=1"]) == pytest.approx(expected, abs=1)


def test_a_page_that_says_it_is_enormous_is_rendered_small(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["x"], size=(14_400, 14_400))
    items = items_of(Folder(tmp_path, dpi=1200), tmp_path / "index")
    width, height = size_of(tmp_path / "index", items["a.pdf#page=1"])
    assert width * height <= 51_000_000


@pytest.mark.parametrize("dpi", [0, -3, 5000])
def test_a_dpi_that_makes_no_sense_is_refused(dpi: int) -> None:
    with pytest.raises(ValueError, match="allowed is from 1 to 1200"):
        Folder("x", dpi=dpi)


def test_without_pypdfium2_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ImportError, match=r"sentence-vipyloqwen\[pdf\]"):
        list(located(folder))


def test_a_scan_of_several_pages(tmp_path: Path, picture) -> None:
    (tmp_path / "scans").mkdir()
    picture("red").save(tmp_path / "scans" / "a.tiff", save_all=True, append_images=[picture("blue")])
    picture("green").save(tmp_path / "scans" / "b.tif")
    items = items_of(tmp_path / "scans", tmp_path / "index")
    assert list(items) == ["a.tiff#page=1", "a.tiff#page=2", "b.tif"]
    with Image.open(tmp_path / "index" / items["a.tiff#page=2"]["image"][0]) as page:
        assert page.getpixel((0, 0)) == (0, 0, 255)


# --- datasets ---


@pytest.fixture
def rows(picture) -> datasets.Dataset:
    columns = {
        "id": ["một", "hai"],
        "image": [picture("red"), picture("blue")],
        "text": ["x", None],
        "lang": ["vi", "en"],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_dataset_is_its_rows(rows: datasets.Dataset, tmp_path: Path) -> None:
    items = items_of(rows, tmp_path / "index")
    assert [(item["id"], item["text"], item["metadata"]) for item in items.values()] == [
        ("một", "x", {"lang": "vi"}),
        ("hai", "", {"lang": "en"}),
    ]
    assert items_of(rows.to_iterable_dataset(), tmp_path / "index") == items
    rows.save_to_disk(tmp_path / "saved")
    assert items_of(tmp_path / "saved", tmp_path / "index") == items


def test_a_dataset_with_lists_of_images_and_metadata_of_its_own(tmp_path: Path, picture) -> None:
    picture("teal").save(tmp_path / "a.png")
    features = datasets.Features(
        {"image": datasets.List(datasets.Image()), "metadata": {"year": datasets.Value("int32")}}
    )
    columns = {"image": [[str(tmp_path / "a.png"), picture("red")]], "metadata": [{"year": 2024}]}
    (item,) = items_of(datasets.Dataset.from_dict(columns, features=features), tmp_path / "index").values()
    assert (item["id"], item["metadata"]) == ("0", {"year": 2024})
    assert len(item["image"]) == 2


def test_a_broken_image_of_a_dataset_is_an_error_of_its_row(rows: datasets.Dataset, model, tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"no", "path": None}]}, features=features)
    with pytest.raises(ValueError, match="row 0: cannot read its image"):
        items_of(broken.cast_column("image", datasets.Image()), tmp_path / "items")


def test_datasets_that_hold_no_items_are_refused(rows: datasets.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the columns \['caption'\]; needed is 'text', 'image', or both"):
        list(located(datasets.Dataset.from_dict({"caption": ["x"]})))
    splits = datasets.DatasetDict(train=rows, test=rows)
    with pytest.raises(ValueError, match=r"the splits \['train', 'test'\]; allowed is one"):
        list(located(splits))
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: this is a dataset of the splits"):
        list(located(tmp_path / "saved"))
    assert len(list(located(tmp_path / "saved" / "train"))) == 2
    (tmp_path / "saved" / "train" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read the dataset"):
        list(located(tmp_path / "saved" / "train"))


def test_a_path_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the items of"):
        list(located(tmp_path / "none"))

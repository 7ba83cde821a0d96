from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sentence_vipyloqwen.index import VectorIndex, ui
from sentence_vipyloqwen.index.filters import parse
from sentence_vipyloqwen.index.ui_words import WORDS

ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
HERE = "http://127.0.0.1:8765"


def png(color: Any = "red", size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """The head of a PNG that says it has side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def ids(html: str) -> list[str]:
    return re.findall(r'<li class="card" data-id="(.*?)">', html)


@pytest.fixture
def index(model, tmp_path: Path) -> VectorIndex:
    (tmp_path / "secret.txt").write_text("secret")
    Image.new("RGB", (3000, 100), "blue").save(tmp_path / "xanh.png")
    items = [
        {
            "id": "bills/may.pdf#page=3",
            "image": Image.new("RGB", (40, 20), "red"),
            "metadata": {"lang": "vi", "page": 3},
        },
        {"id": "xanh", "image": str(tmp_path / "xanh.png"), "metadata": {"lang": "vi"}},
        {"id": "note", "text": "hóa đơn tiền điện", "metadata": {"lang": "vi", "tags": ["a"]}},
        {"id": "attack", "text": ATTACK, "metadata": {ATTACK[:20]: ATTACK}},
    ]
    return VectorIndex.build(model, items, tmp_path / "chỉ mục")


@pytest.fixture
def client(index: VectorIndex) -> Iterator[TestClient]:
    with TestClient(ui.create_app(index), base_url=HERE, headers={"accept-language": "vi"}) as client:
        yield client


def ask(client: TestClient, *images: bytes, **fields: str):
    files = [("image", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]
    return client.post("/results", data=fields, files=files or [("image", ("", b""))])


# --- asking ---


def test_the_page_tells_what_is_searched(client: TestClient) -> None:
    page = client.get("/").text
    assert "chỉ mục</b> · 4 mục · 32 chiều" in page
    assert "<option>ocr</option>" in page
    assert WORDS["vi"]["start"] in page
    assert ids(page) == []
    assert WORDS["en"]["start"] in client.get("/", headers={"accept-language": "fr"}).text


def test_every_language_has_every_word() -> None:
    assert len({tuple(words) for words in WORDS.values()}) == 1


def test_a_text_finds_and_the_address_asks_again(client: TestClient) -> None:
    found = ask(client, text="hóa đơn tiền điện", k="2").text
    assert ids(found)[0] == "note"
    assert len(ids(found)) == 2
    assert "1.000" in found
    page = client.get("/", params={"text": "hóa đơn tiền điện", "k": "2", "where": "lang = 'vi'"}).text
    assert ids(page)[0] == "note"
    assert 'value="lang = &#39;vi&#39;"' in page
    assert ">hóa đơn tiền điện</textarea>" in page


def test_an_image_finds_and_the_form_works_without_scripts(client: TestClient) -> None:
    assert ids(ask(client, png("red")).text)[0] == "bills/may.pdf#page=3"
    page = client.post("/", data={"text": ""}, files=[("image", ("a.png", png("red")))])
    assert ids(page.text)[0] == "bills/may.pdf#page=3"
    assert page.text.startswith("<!DOCTYPE html>")


def test_a_prompt_is_used(client: TestClient, index: VectorIndex) -> None:
    (hit, *_) = index.search("hóa đơn tiền điện", prompt_name="ocr")
    assert f"{hit.score:.6f}" in ask(client, text="hóa đơn tiền điện", prompt_name="ocr").text


def test_a_condition_narrows_down(client: TestClient) -> None:
    assert ids(ask(client, text="x", where="page = 3").text) == ["bills/may.pdf#page=3"]
    nothing = ask(client, text="x", where="page = 4").text
    assert ids(nothing) == []
    assert WORDS["vi"]["nothing"] in nothing


def test_one_goes_on_from_an_item(client: TestClient, index: VectorIndex) -> None:
    assert ids(ask(client, like="xanh").text)[0] == "xanh"
    assert ids(ask(client, like="note").text)[0] == "note"
    both = ui._read_query(index, ui.Question(text="điện", like="note"))
    assert both == {"text": "hóa đơn tiền điện\nđiện", "image": []}


def test_a_fact_is_a_condition(client: TestClient, index: VectorIndex) -> None:
    conditions = re.findall(r'data-where="(.*?)"', ask(client, like="note").text)
    assert "lang = &#39;vi&#39;" in conditions
    for key, value in (("số tiền", 5), ('a"b', "it's"), ("đã_trả", True), ("x", None), ("y", -1.5), ("order", "x")):
        parse(ui.condition(key, value))
    assert ui.condition("text", "ă" * 1000) is ui.condition("tags", ["a"]) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "x", "where": "lang ="}, "where is"),
        ({"text": "x", "k": "0"}, "allowed is a whole number from 1 to 200"),
        ({"text": "x", "k": "²"}, "allowed is a whole number from 1 to 200"),
        ({"text": "x", "k": "9" * 5000}, "allowed is a whole number from 1 to 200"),
        ({"text": "x", "prompt_name": "nope"}, "nope"),
        ({"text": "x" * 20_001}, "20,001 letters"),
        ({"like": "nope"}, "nope"),
    ],
)
def test_what_cannot_be_asked_is_told(client: TestClient, fields: dict[str, str], reason: str) -> None:
    response = ask(client, **fields)
    assert response.status_code == 400
    assert 'role="alert"' in response.text
    assert reason in response.text


# --- while others change the index ---


def test_the_page_shows_what_others_have_made_of_the_index(client: TestClient, index: VectorIndex, model) -> None:
    assert "4 mục" in client.get("/").text
    before = re.findall(r'<img src="(.*?)"', ask(client, like="xanh", k="1").text)
    other = VectorIndex.load(index.folder, model)
    other.add([{"id": "new", "text": "biển số xe"}])
    assert ids(ask(client, text="biển số xe").text)[0] == "new"
    assert "5 mục" in client.get("/").text
    other.update([{"id": "xanh", "image": Image.new("RGB", (30, 60), "green")}])
    other.remove(["new"])
    other.compact()
    assert "new" not in ids(ask(client, text="biển số xe", k="200").text)
    (after,) = re.findall(r'<img src="(.*?)"', ask(client, like="xanh", k="1").text)
    assert [after] != before  # or a browser would go on to show the old picture
    assert Image.open(io.BytesIO(client.get(f"/{after.replace('&amp;', '&')}").content)).size == (30, 60)


def test_a_picture_of_an_item_that_came_later_is_shown(client: TestClient, index: VectorIndex, model) -> None:
    VectorIndex.load(index.folder, model).add([{"id": "late", "image": Image.new("RGB", (30, 60))}])
    assert client.get("/image", params={"item": "late"}).status_code == 200


def test_an_index_that_can_no_longer_be_read_is_told_and_comes_back(client: TestClient, index: VectorIndex) -> None:
    pointer = index.folder / "index.json"
    content = pointer.read_bytes()
    pointer.write_bytes(content[:-9])
    for response in (client.get("/"), ask(client, text="x")):
        assert response.status_code == 400
        assert "index.json cannot be read" in response.text
    assert client.get("/image", params={"item": "xanh"}).status_code == 404
    pointer.write_bytes(content)
    assert ids(ask(client, text="x").text)


# --- safety ---


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (bomb(), "far too many pixels; at most 50,000,000 are allowed"),
        (bomb(8_000), "64,000,000 pixels; at most 50,000,000 are allowed"),
        (b"nothing", "no image of a kind that is allowed: PNG, JPEG"),
        (png(size=(1000, 2)), "aspect ratio"),
        (png()[:-30], "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a kind that is allowed"),
    ],
)
def test_images_that_are_none_or_too_large_are_refused(client: TestClient, image: bytes, reason: str) -> None:
    response = ask(client, image)
    assert response.status_code == 400
    assert reason in response.text
    assert "0.png" in response.text


def test_requests_that_are_too_large_are_refused_unread(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "MOST_BYTES", 1000)
    response = ask(client, b"x" * 2000)
    assert response.status_code == 413
    assert "at most 1,000 are allowed" in response.text
    chunks = client.post("/results", content=iter([b"x"] * 9))
    assert chunks.status_code == 411


def test_more_than_five_images_or_fields_are_refused(client: TestClient) -> None:
    assert ask(client, *[png()] * 6).status_code == 400
    assert ask(client, **{f"field{number}": "x" for number in range(50)}).status_code == 400


def test_only_names_of_this_computer_are_answered(client: TestClient, index: VectorIndex) -> None:
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example"):
        assert client.get("/", headers={"host": host}).status_code == 400
    for host in ("localhost:1", "127.0.0.1"):
        assert client.get("/", headers={"host": host}).status_code == 200
    with TestClient(ui.create_app(index, host_names=["máy-chủ"]), base_url=HERE) as other:
        assert other.get("/").status_code == 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9"])
def test_what_another_site_sends_is_refused(client: TestClient, origin: str) -> None:
    response = client.post("/results", data={"text": "x"}, headers={"origin": origin})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    assert client.post("/results", data={"text": "x"}, headers={"origin": HERE}).status_code == 200


def test_browsers_are_told_to_be_strict(client: TestClient) -> None:
    for path in ("/", "/ui.js", "/image?item=xanh", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe-inline" not in headers["content-security-policy"].replace("style-src-attr 'unsafe-inline'", "")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_nothing_but_images_of_items_is_served(client: TestClient, tmp_path: Path) -> None:
    image = client.get("/image", params={"item": "bills/may.pdf#page=3"})
    assert image.headers["content-type"].startswith("image/")
    assert Image.open(io.BytesIO(image.content)).size == (40, 20)
    for size, width in (("small", 512), ("large", 2400)):
        content = client.get("/image", params={"item": "xanh", "size": size}).content
        assert Image.open(io.BytesIO(content)).width == width
    for item, number in (("note", 0), ("xanh", 1), ("nope", 0), (str(tmp_path / "xanh.png"), 0), ("../secret.txt", 0)):
        assert client.get("/image", params={"item": item, "number": number}).status_code == 404
    for number in (-1, "x"):
        assert client.get("/image", params={"item": "xanh", "number": number}).status_code == 422
    for path in ("/secret.txt", "/ui.html.jinja", "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "/docs"):
        response = client.get(path)
        assert response.status_code == 404
        assert "secret" not in response.text.replace("secret.txt", "")


def test_an_image_that_is_gone_is_not_found(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "xanh.png").unlink()
    assert client.get("/image", params={"item": "xanh"}).status_code == 404


def test_texts_of_users_are_escaped_everywhere(client: TestClient) -> None:
    page = client.get("/", params={"text": ATTACK, "where": ATTACK, "like": ATTACK, "prompt_name": ATTACK, "k": ATTACK})
    found = ask(client, text="x", k="200")
    assert "attack" in ids(found.text)
    for html in (page.text, found.text):
        assert "<script>" not in html
        assert "<img src=x" not in html
        assert "49" not in html

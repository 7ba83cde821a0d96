from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from sentence_vipyloqwen.index import Hit, SearchResult, VectorIndex, write_report

ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hit(rank: int = 1, score: float = 0.5, **item) -> Hit:
    full = {"id": f"item-{rank}", "text": "", "image": [], "metadata": {}, **item}
    return Hit(rank, full["id"], score, full)


def page_of(tmp_path, *results: SearchResult, **options) -> Page:
    return Page(write_report(tmp_path / "page.html", results, **options).read_text(encoding="utf-8"))


def test_queries_stand_beside_their_results(model, tmp_path, picture):
    items = [{"id": "h", "text": "hóa đơn", "metadata": {"trang": 3}}, {"id": "ảnh", "image": picture("red")}]
    index = VectorIndex.build(model, items, tmp_path / "index")
    queries = [("hóa đơn", "ocr"), ({"text": "màu gì?", "image": picture("red")}, None)]
    results = [SearchResult(query, index.search(query, prompt_name=name), name) for query, name in queries]
    page = page_of(tmp_path, *results, title="Tìm kiếm", subtitle="hai mục", lang="vi")
    for text in (
        "Tìm kiếm",
        "hai mục",
        "hóa đơn",
        "ocr",
        "màu gì?",
        "h",
        "ảnh",
        "trang",
        "3",
        "Truy vấn 1",
        "Truy vấn 2",
    ):
        assert text in page.text
    for result in results:
        for found in result.hits:
            assert f"{found.score:.3f}" in page.text
    assert page.all("html") == [{"lang": "vi"}]
    assert len(page.all("section")) == 2
    assert len(page.all("li")) == 4
    assert len(page.all("img")) == 3


def test_texts_of_users_are_escaped_everywhere(tmp_path):
    results = SearchResult(
        {"text": ATTACK}, [hit(id=ATTACK, text=ATTACK, image=[f"/{ATTACK}.png"], metadata={ATTACK: ATTACK})], ATTACK
    )
    path = write_report(tmp_path / "page.html", [results], title=ATTACK, subtitle=ATTACK)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.all("script") == []
    assert page.all("img") == []
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    # Title, heading, subtitle, query, prompt, text, id, key and value.
    assert page.text.count(ATTACK) == 9
    assert "49" not in page.text


def test_the_page_needs_nothing_else(tmp_path, picture):
    picture("red").save(tmp_path / "a.png")
    result = SearchResult({"image": "https://example.com/a.png"}, [hit(image=[str(tmp_path / "a.png")])])
    page = page_of(tmp_path, result)
    assert all(attributes["src"].startswith("data:image/") for attributes in page.all("img"))
    assert page.all("link") == page.all("script") == page.all("iframe") == page.all("a") == []
    assert not re.search(r"url\(|@import|https?://", (tmp_path / "page.html").read_text(encoding="utf-8"))
    policies = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("size", [(2000, 500), (300, 1800), (30, 20)])
def test_thumbnails_are_at_most_256_pixels(tmp_path, picture, size):
    picture("teal", size).save(tmp_path / "big.png")
    page = page_of(tmp_path, SearchResult(tmp_path / "big.png", []))
    (image,) = page.all("img")
    assert image["alt"] == "big.png"
    data = base64.b64decode(image["src"].partition(",")[2])
    with Image.open(io.BytesIO(data)) as thumbnail:
        assert max(thumbnail.size) == min(256, max(size))
        assert thumbnail.width / thumbnail.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_transparent_and_rotated_images(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture("red", (60, 20)).save(tmp_path / "turned.jpg", exif=exif)
    picture((0, 0, 0, 0), (20, 20), "RGBA").save(tmp_path / "clear.png")
    images = page_of(tmp_path, SearchResult({"image": [tmp_path / "turned.jpg", tmp_path / "clear.png"]}, [])).all(
        "img"
    )
    turned, clear = (Image.open(io.BytesIO(base64.b64decode(tag["src"].partition(",")[2]))) for tag in images)
    assert turned.size == (20, 60)
    assert clear.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_an_image_that_is_gone_is_named(tmp_path, caplog):
    page = page_of(tmp_path, SearchResult("q", [hit(image=["/gone/mất.png"])]))
    assert page.all("img") == []
    assert {"mất.png", "cannot be shown"} <= set(page.text)
    assert "mất.png" in caplog.text


def test_bars_show_scores_from_0_to_1(tmp_path):
    hits = [hit(rank, score) for rank, score in enumerate([1.0, 0.873, 0.0, -0.4], 1)]
    page = page_of(tmp_path, SearchResult("q", hits))
    assert [bar["width"] for bar in page.all("rect")] == ["100.0%", "87.3%", "0.0%", "0.0%"]
    assert "-0.400" in page.text


def test_long_texts_are_shortened_and_say_so(tmp_path):
    page = page_of(tmp_path, SearchResult("q", [hit(text="ă" * 5000, metadata={"x": "y" * 10**6, "n": {"a": [1]}})]))
    assert f"{'ă' * 400} … (+4,600)" in page.text
    assert '{"a": [1]}' in page.text
    assert (tmp_path / "page.html").stat().st_size < 20_000


def test_a_condition_is_shown(tmp_path):
    page = page_of(tmp_path, SearchResult("q", [], where="năm > 2024 <b>"), lang="vi")
    assert "năm > 2024 <b>" in page.text
    assert page.all("b") == []


def test_a_query_without_hits_and_a_page_without_queries(tmp_path):
    assert "0 results" in page_of(tmp_path, SearchResult("q", [])).text
    assert page_of(tmp_path).all("section") == []


def test_the_folder_of_the_page_is_made_and_an_old_page_replaced(tmp_path):
    path = tmp_path / "báo cáo" / "trang.html"
    write_report(path, [], title="first")
    assert write_report(path, [], title="second") == path
    assert "second" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["trang.html"]


def test_unknown_language_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lang is 'fr'; allowed is one of"):
        write_report(tmp_path / "page.html", [], lang="fr")

from __future__ import annotations

import base64
import io
import pickle
import threading
import zlib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sentence_vipyloqwen.modules import images
from sentence_vipyloqwen.modules.images import (
    describe,
    fetch,
    image_key,
    image_size,
    is_decoded,
    open_image,
    source_identity,
)
from sentence_vipyloqwen.modules.spool import Spool

Picture = Callable[..., Image.Image]


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_source_gives_the_same_pixels(tmp_path: Path, picture: Picture) -> None:
    image = picture()
    path = tmp_path / "x.png"
    image.save(path)
    uri = "data:image/png;base64," + base64.b64encode(as_bytes(image)).decode()
    values = np.asarray(image)
    channels_first = torch.from_numpy(values.transpose(2, 0, 1).copy())
    for source in (image, path, str(path), uri, values, channels_first, channels_first / 255, values / 255):
        assert np.array_equal(open_image(source), values)


def test_every_source_tells_its_size(tmp_path: Path, picture: Picture) -> None:
    image = picture(20, 60)
    image.save(tmp_path / "x.png")
    uri = "data:image/png;base64," + base64.b64encode(as_bytes(image)).decode()
    values = np.asarray(image)
    channels_first = torch.from_numpy(values.transpose(2, 0, 1).copy())
    sources = [image, tmp_path / "x.png", str(tmp_path / "x.png"), uri, values, channels_first, values[..., 0]]
    assert [image_size(source) for source in sources] == [(60, 20)] * len(sources)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_size_is_the_upright_one(tmp_path: Path, picture: Picture, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind.lower()}"
    picture(20, 60).save(path, exif=exif)
    assert image_size(path) == open_image(path).size == ((60, 20) if orientation < 5 else (20, 60))
    with Image.open(path) as opened:
        assert image_size(opened) == open_image(opened).size == image_size(opened) == image_size(path)


def test_a_size_is_upright_where_the_rotation_stands_behind_the_pixels(tmp_path: Path, picture: Picture) -> None:
    """ExifTool writes a PNG's EXIF data there."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + content
    chunk = len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    image = as_bytes(picture(20, 60))
    (tmp_path / "x.png").write_bytes(image[:-12] + chunk + image[-12:])  # before the 12 bytes of IEND
    assert image_size(tmp_path / "x.png") == open_image(tmp_path / "x.png").size == (20, 60)
    with Image.open(tmp_path / "x.png") as opened:
        assert image_size(opened) == open_image(opened).size == (20, 60)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_size_is_told_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Picture, kind: str
) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    picture(100, 140).save(path)

    def decoded(*args: Any) -> None:
        raise AssertionError("a pixel was decoded")

    with Image.open(path) as opened:
        for owner in (ImageFile.ImageFile, type(opened)):
            monkeypatch.setattr(owner, "load", decoded)
        assert image_size(path) == image_size(opened) == (140, 100)


def test_a_truncated_file_tells_its_size_and_fails_when_decoded(tmp_path: Path, picture: Picture) -> None:
    for kind in ("JPEG", "PNG"):
        path = tmp_path / f"x.{kind.lower()}"
        path.write_bytes(as_bytes(picture(100, 140), kind)[:-200])
        assert image_size(path) == (140, 100)
        with pytest.raises(ValueError, match=f"cannot decode the image '.*x.{kind.lower()}'"):
            open_image(path)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_draft_is_at_least_twice_the_target(tmp_path: Path, picture: Picture, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = (801, 1201) if orientation == 1 else (1201, 801)
    picture(1201, 801).save(tmp_path / "x.jpg", quality=95, exif=exif)
    picture(1201, 801).save(tmp_path / "x.png", exif=exif)
    target = tuple(side // 4 for side in upright)
    whole = open_image(tmp_path / "x.jpg")
    assert whole.size == open_image(tmp_path / "x.png", draft_size=target).size == upright
    assert open_image(tmp_path / "x.jpg", draft_size=(upright[0] // 4 + 1, upright[1] // 4 + 1)).size == upright
    draft = open_image(tmp_path / "x.jpg", draft_size=target)
    assert draft.size == tuple((side + 1) // 2 for side in upright)
    left, right = (np.asarray(image.resize(target, Image.Resampling.BICUBIC), np.int16) for image in (whole, draft))
    assert np.abs(left - right).max() <= 8


def test_a_source_is_known_by_its_path_or_by_its_object(picture: Picture) -> None:
    image = picture()
    assert source_identity("a.png") == source_identity(Path("a.png")) == "a.png"
    assert source_identity(image) == source_identity(image) != source_identity(image.copy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_picture_that_is_not_decoded_stays_so(tmp_path: Path, picture: Picture, kind: str) -> None:
    picture().save(tmp_path / "x", kind)
    expected = np.asarray(open_image(tmp_path / "x"))
    for opened in (Image.open(tmp_path / "x"), Image.open(io.BytesIO((tmp_path / "x").read_bytes()))):
        place = opened.fp.tell()
        assert image_size(opened) == picture().size
        assert np.array_equal(open_image(opened), expected)
        assert not is_decoded(opened)
        assert opened.fp.tell() == place
        opened.load()
        assert is_decoded(opened)
        assert np.array_equal(open_image(opened), expected)


def test_a_picture_is_read_as_the_caller_left_it(tmp_path: Path, picture: Picture) -> None:
    """Turned, drafted, on its second frame, from a file since replaced, or one that can be read once only."""
    picture(300, 500).save(tmp_path / "x.jpg")
    turned = Image.open(tmp_path / "x.jpg")
    turned.getexif()[0x0112] = 6
    assert open_image(turned).size == image_size(turned) == (300, 500)
    drafted = Image.open(tmp_path / "x.jpg")
    drafted.draft(None, (100, 60))
    assert open_image(drafted).size == image_size(drafted) == (125, 75)
    picture(seed=1).save(tmp_path / "x.tiff", save_all=True, append_images=[picture(seed=2)])
    second = Image.open(tmp_path / "x.tiff")
    second.seek(1)
    assert np.array_equal(open_image(second), picture(seed=2))
    picture(seed=3).save(tmp_path / "x.png")
    replaced = Image.open(tmp_path / "x.png")
    (tmp_path / "x.png").unlink()
    picture(seed=4).save(tmp_path / "x.png")
    assert np.array_equal(open_image(replaced), picture(seed=3))

    class Once(io.BytesIO):
        def seekable(self) -> bool:
            return False

    assert np.array_equal(open_image(Image.open(Once(as_bytes(picture())))), picture())


def test_exif_rotation_is_applied(tmp_path: Path, picture: Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    picture(20, 60).save(tmp_path / "x.png", exif=exif)
    upright = open_image(tmp_path / "x.png")
    assert np.array_equal(upright, np.rot90(np.asarray(picture(20, 60)), -1))


def test_transparent_pixels_lie_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    for image in (rgba, palette, Image.new("LA", (4, 4), (0, 0))):
        assert open_image(image).getpixel((0, 0)) == (255, 255, 255)
    half = open_image(Image.new("RGBA", (4, 4), (255, 0, 0, 128))).getpixel((0, 0))
    assert half == (255, 127, 127)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_become_eight(dtype: type) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=dtype)
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_and_grey_become_rgb() -> None:
    assert open_image(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).getpixel((0, 0))[0] > 200
    assert open_image(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert open_image(np.full((4, 4), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)


def test_a_content_key_is_that_of_the_pixels(tmp_path: Path, picture: Picture) -> None:
    image = picture()
    image.save(tmp_path / "x.png")
    assert image_key(image) == image_key(open_image(tmp_path / "x.png"))
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    reshaped = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    keys = {image_key(image), image_key(changed), image_key(reshaped)}
    assert len(keys) == 3
    assert all(-(2**63) <= key < 2**63 and key for key in keys)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"cannot read the image 'missing.png'.*allowed is a PIL image"),
        (Path("/"), "cannot read the image '/'"),
        ("https://example.com/x.png", "URLs are fetched only where allow_urls=True"),
        ("data:image/png,abc", "a data URI must read"),
        ("data:image/png;base64,!!", "cannot read the image 'data:image"),
        ("data:image/png;base64,AAAA", "cannot identify image file"),
        (Image.new("RGB", (4, 804)), "measures 4x804; the aspect ratio must be at most 200"),
        (np.zeros((4, 804, 3), np.uint8), "measures 804x4"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"an array must be \(H, W\)"),
        (np.zeros((5, 6, 7), np.uint8), "1, 3 or 4 channels"),
        (np.full((4, 4, 3), 300), "values from 300 to 300; allowed are integers 0-255"),
        (np.full((4, 4, 3), np.nan), "values from nan to nan"),
        (np.full((4, 4, 3), "a"), "dtype .*; allowed are integers 0-255"),
    ],
)
def test_a_bad_image_is_named(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_image(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "cannot read the image 'missing.png'"),
        ("https://example.com/x.png", "URLs are fetched only where allow_urls=True"),
        (Image.new("RGB", (4, 804)), "measures 4x804; the aspect ratio must be at most 200"),
        (np.zeros((4, 804, 3), np.uint8), "measures 804x4"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"an array must be \(H, W\)"),
    ],
)
def test_a_bad_image_is_named_by_its_header(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_size(source)


def test_a_truncated_file_is_refused(tmp_path: Path, picture: Picture) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        path = tmp_path / f"x.{kind.lower()}"
        path.write_bytes(as_bytes(picture(100, 100), kind)[:-200])
        with pytest.raises(ValueError, match=f"image .*x.{kind.lower()}"):
            open_image(path)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, picture: Picture
) -> None:
    monkeypatch.setattr(images, "MAX_SOURCE_PIXELS", 100)
    with pytest.raises(ValueError, match="has 110 pixels; at most 100 are allowed"):
        open_image(picture(10, 11))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="too large"):
        open_image("data:image/png;base64," + base64.b64encode(as_bytes(picture(10, 11))).decode())


def test_a_url_is_fetched_where_it_is_allowed(tmp_path: Path, picture: Picture) -> None:
    picture().save(tmp_path / "x.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Stay off the screen."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(open_image(f"{address}/x.png", allow_urls=True), picture())
        fetched = fetch(f"{address}/x.png", allow_urls=True, spool=Spool())
        with pytest.raises(ValueError, match="URLs are fetched only where"):
            fetch(f"{address}/x.png", allow_urls=False, spool=Spool())
        with pytest.raises(ValueError, match="cannot read the image .*404"):
            open_image(f"{address}/y.png", allow_urls=True)
        server.shutdown()
    assert image_size(fetched) == picture().size  # the server is gone
    assert np.array_equal(open_image(pickle.loads(pickle.dumps(fetched))), picture())
    assert np.array_equal(open_image(fetched), picture())
    assert describe(fetched) == repr(f"{address}/x.png")
    assert fetch("x.png", allow_urls=False, spool=Spool()) == "x.png"

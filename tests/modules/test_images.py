from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sentence_vipyloqwen.modules import images
from sentence_vipyloqwen.modules.images import image_key, open_image

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
        with pytest.raises(ValueError, match="cannot read the image .*404"):
            open_image(f"{address}/y.png", allow_urls=True)
        server.shutdown()

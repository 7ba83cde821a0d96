from __future__ import annotations

import gc
import io
import threading
import tracemalloc
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers.util import batch_to_device

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules import opening, spool
from sentence_vipyloqwen.modules.images import open_image
from sentence_vipyloqwen.modules.inputs import parse_inputs
from sentence_vipyloqwen.modules.patches import ImagePatchCache

Picture = Callable[..., Image.Image]


def mixed(picture: Picture) -> list[Any]:
    a, b = picture(56, 84, seed=1), picture(100, 60, seed=2)
    return ["xin chào", a, {"image": [a, b], "text": "<ocr> tổng"}, {"text": "<instr> x"}, {"image": [b] * 5}]


def test_features_are_the_stock_ones_and_the_keys(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))
    rows, length = features["input_ids"].shape
    assert rows == 5
    assert features["attention_mask"].shape == features["mm_token_type_ids"].shape == (5, length)
    assert features["num_images_per_sample"].tolist() == [0, 1, 2, 0, 5]
    assert features["image_grid_thw"].shape == (8, 3)
    assert features["pixel_values"].shape == (int(features["image_grid_thw"].prod(1).sum()), 588)
    assert features["pixel_values"].dtype == torch.uint8
    assert features["image_keys"].shape == (5, 5)
    assert (features["image_keys"] != 0).sum(1).tolist() == [0, 1, 2, 0, 5]
    assert features["image_keys"][1, 0] == features["image_keys"][2, 0]


def test_padding_is_on_the_right(model: ViPyloQwen, picture: Picture) -> None:
    mask = model.preprocess(mixed(picture))["attention_mask"]
    assert mask[:, 0].all()
    assert (mask.diff(dim=1) <= 0).all()


def test_token_types_mark_the_image_tokens(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))
    per_row = torch.stack([part.prod(1).sum() // 4 for part in features["image_grid_thw"].split([0, 1, 2, 0, 5])])
    assert features["mm_token_type_ids"].sum(1).tolist() == per_row.tolist()


def test_stock_pixel_values_give_the_same(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))
    a, b = picture(56, 84, seed=1), picture(100, 60, seed=2)
    stock = model[0].image_processor(images=[a, a, b, *[b] * 5], return_tensors="pt")
    assert torch.equal(features["image_grid_thw"], stock["image_grid_thw"])
    ours, theirs = (model(dict(features) | more)["sentence_embedding"] for more in ({}, dict(stock)))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources that were opened, in order."""
    seen: list[Any] = []

    def counted(source: Any, **options: Any) -> Image.Image:
        seen.append(source)
        return open_image(source, **options)

    monkeypatch.setattr(opening, "open_image", counted)
    return seen


def test_rendering_decodes_nothing(model: ViPyloQwen, picture: Picture, tmp_path: Path, opened: list[Any]) -> None:
    picture(100, 60).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(data[:-100])
    rows = model[0].render(parse_inputs(["a", {"image": [picture(), tmp_path / "x.jpg"], "text": "<ocr> a"}]), 99)
    assert [row.grids for row in rows] == [(), ((4, 6), (8, 4))]
    assert [len(row.token_ids) for row in rows] == [1, 6 + 2 + 8 + 2 + 1 + 1]
    assert opened == []
    with pytest.raises(ValueError, match="Input 1, image 1: cannot decode the image '.*x.jpg'"):
        model[0].collate(rows)


def test_collating_rendered_rows_is_preprocessing(model: ViPyloQwen, picture: Picture) -> None:
    inputs = mixed(picture)
    rows = model[0].render(parse_inputs(inputs), 8192)
    left, right = model[0].collate(rows), model.preprocess(inputs)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(model[0].collate(rows[::-1])["image_keys"], right["image_keys"].flip(0))


def test_an_image_is_opened_once_in_a_batch(
    model: ViPyloQwen, picture: Picture, tmp_path: Path, opened: list[Any]
) -> None:
    image, path = picture(), tmp_path / "x.png"
    picture(seed=1).save(path)
    features = model.preprocess([image, {"image": [image, path]}, {"image": [str(path)] * 5}])
    assert opened == [image, path]
    assert features["num_images_per_sample"].tolist() == [1, 2, 5]
    parts = features["pixel_values"].split(24)
    assert all(torch.equal(part, parts[number]) for part, number in zip(parts, [0, 0, 2, 2, 2, 2, 2, 2], strict=True))


@pytest.mark.parametrize("spare_bytes", [0, 10**6])
def test_a_batch_reuses_the_images_of_those_before(
    model: ViPyloQwen, picture: Picture, opened: list[Any], spare_bytes: int
) -> None:
    a, b = picture(), picture(seed=1)
    rows = model[0].render(parse_inputs([a, {"image": [a, b]}, b, a]), 99)
    cache = ImagePatchCache(spare_bytes)
    batches = [model[0].collate([row], cache) for row in rows]
    assert opened == ([a, b] if spare_bytes else [a, b, a])  # the third batch has no need of the first image
    for row, features in zip(rows, batches, strict=True):
        assert torch.equal(features["pixel_values"], model[0].collate([row])["pixel_values"])


def test_a_planned_batch_has_each_image_once_and_gives_the_same(model: ViPyloQwen, picture: Picture) -> None:
    inputs = mixed(picture)
    rows = model[0].render(parse_inputs(inputs), 8192)
    planned, plain = model[0].collate_packed(rows), model[0].collate(rows)
    assert len(planned["pixel_values"]) == 4 * 6 + 8 * 4
    assert len(plain["pixel_values"]) == 2 * (4 * 6) + 6 * (8 * 4)
    for key in plain.keys() - {"pixel_values"}:
        assert torch.equal(planned[key], plain[key])
    for output in ("sentence_embedding", "token_embeddings"):
        left, right = (
            model(dict(features), padded_output=output != "sentence_embedding")[output] for features in (planned, plain)
        )
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
    again = model(dict(planned))["sentence_embedding"]  # the features are as they were
    torch.testing.assert_close(again, model(dict(plain))["sentence_embedding"], atol=1e-6, rtol=0)
    model[0].packed = False
    assert model[0].collate_packed(rows).keys() == plain.keys()


def test_a_planned_batch_waits_for_no_device(
    model: ViPyloQwen, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device computes nothing, so that whoever asks it for a number fails; a GPU would stop the thread."""
    rows = model[0].render(parse_inputs(mixed(picture)), 8192)
    planned, plain = model[0].collate_packed(rows), model[0].collate(rows)
    model.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # it knows no such device
    assert model(batch_to_device(planned, "meta"))["sentence_embedding"].shape == (5, 32)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        model(batch_to_device(plain, "meta"))


def test_a_file_that_changes_under_way_is_an_error(model: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    picture(56, 84).save(tmp_path / "x.png")
    rows = model[0].render(parse_inputs([tmp_path / "x.png"]), 99)
    picture(84, 56).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="Input 0, image 0: the image '.*' measures 56x84, not what its header said"):
        model[0].collate(rows)


def test_drafts_of_jpegs_are_off_unless_asked_for(model: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    model[0].image_processor.size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 16}
    picture(700, 900).save(tmp_path / "x.jpg", quality=95)
    exact = model.preprocess([tmp_path / "x.jpg"])
    assert not model[0].jpeg_draft
    model[0].jpeg_draft = True
    draft = model.preprocess([tmp_path / "x.jpg"])
    assert torch.equal(exact["image_grid_thw"], draft["image_grid_thw"])
    assert exact["image_keys"][0, 0] != draft["image_keys"][0, 0]
    assert (exact["pixel_values"].int() - draft["pixel_values"].int()).abs().max() <= 8


def test_a_url_is_fetched_once(model: ViPyloQwen, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        buffer = io.BytesIO()
        picture().save(buffer, "PNG")
        buffer.seek(0)
        return buffer

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    url = "https://example.com/x.png"
    with pytest.raises(ValueError, match="Input 0, image 0: cannot read the image 'https.*only where allow_urls=True"):
        model.preprocess([{"image": url}])
    model[0].allow_urls = True
    features = model.preprocess([{"image": url}, {"image": [url, url]}])
    assert asked == [url]
    assert torch.equal(features["pixel_values"][:24], model.preprocess([picture()])["pixel_values"])


def test_what_urls_gave_is_kept_on_disk(
    model: ViPyloQwen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 300, 300, 3), dtype=np.uint8)
    for number, values in enumerate(noise):
        Image.fromarray(values).save(tmp_path / f"{number}.png")  # of 270 kB
    model[0].allow_urls = True
    model[0].image_processor.size = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 4}
    monkeypatch.setattr(spool, "SPOOL_BYTES", 100_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inputs = [{"image": f"http://127.0.0.1:{server.server_port}/{number}.png"} for number in range(12)]
        tracemalloc.start()
        rows = model[0].render(parse_inputs(inputs), 99)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        vectors = model.encode(inputs)
        server.shutdown()
    assert kept < 500_000 < noise.nbytes / 2
    np.testing.assert_array_equal(vectors, model.encode([tmp_path / f"{number}.png" for number in range(12)]))
    files = {row.source.images[0].spool._file for row in rows}
    assert len(files) == 1
    del rows
    gc.collect()
    assert files.pop().closed


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Stay off the screen."""


def test_text_alone_has_no_pixels_but_keys(model: ViPyloQwen) -> None:
    features = model.preprocess(["a", "b c"])
    assert "pixel_values" not in features
    assert not features["image_keys"].any()
    assert features["image_keys"].shape == (2, 5)


def test_a_row_does_not_depend_on_its_neighbours(model: ViPyloQwen, picture: Picture) -> None:
    inputs = mixed(picture)
    together = model.encode(inputs, batch_size=8)
    alone = np.stack([model.encode(item) for item in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_the_limit_of_a_call_cuts_text(model: ViPyloQwen) -> None:
    text = "một hai ba bốn năm sáu bảy " * 10
    for options in ({"processing_kwargs": {"text": {"max_length": 7}}}, {"max_length": 7}):
        assert model.preprocess([text], **options)["input_ids"].shape == (1, 7)
    with pytest.raises(ValueError, match=r"processing_kwargs has \['image.size'\]; allowed is"):
        model.preprocess([text], processing_kwargs={"image": {"size": 3}})
    for limit in (0, -1, "5"):
        with pytest.raises(ValueError, match=f"max_length is {limit!r}; allowed is a whole number"):
            model.preprocess([text], processing_kwargs={"text": {"max_length": limit}})


def test_max_seq_length_is_kept_in_the_folder(model: ViPyloQwen, tmp_path: Path) -> None:
    assert model.max_seq_length == 8192
    model.max_seq_length = 11
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert ViPyloQwen(tmp_path, device="cpu").max_seq_length == 11


def test_images_over_the_limit_are_an_error(model: ViPyloQwen, picture: Picture) -> None:
    model.max_seq_length = 20
    with pytest.raises(ValueError, match="Input 1: its 5 images and prefix take"):
        model.encode(["a", {"image": [picture()] * 5, "text": "<ocr> a"}])


def test_five_images_of_the_largest_size_fit_the_default_limit(model: ViPyloQwen) -> None:
    processor = model[0].image_processor
    patches = processor.get_number_of_image_patches(4000, 4000)
    assert 5 * (patches // 4 + 2) + 1 < model.max_seq_length


def test_the_pixel_budget_of_create_holds(base: Path, picture: Picture) -> None:
    model = ViPyloQwen.create(base, 16, min_pixels=28 * 28 * 9, max_pixels=28 * 28 * 16, device="cpu")
    grids = model.preprocess([picture(20, 20), picture(400, 500)])["image_grid_thw"]
    tokens = (grids.prod(1) // 4).tolist()
    assert tokens[0] >= 9
    assert tokens[1] <= 16


def test_the_pixel_budget_can_be_set_when_loading(folder: Path, picture: Picture) -> None:
    loaded = ViPyloQwen(folder, device="cpu", processor_kwargs={"max_pixels": 28 * 28 * 6})
    assert loaded.preprocess([picture(400, 500)])["image_grid_thw"].prod() // 4 <= 6


def test_errors_name_input_and_image(model: ViPyloQwen, picture: Picture) -> None:
    with pytest.raises(ValueError, match="Input 1, image 1: cannot read the image 'missing.png'"):
        model.encode([picture(), {"image": [picture(), "missing.png"]}])


def test_a_type_error_within_is_not_taken_for_a_missing_argument(
    model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentence Transformers answers a TypeError of `preprocess` by calling again without the prompt."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(type(model[0]), "render", broken)
    with pytest.raises(RuntimeError, match="broken"):
        model.preprocess(["a"], prompt="<ocr> ")


def test_two_dimensional_arrays_are_grey_images(model: ViPyloQwen) -> None:
    grey = np.full((56, 56), 100, np.uint8)
    np.testing.assert_array_equal(model.encode(grey), model.encode(Image.fromarray(grey).convert("RGB")))


def test_token_embeddings_come_without_padding(model: ViPyloQwen) -> None:
    short, long = model.encode(["a", "một hai ba bốn"], output_value="token_embeddings")
    lengths = model.preprocess(["a", "một hai ba bốn"])["attention_mask"].sum(1).tolist()
    assert [len(short), len(long)] == lengths


def test_gradient_checkpointing_changes_nothing(model: ViPyloQwen, picture: Picture) -> None:
    features = model.preprocess(mixed(picture))

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(dict(features))["sentence_embedding"].pow(3).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for left, right in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(left, right)

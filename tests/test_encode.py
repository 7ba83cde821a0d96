"""``encode``: the values of one row at a time, no work twice, batches within their bounds."""

from __future__ import annotations

import base64
import io
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from sentence_transformers import SentenceTransformer
from torch import Tensor

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen import model as model_module
from sentence_vipyloqwen.modules import opening
from sentence_vipyloqwen.modules.images import is_decoded
from sentence_vipyloqwen.modules.inputs import parse_inputs

Picture = Callable[..., Image.Image]
Features = Mapping[str, Tensor]

WORDS = ["hóa", "đơn", "tiền", "điện", "tổng", "cộng", "số", "ngày", "what", "colour", "is", "the", "一个红色的圆形"]


class Forwards:
    """What went through the model's forward: rows, tokens and patches of each batch, shared ones once."""

    def __init__(self, model: ViPyloQwen, fail: Callable[[Forwards], None] = lambda forwards: None) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.patches: list[int] = []
        self.keys: list[set[int]] = []
        self.inputs: Counter[bytes] = Counter()
        self._forward, self._fail = model[0].forward, fail

    def __call__(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self._record(features)
        try:
            self._fail(self)
        except BaseException:
            for record in (self.rows, self.tokens, self.patches, self.keys):
                record.pop()
            raise
        contents = (features["input_ids"], features["attention_mask"], features["image_keys"])
        self.inputs.update(
            ids[mask > 0].numpy().tobytes() + keys.numpy().tobytes() for ids, mask, keys in zip(*contents, strict=True)
        )
        return self._forward(features, **kwargs)

    def _record(self, features: Features) -> None:
        steps: dict[tuple[int, ...], int] = {}
        patches: dict[int, int] = {}
        grids = iter(features.get("image_grid_thw", torch.zeros(0, 3)).prod(dim=1).tolist())
        text = int(features["attention_mask"].sum())
        for row in features["image_keys"].tolist():
            keys = [key for key in row if key]
            for place, key in enumerate(keys):
                patches[key] = next(grids)
                steps[tuple(keys[: place + 1])] = patches[key] // 4 + 2
                text -= patches[key] // 4 + 2
        self.rows.append(len(features["input_ids"]))
        self.tokens.append(text + sum(steps.values()))
        self.patches.append(sum(patches.values()))
        self.keys.append(set(patches))


@pytest.fixture
def forwards(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> Forwards:
    recorder = Forwards(model)
    monkeypatch.setattr(model[0], "forward", recorder)
    return recorder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sources of the images that were opened."""
    sources: list[Any] = []

    def open_image(source: Any, **kwargs: Any) -> Image.Image:
        sources.append(source)
        return real(source, **kwargs)

    real = opening.open_image
    monkeypatch.setattr(opening, "open_image", open_image)
    return sources


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prepare")]


def text(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def pages(picture: Picture, folder: Path, count: int) -> list[str]:
    paths = [str(folder / f"page-{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        picture(84, 112, seed=number).save(path)
    return paths


def mixed(picture: Picture, folder: Path) -> list[Any]:
    """Texts, images and both, of many lengths; several questions on each page; shuffled."""
    paths = pages(picture, folder, 4)
    questions = [{"image": path, "text": f"<ocr> {text(3, seed)}"} for path in paths for seed in range(3)]
    several = [{"image": paths[:2], "text": "a"}, {"image": paths[1::-1], "text": "a"}, {"image": paths[:3]}]
    inputs = [
        *questions,
        *several,
        *(text(3 * count, count) for count in range(1, 12)),
        picture(60, 150),
        Path(paths[3]),
    ]
    random.Random(0).shuffle(inputs)
    return inputs


def one_by_one(model: ViPyloQwen, inputs: list[Any], **kwargs: Any) -> np.ndarray:
    return np.stack([model.encode(item, **kwargs) for item in inputs])


@pytest.mark.parametrize("bounds", [{}, {"batch_size": 3}, {"token_budget": 60}, {"patch_budget": 50}], ids=str)
def test_vectors_are_those_of_each_input_alone(
    model: ViPyloQwen, picture: Picture, tmp_path: Path, bounds: dict[str, int]
) -> None:
    inputs = mixed(picture, tmp_path)
    np.testing.assert_allclose(model.encode(inputs, **bounds), one_by_one(model, inputs), atol=1e-5)


@pytest.mark.parametrize("bounds", [(4, 4096, 16384), (32, 60, 16384), (32, 4096, 100), (5, 90, 120)], ids=str)
def test_batches_keep_their_bounds(
    model: ViPyloQwen, forwards: Forwards, picture: Picture, tmp_path: Path, bounds: tuple[int, int, int]
) -> None:
    inputs = mixed(picture, tmp_path)
    model.encode(inputs, **dict(zip(("batch_size", "token_budget", "patch_budget"), bounds, strict=True)))
    assert sum(forwards.rows) == len(inputs)
    for held in zip(forwards.rows, forwards.tokens, forwards.patches, strict=True):
        assert held[0] == 1 or all(one <= most for one, most in zip(held, bounds, strict=True))


def test_budgets_must_be_positive_whole_numbers(model: ViPyloQwen, forwards: Forwards) -> None:
    for name, value in (("token_budget", 0), ("patch_budget", -4), ("token_budget", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}; allowed is a whole number of at least 1"):
            model.encode(["a"], **{name: value})
        with pytest.raises(ValueError, match=f"{name} is {value}; allowed"):
            model.encode(["a"], output_value="token_embeddings", **{name: value})
    assert not forwards.rows


def test_equal_inputs_are_computed_once(
    model: ViPyloQwen, forwards: Forwards, picture: Picture, tmp_path: Path
) -> None:
    image, path = picture(), tmp_path / "a.png"
    image.save(path)
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    array = np.asarray(image)
    groups: list[list[Any]] = [
        ["một", {"text": "một"}, "<image>một"],
        ["<ocr> một", "  <ocr> một", {"text": "<ocr> một", "image": []}],
        [image, image.copy(), {"image": [image.copy()]}],
        [array, array.copy(), {"image": array}],
        [torch.from_numpy(array.copy()), torch.from_numpy(array.copy())],
        [path, {"image": path}, {"image": str(path)}],
        [{"image": uri}, {"image": str(uri), "text": ""}],
        [{"image": [path, image], "text": "x"}, {"image": [str(path), image.copy()], "text": "x"}],
    ]
    inputs = [(number, item) for number, group in enumerate(groups) for item in group]
    random.Random(0).shuffle(inputs)
    vectors = model.encode([item for _, item in inputs])
    assert sum(forwards.rows) == len(groups)
    for number in range(len(groups)):
        alike = vectors[[group == number for group, _ in inputs]]
        np.testing.assert_array_equal(alike, alike[:1].repeat(len(alike), axis=0))


def test_shuffled_questions_on_a_page_meet_in_one_batch(
    model: ViPyloQwen, forwards: Forwards, opened: list[Any], picture: Picture, tmp_path: Path
) -> None:
    paths = pages(picture, tmp_path, 6)
    inputs = [{"image": path, "text": text(4, seed)} for path in paths for seed in range(4)]
    inputs += [text(9, seed) for seed in range(100, 120)]
    random.Random(1).shuffle(inputs)
    model.encode(inputs, batch_size=9)
    assert sorted(Counter(key for keys in forwards.keys for key in keys).values()) == [1] * 6
    assert Counter(opened) == Counter(paths)


def test_a_page_of_more_questions_than_a_batch_is_opened_once(
    model: ViPyloQwen, forwards: Forwards, opened: list[Any], picture: Picture
) -> None:
    page = picture()
    model.encode([{"image": page.copy(), "text": text(3, seed)} for seed in range(10)], batch_size=4)
    assert forwards.rows == [4, 4, 2]
    assert len(opened) == 1


def test_an_image_that_many_batches_show_is_opened_once(
    model: ViPyloQwen, opened: list[Any], picture: Picture, tmp_path: Path
) -> None:
    """A logo behind pages: between its rows go texts of like length."""
    logo, *paths = pages(picture, tmp_path, 12)
    inputs: list[Any] = [{"image": [path, logo], "text": text(3 * n, n)} for n, path in enumerate(paths)]
    model.encode(inputs + [text(3 * count, count) for count in range(1, 20)], batch_size=1)
    assert Counter(opened) == Counter([logo, *paths])


def test_patches_keep_the_budget_before_they_reach_the_model(
    model: ViPyloQwen, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows on the same pages have them once, not once for each."""
    kept: list[int] = []
    forward = model[0].forward

    def record(features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        kept.append(features["pixel_values"].nbytes)
        return forward(features, **kwargs)

    monkeypatch.setattr(model[0], "forward", record)
    five = [picture(112, 112, seed=seed) for seed in range(5)]  # of 64 patches
    inputs: list[Any] = [{"image": five, "text": text(3, seed)} for seed in range(16)]
    inputs += [{"image": five[:2], "text": text(3, seed)} for seed in range(16)]
    vectors = model.encode(inputs, patch_budget=5 * 64)
    assert kept == [5 * 64 * 588]
    np.testing.assert_allclose(vectors[[0, 20]], one_by_one(model, [inputs[0], inputs[20]]), atol=1e-5)


def test_pictures_that_the_caller_opened_stay_undecoded(model: ViPyloQwen, picture: Picture, tmp_path: Path) -> None:
    """Else the pixels of all of them would be in memory in the end."""
    kinds = [("png", {}), ("jpg", {}), ("webp", {}), ("tiff", {}), ("gif", {}), ("bmp", {})]
    paths = [tmp_path / f"x.{kind}" for kind, _ in kinds]
    for path, (_, options) in zip(paths, kinds, strict=True):
        picture().save(path, **options)
    opened = [Image.open(path) for path in paths]
    np.testing.assert_array_equal(model.encode(opened), model.encode(paths))
    assert not any(is_decoded(image) for image in opened)
    assert all(image.tile for image in opened if image.format != "WEBP")
    for image, path in zip(opened, paths, strict=True):
        np.testing.assert_array_equal(image, Image.open(path))  # they can be read as ever


def test_planning_decodes_nothing(
    model: ViPyloQwen, picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = pages(picture, tmp_path, 1)
    uri = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    lazy = Image.open(io.BytesIO(Path(path).read_bytes()))

    def collate(rows: list[Any], cache: Any) -> None:
        raise KeyError([(row.grids, len(row.token_ids)) for row in rows])

    def load(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(model[0], "collate_packed", collate)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(KeyError) as planned:
        model.encode([{"image": path}, {"image": uri}, lazy])
    assert planned.value.args == ([(((6, 8),), 14)] * 3,)


# --- where something fails ---


def out_of_memory_above(tokens: int, error: Exception) -> Callable[[Forwards], None]:
    def fail(forwards: Forwards) -> None:
        if forwards.tokens[-1] > tokens:
            raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["accelerator", "linux", "windows", "cublas", "python"],
)
def test_where_memory_runs_out_the_budget_is_halved(
    model: ViPyloQwen,
    picture: Picture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    inputs = [*mixed(picture, tmp_path), "a", "a"]
    expected = model.encode(inputs)
    recorder = Forwards(model, out_of_memory_above(160, error))
    monkeypatch.setattr(model[0], "forward", recorder)
    with caplog.at_level(logging.WARNING, "sentence_vipyloqwen"):
        vectors = model.encode(inputs, token_budget=1000)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert max(recorder.tokens) <= 160
    assert sum(recorder.rows) == len(inputs) - 1
    assert set(recorder.inputs.values()) == {1}
    assert "going on with token_budget=" in caplog.text
    np.testing.assert_allclose(model.encode(inputs[:3]), expected[:3], atol=1e-5)


def test_questions_on_a_page_are_split_each_time_memory_runs_out(
    model: ViPyloQwen, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [{"image": picture(560, 560), "text": text(3, seed)} for seed in range(8)]
    expected = model.encode(inputs)
    tried: list[int] = []

    def fail(forwards: Forwards) -> None:
        tried.append(forwards.rows[-1])
        if tried[-1] > 2:
            raise MemoryError

    monkeypatch.setattr(model[0], "forward", Forwards(model, fail))
    np.testing.assert_allclose(model.encode(inputs), expected, atol=1e-5)
    assert tried == [8, 4, 2, 2, 2, 2]


def test_a_batch_within_the_budget_is_split_at_once(
    model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Halving a budget of a million would not."""
    inputs = [text(20, seed) for seed in range(4)]
    total = Forwards(model)
    monkeypatch.setattr(model[0], "forward", total)
    model.encode(inputs)
    recorder = Forwards(model, out_of_memory_above(total.tokens[0] - 1, MemoryError()))
    monkeypatch.setattr(model[0], "forward", recorder)
    model.encode(inputs, token_budget=10**6)
    assert sum(recorder.rows) == 4
    assert len([record for record in caplog.records if "Memory ran out" in record.message]) == 1
    assert f"token_budget={total.tokens[0] // 2}, patch_budget=2000000" in caplog.text


def test_memory_may_run_out_while_a_batch_is_prepared(
    model: ViPyloQwen, picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate(rows: list[Any], cache: Any) -> dict[str, Tensor]:
        if len(rows) > 2:
            raise MemoryError
        return real(rows, cache)

    inputs = mixed(picture, tmp_path)
    expected = model.encode(inputs)
    real = model[0].collate_packed
    monkeypatch.setattr(model[0], "collate_packed", collate)
    np.testing.assert_allclose(model.encode(inputs), expected, atol=1e-5)


def test_an_input_too_large_by_itself_is_named(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(model[0], "forward", Forwards(model, out_of_memory_above(40, error)))
    with pytest.raises(torch.OutOfMemoryError, match="Input 2 alone is too large: CUDA out of memory."):
        model.encode(["a", "a", text(80), "b"])


def test_another_error_of_the_model_is_not_taken_for_memory(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def forward(features: dict[str, Any], **kwargs: Any) -> None:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(model[0], "forward", forward)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.encode(["a", "b", "c"], batch_size=1)
    assert len(calls) == 1


def test_a_bad_header_is_found_before_anything_is_computed(model: ViPyloQwen, forwards: Forwards) -> None:
    with pytest.raises(ValueError, match="Input 4, image 0: cannot read the image 'missing.png'"):
        model.encode(["long " * 30, "b", "b", "c", {"image": "missing.png"}], batch_size=1)
    closed = Image.new("RGB", (28, 28))
    closed.close()
    with pytest.raises(ValueError, match="Input 1, image 1: cannot read the image <PIL image"):
        model.encode(["a", {"image": [Image.new("RGB", (28, 28)), closed]}])
    assert not forwards.rows


def test_a_picture_that_breaks_off_is_named_when_its_turn_comes(
    model: ViPyloQwen, forwards: Forwards, picture: Picture, tmp_path: Path
) -> None:
    (path,) = pages(picture, tmp_path, 1)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="Input 3, image 0: cannot decode the image .*page-0.png"):
        model.encode([text(40, 1), text(40, 2), "a", Path(path), "b"], batch_size=1)
    assert forwards.rows == [1, 1]


# --- as Sentence Transformers does ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt_name": "ocr"},
        {"prompt": "<instr> tóm tắt: "},
        {"truncate_dim": 8},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "int8"},
        {"precision": "binary"},
        {"processing_kwargs": {"text": {"max_length": 20}}},
        {"output_value": "token_embeddings"},
        {"output_value": None},
    ],
    ids=str,
)
def test_results_have_the_form_of_sentence_transformers_own_loop(
    model: ViPyloQwen, picture: Picture, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def stock(self: ViPyloQwen, inputs: list[Any], prompt: str | None, **kwargs: Any) -> Any:
        padded = kwargs["output_value"] != "sentence_embedding"
        return SentenceTransformer._inference(
            self, parse_inputs(inputs, prompt), prompt=None, padded_output=padded, **kwargs
        )

    inputs = [text(4), picture(), {"text": "b", "image": picture(seed=1)}, *(text(3, seed) for seed in range(1, 9))]
    cases = [inputs, [], "a"] if "precision" not in options else [inputs, []]
    ours = [model.encode(case, **options) for case in cases]
    monkeypatch.setattr(ViPyloQwen, "_inference", stock)
    for one, other in zip(ours, [model.encode(case, **options) for case in cases], strict=True):
        assert type(one) is type(other)
        _assert_close(one, other)


def _assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        _assert_close(one["sentence_embedding"], other["sentence_embedding"])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            _assert_close(left, right)
    else:
        left, right = torch.as_tensor(one), torch.as_tensor(other)
        assert left.dtype == right.dtype
        step = 0 if left.is_floating_point() else 1
        torch.testing.assert_close(left.double(), right.double(), atol=1e-5 + step, rtol=0)


def test_token_embeddings_ask_for_padded_output(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = model[0].forward

    def record(features: dict[str, Any], padded_output: bool, **kwargs: Any) -> dict[str, Any]:
        seen.append(padded_output)
        return forward(features, padded_output, **kwargs)

    monkeypatch.setattr(model[0], "forward", record)
    lengths = [len(row) for row in model.encode([text(9), "a"], output_value="token_embeddings")]
    assert lengths == model[0].preprocess([text(9), "a"])["attention_mask"].sum(1).tolist()
    with pytest.raises(ValueError, match="missing.png"):
        model.encode({"image": "missing.png"}, output_value=None)
    model.encode(["a"])
    assert seen == [True, False]


def test_threads_do_not_disturb_each_other(model: ViPyloQwen) -> None:
    """Two ask for token embeddings at a time; the one that began first is done before the other goes on."""
    texts = ["một hai ba bốn", "a"]
    inside, go_on = ([threading.Event(), threading.Event()] for _ in range(2))
    begun = iter(range(2))
    forward = model[0].forward

    def wait(features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        place = next(begun)
        inside[place].set()
        assert go_on[place].wait(timeout=60)
        return forward(features, **kwargs)

    model[0].forward = wait
    with ThreadPoolExecutor(2) as threads:
        futures = []
        for entered in inside:
            futures.append(threads.submit(model.encode, texts, output_value="token_embeddings"))
            assert entered.wait(timeout=60)
        for event, future in zip(go_on, futures, strict=True):
            event.set()
            assert [row.shape[1] for row in future.result()] == [64, 64]


def test_the_progress_bar_counts_inputs(model: ViPyloQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Bar] = []

    class Bar:
        def __init__(self, *, total: int, desc: str, disable: bool) -> None:
            self.total, self.disable, self.steps = total, disable, list[int]()
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, count: int) -> None:
            self.steps.append(count)

    monkeypatch.setattr(model_module, "tqdm", Bar)
    model.encode(["một hai ba", "a", "a", "a", "b"], batch_size=2, show_progress_bar=True)
    model.encode(["a"], show_progress_bar=False)
    assert [(bar.total, bar.disable, sum(bar.steps), len(bar.steps)) for bar in bars] == [
        (5, False, 5, 2),
        (1, True, 1, 1),
    ]


def test_another_process_gives_the_same(model: ViPyloQwen, picture: Picture) -> None:
    inputs = [text(5), picture(), "a", {"image": picture(seed=1), "text": "b"}]
    vectors = model.encode(inputs, device=["cpu"], chunk_size=2, token_budget=50)
    np.testing.assert_allclose(vectors, model.encode(inputs), atol=1e-5)

"""The demo's data: what is held out stays out, and every record is one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sentence_vipyloqwen.demo.data import DemoData, DemoSizes, SplitSizes, build_demo_data
from sentence_vipyloqwen.demo.sources import documents
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, split_prefix
from sentence_vipyloqwen.train.validation import validate

SIZES = DemoSizes().scaled(0.03)
OPEN_TASKS = ("ocr", "text_pair", "instr")
DOMAINS = {
    "vqa_single": {"easy-vqa"},
    "vqa_multi": {"easy-vqa-turns", "easy-vqa-images"},
    "ocr": {"line", *documents.PAGE_SIZES},
    "text_pair": {"names", "dates", "amounts"},
    "instr": {"translation", "conversation", "date", "number"},
    "general": {"caption", "document"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return build_demo_data(tmp_path_factory.mktemp("demo"), sizes=SIZES)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def side(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": value} if isinstance(value, str) else value


def images(records: Iterable[dict[str, Any]]) -> set[str]:
    return {name for record in records for name in side(record["anchor"]).get("image", [])}


def pixels(folder: Path, name: str) -> str:
    image = Image.open(folder / name).convert("RGB")
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def open_texts(records: Iterable[dict[str, Any]]) -> set[str]:
    """Every text whose kind is an open set: answers, hard negatives, both sides of pairs, captions of documents."""
    texts = set()
    for record in records:
        if record["task"] in OPEN_TASKS or record["domain"] == "document":
            texts |= {record["positive"], record.get("negative", record["positive"])}
        if record["task"] == "text_pair":
            texts.add(record["anchor"])
    return texts


def test_train_and_eval_share_no_image(data: DemoData) -> None:
    train, held_out = (images(read(path)) for path in (data.train, data.eval))
    content = {name: pixels(data.folder, name) for name in train | held_out}
    assert not {content[name] for name in train} & {content[name] for name in held_out}
    assert len(set(content.values())) == len(content)  # no image is there twice, under two names
    assert {str(path.relative_to(data.folder)) for path in data.folder.rglob("*.png")} == set(content)


def test_train_and_eval_share_no_anchor(data: DemoData) -> None:
    def anchors(path: Path) -> set[tuple[str, ...]]:
        sides = [side(record["anchor"]) for record in read(path)]
        return {(str(anchor.get("text")), *anchor.get("image", [])) for anchor in sides}

    assert not anchors(data.train) & anchors(data.eval)


def test_train_and_eval_share_no_open_text(data: DemoData) -> None:
    assert not open_texts(read(data.train)) & open_texts(read(data.eval))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_record_is_valid(data: DemoData, split: str) -> None:
    path = getattr(data, split)
    report = validate(path)
    assert report.ok and report.records == sum(data.counts[split].values())
    records = read(path)
    assert len({record["id"] for record in records}) == len(records)
    assert dict(Counter(f"{record['task']}/{record['domain']}" for record in records)) == data.counts[split]
    for record in records:
        assert record["task"] in ALL_TASKS and record["lang"] in ("vi", "en", "zh")
        assert record["domain"] in DOMAINS[record["task"]]
        assert ("score" in record) == (record["task"] == "text_pair")
        assert record.get("negative") != record["positive"]
        text = side(record["anchor"]).get("text", "")
        assert split_prefix("\n".join(text) if isinstance(text, list) else text)[0] is GENERAL


def test_every_task_and_domain_is_in_both_splits(data: DemoData) -> None:
    names = {f"{task}/{domain}" for task, domains in DOMAINS.items() for domain in domains}
    assert set(data.counts["train"]) == set(data.counts["eval"]) == names


def test_equal_seeds_give_equal_bytes(data: DemoData, tmp_path: Path) -> None:
    again = build_demo_data(tmp_path, sizes=SIZES)
    for path in sorted(data.folder.rglob("*.*")):
        assert path.read_bytes() == (again.folder / path.relative_to(data.folder)).read_bytes()
    other = build_demo_data(tmp_path / "other", seed=1, sizes=DemoSizes().scaled(0.005))
    assert not open_texts(read(other.eval_lines)) & open_texts(read(data.eval_lines))


def test_data_of_other_sizes_are_not_written_over(tmp_path: Path) -> None:
    sizes = DemoSizes().scaled(0.005)
    made = build_demo_data(tmp_path, sizes=sizes)
    before = made.train.read_bytes()
    for seed, other in ((1, sizes), (0, sizes.replaced({"lines": 9}))):
        with pytest.raises(ValueError, match=r"holds data of .*'lines': .* Choose another folder"):
            build_demo_data(tmp_path, seed=seed, sizes=other)
    assert made.train.read_bytes() == before
    assert build_demo_data(tmp_path, sizes=sizes).train.read_bytes() == before


def test_eval_lines_are_the_lines_of_eval(data: DemoData) -> None:
    lines = read(data.eval_lines)
    assert lines == [record for record in read(data.eval) if record["domain"] == "line"]
    assert len({record["positive"] for record in lines}) == len(lines) == SIZES.eval.lines


def test_items_are_held_out_and_mixed(data: DemoData) -> None:
    items = read(data.items)
    held_out = read(data.eval)
    assert len({item["id"] for item in items}) == len(items)
    assert {name for item in items for name in item.get("image", [])} <= images(held_out)
    assert {(bool(item.get("image")), bool(item.get("text"))) for item in items} == {
        (True, False),
        (False, True),
        (True, True),
    }
    assert {"picture", "line", "text", *documents.PAGE_SIZES} <= {item["metadata"]["kind"] for item in items}


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    build_demo_data(tmp_path, sizes=DemoSizes().scaled(0.005), progress=lambda *call: calls.append(call))
    last = {what: (done, total) for what, done, total in calls}
    assert set(last) == {"train images", "eval images"}
    assert all(done == total for done, total in last.values())


def test_default_sizes_hold_what_the_readme_says() -> None:
    sizes = DemoSizes()
    assert (sizes.train.vqa_images, sizes.eval.vqa_images, sizes.eval.lines) == (4000, 1000, 200)


def test_some_sizes_of_the_train_split_are_replaced() -> None:
    sizes = DemoSizes().replaced({"lines": 5, "captions": 6})
    assert vars(sizes.train) == {**vars(DemoSizes().train), "lines": 5, "captions": 6}
    assert sizes.eval == DemoSizes().eval
    with pytest.raises(ValueError, match=r"Unknown sizes \['line'\]; allowed are \['vqa_images', .*'instructions'\]"):
        DemoSizes().replaced({"line": 5})


@pytest.mark.parametrize("bad", [0, -1])
def test_sizes_below_one_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"lines = {bad}: allowed is 1 or more"):
        SplitSizes(**{**vars(SIZES.eval), "lines": bad})

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import load_from_disk
from datasets.naming import _split_re
from PIL import Image
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.losses import PrefixRoutedLoss
from sentence_vipyloqwen.train import dataset
from sentence_vipyloqwen.train.dataset import load_tasks, skipped_rows
from sentence_vipyloqwen.train.evaluation import TasksEvaluator
from sentence_vipyloqwen.train.record_lines import ImageError, RecordError

LINES: list[dict[str, Any]] = [
    {"task": "ocr", "anchor": {"image": "a.png", "text": "q1"}, "positive": "p1", "negative": ["n1", "n2"], "id": "1"},
    {"anchor": "caption", "positive": {"image": ["b.png"]}, "lang": "vi"},
    {"task": "ocr", "anchor": {"image": "a.png", "text": "q2"}, "positive": "p2", "domain": "x"},
    {"task": "text_pair", "anchor": "a", "positive": "b", "score": 0.62},
    {"task": "ocr", "anchor": {"image": "a.png", "text": "q3"}, "positive": "p3", "negative": "n3"},
    {"task": "ocr", "anchor": {"image": "a.png", "text": "q4"}, "positive": "p4"},
    {"task": "text_pair", "anchor": "a", "positive": "b", "negative": "c", "score": 1},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", LINES)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_records_are_split_by_task_and_columns_in_the_order_of_the_table(path: Path, cache: Path):
    splits = load_tasks(path, cache_dir=cache)
    assert splits.column_names == {
        "text_pair": ["anchor", "positive", "score"],
        "text_pair.negatives_1": ["anchor", "positive", "negative_1", "score"],
        "ocr": ["anchor", "positive"],
        "ocr.negatives_1": ["anchor", "positive", "negative_1"],
        "ocr.negatives_2": ["anchor", "positive", "negative_1", "negative_2"],
        "general": ["anchor", "positive"],
    }
    assert list(splits) == list(splits.column_names)
    assert splits.num_rows == dict.fromkeys(splits, 1) | {"ocr": 2}
    assert all(re.fullmatch(_split_re, name) for name in splits), "the Hub would refuse the name"


def test_rows_hold_inputs_with_their_prefix_and_nothing_else(path: Path, cache: Path):
    splits = load_tasks(path, cache_dir=cache)
    image = str(path.parent / "a.png")
    assert splits["ocr"][:] == {
        "anchor": [{"image": [image], "text": "<ocr> q2"}, {"image": [image], "text": "<ocr> q4"}],
        "positive": [{"image": [], "text": "p2"}, {"image": [], "text": "p4"}],
    }
    assert splits["ocr.negatives_2"][0] == {
        "anchor": {"image": [image], "text": "<ocr> q1"},
        "positive": {"image": [], "text": "p1"},
        "negative_1": {"image": [], "text": "n1"},
        "negative_2": {"image": [], "text": "n2"},
    }
    assert splits["text_pair"][0] == {
        "anchor": {"image": [], "text": "<text_pair> a"},
        "positive": {"image": [], "text": "<text_pair> b"},
        "score": 0.62,
    }
    assert splits["general"][0]["positive"] == {"image": [str(path.parent / "b.png")], "text": ""}


def test_rows_are_memory_mapped_and_the_files_are_parsed_once(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = load_tasks(path, cache_dir=cache)
    monkeypatch.setattr(dataset, "read_records", None)
    before = pa.total_allocated_bytes()
    second = load_tasks(path, cache_dir=cache)
    assert pa.total_allocated_bytes() == before
    assert {name: split[:] for name, split in first.items()} == {name: split[:] for name, split in second.items()}
    assert all(Path(file["filename"]).is_relative_to(cache) for split in second.values() for file in split.cache_files)


def test_a_changed_file_is_read_anew(path: Path, cache: Path):
    load_tasks(path, cache_dir=cache)
    write(path, LINES[:2])
    assert load_tasks(path, cache_dir=cache).num_rows == {"ocr.negatives_2": 1, "general": 1}
    os.utime(path, ns=(0, 0))
    assert len(list(cache.glob("*/splits.json"))) == 2
    load_tasks(path, cache_dir=cache)
    assert len(list(cache.glob("*/splits.json"))) == 3


def test_a_new_format_is_built_anew(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    load_tasks(path, cache_dir=cache)
    monkeypatch.setattr(dataset, "FORMAT_VERSION", -1)
    load_tasks(path, cache_dir=cache)
    assert len(list(cache.glob("*/splits.json"))) == 2


def test_several_files_are_one_dataset_and_images_stay_relative_to_their_file(path: Path, cache: Path):
    (path.parent / "more").mkdir()
    more = write(path.parent / "more" / "t.jsonl", LINES[2:3])
    ocr = load_tasks([str(path), more], cache_dir=cache)["ocr"]
    assert [row["image"] for row in ocr["anchor"]] == [[str(path.parent / "a.png")]] * 2 + [
        [str(path.parent / "more" / "a.png")]
    ]


@pytest.mark.parametrize("bound", ["ROWS_PER_BATCH", "CHARACTERS_PER_BATCH"])
def test_rows_are_written_in_batches(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, bound: str):
    monkeypatch.setattr(dataset, bound, 10)
    path = write(tmp_path / "t.jsonl", [{"anchor": f"anchor {i}", "positive": "p"} for i in range(95)])
    general = load_tasks(path, cache_dir=cache)["general"]
    assert [row["text"] for row in general["anchor"]] == [f"anchor {i}" for i in range(95)]
    assert len(general.data.column("anchor").chunks) >= 10


def test_a_bad_line_stops_with_its_place_and_leaves_nothing_to_load(path: Path, cache: Path):
    path.write_text(path.read_text() + '{"task": "ocr"}\n')
    for _ in range(2):
        with pytest.raises(RecordError, match=rf"{path}:8: anchor: got nothing"):
            load_tasks(path, cache_dir=cache)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_a_file_without_records_is_refused(path: Path, cache: Path):
    empty = path.parent / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=f"{empty}: no record"):
        load_tasks([path, empty], cache_dir=cache)
    with pytest.raises(ValueError, match="got no path"):
        load_tasks([], cache_dir=cache)


def test_a_file_that_changes_while_it_is_read_is_refused(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def growing(source: Path, **options: Any):
        yield from read(source, **options)
        os.utime(source, ns=(0, 0))

    read = dataset.read_records
    monkeypatch.setattr(dataset, "read_records", growing)
    with pytest.raises(ValueError, match="changed while being read"):
        load_tasks(path, cache_dir=cache)
    assert not list(cache.glob("*/splits.json"))


# --- Broken images ---


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Records whose images are sound, cut off, missing, a bomb, and none."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "sound.jpg")
    whole = (tmp_path / "sound.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    names = ["sound.jpg", "cut.jpg", "missing.png", "bomb.png"]
    rows = [{"task": "ocr", "anchor": {"image": name, "text": "q"}, "positive": "p", "id": name} for name in names]
    negative = {"task": "instr", "anchor": "a", "positive": "p", "negative": ["n", {"image": ["sound.jpg", "cut.jpg"]}]}
    return write(tmp_path / "broken.jsonl", [*rows, negative, {"anchor": "a", "positive": "p"}])


def test_broken_images_are_not_looked_at_by_default(broken: Path, cache: Path):
    splits = load_tasks(broken, cache_dir=cache)
    assert splits.num_rows == {"instr.negatives_2": 1, "ocr": 4, "general": 1}
    assert skipped_rows(splits) is None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_rows_with_broken_images_are_left_out_and_listed(
    broken: Path, cache: Path, model: ViPyloQwen, caplog: pytest.LogCaptureFixture
):
    splits = load_tasks(broken, cache_dir=cache, on_error="skip", show_progress_bar=True)
    assert splits.num_rows == {"ocr": 1, "general": 1}
    assert splits["ocr"][0]["anchor"]["image"] == [str(broken.parent / "sound.jpg")]
    report = skipped_rows(splits)
    assert report is not None and report.is_relative_to(cache) and str(report) in caplog.text
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["file"], line["line"], line.get("id")) for line in lines] == [
        (str(broken), 2, "cut.jpg"),
        (str(broken), 3, "missing.png"),
        (str(broken), 4, "bomb.png"),
        (str(broken), 5, None),
    ]
    paths = [str(broken.parent / name) for name in ("cut.jpg", "missing.png", "bomb.png", "cut.jpg")]
    assert [line["image"] for line in lines] == paths
    for line, why in zip(lines, ("truncated", "No such file", "pixels", "truncated"), strict=True):
        assert why in line["reason"]
    for path in paths:  # and they are those that training cannot open
        with pytest.raises(ValueError, match=re.escape(path)):
            model.preprocess([{"image": path}])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_skipping_looks_once_and_tells_each_time(broken: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    rows = load_tasks(broken, cache_dir=cache, on_error="skip").num_rows
    (broken.parent / "sound.jpg").unlink()
    caplog.clear()
    assert load_tasks(broken, cache_dir=cache, on_error="skip").num_rows == rows
    assert "left out" in caplog.text
    assert load_tasks(broken, cache_dir=cache).num_rows["ocr"] == 4, "the other policy has a cache of its own"


def test_where_all_images_are_sound_nothing_is_listed(broken: Path, cache: Path, caplog: pytest.LogCaptureFixture):
    path = write(broken.parent / "sound.jsonl", [{"anchor": {"image": "sound.jpg"}, "positive": "p"}])
    assert skipped_rows(load_tasks(path, cache_dir=cache, on_error="skip")) is None
    assert not caplog.text


def test_a_file_without_a_sound_row_is_refused(broken: Path, cache: Path):
    path = write(broken.parent / "lost.jsonl", [{"anchor": {"image": "missing.png"}, "positive": "p"}])
    with pytest.raises(ImageError, match=rf"{path}:1: cannot read the image .*missing.png"):
        load_tasks([broken, path], cache_dir=cache, on_error="skip")
    assert not list(cache.glob("*/splits.json"))


def test_a_line_that_is_no_record_stops_it_under_either_policy(broken: Path, cache: Path):
    broken.write_text('{"task": "ocr"}\n' + broken.read_text())
    with pytest.raises(RecordError, match=rf"{broken}:1: anchor: got nothing"):
        load_tasks(broken, cache_dir=cache, on_error="skip")


def test_another_policy_is_refused(path: Path, cache: Path):
    with pytest.raises(ValueError, match="on_error is 'ignore'; allowed: raise, skip"):
        load_tasks(path, cache_dir=cache, on_error="ignore")


def test_a_training_stops_at_a_broken_image_and_runs_without_it(broken: Path, cache: Path, model: ViPyloQwen):
    lines = [json.loads(line) for line in broken.read_text().splitlines()]
    path = write(broken.parent / "t.jsonl", [lines[0], lines[1]])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(cache / "run"), max_steps=1, per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        save_strategy="no", use_cpu=True,
    )  # fmt: skip

    def train(policy: str) -> int:
        data = load_tasks(path, cache_dir=cache, on_error=policy)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=PrefixRoutedLoss(model))
        return trainer.train().global_step

    with pytest.raises(
        ValueError, match=r"Input 1, image 0: cannot decode the image .*cut\.jpg|Input 0, image 0: .*cut"
    ):
        train("raise")
    assert train("skip") == 1


def test_what_a_killed_run_left_is_cleared(path: Path, cache: Path):
    rows = load_tasks(path, cache_dir=cache).num_rows
    (complete,) = (entry.parent for entry in cache.glob("*/splits.json"))
    complete.rename(complete.with_name(f"{complete.name}.tmp"))
    assert load_tasks(path, cache_dir=cache).num_rows == rows
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == [complete]


def test_a_damaged_cache_is_refused(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "ROWS_PER_BATCH", 1)
    load_tasks(path, cache_dir=cache)
    (file,) = cache.glob("*/ocr.arrow")
    with pa.ipc.open_stream(pa.OSFile(str(file))) as stream:
        batches = list(stream)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batches[0].schema) as stream:
        stream.write_batch(batches[0])  # one row of two
    with pytest.raises(ValueError, match="delete the folder"):
        load_tasks(path, cache_dir=cache)


def test_the_stock_trainer_takes_every_split_and_the_evaluator(
    path: Path, cache: Path, tmp_path: Path, model: ViPyloQwen, picture
):
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        multi_dataset_batch_sampler="round_robin",
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=load_tasks(path, cache_dir=cache),
        loss=PrefixRoutedLoss(model),
        evaluator=TasksEvaluator(path),
    )
    trainer.train()
    (measured,) = [entry for entry in trainer.state.log_history if "eval_tasks_mean" in entry]
    assert measured["eval_ocr_recall@10"] == 1


def test_splits_survive_saving_to_disk(path: Path, cache: Path, tmp_path: Path):
    splits = load_tasks(path, cache_dir=cache)
    splits.save_to_disk(tmp_path / "saved")
    assert load_from_disk(tmp_path / "saved").column_names == splits.column_names

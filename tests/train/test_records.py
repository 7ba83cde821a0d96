from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sentence_vipyloqwen.cli import app
from sentence_vipyloqwen.modules import images
from sentence_vipyloqwen.tasks import ALL_TASKS, TASKS, split_prefix
from sentence_vipyloqwen.train import record_lines, validation
from sentence_vipyloqwen.train.record_lines import ImageError, RecordError, check_records, read_records
from sentence_vipyloqwen.train.records import RECORD_KEYS, Record, Side, parse_record
from sentence_vipyloqwen.train.validation import validate

GOOD: dict[str, Any] = {"task": "ocr", "anchor": "Tổng cộng?", "positive": "320.000 đ"}


def parse(**fields: Any) -> Record:
    return parse_record(json.dumps(fields, ensure_ascii=False).encode(), "/data")


def write_lines(path: Path, *lines: dict[str, Any] | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


# --- What a record may be ---


def test_a_full_record():
    record = parse(
        task="ocr",
        anchor={"image": ["a.png", "sub/b.png"], "text": "Tổng cộng?"},
        positive={"image": "c.png"},
        negative=["32.000 đ", {"text": "3 đ", "image": "/elsewhere/d.png"}],
        id="7",
        lang="vi",
        domain="invoice",
    )
    assert record == Record(
        task=TASKS["ocr"],
        anchor=Side("<ocr> Tổng cộng?", ("/data/a.png", "/data/sub/b.png")),
        positive=Side("", ("/data/c.png",)),
        negatives=(Side("32.000 đ"), Side("3 đ", ("/elsewhere/d.png",))),
        id="7",
        lang="vi",
        domain="invoice",
    )
    assert record.sides == (record.anchor, record.positive, *record.negatives)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_prefix_stands_on_the_sides_that_the_task_table_says(name: str):
    task = ALL_TASKS[name]
    score = {"score": 0.5} if name == "text_pair" else {}
    record = parse(task=name, anchor="a", positive="p", negative="n", **score)
    assert record.anchor.text == task.prompt + "a"
    other = task.prompt if task.prefix_on_positive else ""
    assert (record.positive.text, record.negatives[0].text) == (other + "p", other + "n")


@pytest.mark.parametrize("text", ["<ocr> q", "<ocr>q", "  <ocr>  q", "<image><ocr> q", "<image>\n<ocr> q"])
@pytest.mark.parametrize("named", [{"task": "ocr"}, {}])
def test_a_prefix_in_the_text_names_the_task_and_is_not_doubled(text: str, named: dict[str, str]):
    record = parse(anchor=text, positive="p", **named)
    assert (record.task.name, record.anchor.text) == ("ocr", "<ocr> q")


def test_without_task_and_prefix_a_record_is_general():
    record = parse(anchor="a <ocr> b", positive="p")
    assert (record.task.name, record.anchor.text) == ("general", "a <ocr> b")


def test_text_pair_may_bear_the_prefix_on_every_side():
    record = parse(anchor="<text_pair> a", positive="<text_pair>b", negative="c", score=0)
    assert [side.text for side in record.sides] == ["<text_pair> a", "<text_pair> b", "<text_pair> c"]
    assert record.score == 0.0


def test_turns_are_joined_by_a_newline_and_image_placeholders_dropped():
    record = parse(task="instr", anchor={"text": ["<instr> <image>Một", "Hai"]}, positive="x")
    assert record.anchor.text == "<instr> Một\nHai"


def test_null_means_absent():
    record = parse(
        task=None,
        anchor={"text": None, "image": "a.png"},
        positive={"text": "p", "image": None},
        negative=None,
        score=None,
        id=None,
        lang=None,
        domain=None,
    )
    assert record == Record(ALL_TASKS["general"], Side("", ("/data/a.png",)), Side("p"))


def test_a_prefix_with_an_image_and_no_text_is_an_input():
    assert parse(task="ocr", anchor={"image": "a.png"}, positive="p").anchor == Side("<ocr> ", ("/data/a.png",))


def test_paths_are_normalised_and_data_uris_kept():
    uri = "data:image/png;base64,AAAA"
    assert parse(anchor={"image": ["./x/../a.png", uri]}, positive="p").anchor.images == ("/data/a.png", uri)


def test_a_number_as_id_becomes_text():
    assert parse(**GOOD, id=12).id == "12"


def test_a_side_as_input_and_as_row():
    both = Side("t", ("/a.png",))
    assert both.as_input() == both.as_row() == {"image": ["/a.png"], "text": "t"}
    assert Side("", ("/a.png",)).as_input() == {"image": ["/a.png"]}
    assert Side("", ("/a.png",)).as_row() == {"image": ["/a.png"], "text": ""}


# --- What it may not be ---

FAULTS = [
    (b"{", "not JSON", "one JSON object a line"),
    (b"[1]", "got a list ([1])", "a JSON object"),
    (b'{"anchor": "\xff"}', "not UTF-8: byte 0xff at position 12", ""),
    (b'{"anchor": "a", "anchor": "b", "positive": "c"}', "key 'anchor' occurs twice", "once"),
    (b"[" * 100_000, "nested too deeply", "the record format"),
    (b'{"anchor": "\\ud800", "positive": "p"}', "anchor: half of a surrogate pair", "Unicode"),
    (b'{"task": "text_pair", "anchor": "a", "positive": "p", "score": NaN}', "got NaN", "finite numbers"),
    (
        b'{"task": "text_pair", "anchor": "a", "positive": "p", "score": 1e999}',
        "score: got a number (inf)",
        "from 0 to 1",
    ),
    ({**GOOD, "extra": 1}, "record: unknown key 'extra'", "task, anchor, positive, negative, score, id, lang, domain"),
    ({**GOOD, "task": "OCR"}, "task: got a text ('OCR')", "text_pair, instr, ocr, vqa_single, vqa_multi, general"),
    ({**GOOD, "task": 3}, "task: got a number (3)", "text_pair"),
    ({"anchor": "a"}, "positive: got nothing", 'a text or {"text": ..., "image": ...}'),
    ({"positive": "a"}, "anchor: got nothing", "a text or"),
    ({**GOOD, "anchor": 5}, "anchor: got a number (5)", "a text or"),
    ({**GOOD, "anchor": ["a", "b"]}, "anchor: got a list", "a text or"),
    ({**GOOD, "anchor": {"txt": "a"}}, "anchor: unknown key 'txt'", "text, image"),
    ({**GOOD, "anchor": {"text": ["a", 1]}}, "anchor.text: got a number (1)", "a text or a list of texts"),
    ({**GOOD, "anchor": ""}, "anchor: neither text nor image", "at least one"),
    ({**GOOD, "anchor": " <image> "}, "anchor: neither text nor image", "at least one"),
    ({**GOOD, "anchor": "<ocr>"}, "anchor: neither text nor image", "at least one"),
    ({**GOOD, "positive": {}}, "positive: neither text nor image", "at least one"),
    ({**GOOD, "positive": {"text": [], "image": []}}, "positive: neither text nor image", "at least one"),
    ({**GOOD, "negative": ["a", ""]}, "negative_2: neither text nor image", "at least one"),
    ({**GOOD, "negative": 1.5}, "negative_1: got a number (1.5)", "a text or"),
    ({**GOOD, "anchor": {"image": ["i.png"] * 6}}, "anchor.image: got 6 images", "up to 5"),
    ({**GOOD, "anchor": {"image": ""}}, "anchor.image: got a text ('')", "a path, a data URI"),
    ({**GOOD, "anchor": {"image": {"path": "x"}}}, "anchor.image: got an object", "a path, a data URI"),
    ({**GOOD, "anchor": {"image": "a\0b"}}, "anchor.image: got a text", "a path without a NUL"),
    ({**GOOD, "anchor": {"image": "https://x.vn/a.png"}}, "anchor.image: got the URL", "files and data URIs"),
    ({**GOOD, "anchor": {"image": "data:text/plain,hi"}}, "anchor.image: got a text", "data:image/<format>;base64"),
    ({**GOOD, "anchor": "<instr> q"}, "anchor: prefix <instr> on task ocr", "<ocr> or none"),
    ({**GOOD, "task": "general", "anchor": "<ocr> q"}, "anchor: prefix <ocr> on task general", "no prefix here"),
    ({**GOOD, "positive": "<ocr> p"}, "positive: prefix <ocr> on task ocr", "no prefix here"),
    ({"anchor": "a", "positive": "<text_pair> p"}, "positive: prefix <text_pair> on task general", "no prefix here"),
    ({**GOOD, "score": 0.5}, "score: got a number (0.5) on task ocr", "on text_pair only"),
    ({**GOOD, "task": "text_pair"}, "score: got nothing on task text_pair", "a number from 0 to 1"),
    ({**GOOD, "task": "text_pair", "score": 1.01}, "score: got a number (1.01)", "a number from 0 to 1"),
    ({**GOOD, "task": "text_pair", "score": "0.5"}, "score: got a text ('0.5')", "a number from 0 to 1"),
    ({**GOOD, "task": "text_pair", "score": True}, "score: got a boolean (True)", "a number from 0 to 1"),
    ({**GOOD, "lang": ""}, "lang: got a text ('')", "a text that is not empty"),
    ({**GOOD, "domain": ["x"]}, "domain: got a list", "a text that is not empty"),
    ({**GOOD, "id": True}, "id: got a boolean", "a text that is not empty"),
]


@pytest.mark.parametrize(("line", "came", "allowed"), FAULTS)
def test_a_fault_is_named_with_file_and_line_and_what_is_allowed(tmp_path: Path, line: Any, came: str, allowed: str):
    path = write_lines(tmp_path / "t.jsonl", GOOD, b"   ", line)
    with pytest.raises(RecordError) as error:
        list(read_records(path))
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert came in message
    assert allowed in message


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError, match="task: got a text") as error:
        parse(**{**GOOD, "task": "x" * 10_000})
    assert len(str(error.value)) < 250


def test_a_record_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RecordError("t.jsonl", 3, "why")))
    assert (str(error), error.path, error.line, error.reason) == ("t.jsonl:3: why", "t.jsonl", 3, "why")
    error = pickle.loads(pickle.dumps(ImageError("t.jsonl", 3, "why", "a.png", "x")))
    assert (str(error), error.image, error.id) == ("t.jsonl:3: why", "a.png", "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<ocr> x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "image"]), inner, max_size=2),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(RECORD_KEYS), JSON) | JSON)
@example({"anchor": {"image": ["a"]}, "positive": "p"})
def test_any_json_is_a_well_formed_record_or_a_value_error(raw: Any):
    try:
        record = parse_record(json.dumps(raw).encode(), "/data")
    except ValueError:
        return
    for side in record.sides:
        assert side.as_input()
        assert len(side.images) <= 5
    assert split_prefix(record.anchor.text)[0] is record.task
    assert (record.score is not None) == (record.task.name == "text_pair")


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_record_or_a_value_error(line: bytes):
    with pytest.raises(ValueError, match=r"."):
        parse_record(line, "/data")


def test_reading_is_lazy_and_skips_blank_lines_a_byte_order_mark_and_carriage_returns(tmp_path: Path):
    line = json.dumps(GOOD).encode()
    path = write_lines(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + line + b"\r", b"", b" \t", line, b"broken")
    reading = read_records(path)
    assert [next(reading).anchor.text for _ in range(2)] == ["<ocr> Tổng cộng?"] * 2
    with pytest.raises(RecordError, match=":5: not JSON"):
        next(reading)


def test_images_are_relative_to_the_file_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_lines(tmp_path / "t.jsonl", {"anchor": {"image": "a.png"}, "positive": "p"})
    monkeypatch.chdir(tmp_path)
    assert next(read_records("t.jsonl")).anchor.images == (str(tmp_path / "a.png"),)


# --- validate ---


def test_validate_counts_by_task_and_reports_every_bad_line(tmp_path: Path):
    pair = {"task": "text_pair", "anchor": "a", "positive": "b", "score": 1}
    path = write_lines(tmp_path / "t.jsonl", GOOD, b"{", pair, {**GOOD, "task": "x"}, b"", GOOD)
    report = validate(path, show_progress_bar=True)
    assert (report.records, report.tasks, report.error_count, report.ok) == (3, {"text_pair": 1, "ocr": 2}, 2, False)
    assert [message.split(": ")[0] for message in report.errors] == [f"{path}:2", f"{path}:4"]


def test_validate_passes_a_good_file_and_not_an_empty_one(tmp_path: Path):
    assert validate(write_lines(tmp_path / "t.jsonl", GOOD)).ok
    assert not validate(write_lines(tmp_path / "empty.jsonl", b"")).ok


def test_validate_checks_images_by_their_header(tmp_path: Path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "head.png").write_bytes(png((50, 50))[:-20])  # the header alone is good
    (tmp_path / "text.png").write_bytes(b"not an image")
    (tmp_path / "thin.png").write_bytes(png((402, 2)))
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    images = ["good.png", "head.png", uri, "text.png", "missing.png", ".", "thin.png", uri[:30] + "!"]
    path = write_lines(tmp_path / "t.jsonl", *({"anchor": {"image": image}, "positive": "p"} for image in images))
    report = validate(path)
    reasons = [message.partition(": ")[2] for message in report.errors]
    assert report.records == 3
    expected = [
        (f"'{tmp_path}/text.png'", "cannot identify image file"),
        (f"'{tmp_path}/missing.png'", "No such file"),
        (f"'{tmp_path}'", "Is a directory"),
        (f"'{tmp_path}/thin.png'", "measures 402x2; the aspect ratio must be at most 200"),
        ("'data:image/png;base64,", "Only base64 data is allowed"),
    ]
    for reason, parts in zip(reasons, expected, strict=True):
        assert all(part in reason for part in parts), reason


def test_validate_decodes_images_to_their_end_if_asked(tmp_path: Path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes(png((50, 50))[:-40])
    images = ["good.jpg", "cut.jpg", "cut.png", "missing.jpg"]
    path = write_lines(tmp_path / "t.jsonl", *({"anchor": {"image": image}, "positive": "p"} for image in images))
    (error,) = validate(path).errors
    assert error.startswith(f"{path}:4: cannot read the image '{tmp_path}/missing.jpg'")
    errors = validate(path, decode_images=True).errors
    assert [message.split(": ")[0] for message in errors] == [f"{path}:2", f"{path}:3", f"{path}:4"]
    assert all("cannot decode the image" in message for message in errors[:2])


def test_an_image_that_is_not_what_its_header_says_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(png())
    path = write_lines(tmp_path / "t.jsonl", {"anchor": {"image": "a.png"}, "positive": "p"})
    monkeypatch.setattr(record_lines, "image_size", lambda _: (5, 5))
    assert "measures (4, 3), not (5, 5) as its header says" in validate(path, decode_images=True).errors[0]


def test_checked_lines_come_in_order_whatever_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(png())
    image = {"image": "a.png"}
    lines = [GOOD, b"{", {**GOOD, "anchor": image}, {**GOOD, "positive": {"image": "b.png"}, "id": 7}, b" ", GOOD]
    path = write_lines(tmp_path / "t.jsonl", *lines)
    expected = [Record, RecordError, Record, ImageError, Record]
    for bound, value in (("LINES_AT_ONCE", 1), ("LINES_AT_ONCE", 2), ("BYTES_AT_ONCE", 80), ("LINES_AT_ONCE", 1000)):
        monkeypatch.setattr(record_lines, bound, value)
        checked = list(check_records(path))
        assert [type(line.outcome) for line in checked] == expected
        assert b"".join(line.line for line in checked) == path.read_bytes().replace(b" \n", b"")
    assert checked[3].outcome.as_dict() == {
        "file": str(path),
        "line": 4,
        "id": "7",
        "image": str(tmp_path / "b.png"),
        "reason": checked[3].outcome.reason,
    }


def test_an_image_of_many_lines_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[Any] = []
    monkeypatch.setattr(record_lines, "LINES_AT_ONCE", 2)
    monkeypatch.setattr(record_lines, "image_size", opened.append)
    path = write_lines(tmp_path / "t.jsonl", *[{"anchor": {"image": ["a.png", "b.png"]}, "positive": "p"}] * 5)
    assert validate(path).records == 5
    assert sorted(map(str, opened)) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_validate_writes_a_report_of_all_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(validation, "MAX_ERRORS_KEPT", 1)
    uri = "data:image/png;base64," + "A" * 10_000
    bad = [
        b"{",
        {"anchor": {"image": "đơn.png"}, "positive": "p", "id": "x"},
        {"anchor": {"image": uri}, "positive": "p"},
    ]
    path = write_lines(tmp_path / "t.jsonl", GOOD, *bad)
    report = validate(path, write_report=tmp_path / "bad.jsonl")
    assert (len(report.errors), report.error_count) == (1, 3)
    text = (tmp_path / "bad.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0] == {"file": str(path), "line": 2, "reason": report.errors[0].partition(": ")[2]}
    assert (lines[1]["line"], lines[1]["id"], lines[1]["image"]) == (3, "x", str(tmp_path / "đơn.png"))
    assert "No such file" in lines[1]["reason"]
    assert lines[2]["image"].startswith("data:image/png;base64,AAA") and len(text) < 2000
    assert "đơn.png" in text


def test_a_report_goes_to_a_file_of_its_own(tmp_path: Path):
    path = write_lines(tmp_path / "t.jsonl", GOOD)
    good = tmp_path / "good.jsonl"
    for target in (path, good, tmp_path / "sub" / ".." / "t.jsonl"):
        with pytest.raises(ValueError, match="write_report: got .*; allowed: another file than"):
            validate(path, write_good=good, write_report=target)
    assert path.read_bytes() == json.dumps(GOOD).encode() + b"\n"


def test_the_command_line_checks_images_and_writes_both_files(tmp_path: Path):
    (tmp_path / "cut.png").write_bytes(png((50, 50))[:-40])
    path = write_lines(tmp_path / "t.jsonl", {"anchor": {"image": "cut.png"}, "positive": "p"}, GOOD)
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    arguments = ["validate", str(path), "--write-good", str(good), "--write-report", str(bad)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (len(good.read_bytes().splitlines()), bad.read_bytes()) == (2, b"")
    result = CliRunner().invoke(app, [*arguments, "--images"])
    assert result.exit_code == 1 and f"{path}:1: cannot decode the image" in result.output
    assert json.loads(good.read_bytes()) == GOOD
    assert json.loads(bad.read_bytes())["image"] == str(tmp_path / "cut.png")


def test_validate_looks_at_images_anew_each_time(tmp_path: Path):
    path = write_lines(tmp_path / "t.jsonl", {"anchor": {"image": "a.png"}, "positive": "p"})
    assert not validate(path).ok
    (tmp_path / "a.png").write_bytes(png())
    assert validate(path).ok


def test_validate_finds_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "big.png").write_bytes(png((40, 40)))
    path = write_lines(tmp_path / "t.jsonl", {"anchor": "a", "positive": {"image": "big.png"}})
    monkeypatch.setattr(images, "MAX_SOURCE_PIXELS", 1000)
    assert "has 1,600 pixels; at most 1,000 are allowed" in validate(path).errors[0]


def test_validate_keeps_the_first_messages_and_counts_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(validation, "MAX_ERRORS_KEPT", 2)
    report = validate(write_lines(tmp_path / "t.jsonl", *[b"{"] * 5))
    assert (len(report.errors), report.error_count) == (2, 5)


def test_validate_writes_the_good_lines_byte_for_byte(tmp_path: Path):
    odd = b'{ "anchor":"\\u0061" ,  "positive":"p"}'
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"{\n" + odd + b"\r\n\n" + odd)
    validate(path, write_good=tmp_path / "good.jsonl")
    assert (tmp_path / "good.jsonl").read_bytes() == odd + b"\r\n" + odd + b"\n"
    assert validate(tmp_path / "good.jsonl").ok


def test_a_stopped_validate_leaves_the_previous_good_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_lines(tmp_path / "t.jsonl", GOOD, GOOD)
    good = tmp_path / "good.jsonl"
    good.write_text("previous")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record_lines, "parse_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        validate(path, write_good=good)
    assert good.read_text() == "previous"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["good.jsonl", "t.jsonl"]


def test_good_lines_go_to_another_file_of_the_same_folder(tmp_path: Path):
    path = write_lines(tmp_path / "t.jsonl", GOOD)
    (tmp_path / "sub").mkdir()
    for target in (path, tmp_path / "sub" / "good.jsonl", tmp_path / "sub" / ".." / "t.jsonl"):
        with pytest.raises(ValueError, match="allowed: another file in"):
            validate(path, write_good=target)
    assert path.read_bytes() == json.dumps(GOOD).encode() + b"\n"

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sentence_vipyloqwen import VectorIndex, ViPyloQwen, cli
from sentence_vipyloqwen.cli import shared
from sentence_vipyloqwen.train.recipe import Recipe


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line as the console script does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vipyloqwen", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["create"],
        ["validate"],
        ["train"],
        ["evaluate"],
        ["ablate"],
        ["index"],
        ["index", "build"],
        ["search"],
        ["ui"],
    ],
)
def test_help_tells_of_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    assert "Usage: vipyloqwen" in capsys.readouterr().out


def test_an_error_is_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    for arguments, message in (
        (["evaluate", base, "x.jsonl"], "has no modules.json"),
        (["search", "m", "i"], "A query needs --text, --image, or both."),
        (["search", "i"], "A query needs --text, --image, or both."),
        (["search", tmp_path / "no", "--text", "a"], f"There is no index at {tmp_path / 'no'}"),
        (["train", "--set", "epochs"], "--set 'epochs': write it as KEY=VALUE"),
        (["train", "--set", "margins={ocr"], "--set 'margins={ocr': the value is not YAML"),
        (["evaluate", base, "x.jsonl", "--device", "bogus"], "--device 'bogus': allowed are cpu, cuda"),
        (
            ["train", "--base", "b"],
            "The recipe lacks ['train', 'output']: write them in the file, or give --train, --output",
        ),
        (["validate", "no.jsonl"], "Error: no.jsonl: No such file or directory"),
        (["train", "--recipe", tmp_path / "no.yaml"], "No recipe"),
        (["validate", tmp_path / "no.jsonl"], "No such file"),
    ):
        assert run(monkeypatch, *arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


@pytest.mark.parametrize("place", ["/no/model", "./model", "../model", "~/model", "run/of/model", "model/"])
@pytest.mark.parametrize("command", [["mteb"], ["mine"], ["evaluate"], ["index", "build"]])
def test_a_folder_that_is_not_there_is_no_matter_for_the_hub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sentence_transformers.util.file_io.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    more = {"mteb": [], "mine": ["rows.jsonl", "out.jsonl"], "evaluate": ["rows.jsonl"], "index": ["rows.jsonl", "out"]}
    assert run(monkeypatch, *command, place, *more[command[0]]) == 1
    assert capsys.readouterr().err == (
        f"Error: There is no folder {place!r}; allowed are the folder of a finished model, or a Hub id such as "
        "owner/name.\n"
    )


def test_what_may_be_a_hub_id_is_left_to_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(shared, "_is_stock", lambda path: asked.append(path))
    monkeypatch.setattr("sentence_vipyloqwen.ViPyloQwen", lambda path, device: path)
    for place in ("model", "owner/model", str(folder), f"{folder}/"):
        assert shared.load_any(place, None) == place
    assert asked == ["model", "owner/model", str(folder), f"{folder}/"]


def test_the_page_needs_an_extra_and_is_for_this_computer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "fastapi", None)
        assert run(patched, "ui", "m", "i") == 1
    assert "sentence-vipyloqwen[ui]" in capsys.readouterr().err.replace("\n", "")

    served: list[dict] = []
    monkeypatch.setattr("uvicorn.run", lambda app, **how: served.append({"app": app, **how}))
    VectorIndex.build(ViPyloQwen(folder, device="cpu"), [{"text": "một"}], tmp_path / "index")
    assert run(monkeypatch, "ui", folder, tmp_path / "index", "--device", "cpu") == 0
    assert "1 items, to search at http://127.0.0.1:8765" in capsys.readouterr().out
    assert (served[0]["host"], served[0]["port"]) == ("127.0.0.1", 8765)


@pytest.mark.parametrize("command", ["search", "ui"])
def test_an_index_opens_with_the_model_it_remembers_or_the_one_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, command: str
) -> None:
    monkeypatch.setattr("uvicorn.run", lambda app, **how: None)
    monkeypatch.chdir(tmp_path)
    options = ["--text", "hai", "--device", "cpu"] if command == "search" else ["--device", "cpu"]
    told = "1.0000" if command == "search" else "2 items, to search at"
    shutil.copytree(folder, "model")
    VectorIndex.build(ViPyloQwen("model", device="cpu"), [{"text": "một"}, {"text": "hai"}], "index")
    for places in (["index"], ["model", "index"]):
        assert run(monkeypatch, command, *places, *options) == 0
        assert told in capsys.readouterr().out
    assert run(monkeypatch, command, *options, "index") == 0  # after the options as well
    Path("model").rename("renamed")
    assert run(monkeypatch, command, "index", *options) == 1
    assert f"was built with the model at {tmp_path / 'model'}, which is not there" in capsys.readouterr().err
    assert run(monkeypatch, command, "renamed", "index", *options) == 0

    in_memory = ViPyloQwen(modules=list(ViPyloQwen("renamed", device="cpu")), device="cpu")
    in_memory.tokenizer.name_or_path = ""
    VectorIndex.build(in_memory, [{"text": "một"}], "index", overwrite=True)
    assert run(monkeypatch, command, "index", *options) == 1
    assert "does not say where its model is" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["search", "ui"])
def test_none_or_three_places_are_an_error_of_usage_and_the_help_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for places, message in (
        ([], "Missing argument '[MODEL] INDEX'"),
        (["m", "i", "x"], "3 came: m i x. Allowed are INDEX, or MODEL INDEX."),
    ):
        assert run(monkeypatch, command, *places, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
    assert run(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    for line in ("[MODEL] INDEX", f"vipyloqwen {command} my-index", f"vipyloqwen {command} run/model my-index"):
        assert line in shown


def test_train_hands_over_what_was_given_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes: list[Recipe] = []

    def train(recipe: Recipe, device: str | None) -> None:
        recipes.append(recipe)
        raise ValueError("enough")

    monkeypatch.setattr("sentence_vipyloqwen.train.run.train", train)
    file = tmp_path / "r.yaml"
    file.write_text("resume: false")
    command = ["train", "--recipe", file, "--base", "0123", "--train", "no", "--output", "runs/a #1", "--eval", "null"]
    for more in ([], ["--resume"], ["--set", "resume=true"], ["--set", "epochs=3", "--set", "margins={ocr: 0.1}"]):
        assert run(monkeypatch, *command, *more) == 1
    first = recipes[0]
    assert (first.base, first.train, first.output, first.eval) == ("0123", ("no",), "runs/a #1", "null")
    assert [recipe.resume for recipe in recipes] == [False, True, True, False]
    assert (recipes[-1].epochs, recipes[-1].margins) == (3, {"ocr": 0.1})


def test_validate_names_each_bad_line_and_writes_the_good_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = {"task": "instr", "anchor": "a", "positive": "b"}
    lines = [json.dumps(good), "{", json.dumps({**good, "task": "translate"}), json.dumps({**good, "positive": "c"})]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert run(monkeypatch, "validate", file, "--write-good", tmp_path / "good.jsonl") == 1
    told = capsys.readouterr().out
    assert f"{file}:2: " in told.replace("\n", "")
    assert f"{file}:3: " in told.replace("\n", "")
    assert "2 good, 2 bad" in told
    assert (tmp_path / "good.jsonl").read_text().splitlines() == [lines[0], lines[3]]
    assert run(monkeypatch, "validate", tmp_path / "good.jsonl") == 0


def test_a_folder_is_indexed_and_what_is_left_out_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    files, report = tmp_path / "files", tmp_path / "left-out.jsonl"
    files.mkdir()
    Image.new("RGB", (400, 200), "white").save(files / "a.pdf", resolution=100)  # 4 x 2 inches
    (files / "b.docx").write_bytes(b"PK")
    build = ["index", "build", folder, files, tmp_path / "index", "--dpi", 30, "--device", "cpu"]
    assert run(monkeypatch, *build) == 1
    assert f"{files / 'b.docx'}: the kind of file '.docx' is not read" in capsys.readouterr().err
    assert run(monkeypatch, *build, "--on-error", "skip", "--write-report", report) == 0
    assert [json.loads(line)["where"] for line in report.read_text().splitlines()] == [str(files / "b.docx")]
    (item,) = VectorIndex.load(tmp_path / "index", ViPyloQwen(folder, device="cpu")).items
    assert item["id"] == "a.pdf#page=1"
    assert Image.open(item["image"][0]).size == (120, 60)


def test_how_far_a_search_looks_is_told_to_the_index(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    VectorIndex.build(ViPyloQwen(folder, device="cpu"), [{"text": "hóa đơn"}], tmp_path / "index")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(VectorIndex, "search", lambda self, query, **options: asked.append(options) or [])
    query = ["search", folder, tmp_path / "index", "--text", "hóa đơn", "--device", "cpu"]
    for options in ([], ["--effort", 300], ["--exact"]):
        assert run(monkeypatch, *query, *options) == 0
    assert [(of["exact"], of["effort"]) for of in asked] == [(False, None), (False, 300), (True, None)]


def test_an_index_is_built_looked_at_and_searched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text("\n".join(json.dumps({"id": text, "text": text}) for text in ("hóa đơn", "một hình tròn")))
    assert run(monkeypatch, "index", "build", folder, items, tmp_path / "index", "--device", "cpu") == 0
    assert "Indexed 2 items" in capsys.readouterr().out
    assert run(monkeypatch, "index", "info", tmp_path / "index") == 0
    assert json.loads(capsys.readouterr().out)["count"] == 2
    page = tmp_path / "page.html"
    query = ["search", folder, tmp_path / "index", "--text", "hóa đơn", "-k", 1, "--html", page, "--device", "cpu"]
    assert run(monkeypatch, *query) == 0
    assert "hóa đơn" in capsys.readouterr().out
    assert "hóa đơn" in page.read_text(encoding="utf-8")
    assert run(monkeypatch, "index", "build", folder, items, tmp_path / "index", "--device", "cpu") == 1

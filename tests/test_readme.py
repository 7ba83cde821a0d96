"""What the READMEs say is so: their commands and Python blocks run as they stand, their tables are those of the code.

Commands and blocks of README.md run in order, in one folder. It holds what `make demo` leaves, at a hundredth of its
size: the demo's own data, and tiny models in place of the trained ones. README.vi.md has the same commands and blocks,
comments apart.
"""

from __future__ import annotations

import ast
import configparser
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
import yaml
from fastapi.testclient import TestClient
from PIL import Image
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen import VectorIndex, ViPyloQwen, cli
from sentence_vipyloqwen.ablation.plan import plan
from sentence_vipyloqwen.ablation.report import write_report
from sentence_vipyloqwen.ablation.results import RESULTS_FILE
from sentence_vipyloqwen.ablation.variants import FULL, VARIANTS, with_needed
from sentence_vipyloqwen.demo import data as demo_data
from sentence_vipyloqwen.demo import run as demo
from sentence_vipyloqwen.demo.data import DemoSizes, build_demo_data
from sentence_vipyloqwen.files import measure
from sentence_vipyloqwen.index.items import ITEM_KEYS
from sentence_vipyloqwen.mteb_tasks.offline import VietnameseDocumentRetrieval
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL, Task
from sentence_vipyloqwen.train.recipe import load_recipe, shipped_recipes
from sentence_vipyloqwen.train.records import parse_record

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.vi.md")
QUICKER = {"max_steps=100": "max_steps=2"}
"""What is written -> what runs here; everything else runs as it stands."""

HERE = "http://127.0.0.1"
ORIENTATION = 0x0112  # the tag of EXIF
LANGUAGES = {"bash", "python", "json", "bibtex"}
PLOT = re.compile(r"data:image/svg\+xml;base64,[\w+/=]+")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the line of the file at which the code begins."""

    language: str
    code: str
    line: int


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[Block]:
    text = read(name)
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in BLOCK.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The arguments of each command of a block, comments dropped, continued lines joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [arguments for line in lines if (arguments := shlex.split(line, comments=True))]


@pytest.fixture
def after_the_demo(folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory as `make demo` leaves it, but small; the page to search in ends as soon as it is up."""
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: TestClient(app, HERE).get("/").raise_for_status())
    monkeypatch.chdir(tmp_path)
    output = Path("demo-output")
    build_demo_data(output / "data", sizes=DemoSizes().scaled(0.01))
    shutil.copytree(base, output / "base")
    shutil.copytree(folder, output / "training" / "model")
    VectorIndex.build(ViPyloQwen(folder, device="cpu"), output / "data" / "items.jsonl", output / "index")
    return tmp_path


def test_commands_and_blocks_run_in_order(after_the_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for block in blocks("README.md"):
        if block.language == "bash":
            for command in commands(block):
                run_command(command, monkeypatch)
        if block.language == "python":
            lines = "\n" * (block.line - 1) + quicker(block.code)  # so that a traceback names the README's line
            exec(compile(lines, "README.md", "exec"), names)
    assert (names["ours"] * names["theirs"]).sum(axis=1) == pytest.approx(1, abs=1e-4)
    assert len(names["index"]) > 0
    assert "<section" in Path("runs/first/search.html").read_text(encoding="utf-8")
    assert json.loads(Path("runs/first/lines.json").read_text(encoding="utf-8"))["tasks"]["ocr"]["queries"] > 0
    assert Path("my-adapter/adapter_model.safetensors").is_file()


def quicker(code: str) -> str:
    for written, run in QUICKER.items():
        code = code.replace(written, run)
    return code


def run_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of ours as the console script does; of `make` and `pip`, see that what they name exists."""
    program, *arguments = command
    if program == "make":
        assert set(arguments) <= make_targets()
    elif program == "pip":
        assert arguments[0] == "install"
        assert set(re.findall(r"[\w-]+", arguments[1])) <= extras()
    else:
        assert program == "vipyloqwen", f"no test for {program}"
        monkeypatch.setattr(sys, "argv", [program, *map(quicker, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, shlex.join(command)


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))


def extras() -> set[str]:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(setup["options.extras_require"])


def test_the_commands_for_contributors_exist() -> None:
    wanted = [command for block in blocks("CONTRIBUTING.md") for command in commands(block)]
    assert wanted
    for program, *arguments in wanted:
        assert program == "make"
        assert set(arguments) <= make_targets()


@pytest.mark.parametrize("name", READMES)
def test_every_block_is_of_a_kind_that_is_checked(name: str) -> None:
    assert {block.language for block in blocks(name)} == LANGUAGES
    assert read(name).count("```") == 2 * len(blocks(name))


def test_the_translation_has_the_same_commands_and_blocks() -> None:
    def plain(block: Block) -> Any:
        if block.language == "bash":
            return commands(block)
        return ast.dump(ast.parse(block.code)) if block.language == "python" else block.code

    assert [plain(block) for block in blocks("README.vi.md")] == [plain(block) for block in blocks("README.md")]


@pytest.mark.parametrize("name", READMES)
def test_json_blocks_are_records_and_items(name: str, tmp_path: Path) -> None:
    records, items = (block.code.splitlines() for block in blocks(name) if block.language == "json")
    assert [parse_record(line.encode(), str(tmp_path)).task.name for line in records] == [
        "ocr",
        "text_pair",
        "instr",
        "vqa_single",
    ]
    for line in items:
        item = json.loads(line)
        assert set(item) <= set(ITEM_KEYS)
        assert item.keys() & {"text", "image"}


@pytest.mark.parametrize("name", READMES)
def test_the_table_of_tasks_is_that_of_the_code(name: str) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in read(name).splitlines() if "|" in line]
    shown = {row[0].strip("`"): row for row in rows if len(row) == 4 and row[0].strip("`") in ALL_TASKS}
    assert list(shown) == list(ALL_TASKS)
    for task in ALL_TASKS.values():
        if task is not GENERAL:
            assert shown[task.name][1] == f"`{task.token}`"
        assert shown[task.name][3] == formula(task)


def formula(task: Task) -> str:
    terms = [f"`{term}`" if weight == 1 else f"{weight:g} `{term}`" for term, weight in task.weights.items()]
    return " + ".join(terms) + (f" (margin {task.margin})" if task.margin is not None else "")


@pytest.mark.parametrize("name", READMES)
def test_the_extras_and_recipes_are_all_there(name: str) -> None:
    text = read(name)
    assert set(re.findall(r"^\| `([\w-]+)` \| [^|]+ \|$", text, re.MULTILINE)) >= extras()
    assert set(re.findall(r"(?<![/\w-])[\w-]+\.yaml", text)) == set(shipped_recipes())


@pytest.mark.parametrize("name", READMES)
def test_the_demo_leaves_what_is_listed(name: str) -> None:
    text = read(name)
    for left in (demo.PAGE_FILE, demo.METRICS_FILE, "training/model/", "base/", "data/", "index/"):
        assert f"| `{left}` |" in text


@pytest.mark.parametrize("name", READMES)
def test_the_tables_are_those_of_the_results(name: str) -> None:
    """`docs/write_figures.py` writes them; what it would write stands there."""
    written = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))
    assert written["with_figures"](read(name), written["READMES"][name]) == read(name)


def test_the_figures_are_of_the_demo_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the recipe that comes with the package, on the sizes that are the default."""
    kept = json.loads(read("docs/demo.json"))
    places = {"base": "base", "train": ["train"], "output": "output"}
    own = {"seed": kept["recipe"]["seed"], "min_pixels": demo.MIN_PIXELS}
    recipe = yaml.safe_load(load_recipe(demo.RECIPE, {**places, **own}).to_yaml())
    assert kept["recipe"] == {name: value for name, value in recipe.items() if name not in (*places, "eval")}
    assert kept["processes"] == 2
    monkeypatch.setattr(demo_data, "_write_images", lambda *arguments: None)
    assert kept["records"] == build_demo_data(tmp_path).counts


def test_the_aims_for_speed_are_held_to_the_results() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))
    assert written["with_aims"](read("docs/speed.md")) == read("docs/speed.md")


def test_the_records_at_scale_are_those_measured() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))
    page = read("docs/scaling.md")
    assert written["with_records"](page) == page
    assert written["with_records"](page.replace("| 11,000,000 | validate |", "| 11 | validate |")) == page


def test_half_of_a_demo_replaces_no_figures(tmp_path: Path) -> None:
    before = read("docs/demo.json")
    (tmp_path / "metrics.json").write_text("{}")
    main = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))["main"]
    with pytest.raises(FileNotFoundError, match=r"mteb\.json, .*curves\.svg: missing"):
        main([str(tmp_path)])
    assert read("docs/demo.json") == before


def test_figures_of_two_models_are_not_put_together(tmp_path: Path) -> None:
    before = read("docs/demo.json")
    kept, mteb = (json.loads(read(f"docs/{name}.json")) for name in ("demo", "mteb"))
    assert kept["weights"] == mteb["weights"]
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    (tmp_path / "mteb.json").write_text(json.dumps({**mteb, "weights": "of another"}))
    (tmp_path / "training/model/assets").mkdir(parents=True)
    (tmp_path / "training/model/assets/curves.svg").touch()
    main = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))["main"]
    with pytest.raises(ValueError, match=r"holds figures of different models, by their weights: .*of another"):
        main([str(tmp_path)])
    assert read("docs/demo.json") == before


def test_what_makes_the_figures_is_there() -> None:
    """The targets that take hours name scripts that exist, and variants of the table."""
    makefile = read("Makefile")
    scripts = re.findall(r"\b(?:benchmarks|docs)/\w+\.py", makefile)
    assert {"benchmarks/index.py", "docs/write_figures.py", "docs/make_pictures.py"} <= set(scripts)
    assert not [script for script in scripts if not (ROOT / script).exists()]
    ablated = [*words_of("ABLATED"), *words_of("ONCE")]
    assert {variant.name for variant in with_needed(ablated)} == {FULL, *ablated}
    words = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))["READMES"].values()
    assert [of["changes"].keys() for of in words] == [VARIANTS.keys()] * 2


def words_of(variable: str) -> list[str]:
    """The words of a variable of the Makefile."""
    (words,) = re.findall(rf"^{variable} = (.*)$", read("Makefile").replace("\\\n", ""), re.MULTILINE)
    return words.split()


def test_the_ablation_is_what_its_command_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would do the committed runs again, no more and no fewer, by the same settings on the same data."""
    monkeypatch.setattr(demo_data, "_write_images", lambda *arguments: None)
    sizes = {name: int(number) for name, number in (size.split("=") for size in words_of("ABLATION_DATA"))}
    made = build_demo_data(tmp_path, sizes=DemoSizes().replaced(sizes))
    places = {"base": "base", "train": [str(made.train)], "eval": str(made.eval), "output": "output"}
    recipe = load_recipe(str(ROOT / "docs" / "ablation.yaml"), places)
    planned = {
        (run.variant.name, run.recipe.seed): json.loads(json.dumps(run.settings()))
        for run in [*plan(recipe, words_of("ABLATED"), seeds=3), *plan(recipe, words_of("ONCE"), seeds=1)]
    }
    kept = json.loads(read(f"docs/ablation/{RESULTS_FILE}"))
    runs = kept["runs"]
    assert kept["about"] == " ".join(words_of("ABLATION_ABOUT"))
    assert {(run["variant"], run["seed"]): run["settings"] for run in runs} == planned
    digests = {name: measure(getattr(made, name))["xxh3_128"] for name in ("train", "eval")}
    for run in runs:
        assert (run["data"]["train"], run["data"]["eval"]) == ([digests["train"]], digests["eval"])


@pytest.mark.parametrize("name", READMES)
def test_what_is_said_of_the_ablation_has_its_figures(name: str) -> None:
    """Every figure in the words under the table stands in the report, with the sign that it has there, if any."""
    said = read(name).partition("<!-- ablation:end -->")[2].partition("\n## ")[0]
    report = re.findall(r"[+-]?0\.\d{3}", read("docs/ablation/ablation.md"))
    known = {*report, *(figure.lstrip("+-") for figure in report)}
    figures = re.findall(r"[+-]?0\.\d{3}", said)
    assert figures
    assert not [figure for figure in figures if figure not in known]


@pytest.mark.parametrize("name", READMES)
def test_what_knowing_the_kind_of_a_page_gives_is_said(name: str) -> None:
    before, _, _ = read(name).partition("<!-- mteb:start -->")
    assert f"{VietnameseDocumentRetrieval().kind_baseline():.3f}" in before[-400:]


def test_what_is_said_of_the_index_has_its_figures() -> None:
    """Every figure in the words of docs/index.md stands in the raw results, rounded as it is in the words."""
    said = read("docs/index.md").partition("## What it costs\n")[2].partition("\n## ")[0]
    figures = re.findall(r"(?<![\w.])\d+\.\d+", said)
    measured = [float(figure) for figure in re.findall(r"(?<![\w.])\d+\.\d+", read("benchmarks/index.md"))]
    assert len(figures) > 10
    for figure in figures:
        half = 0.5 * 10.0 ** -len(figure.partition(".")[2])
        assert any(abs(raw - float(figure)) <= half * 1.001 for raw in measured), figure


def test_the_report_of_the_ablation_is_that_of_its_results(tmp_path: Path) -> None:
    kept = ROOT / "docs" / "ablation"
    shutil.copy(kept / RESULTS_FILE, tmp_path)
    write_report(tmp_path)
    assert {path.name for path in kept.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for name in ("ablation.html", "ablation.md"):
        made, here = (PLOT.sub("", (folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, kept))
        assert made == here  # plots are drawn differently by every release of matplotlib


def test_a_readme_without_its_table_is_refused() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "write_figures.py"))
    with pytest.raises(ValueError, match="'speed' stands 0 times"):
        written["with_figures"]("no table", written["READMES"]["README.md"])


def test_stock_differs_where_the_readme_says(folder: Path, picture: Callable[..., Image.Image], tmp_path: Path) -> None:
    """The list of "One folder, two ways to load it", in its order."""
    ours, stock = ViPyloQwen(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    turned, exif, text = picture(40, 80), Image.Exif(), {"image": picture(), "text": "a"}
    exif[ORIENTATION] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    file = str(tmp_path / "turned.png")

    for refused in (Path(file), np.zeros((40, 60), np.uint8), {**text, "text": "a <|image_pad|>"}):
        ours.encode(refused)
        with pytest.raises(ValueError):
            stock.encode(refused)
    floats, deep = np.random.default_rng(0).random((40, 60, 3)), Image.new("I;16", (40, 60), 40_000)
    for other in (file, floats, Image.open(file), deep, "a <ocr> b"):
        assert ours.encode(other) @ stock.encode(other) < 0.999, other
    for same in ({"text": file}, {"image": file}):
        assert ours.encode(same) @ stock.encode(same) > 0.9999, same
    with pytest.raises(ValueError, match="6 images"):
        ours.encode({"image": [turned] * 6})
    assert stock.encode({"image": [turned] * 6}).shape == (32,)


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", read(name))
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]

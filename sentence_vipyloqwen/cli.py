"""The command line: ``vipyloqwen demo | create | validate | train | evaluate | index | search``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from sentence_vipyloqwen.model import ViPyloQwen

WIDTH_OF_A_PIPE = 140  # characters; a table of figures would be cut at the 80 that rich assumes

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train, run and index one embedding space for text and images on Qwen2-VL.\n\n"
    "New here? `vipyloqwen demo` does the whole job on a tiny model in a quarter of an hour.",
)
index_app = typer.Typer(no_args_is_help=True, help="Build an index of texts, images and mixed items, or look at one.")
app.add_typer(index_app, name="index")


def _check_device(device: str | None) -> str | None:
    import torch

    try:
        return device and str(torch.device(device))
    except RuntimeError as error:
        raise ValueError(f"--device {device!r}: allowed are cpu, cuda, cuda:1 and so on, mps.") from error


Device = Annotated[
    str | None,
    typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. The best at hand by default.", callback=_check_device),
]
Model = Annotated[str, typer.Argument(help="Folder or Hub id of a finished model.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs in one forward pass.")]


def main() -> None:
    """Run the command line; what the user can mend is told in a line, not in a traceback."""
    try:
        app(prog_name="vipyloqwen")
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(1)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        _silence_libraries()


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Folder for data, model, index and pages.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer end sooner and learn less.")] = None,
) -> None:
    """Do the whole job on a tiny model: create, train, evaluate, save, load, index, search.

    Needs no GPU, no network and no model from a hub. Ends with a page of results to open in a browser.
    """
    from sentence_vipyloqwen.demo.run import run_demo

    run_demo(output, overrides={"max_steps": steps} if steps else None, console=_screen())


@app.command()
def create(
    base: Annotated[str, typer.Argument(help="Qwen2-VL checkpoint: Hub id or local folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the new model.")],
    embedding_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an embedding.")] = 1024,
    max_seq_length: Annotated[int, typer.Option(min=1, help="Most tokens of an input; only text is cut.")] = 8192,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of an image; 784 make one token.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the checkpoint's own by default.")] = None,
    device: Device = None,
) -> None:
    """Make a new, untrained embedding model of a Qwen2-VL checkpoint."""
    from sentence_vipyloqwen import ViPyloQwen

    pixels = {} if max_pixels is None else {"max_pixels": max_pixels}
    model = ViPyloQwen.create(base, embedding_dim, max_seq_length=max_seq_length, dtype=dtype, device=device, **pixels)
    model.save_pretrained(str(output))
    _screen().print(
        f"Saved {output}: {embedding_dim} dimensions, prompts {', '.join(filter(model.prompts.get, model.prompts))}."
    )


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="JSONL file of training records.")],
    write_good: Annotated[
        Path | None, typer.Option(help="Write the good lines to this file, beside the first.")
    ] = None,
) -> None:
    """Check a file of training records: every bad line is reported as file:line, what came, what is allowed."""
    from rich.table import Table

    from sentence_vipyloqwen.train.records import validate as check

    report = check(file, write_good=write_good, show_progress_bar=True)
    screen = _screen()
    for error in report.errors:
        screen.print(_escape(error), soft_wrap=True)
    table = Table("task", "records", title=f"{report.records} good, {report.error_count} bad")
    for task, count in report.tasks.items():
        table.add_row(task, str(count))
    screen.print(table)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or a shipped one: viPyloqwen-2b.yaml, tiny.yaml.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Qwen2-VL checkpoint, or a finished model to go on with.")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="JSONL file of records; may be given often.")] = None,
    eval: Annotated[Path | None, typer.Option(help="JSONL file of held-out records.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints, log, metrics and model.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the recipe.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Go on from the last checkpoint in the output folder, or refuse to."),
    ] = None,
    device: Device = None,
) -> None:
    """Train a model by a recipe.

    Settings on the command line replace the recipe's. A record is one JSON object a line:

    `{"task": "ocr", "anchor": {"image": ["a.png"], "text": "Số tiền?"}, "positive": "1.250.000 đ"}`

    Example: `vipyloqwen train --recipe tiny.yaml --base my-base --train train.jsonl --output run --set epochs=3`
    """
    from sentence_vipyloqwen.train.recipe import load_recipe
    from sentence_vipyloqwen.train.run import train as run

    given = {"base": base, "eval": eval and str(eval), "output": output and str(output)}
    given |= {"train": [str(path) for path in train] if train else None, "resume": resume}
    overrides = {key: value for key, value in given.items() if value is not None}
    result = run(load_recipe(recipe, {**_settings(set_ or []), **overrides}), device=device)
    screen = _screen()
    if result.after:
        screen.print(result.after.table())
    screen.print(f"Saved {result.model_path}: load it with SentenceTransformer or ViPyloQwen.")


@app.command()
def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="JSONL file of held-out records.")],
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Measure a model: recall@k, MRR, nDCG@10, accuracy, and correlations for scored pairs; by language and domain."""
    from sentence_vipyloqwen.train.evaluation import evaluate as measure

    evaluation = measure(_load(model, device), file, batch_size=batch_size, show_progress_bar=True)
    _screen().print(evaluation.table())
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(evaluation.to_json() + "\n", encoding="utf-8")


@index_app.command("build")
def index_build(
    model: Model,
    items: Annotated[Path, typer.Argument(help='JSONL file of items: {"id", "text", "image", "metadata"}.')],
    index: Annotated[Path, typer.Argument(help="Folder for the index.")],
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option(help="Replace an index that is there.")] = False,
    device: Device = None,
) -> None:
    """Embed items and write an index of them."""
    from sentence_vipyloqwen.index import VectorIndex

    built = VectorIndex.build(
        _load(model, device), items, index, batch_size=batch_size, overwrite=overwrite, show_progress_bar=True
    )
    _screen().print(f"Indexed {len(built)} items in {index}.")


@index_app.command("info")
def index_info(index: Annotated[Path, typer.Argument(help="Folder of the index.")]) -> None:
    """Tell what an index holds and which model it belongs to."""
    from sentence_vipyloqwen.index.store import read_manifest, readable

    _screen().print_json(data=read_manifest(readable(index.resolve())).to_dict())


@app.command()
def search(
    model: Model,
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    text: Annotated[str | None, typer.Option(help="Text of the query.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image of the query; may be given up to five times.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Task of the query: ocr, vqa_single, ...")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write the results as a page with thumbnails.")] = None,
    device: Device = None,
) -> None:
    """Search an index by a text, by images, or by both together."""
    from rich.table import Table

    from sentence_vipyloqwen.index import SearchResult, VectorIndex, write_report

    query = {key: value for key, value in (("text", text), ("image", list(map(str, image or [])))) if value}
    if not query:
        raise ValueError("A query needs --text, --image, or both.")
    hits = VectorIndex.load(index, _load(model, device)).search(query, k=k, prompt_name=prompt_name)
    table = Table("rank", "score", "id", "text", "image")
    for hit in hits:
        images = ", ".join(Path(path).name for path in hit.item.get("image", []))
        table.add_row(
            str(hit.rank), f"{hit.score:.4f}", _escape(hit.id), _escape(hit.item.get("text", "")), _escape(images)
        )
    screen = _screen()
    screen.print(table)
    if html:
        write_report(html, [SearchResult(query, hits, prompt_name=prompt_name)])
        screen.print(f"Wrote {html}.")


def _load(path: str, device: str | None) -> ViPyloQwen:
    from sentence_vipyloqwen import ViPyloQwen

    return ViPyloQwen(path, device=device)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """The settings of ``--set KEY=VALUE``, each value read as YAML."""
    import yaml

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r}: write it as KEY=VALUE, e.g. --set epochs=3.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
            raise ValueError(f"--set {pair!r}: the value is not YAML: {error}") from error
    return settings


def _screen() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _silence_libraries() -> None:
    """transformers draws a bar for every load and save; a command that shows its own has no use for them."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()

"""The command line: ``vipyloqwen demo | create | validate | mine | train | evaluate | index | search | ui``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from sentence_vipyloqwen.index.shards import Skipped
    from sentence_vipyloqwen.model import ViPyloQwen

WIDTH_OF_A_PIPE = 140  # characters; a table of figures would be cut at the 80 that rich assumes
MOST_TOLD = 20  # items left out, on the screen

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
        _tell_error(error)
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
    write_report: Annotated[
        Path | None, typer.Option(help="Write all bad lines to this JSONL file: file, line, image, reason.")
    ] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Decode every image to its end: finds those cut off, takes long.")
    ] = False,
) -> None:
    """Check a file of training records: every bad line is reported as file:line, what came, what is allowed."""
    from rich.table import Table

    from sentence_vipyloqwen.train.records import validate as check

    report = check(file, decode_images=images, write_good=write_good, write_report=write_report, show_progress_bar=True)
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
def mine(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a finished model: ours, or any other.")],
    train: Annotated[Path, typer.Argument(help="JSONL file of training records.")],
    output: Annotated[Path, typer.Argument(help="JSONL file to write; image paths in it are made relative to it.")],
    negatives: Annotated[int, typer.Option(min=1, help="How many a row gets: all of them or none.")] = 1,
    skip_top: Annotated[int, typer.Option(min=0, help="Pass over the K nearest candidates.", metavar="K")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Look at the R nearest candidates.", metavar="R")] = 50,
    sample: Annotated[
        bool, typer.Option("--sample", help="Take random ones of those that qualify, not the nearest.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --sample.")] = 0,
    relative_margin: Annotated[
        float, typer.Option(min=0, help="A negative's cosine is lower than the positive's by this share of it.")
    ] = 0.05,
    absolute_margin: Annotated[
        float | None, typer.Option(min=0, help="And lower by this much; none by default.")
    ] = None,
    no_margin: Annotated[bool, typer.Option("--no-margin", help="Allow any cosine; for closed sets.")] = False,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Take candidates from all tasks, not the row's own.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Mine for rows that have negatives, too.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for embeddings; in the cache of datasets by default.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Find hard negatives for training records, texts and images alike, with a model.

    A hard negative is an answer that the model takes for close, and that is wrong. Candidates are the other answers in
    the file: the distinct positives of the row's task. Never taken are the positives of any row with the same anchor,
    and candidates **nearly as close as the row's own positive** or closer: those are often right answers that nobody
    wrote down. How near is too near, `--relative-margin` says: at 0.05, with the positive at cosine 0.80, a negative
    lies at 0.76 or below. Where the positives are a closed set of answers (yes and no, colours), every other answer is
    wrong for certain: use `--no-margin`.

    Rows come out in their order with all their fields. Written as they are, and counted, are rows that find too few,
    rows that have negatives (unless `--replace`), and rows with a score, which is a graded judgement that no mined pair
    has. Embeddings are kept by model and content: after a kill, the same command goes on where it stopped.

    Examples:

    `vipyloqwen mine run/model train.jsonl mined.jsonl`

    `vipyloqwen mine run/model train.jsonl mined.jsonl --negatives 4 --skip-top 5 --top 100 --sample`
    """
    from sentence_vipyloqwen.train.hard_negatives import MiningOptions
    from sentence_vipyloqwen.train.mining import mine_negatives

    options = MiningOptions(
        negatives=negatives,
        skip_top=skip_top,
        top=top,
        sample=sample,
        seed=seed,
        relative_margin=None if no_margin else relative_margin,
        absolute_margin=None if no_margin else absolute_margin,
        all_tasks=all_tasks,
        replace=replace,
    )
    loaded = _load_any(model, device)
    report = mine_negatives(
        loaded, train, output, options, batch_size=batch_size, cache_dir=cache, show_progress_bar=True
    )
    screen = _screen()
    screen.print(report.table())
    if report.too_few:
        screen.print(f"{report.too_few} rows found too few: a larger --top or a smaller margin finds more.")
    screen.print(f"{report.embedded} contents embedded, {report.reused} found in the cache:")
    screen.print(f"{_escape(report.cache)} ({report.cache_bytes / 1e6:,.1f} MB)", soft_wrap=True)
    screen.print(f"Wrote {_escape(str(output))}.", soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="YAML file of settings, or a shipped one: viPyloqwen-2b.yaml (published run), tiny.yaml (CPU)."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What to begin with: a Qwen2-VL checkpoint, or a finished model to go on with.")
    ] = None,
    train: Annotated[list[Path] | None, typer.Option(help="JSONL file of records; may be given often.")] = None,
    eval: Annotated[
        Path | None,
        typer.Option(help="JSONL file of held-out records: measured before and after, and every eval_steps."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for all that the run writes; one for each run.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any setting of the recipe, its value as YAML; may be given often."
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Go on from the last complete checkpoint in the output, or refuse to."
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option("--show", help="Print the recipe, comments and all, and do nothing: to copy, read and change."),
    ] = False,
    device: Device = None,
) -> None:
    """Train a model by a recipe; run the same command again to go on after any end.

    **Data.** One JSON object a line; `vipyloqwen validate` checks a file:

    `{"task": "ocr", "anchor": {"image": ["a.png"], "text": "Số tiền?"}, "positive": "1.250.000 đ"}`

    **Settings** come from the recipe; `--set` replaces one for this run. All are explained in the published run's
    recipe: `vipyloqwen train --recipe viPyloqwen-2b.yaml --show`. What one changes most:

    - *batch*: `batch_size` rows on each device; `loss_mini_batch_size=16` computes a large batch in parts that fit the
      memory, `gather_negatives=true` contrasts it with the other devices' rows.

    - *memory*: `gradient_checkpointing=true`, `bf16=true`, `tuning=lora` (or `qlora`), `frozen=[visual]`.

    - *speed of learning*: `learning_rate=1e-4`, or by part `learning_rates={visual: 1e-5, linear: 1e-3}`.

    - *length*: `epochs=2` or `max_steps=5000`; `eval_steps=500 best_metric=mean patience=5` keeps the best model and
      ends when nothing improves.

    - *safety*: `save_steps=500`.

    **Several devices**: `accelerate launch --config_file FILE -m sentence_vipyloqwen train ...`, with a file of
    `train/accelerate/` in the package.

    **What the output holds**: `model/` (load it with `SentenceTransformer`), `training.html` (curves, to open in a
    browser), `metrics.json`, `log.jsonl`, `recipe.yaml`, `checkpoints/`, and `tensorboard/` where that is installed.

    **Ends.** Ctrl-C or SIGTERM: the step under way ends, a checkpoint is written, exit code 130 or 143; a second one
    ends at once. A loss that is no number: the batch and the last good weights are in `stopped/`.

    Example: `vipyloqwen train --recipe tiny.yaml --base my-base --train train.jsonl --output run --set epochs=3`
    """
    from sentence_vipyloqwen.train.batches import NonFiniteStep
    from sentence_vipyloqwen.train.interruption import ProcessLost, TrainingInterrupted
    from sentence_vipyloqwen.train.recipe import load_recipe, recipe_text
    from sentence_vipyloqwen.train.run import train as run

    if show:
        typer.echo(recipe_text(recipe or "viPyloqwen-2b.yaml"), nl=False)
        return

    given = {"base": base, "eval": eval and str(eval), "output": output and str(output)}
    given |= {"train": [str(path) for path in train] if train else None, "resume": resume}
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = load_recipe(recipe, {**_settings(set_ or []), **overrides})
    try:
        result = run(settings, device=device)
    except (NonFiniteStep, ProcessLost, TrainingInterrupted) as error:
        _tell_error(error)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    if os.environ.get("RANK", "0") != "0":
        return  # one process of several speaks
    screen = _screen()
    if result.after:
        screen.print(result.after.table())
    screen.print(f"Saved {result.model_path}: load it with SentenceTransformer or ViPyloQwen.")
    screen.print(f"Curves and figures: {Path(settings.output) / 'training.html'}")


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


Index = Annotated[Path, typer.Argument(help="Folder of the index.")]
Items = Annotated[
    Path,
    typer.Argument(
        help='JSONL file of items, {"id", "text", "image", "metadata"}; or a folder of images, texts and PDFs; '
        "or a PDF; or a dataset that save_to_disk wrote."
    ),
]
Dpi = Annotated[
    int | None,
    typer.Option(help="Dots per inch of a PDF's pages; by default as many as the model looks at, at most 200."),
]
OnError = Annotated[
    str, typer.Option(help="An item that cannot be read or embedded: raise ends the work, skip leaves it out.")
]
Report = Annotated[Path | None, typer.Option(help="Write what was left out to this JSONL file: where, id, reason.")]


@index_app.command("build")
def index_build(
    model: Model,
    items: Items,
    index: Annotated[Path, typer.Argument(help="Folder for the index.")],
    kind: Annotated[
        str, typer.Option(help="auto, Flat, HNSW, IVF,SQ8, IVF,PQ, binary, MRL256, or a FAISS factory string.")
    ] = "auto",
    batch_size: BatchSize = 32,
    overwrite: Annotated[bool, typer.Option(help="Replace an index that is there.")] = False,
    on_error: OnError = "raise",
    write_report: Report = None,
    dpi: Dpi = None,
    device: Device = None,
) -> None:
    """Embed items and write an index of them; run the same command again to go on after a kill.

    **Items** may be a folder: every image and text (`.txt`, `.md`) in it is an item, and every page of a PDF, under its
    path as id, `bills/may.pdf#page=3`. PDFs need the `pdf` extra.

    Vectors and items are written as Parquet files, shard by shard; `index.json` names them once all are there.

    **Kinds.** `auto` compares every vector up to 200,000 items, and beyond makes an `IVF,SQ8`: lists of near vectors,
    of which a query looks through some. `HNSW` is quickest to query and slowest to build; `IVF,PQ` and `binary` take an
    eighth of a byte a dimension; `MRL256` looks at the first 256 dimensions of a model trained with Matryoshka sizes.
    Whatever the kind, what it finds is compared again by whole vectors: scores are exact cosines.

    Example: `vipyloqwen index build run/model items.jsonl my-index --kind HNSW`
    """
    from sentence_vipyloqwen.index import EmbedOptions, Folder, VectorIndex

    options = EmbedOptions(batch_size=batch_size, on_error=on_error, show_progress_bar=True)
    loaded = _load(model, device)
    built = VectorIndex.build(loaded, Folder(items, dpi), index, options, kind=kind, overwrite=overwrite)
    _tell_skipped(built.skipped, write_report)
    _screen().print(f"Indexed {len(built)} items in {index}.")


@index_app.command("encode")
def index_encode(
    model: Model,
    items: Items,
    index: Annotated[Path, typer.Argument(help="Folder for the index, on a disk that all processes see.")],
    share: Annotated[int, typer.Option(envvar="RANK", help="Which share this process embeds, from 0.")] = 0,
    shares: Annotated[int, typer.Option(envvar="WORLD_SIZE", help="How many processes there are.")] = 1,
    batch_size: BatchSize = 32,
    on_error: OnError = "raise",
    dpi: Dpi = None,
    device: Device = None,
) -> None:
    """Embed a share of the items, where several processes or machines do it; `index build` then joins the shares.

    Example, on a machine of four GPUs:

    `torchrun --nproc-per-node 4 -m sentence_vipyloqwen index encode run/model items.jsonl my-index`

    `vipyloqwen index build run/model items.jsonl my-index`
    """
    from sentence_vipyloqwen.index import EmbedOptions, Folder, encode_share

    options = EmbedOptions(batch_size=batch_size, on_error=on_error, show_progress_bar=share == 0)
    loaded = _load(model, device or _device_of_rank())
    count = encode_share(loaded, Folder(items, dpi), index, share, shares, options)
    _screen().print(f"Share {share} of {shares}: {count} items.")


@index_app.command("add")
def index_add(
    model: Model,
    items: Items,
    index: Index,
    update: Annotated[bool, typer.Option("--update", help="An item whose id is there takes its place.")] = False,
    batch_size: BatchSize = 32,
    on_error: OnError = "raise",
    write_report: Report = None,
    dpi: Dpi = None,
    device: Device = None,
) -> None:
    """Embed more items into an index. All of them are in it afterwards, or, after a kill, none."""
    from sentence_vipyloqwen.index import EmbedOptions, Folder, VectorIndex

    options = EmbedOptions(batch_size=batch_size, on_error=on_error, show_progress_bar=True)
    loaded = VectorIndex.load(index, _load(model, device))
    change = loaded.update if update else loaded.add
    count = change(Folder(items, dpi), options)
    _tell_skipped(loaded.skipped, write_report)
    _screen().print(f"Added {count} items; {len(loaded)} are in {index}.")


@index_app.command("remove")
def index_remove(index: Index, ids: Annotated[list[str], typer.Argument(help="Ids of the items.")]) -> None:
    """Remove items by id. They are found no more; `index compact` takes them off the disk."""
    from sentence_vipyloqwen.index.maintenance import remove_items

    _screen().print(f"Removed {remove_items(index, ids)} items from {index}.")


@index_app.command("compact")
def index_compact(index: Index) -> None:
    """Take removed items off the disk, join small shards, and drop what killed runs left behind."""
    from sentence_vipyloqwen.index.maintenance import compact_index

    manifest = compact_index(index)
    _screen().print(f"{manifest.count} items in {len(manifest.shards)} shards.")


@index_app.command("verify")
def index_verify(index: Index) -> None:
    """Read everything and compare it: checksums, vectors, ids, images."""
    from sentence_vipyloqwen.index.maintenance import verify_index

    found = verify_index(index)
    _screen().print(", ".join(f"{count} {what}" for what, count in found.items()) + ": all as they were written.")


@index_app.command("info")
def index_info(index: Index) -> None:
    """Tell what an index holds and which model it belongs to."""
    from sentence_vipyloqwen.index.manifest import read_manifest

    _screen().print_json(data=read_manifest(index.resolve()).to_dict())


@app.command()
def search(
    model: Model,
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    text: Annotated[str | None, typer.Option(help="Text of the query.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image of the query; may be given up to five times.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Task of the query: ocr, vqa_single, ...")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of results.")] = 10,
    where: Annotated[
        str | None,
        typer.Option(help="Only items whose metadata satisfy this, as in SQL: \"lang = 'vi' AND page < 3\"."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the results as a page with thumbnails.")] = None,
    device: Device = None,
) -> None:
    """Search an index by a text, by images, or by both together."""
    from rich.table import Table

    from sentence_vipyloqwen.index import SearchResult, VectorIndex, write_report

    query = {key: value for key, value in (("text", text), ("image", list(map(str, image or [])))) if value}
    if not query:
        raise ValueError("A query needs --text, --image, or both.")
    hits = VectorIndex.load(index, _load(model, device)).search(query, k=k, prompt_name=prompt_name, where=where)
    table = Table("rank", "score", "id", "text", "image")
    for hit in hits:
        images = ", ".join(Path(path).name for path in hit.item.get("image", []))
        table.add_row(
            str(hit.rank), f"{hit.score:.4f}", _escape(hit.id), _escape(hit.item.get("text", "")), _escape(images)
        )
    screen = _screen()
    screen.print(table)
    if html:
        write_report(html, [SearchResult(query, hits, prompt_name, where)])
        screen.print(f"Wrote {html}.")


@app.command()
def ui(
    model: Model,
    index: Index,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other computers reach the page only if you change it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8765,
    name: Annotated[
        list[str] | None,
        typer.Option(help="A further name under which the page may be asked for; may be given often."),
    ] = None,
    device: Device = None,
) -> None:
    """Search an index in the browser: type, drop or paste images, choose a prefix, filter, look at what is found.

    The page is served on this computer alone, and shows no file but the images of the index's items. What you ask with
    is kept nowhere. Needs the `ui` extra. Ctrl-C ends it.

    **Asking.** Words, images, or both; a prefix says what kind of question it is, as `--prompt-name` does in `search`.
    The condition is that of `search --where`: `lang = 'vi' AND page < 3`. Click a fact of a result to filter by it, a
    picture to enlarge it, and *More like this* to go on from a result; words added then narrow it down.

    **Other computers.** `--host 0.0.0.0 --name my-server` lets them in who ask for `my-server`: there is no password
    and no encryption, so do that only in a network you trust.

    Example: `vipyloqwen ui run/model my-index`
    """
    from sentence_vipyloqwen.extras import require

    for module in ("fastapi", "python_multipart", "uvicorn"):
        require(module, "ui")
    from sentence_vipyloqwen.index import VectorIndex
    from sentence_vipyloqwen.index.ui import serve

    loaded = VectorIndex.load(index, _load(model, device))
    _screen().print(f"{len(loaded)} items, to search at http://{host}:{port} (Ctrl-C ends it)")
    serve(loaded, host=host, port=port, host_names=name or ())


def _tell_skipped(skipped: Sequence[Skipped], report: Path | None) -> None:
    screen = _screen()
    for item in skipped[:MOST_TOLD]:
        screen.print(f"Left out: {_escape(item.where)}: {_escape(item.reason)}", soft_wrap=True)
    if len(skipped) > MOST_TOLD:
        screen.print(f"and {len(skipped) - MOST_TOLD} more.")
    if report is not None:
        import json

        lines = (json.dumps(vars(item), ensure_ascii=False) for item in skipped)
        report.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _device_of_rank() -> str | None:
    """The accelerator of a process that torchrun started."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None or not torch.cuda.is_available() else f"cuda:{rank}"


def _load(path: str, device: str | None) -> ViPyloQwen:
    from sentence_vipyloqwen import ViPyloQwen

    return ViPyloQwen(path, device=device)


def _load_any(path: str, device: str | None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path, device=device) if _is_stock(path) else _load(path, device)


def _is_stock(path: str) -> bool:
    """Whether a folder or Hub id is a finished model that is not of Qwen2-VL."""
    import json

    from sentence_transformers.util import load_file_path

    from sentence_vipyloqwen.modules.qwen2_vl import MODEL_TYPE

    modules, config = (load_file_path(path, name) for name in ("modules.json", "config.json"))
    if modules is None:
        return False  # nor is it ours: loading it tells
    if not json.loads(Path(modules).read_bytes())[0]["type"].endswith(".Transformer"):
        return True
    return config is not None and json.loads(Path(config).read_bytes()).get("model_type") != MODEL_TYPE


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


def _tell_error(error: Exception) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {_escape(str(error))}", soft_wrap=True)


def _screen() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _silence_libraries() -> None:
    """transformers draws a bar for every load and save, torch warns of how torchao is written: no use to a command."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    set_verbosity_error()
    disable_progress_bar()

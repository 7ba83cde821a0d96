"""Building an index of items, changing it, and looking at it: ``vipyloqwen index``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sentence_vipyloqwen.cli.shared import BatchSize, Device, Index, Model, device_of_rank, load, make_screen

if TYPE_CHECKING:
    from sentence_vipyloqwen.index.shards import Skipped

MOST_TOLD = 20  # items left out, on the screen

app = typer.Typer(no_args_is_help=True, help="Build an index of texts, images and mixed items, or look at one.")

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


@app.command()
def build(
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
    loaded = load(model, device)
    built = VectorIndex.build(loaded, Folder(items, dpi), index, options, kind=kind, overwrite=overwrite)
    _tell_skipped(built.skipped, write_report)
    make_screen().print(f"Indexed {len(built)} items in {index}.")


@app.command()
def encode(
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
    loaded = load(model, device or device_of_rank())
    count = encode_share(loaded, Folder(items, dpi), index, share, shares, options)
    make_screen().print(f"Share {share} of {shares}: {count} items.")


@app.command()
def add(
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
    loaded = VectorIndex.load(index, load(model, device))
    change = loaded.update if update else loaded.add
    count = change(Folder(items, dpi), options)
    _tell_skipped(loaded.skipped, write_report)
    make_screen().print(f"Added {count} items; {len(loaded)} are in {index}.")


@app.command()
def remove(index: Index, ids: Annotated[list[str], typer.Argument(help="Ids of the items.")]) -> None:
    """Remove items by id. They are found no more; `index compact` takes them off the disk."""
    from sentence_vipyloqwen.index.maintenance import remove_items

    make_screen().print(f"Removed {remove_items(index, ids)} items from {index}.")


@app.command()
def compact(index: Index) -> None:
    """Take removed items off the disk, join small shards, and drop what killed runs left behind."""
    from sentence_vipyloqwen.index.maintenance import compact_index

    manifest = compact_index(index)
    make_screen().print(f"{manifest.count} items in {len(manifest.shards)} shards.")


@app.command()
def verify(index: Index) -> None:
    """Read everything and compare it: checksums, vectors, ids, images."""
    from sentence_vipyloqwen.index.maintenance import verify_index

    found = verify_index(index)
    make_screen().print(", ".join(f"{count} {what}" for what, count in found.items()) + ": all as they were written.")


@app.command()
def info(index: Index) -> None:
    """Tell what an index holds and which model it belongs to."""
    from sentence_vipyloqwen.index.manifest import read_manifest

    make_screen().print_json(data=read_manifest(index.resolve()).to_dict())


def _tell_skipped(skipped: Sequence[Skipped], report: Path | None) -> None:
    screen = make_screen()
    for item in skipped[:MOST_TOLD]:
        screen.print(f"Left out: {escape(item.where)}: {escape(item.reason)}", soft_wrap=True)
    if len(skipped) > MOST_TOLD:
        screen.print(f"and {len(skipped) - MOST_TOLD} more.")
    if report is not None:
        import json

        lines = (json.dumps(vars(item), ensure_ascii=False) for item in skipped)
        report.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

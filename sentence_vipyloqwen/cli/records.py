"""Files of training records: checking them, and finding hard negatives for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sentence_vipyloqwen.cli.shared import BatchSize, Device, load_any, make_screen


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

    from sentence_vipyloqwen.train.validation import validate as check

    report = check(file, decode_images=images, write_good=write_good, write_report=write_report, show_progress_bar=True)
    screen = make_screen()
    for error in report.errors:
        screen.print(escape(error), soft_wrap=True)
    table = Table("task", "records", title=f"{report.records} good, {report.error_count} bad")
    for task, count in report.tasks.items():
        table.add_row(task, str(count))
    screen.print(table)
    if not report.ok:
        raise typer.Exit(1)


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
    loaded = load_any(model, device)
    report = mine_negatives(
        loaded, train, output, options, batch_size=batch_size, cache_dir=cache, show_progress_bar=True
    )
    screen = make_screen()
    screen.print(report.table())
    if report.too_few:
        screen.print(f"{report.too_few} rows found too few: a larger --top or a smaller margin finds more.")
    screen.print(f"{report.embedded} contents embedded, {report.reused} found in the cache:")
    screen.print(f"{escape(report.cache)} ({report.cache_bytes / 1e6:,.1f} MB)", soft_wrap=True)
    screen.print(f"Wrote {escape(str(output))}.", soft_wrap=True)

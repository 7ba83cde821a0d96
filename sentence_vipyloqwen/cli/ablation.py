"""Training under one change at a time, and saying what each is worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sentence_vipyloqwen.cli.shared import Device, make_screen, parse_settings, tell_error


def ablate(
    recipe: Annotated[
        str, typer.Option(help="YAML file of settings, or a shipped one: tiny.yaml (CPU), viPyloqwen-2b.yaml.")
    ] = "tiny.yaml",
    base: Annotated[str | None, typer.Option(help="What every run begins with: a checkpoint or a model.")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="JSONL file of records; may be given often.")] = None,
    eval: Annotated[
        Path | None, typer.Option(help="JSONL file of held-out records, which every run is measured on.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the whole ablation; each run has one in it.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="A variant by name; may be given often. All that apply by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant; fewer than 3 say little.")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[VARIANT.]KEY=VALUE",
            help="A setting of the recipe for every run, or of one variant; may be given often.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the table of variants, and do nothing.")] = False,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Write page and plots of the output's results.json anew; train nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Forget the runs that failed before, and do them again.")
    ] = False,
    about: Annotated[
        str | None, typer.Option(help="What base and data are, in a sentence or two, for readers of the report.")
    ] = None,
    device: Device = None,
) -> None:
    """Find out what each part of the method is worth: train variants of a recipe, each over several seeds.

    **What runs.** Every variant changes one thing about the recipe: the loss, the prefixes, the pooling, the negatives,
    the size; `--list` names them, what they change and what they ask. `full` is the recipe as it is, and always runs.
    All begin with the same base and have the same data and the same rows: where a variant changes the batch,
    `max_steps` changes with it. Some only use another run's model in another way, and train nothing. A variant that
    does not apply to the recipe, the base or the data is left out, with the reason; one given by name is an error.

    **Sizes.** `--set max_steps=400` is for every run, `--set grad_cache.batch_size=256` for one variant: those of
    `in_batch` (24 rows, 32 batches a step) and `grad_cache` (768 rows) suit a large machine and a long run, those of
    `in_batch_192` and `grad_cache_192` a shorter one.

    **Time.** As many trainings as variants times seeds, one after the other. Stop it when you like: the same command
    goes on from the last checkpoint (`save_steps`) of the run under way, and does no finished run again. More variants
    or more seeds in the same folder add to it. A run that diverges or lacks memory is kept as one that failed, with the
    reason, and the others go on: `--retry-failed` does such runs again, with other settings if you give some.

    **Several at once.** Start the same command again, on another accelerator (`CUDA_VISIBLE_DEVICES=1`), another core
    (`OMP_NUM_THREADS=1`), or another machine if file locks (`flock`) hold across machines in the output folder: each
    does the runs that no other has under way.

    **What the output holds.** `ablation.html`: questions, answers, figures with their spread over the seeds, every run;
    it is written anew after each. `ablation.md`: the same for a repository. `differences`, `values` and learning
    `curves` as PNG and SVG. `results.json`: every figure and setting. `runs/VARIANT/seed-N/`: what `vipyloqwen train`
    leaves.

    **What counts.** A difference to the reference counts where the 95 % confidence interval of its mean over the seeds
    (paired, Student's t) excludes 0. Two seeds seldom show anything, three show what is large.

    Example: `vipyloqwen ablate --base my-base --train train.jsonl --eval eval.jsonl --output ablation
    --variant info_nce_only --variant no_prefix --seeds 3 --set max_steps=800`
    """
    from sentence_vipyloqwen.ablation.report import PAGE_FILE, write_report
    from sentence_vipyloqwen.ablation.runs import ablate as run
    from sentence_vipyloqwen.train.interruption import TrainingInterrupted
    from sentence_vipyloqwen.train.recipe import load_recipe

    screen = make_screen()
    if list_:
        screen.print(_variants())
        return
    if redraw:
        if output is None:
            raise ValueError("--redraw needs --output, the folder of an ablation.")
        screen.print(f"Wrote {write_report(output)}")
        return
    shared, own = _split(parse_settings(set_ or []))
    given = {"base": base, "eval": eval and str(eval), "output": output and str(output)}
    given |= {"train": [str(path) for path in train] if train else None}
    settings = load_recipe(recipe, {**shared, **{key: value for key, value in given.items() if value is not None}})
    try:
        run(
            settings,
            variant or (),
            seeds=seeds,
            own=own,
            device=device,
            retry_failed=retry_failed,
            about=about,
            tell=screen.print,
        )
    except TrainingInterrupted as error:
        tell_error(error)
        raise typer.Exit(error.exit_code) from error
    screen.print(_answers(Path(settings.output)))
    screen.print(f"Questions, answers, every run: {Path(settings.output) / PAGE_FILE}")


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of every run, and those of single variants.

    >>> _split({"max_steps": 9, "grad_cache.batch_size": 64})
    ({'max_steps': 9}, {'grad_cache': {'batch_size': 64}})
    """
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in settings.items():
        variant, dot, name = key.rpartition(".")
        if dot:
            own[variant][name] = value
        else:
            shared[name] = value
    return shared, dict(own)


def _variants() -> Any:
    from sentence_vipyloqwen.ablation.variants import VARIANTS

    rows = [
        (variant.name, variant.against or "", variant.change, variant.question, "" if variant.model_of else "yes")
        for variant in VARIANTS.values()
    ]
    return _table(("variant", "against", "what is changed", "question", "trains"), rows)


def _answers(output: Path) -> Any:
    from sentence_vipyloqwen.ablation.answers import answer
    from sentence_vipyloqwen.ablation.results import load_results, summarise

    results = summarise(load_results(output))
    rows = [(result.variant.name, result.variant.question, answer(result)) for result in results]
    return _table(("variant", "question", "answer"), rows)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE, show_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table

"""The command line: ``vipyloqwen demo | create | validate | train | evaluate | mteb | ablate | index | search ...``."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from sentence_vipyloqwen.cli import ablation, benchmarking, indexing, models, records, searching, training
from sentence_vipyloqwen.cli.shared import silence_libraries, tell_error

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train, run and index one embedding space for text and images on Qwen2-VL.\n\n"
    "New here? `vipyloqwen demo` does the whole job on a tiny model in twenty minutes.",
)
for command in (
    models.demo,
    models.create,
    records.validate,
    records.mine,
    training.train,
    training.evaluate,
    benchmarking.mteb,
    ablation.ablate,
    searching.search,
    searching.ui,
):
    app.command()(command)
app.add_typer(indexing.app, name="index")


def main() -> None:
    """Run the command line; what the user can mend is told in a line, not in a traceback."""
    try:
        app(prog_name="vipyloqwen")
    except (ValueError, OSError, ImportError) as error:
        tell_error(error)
        sys.exit(1)


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        silence_libraries()

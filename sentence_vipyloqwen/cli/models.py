"""Making a model, and the whole job at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentence_vipyloqwen.cli.shared import Device, make_screen, parse_settings, tell_error


def demo(
    output: Annotated[Path, typer.Argument(help="Folder for data, model, index and pages.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer end sooner and learn less.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that train together, each with 64 rows a step: 2, if there are 2 cores."),
    ] = None,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Make data and base alone, as for `vipyloqwen ablate`.")
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="How much of something to train on, e.g. `text_pairs=3000`, or to hold out, `eval.text_pairs=300`; "
            "may be given often, with a folder of its own. An unknown name lists them all.",
        ),
    ] = None,
) -> None:
    """Do the whole job on a tiny model: create, train, evaluate, save, load, index, search.

    Needs no GPU, no network and no model from a hub. Ends with a page of results to open in a browser.
    """
    from sentence_vipyloqwen.demo.data import DemoSizes
    from sentence_vipyloqwen.demo.run import PROCESSES, prepare_demo, run_demo
    from sentence_vipyloqwen.train.interruption import ProcessLost, TrainingInterrupted

    sizes = DemoSizes().replaced(parse_settings(size or [], "--size", "text_pairs=3000"))
    if data_only:
        if steps or processes:
            raise ValueError("--data-only trains nothing: leave out --steps and --processes.")
        prepare_demo(output, sizes=sizes, console=make_screen())
        return
    overrides = {"max_steps": steps} if steps else None
    try:
        run_demo(output, sizes=sizes, overrides=overrides, processes=processes or PROCESSES, console=make_screen())
    except (ProcessLost, TrainingInterrupted) as error:
        tell_error(error)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error


def create(
    base: Annotated[str, typer.Argument(help="Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: Hub id or local folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the new model.")],
    embedding_dim: Annotated[int, typer.Option(min=1, help="Dimensions of an embedding.")] = 1024,
    max_seq_length: Annotated[int, typer.Option(min=1, help="Most tokens of an input; only text is cut.")] = 8192,
    max_pixels: Annotated[int | None, typer.Option(help="Most pixels of an image; 784 make one token.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the checkpoint's own by default.")] = None,
    device: Device = None,
) -> None:
    """Make a new, untrained embedding model of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint."""
    from sentence_vipyloqwen import ViPyloQwen

    pixels = {} if max_pixels is None else {"max_pixels": max_pixels}
    model = ViPyloQwen.create(base, embedding_dim, max_seq_length=max_seq_length, dtype=dtype, device=device, **pixels)
    model.save_pretrained(str(output))
    make_screen().print(
        f"Saved {output}: {embedding_dim} dimensions, prompts {', '.join(filter(model.prompts.get, model.prompts))}."
    )

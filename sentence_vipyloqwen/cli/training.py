"""Training a model by a recipe, and measuring one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sentence_vipyloqwen.cli.shared import BatchSize, Device, Model, load, make_screen, parse_settings, tell_error


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

    The task is text_pair (which needs a `score` from 0 to 1), instr, ocr, vqa_single, vqa_multi, or left out for plain
    pairs; it says which losses apply. `negative` may name a wrong answer.

    **Settings** come from a recipe; `--set` replaces one for this run, in quotes where it has spaces. Two recipes come
    with the package: `tiny.yaml`, a run on two CPU cores, and `viPyloqwen-2b.yaml`, the published run, whose comments
    explain every setting and what else to try. Read one with `vipyloqwen train --recipe viPyloqwen-2b.yaml --show`,
    copy it to a file, change it, and give the file to `--recipe`. What one changes most:

    - *batch*: `batch_size=24` rows on each device. Large batches in little memory (GradCache): the loss contrasts all
      rows but computes them in mini-batches, of `loss_mini_batch_size=16` rows or as many as fit
      `loss_mini_batch_tokens=16384`. `gather_negatives=true` contrasts them with the other devices' rows.

    - *memory*: `gradient_checkpointing=true`, `bf16=true`, `tuning=lora` (or `qlora`), `frozen=[visual]`.

    - *images*: beside `frozen=[visual]`, `vision_cache=FOLDER` keeps what the vision tower makes of each image, so that
      it is computed once for all epochs and runs; `group_images=8` computes a page once for up to eight questions.

    - *what is learnt when*: `mix={text: 1, multimodal: 2}` gives tasks, or all of a kind, their share of the batches; a
      curriculum changes it as the run goes on, `curriculum=drafts` from text to images, or one of your own,
      `curriculum=[{until: 0.3, mix: {text: 1, multimodal: 0}}, {until: 1, mix: {text: 1, multimodal: 2}}]`.

    - *speed of learning*: `learning_rate=1e-4`, or by part `learning_rates={visual: 1e-5, linear: 1e-3}`.

    - *length*: `epochs=2` or `max_steps=5000`; `eval_steps=500 best_metric=mean patience=5` keeps the best model and
      ends when nothing improves.

    - *safety*: `save_steps=500` writes checkpoints. After any end, the same command resumes from the last complete one,
      with the rows that were to come next; `--no-resume` refuses where there is one.

    **Several devices**: `accelerate launch --config_file FILE -m sentence_vipyloqwen train ...`, with a file of
    `train/accelerate/` in the package.

    **What the output holds**: `model/` (load it with `SentenceTransformer`), `training.html` (curves, to open in a
    browser), `metrics.json`, `log.jsonl`, `recipe.yaml`, `checkpoints/`, and `tensorboard/`.

    **Ends.** Ctrl-C or SIGTERM: the step under way ends, a checkpoint is written, exit code 130 or 143; a second
    Ctrl-C ends at once. A loss that is no number: the batch and the last good weights are in `stopped/`.

    Example: `vipyloqwen train --recipe tiny.yaml --base my-base --train train.jsonl --output run --set epochs=3`
    """
    from sentence_vipyloqwen.train.batches import NonFiniteStep
    from sentence_vipyloqwen.train.interruption import ProcessLost, TrainingInterrupted
    from sentence_vipyloqwen.train.memory import OutOfMemory
    from sentence_vipyloqwen.train.recipe import load_recipe, recipe_text
    from sentence_vipyloqwen.train.run import train as run

    if show:
        typer.echo(recipe_text(recipe or "viPyloqwen-2b.yaml"), nl=False)
        return

    given = {"base": base, "eval": eval and str(eval), "output": output and str(output)}
    given |= {"train": [str(path) for path in train] if train else None, "resume": resume}
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = load_recipe(recipe, {**parse_settings(set_ or []), **overrides})
    try:
        result = run(settings, device=device)
    except (NonFiniteStep, OutOfMemory, ProcessLost, TrainingInterrupted) as error:
        tell_error(error)
        raise typer.Exit(getattr(error, "exit_code", 1)) from error
    if os.environ.get("RANK", "0") != "0":
        return  # one process of several speaks
    screen = make_screen()
    if result.after:
        screen.print(result.after.table())
    screen.print(f"Saved {result.model_path}: load it with SentenceTransformer or ViPyloQwen.")
    screen.print(f"Curves and figures: {Path(settings.output) / 'training.html'}")


def evaluate(
    model: Model,
    file: Annotated[Path, typer.Argument(help="JSONL file of held-out records.")],
    json: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Measure a model: recall@k, MRR, nDCG@10, accuracy, and correlations for scored pairs; by language and domain."""
    from sentence_vipyloqwen.train.evaluation import evaluate as measure

    evaluation = measure(load(model, device), file, batch_size=batch_size, show_progress_bar=True)
    make_screen().print(evaluation.table())
    if json:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(evaluation.to_json() + "\n", encoding="utf-8")

"""Measuring a model on public benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentence_vipyloqwen.cli.shared import BatchSize, Device, load_any, make_screen
from sentence_vipyloqwen.files import replacing

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from rich.table import Table

    from sentence_vipyloqwen.mteb_tasks.run import Score


def mteb(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a finished model.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, or a list of tasks (see --list); may be given often. `offline` by default."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results, as mteb files them.")] = Path("mteb-results"),
    name: Annotated[
        str | None, typer.Option(help="What results are filed under, owner/name; by default the model's own name.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the lists and their tasks, and do nothing.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the scores to this file as well, as JSON.")] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
) -> None:
    """Measure a model on tasks of mteb: Vietnamese texts, pictures, documents. Needs the `mteb` extra.

    **Lists**: `offline` needs no network: finding rendered Vietnamese documents by queries in Vietnamese, without
    diacritics, with typing errors, in English and Chinese; questions on pictures; graded pairs. The others download
    their data from the Hugging Face Hub: `vn-mteb`, `vidore-v1` to `vidore-v3`, `xm3600-vi`, `mmeb`. Any other task
    goes by the name that mteb has for it.

    **Prompts**: pairs of texts bear `<text_pair>` on both sides, queries that are instructions `<instr>`, questions on
    a picture `<vqa_single>`; documents, captions, pictures and queries for them bear none.

    **Results**: one JSON file for each task in `OUTPUT/results/NAME/REVISION/`. The revision is a hash of the model,
    prompts and settings included: what is there already of the same data is not run again.

    Example: `vipyloqwen mteb run/model --task vn-mteb --task VietnameseDocumentRetrieval`
    """
    from sentence_vipyloqwen.mteb_tasks.run import run
    from sentence_vipyloqwen.mteb_tasks.suites import SUITES, find_tasks

    if list_:
        make_screen().print(_table_of_lists({suite: tasks() for suite, tasks in SUITES.items()}))
        return
    if model is None:
        raise ValueError("No model came; allowed are the folder of a finished model, a Hub id, or --list.")
    found = find_tasks(task or ["offline"])
    if json:  # refused before the work, not after it
        if json.is_dir():
            raise ValueError(f"--json {json} is a folder: name a file.")
        json.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("mteb").setLevel(logging.ERROR)  # it warns of every prompt that is not one of its own
    scores = run(
        load_any(model, device),
        found,
        output,
        name=name or _name_of(model),
        batch_size=batch_size,
        show_progress_bar=True,
    )
    if json:
        with replacing(json) as draft:
            draft.write_text(scores.to_json() + "\n", encoding="utf-8")
    screen = make_screen()
    screen.print(_table_of(scores.scores))
    screen.print(f"Results: {scores.folder}")


def _table_of_lists(lists: Mapping[str, Sequence[AbsTask]]) -> Table:
    """A row for each list of tasks; what has tasks of mteb alone downloads their data."""
    from rich.table import Table

    from sentence_vipyloqwen.mteb_tasks.offline import OFFLINE_TASKS

    table = Table("list", "tasks", "network", "names of the tasks", show_lines=True)
    table.columns[0].no_wrap = True
    table.columns[1].justify = "right"
    for suite, tasks in lists.items():
        names = [task.metadata.name for task in tasks]
        needs_network = "no" if OFFLINE_TASKS.keys() >= set(names) else "yes"
        table.add_row(suite, str(len(names)), needs_network, ", ".join(names))
    return table


def _table_of(scores: Sequence[Score]) -> Table:
    """A row for each score; the split is named where a task has several."""
    from rich.table import Table

    splits: dict[str, set[str]] = {}
    for score in scores:
        splits.setdefault(score.task, set()).add(score.split)
    several = {task for task, names in splits.items() if len(names) > 1}
    table = Table("task", *(["split"] if several else []), "subset", "metric", "value")
    for score in scores:
        split = [score.split if score.task in several else ""] if several else []
        table.add_row(score.task, *split, score.subset, score.metric, f"{score.value:.4f}")
    return table


def _name_of(model: str) -> str:
    """A Hub id as it is; of a folder the last name, with that of the run where it is only ``model``."""
    path = Path(model)
    if not path.exists():
        return model
    parts = path.resolve().parts
    return "-".join(parts[-2:]) if parts[-1] == "model" else parts[-1]

"""What a reader must know before the figures: the tasks, the terms of the loss, what the reference was trained by.

All of it is read from the runs and from the task table, but for what a task and a term mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sentence_vipyloqwen.ablation.results import headlines
from sentence_vipyloqwen.ablation.variants import FULL
from sentence_vipyloqwen.losses.prefix_routed import merge_margins, merge_weights
from sentence_vipyloqwen.tasks import ALL_TASKS, COSINE, INFO_NCE, SCORE_MSE, TRIPLET

TASK_WORDS: Mapping[str, tuple[str, str]] = {
    "text_pair": ("two texts", "how alike they are"),
    "instr": ("an instruction, in one turn or several", "its answer"),
    "ocr": ("an image, with a question or without", "the text that it shows"),
    "vqa_single": ("images and a question", "the answer"),
    "vqa_multi": ("images and a conversation about them", "the last answer"),
    "general": ("a caption, a document or a query", "what belongs to it"),
}
"""Task -> what goes in, and what is looked for."""

TERM_WORDS: Mapping[str, str] = {
    INFO_NCE: "the right one should be the nearest in the batch: cross entropy over the similarities, divided by a "
    "temperature, of the anchor to all positives and of the positive to all anchors (a row's negatives are the other "
    "rows); a scored pair counts by its score",
    SCORE_MSE: "the squared error of (cosine + 1) / 2 against the score of a pair",
    COSINE: "1 less the cosine of anchor and positive, whatever the other rows are",
    TRIPLET: "what is missing for the positive to be nearer than the nearest negative by the margin, a difference of "
    "cosines; 0 once nothing is",
}
"""Term of the loss -> what it asks for."""

_REFERENCE: Mapping[str, str] = {
    "embedding_dim": "embedding dimensions",
    "learning_rate": "learning rate",
    "learning_rates": "learning rate of parts",
    "frozen": "frozen",
    "schedule": "learning rate schedule",
    "temperature": "temperature",
    "max_seq_length": "max sequence length (tokens)",
}
_OF_THE_RUN = ("seed", "evaluation")
"""Settings in which runs differ without a change to the training."""


def task_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each task that was measured: what it is, how it is trained and measured."""
    reference = reference_run(runs) or {}
    settings = reference.get("settings", {})
    weights = merge_weights(settings.get("weights", {}))
    margins = merge_margins(settings.get("margins", {}), weights)
    rows = []
    for task, metric in headlines(runs).items():
        goes_in, looked_for = TASK_WORDS.get(task, ("", ""))
        rows.append(
            {
                "task": task,
                "prefix": ALL_TASKS[task].token or "none" if task in ALL_TASKS else "",
                "what goes in": goes_in,
                "what is looked for": looked_for,
                "loss": _loss(weights.get(task, {}), margins.get(task)),
                "measured by": metric,
                "held-out queries": _queries(runs, task),
                "rows seen in training": f"{seen:,}" if (seen := reference.get("rows", {}).get(task)) else "",
            }
        )
    return [{name: row[name] for name in row if any(other[name] for other in rows)} for row in rows]


def reference_run(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first run of the reference, one with figures before one that failed; ``None`` where there is none."""
    found = [run for run in runs if run["variant"] == FULL]
    return next((run for run in found if run["after"]), found[0] if found else None)


def reference_facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the reference was trained by, as far as its run says it."""
    if not (run := reference_run(runs)):
        return {}
    settings, facts = run["settings"], {}
    if parameters := run.get("parameters"):
        facts["size of the model"] = f"{parameters:,} parameters"
    a_step = rows_a_step(settings)
    if steps := settings.get("max_steps"):
        facts["training"] = f"{steps:,} steps of {a_step:,} rows: {steps * a_step:,} rows"
    else:
        facts["training"] = f"{settings.get('epochs', 1):g} epochs, {a_step:,} rows a step"
    shown = {words: value for name, words in _REFERENCE.items() if (value := settings.get(name))}
    return facts | {words: _value(value) for words, value in shown.items()}


def settings_changed(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Variant -> where its settings differ from the reference's, all that follows from its change included.

    A setting with values of its own, such as weights by task, is named without them.
    """
    reference = reference_run(runs)
    changed: dict[str, list[str]] = {}
    for run in runs if reference else ():
        own, other = run["settings"], reference["settings"]
        if run["variant"] in changed or takes_model(run):
            continue
        names = [name for name in own if name not in _OF_THE_RUN and own[name] != other.get(name)]
        changed[run["variant"]] = [
            name if isinstance(own[name], Mapping) else f"{name} {_value(own[name])}" for name in names
        ]
    return changed


def takes_model(run: Mapping[str, Any]) -> bool:
    """Whether a run used another's model in another way, and trained nothing."""
    return "evaluation" in run["settings"]


def rows_a_step(settings: Mapping[str, Any]) -> int:
    """How many rows an optimiser step sees."""
    rows: int = settings["batch_size"] * settings["accumulation"]
    return rows


def _queries(runs: Sequence[Mapping[str, Any]], task: str) -> str:
    measured = [run["after"]["tasks"][task] for run in runs if run["after"] and task in run["after"]["tasks"]]
    return f"{measured[0]['queries']:,}" if "queries" in measured[0] else ""


def _loss(weights: Mapping[str, float], margin: float | None) -> str:
    """The terms of a task, a weight of 1 left out.

    >>> _loss({"info_nce": 1.0, "cosine": 0.0, "triplet": 1.5}, 0.3)
    'info_nce + 1.5 triplet, margin 0.3'
    """
    terms = [term if weight == 1 else f"{weight:g} {term}" for term, weight in weights.items() if weight]
    with_margin = margin is not None and weights.get(TRIPLET)
    return " + ".join(terms) + (f", margin {margin:g}" if with_margin else "")


def _value(value: Any) -> str:
    """A setting in words.

    >>> _value(None), _value(0.001), _value([8, 4]), _value({"visual": 1e-4}), _value(True)
    ('none', '0.001', '8, 4', 'visual 0.0001', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(of)}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

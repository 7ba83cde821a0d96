"""Doing the runs of an ablation, one after the other, in one process or in several.

1. Runs are done seed by seed, so that every variant has been tried once before any is tried twice. A run that is done
   has a ``run.json`` and is not done again, unless it failed and is to be tried again; one that was cut short goes on
   from its last checkpoint.
2. After each run, ``results.json`` and the report are written anew, of all runs in the folder.
3. A run under way is locked. Another process that is given the same ablation leaves it alone, does others, and waits at
   the end for what it left; the lock of a process that dies is free again.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from sentence_vipyloqwen.ablation.plan import RUNS_FOLDER, SEEDS, Run, Settings, plan
from sentence_vipyloqwen.ablation.plots import check_plots
from sentence_vipyloqwen.ablation.report import write_report
from sentence_vipyloqwen.ablation.results import RESULTS_FILE, load_about
from sentence_vipyloqwen.ablation.variants import VARIANTS
from sentence_vipyloqwen.files import measure, replacing
from sentence_vipyloqwen.model import ViPyloQwen
from sentence_vipyloqwen.tasks import INFO_NCE
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.build import CHECKPOINTS, model_options
from sentence_vipyloqwen.train.evaluation import evaluate
from sentence_vipyloqwen.train.memory import OutOfMemory
from sentence_vipyloqwen.train.progress import LOG_FILE, read_log
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import METRICS_FILE, MODEL, train
from sentence_vipyloqwen.train.task_losses import ROWS

RUN_FILE, REPORT_LOCK = "run.json", "report.lock"
LOOK_AGAIN = 10.0
"""Seconds after which a process that has nothing else to do looks whether others are done with their runs."""

_PACKAGES = ("sentence-vipyloqwen", "sentence-transformers", "transformers", "torch")
Tell = Callable[[str], None]


class _NoModel(Exception):
    """The run that was to leave the model has failed."""


class _UnderWay(Exception):
    """Another process has the run, or the one that is to leave its model, under way."""


def _failure(error: Exception) -> str:
    """What is written of a run that failed."""
    if isinstance(error, NonFiniteStep):
        return "the loss or the gradients of a step were not finite"
    return "the run whose model it takes has failed" if isinstance(error, _NoModel) else str(error)


def ablate(
    recipe: Recipe,
    names: Iterable[str] = (),
    *,
    seeds: int = SEEDS,
    own: Mapping[str, Settings] | None = None,
    device: str | None = None,
    retry_failed: bool = False,
    about: str | None = None,
    tell: Tell = lambda line: None,
) -> Path:
    """Do all runs that are not done yet, and report on every run in the folder; see `plan` for the arguments.

    Several processes may be given the same ablation: they share the runs, and each returns when all are done. A run
    that diverges or lacks memory is kept as one that failed, and the others go on; any other error is raised.

    Args:
        recipe: The reference.
        names: Variants; by default all that apply.
        seeds: How many.
        own: Variant -> settings that replace its own.
        device: ``"cpu"`` to stay off an accelerator; the best device at hand by default.
        retry_failed: Whether runs that failed before are forgotten, whatever their settings, and tried again.
        about: What base and data are, for the readers of the report; by default what was said before, if anything.
        tell: Called with a line for each variant that is left out, and before each run.

    Returns:
        The raw results, ``results.json``; the report lies beside it.

    Raises:
        ValueError: If `plan` refuses, the folder holds runs of other settings or data, a model that a run is to take
            was deleted, or there are several processes.
        ImportError: If matplotlib, which draws the report, is not installed.
        TrainingInterrupted: If a signal ended the run under way; the same call goes on from there.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"A run of an ablation has one process; got {processes}. Start it without accelerate or torchrun, as often "
            "as there are accelerators: each process does the runs that no other has under way."
        )
    check_plots()
    runs, output = plan(recipe, names, seeds=seeds, own=own, tell=tell), Path(recipe.output)
    work = _Work(runs, _data(recipe), output, device=device, about=about, retry_failed=retry_failed, tell=tell)
    work.check_models()
    busy = work.settle_all(runs, work.tell_busy)
    while busy:
        time.sleep(LOOK_AGAIN)
        busy = work.settle_all(busy)
    _report(output, about)
    return output / RESULTS_FILE


class _Work:
    """The runs of an ablation, as one of the processes that share them does them; see `ablate`."""

    def __init__(
        self,
        runs: Sequence[Run],
        data: Settings,
        output: Path,
        *,
        device: str | None,
        about: str | None,
        retry_failed: bool,
        tell: Tell,
    ) -> None:
        self._runs = runs
        self._data = data
        self._output = output
        self._device = device
        self._about = about
        self._tell = tell
        self._labels = {run.folder: f"{number}/{len(runs)}  {run.name}" for number, run in enumerate(runs, 1)}
        before = {run.folder: done for run in runs if (done := _read(run.folder))}
        self._failed = {folder: done for folder, done in before.items() if retry_failed and done["failure"]}

    def check_models(self) -> None:
        """Refuse to begin where a run could not take the model that another has left."""
        for run in self._runs:
            if run.variant.model_of and (run.folder in self._failed or not _read(run.folder)):
                _check_not_deleted(run)

    def settle_all(self, runs: Iterable[Run], tell_busy: Callable[[Run], None] = lambda run: None) -> list[Run]:
        """Do the runs that no other process has under way; those that are, or wait for such a one, are left."""
        busy: list[Run] = []
        for run in runs:
            try:
                if any(other.leaves_model_of(run) for other in busy):
                    raise _UnderWay
                self._settle(run)
            except _UnderWay:
                busy.append(run)
                tell_busy(run)
        return busy

    def tell_busy(self, run: Run) -> None:
        """Say that a run is left to others for now."""
        self._tell(f"{self._labels[run.folder]}: under way in another process, or waits for what is")

    def _settle(self, run: Run) -> None:
        """Do a run unless it is done; ``_UnderWay`` if another process has it."""
        with _alone(run):
            if (before := self._failed.get(run.folder)) and before == _read(run.folder):  # not yet tried again
                shutil.rmtree(run.folder)
            done = _is_done(run, self._data)
            self._tell(f"{self._labels[run.folder]}: {'done before' if done else run.variant.change}")
            if not done:
                _write(run.folder / RUN_FILE, _do(run, self._data, self._device))
                shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
                _report(self._output, self._about)


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Keep other processes off a run.

    Raises:
        _UnderWay: If one has it.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{run.folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _UnderWay from None
    try:
        yield
    finally:
        lock.release()


def _report(output: Path, about: str | None) -> None:
    """Write results, plots and pages anew, all of one state of the folder."""
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / REPORT_LOCK):
        write_results(output, about)
        write_report(output)


def _do(run: Run, data: Settings, device: str | None) -> dict[str, Any]:
    """Train or evaluate, and say what came out; of a run that was cut short, the seconds are those of its last part."""
    run.folder.mkdir(parents=True, exist_ok=True)
    begun, failure = time.perf_counter(), None
    try:
        measured = _evaluate(run, device) if run.variant.model_of else _train(run.recipe, device)
    except (NonFiniteStep, OutOfMemory, _NoModel) as error:
        measured, failure = {"before": None, "after": None}, _failure(error)
    gc.collect()  # a trainer and its callbacks hold each other: their models would pile up
    return {
        "variant": run.variant.name,
        "seed": run.recipe.seed,
        "settings": run.settings(),
        "data": data,
        **measured,
        "failure": failure,
        "seconds": round(time.perf_counter() - begun, 1),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": machine(),
    }


def _train(recipe: Recipe, device: str | None) -> dict[str, Any]:
    train(recipe, device=device)
    measured = json.loads((Path(recipe.output) / METRICS_FILE).read_text(encoding="utf-8"))
    return {name: measured.get(name) for name in ("before", "after")}


def _evaluate(run: Run, device: str | None) -> dict[str, Any]:
    """The model of another run, used in another way. It has no figures from before a training."""
    path, recipe = Path(run.recipe.output) / MODEL, run.recipe
    if not path.exists():
        _check_not_deleted(run)
        raise _NoModel
    model = ViPyloQwen(path, device=device, model_kwargs=model_options(recipe))
    model.truncate_dim = model.get_embedding_dimension() // run.variant.cut
    hidden = (*recipe.hidden_prefixes, *run.variant.hidden_prefixes)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.bf16):  # as in training
        measured = evaluate(model, str(recipe.eval), hidden_prefixes=hidden, show_progress_bar=False)
    return {"before": None, "after": measured.to_dict()}


def machine() -> dict[str, Any]:
    """What a run is done on, without names or places."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
    }


# --- What is kept ---


def _data(recipe: Recipe) -> dict[str, Any]:
    """Hashes of the records and of the base; a base of the Hub by its name."""
    base = Path(recipe.base)
    weights = [_digest(path) for path in sorted(base.glob("*.safetensors"))] if base.is_dir() else recipe.base
    return {"train": [_digest(path) for path in recipe.train], "eval": _digest(str(recipe.eval)), "base": weights}


def _digest(path: str | Path) -> str:
    digest: str = measure(Path(path))["xxh3_128"]
    return digest


def _read(folder: Path) -> dict[str, Any] | None:
    """What a run has left; ``None`` of one that is not done."""
    path = folder / RUN_FILE
    done: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return done


def _check_not_deleted(run: Run) -> None:
    """Refuse to take the model of a run that went well and has lost it: that is no failure of either run."""
    source = Path(run.recipe.output)
    done = _read(source)
    if done and not done["failure"] and not (source / MODEL).exists():
        raise ValueError(
            f"{run.name} takes the model of {source}, where {MODEL} was deleted: delete all of that folder to have it "
            "trained anew, or choose variants that do not take its model."
        )


def _is_done(run: Run, data: Settings) -> bool:
    """Whether the run is done; one of other settings or data is not mixed up with it."""
    if not (done := _read(run.folder)):
        return False
    if done["failure"] and run.variant.model_of and (Path(run.recipe.output) / MODEL).exists():
        return False  # it had no model to take, and has one now
    now = {**run.settings(), "data": data}
    then = {**done["settings"], "data": done["data"]}
    if changed := sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name)):
        changes = ", ".join(f"{name}: {then.get(name)!r} -> {now.get(name)!r}" for name in changed)
        raise ValueError(f"{run.folder} holds a run of other settings ({changes}): choose another output folder.")
    return True


def write_results(output: Path, about: str | None = None) -> None:
    """Gather every run in the folder, failed ones too, with what it logged and how large its model is.

    They stand in the order of the table; those of a variant that it does not have stand last.

    Args:
        output: The folder; it receives ``results.json``.
        about: What base and data are; by default what the results said before, if anything.
    """
    path = output / RESULTS_FILE
    if about is None and path.exists():
        about = load_about(output)
    paths = output.glob(f"{RUNS_FOLDER}/*/*/{RUN_FILE}")
    found = [{**json.loads(path.read_text(encoding="utf-8")), **_left_in(path.parent)} for path in paths]
    order = {name: place for place, name in enumerate(VARIANTS)}
    found.sort(key=lambda run: (order.get(run["variant"], len(order)), run["variant"], run["seed"]))
    _write(path, {"about": about or "", "runs": found})


def _left_in(folder: Path) -> dict[str, Any]:
    """What a training has left in its folder; of a run that trained nothing, nothing.

    ``curves``: task -> step and its InfoNCE in the steps up to there. ``rows``: task -> how many rows of it were seen.
    ``parameters``: how many numbers the model has; ``None`` where it was deleted, or an adapter is all of it.
    """
    curves, rows = defaultdict(list), Counter()
    for entry in read_log(folder / LOG_FILE):
        for key, value in entry.items():
            task, slash, what = key.partition("/")
            if what == INFO_NCE:
                curves[task].append((entry["step"], value))
            elif slash and what == ROWS:
                rows[task] += value
    return {"curves": dict(curves), "rows": dict(rows), "parameters": _parameters(folder / MODEL)}


def _parameters(model: Path) -> int | None:
    count = 0
    for path in model.rglob("*.safetensors"):
        if path.name == ADAPTER_SAFE_WEIGHTS_NAME:
            return None
        with safe_open(path, "pt") as weights:
            names: list[str] = weights.keys()
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return count or None


def _write(path: Path, content: Settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")

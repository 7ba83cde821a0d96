"""The recipe of a training: every setting of a run in one YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from sentence_vipyloqwen.losses.prefix_routed import (
    TEMPERATURE,
    Negatives,
    PairWeight,
    TripletScale,
    check_prefixes,
    merge_margins,
    merge_weights,
)
from sentence_vipyloqwen.modules.attention_pooling import ATTENTION
from sentence_vipyloqwen.modules.qwen2_vl import MAX_PIXELS, MIN_PIXELS
from sentence_vipyloqwen.tasks import ALL_TASKS
from sentence_vipyloqwen.train.adapters import LORA_TARGETS
from sentence_vipyloqwen.train.dataset import OnError
from sentence_vipyloqwen.train.sampling import DRAFT_CURRICULUM, PROPORTIONAL, Phase, task_mix_sampler

AUTO = "auto"
MEAN = "mean"
BY_ROWS = "proportional"
CURRICULA: Mapping[str, tuple[Phase, ...]] = {"drafts": DRAFT_CURRICULUM}
"""Curricula that a recipe may name."""

FULL, LORA, QLORA = "full", "lora", "qlora"
DTYPE = "float32"
DTYPES = (DTYPE, "bfloat16", "float16")
_CHOICES = {
    "dtype": (None, *DTYPES),
    "pooling": (None, MEAN, "lasttoken", "weightedmean", "max", ATTENTION),
    "negatives": get_args(Negatives),
    "pair_weight": get_args(PairWeight),
    "triplet_scale": get_args(TripletScale),
    "sampling": (BY_ROWS, "round_robin"),
    "on_error": get_args(OnError),
    "tuning": (FULL, LORA, QLORA),
}
_SAMPLING = ("group_images", "mix_temperature")
_STEPS = ("max_steps", "save_steps", "eval_steps")
_PHASES = "a list of phases, each {until: 0.3, mix: {text: 1.0}}"
_WITH_EVALUATION = "one only with eval, a file, and eval_steps above 0"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    ``embedding_dim``, ``pooling``, ``max_seq_length``, ``min_pixels`` and ``max_pixels`` are a new model's, by default
    those of ``ViPyloQwen.create``. A finished model keeps its own; one given that differs from them is refused.

    Attributes:
        base: Qwen2-VL checkpoint to start from (Hub id or folder), or a finished model to go on training.
        train: JSONL files of training records.
        on_error: What a broken image does: ``raise`` ends the run at the batch that has it; ``skip`` opens every image
            while the data is read and leaves such rows out, listed beside the cached data.
        output: Folder for checkpoints, log, metrics and, in ``model/``, the trained model.
        eval: JSONL file of held-out records; evaluated before, during and after training.
        lazy_images: Whether images are opened when their rows run rather than by the workers beforehand, so that memory
            holds those of one part of a batch; by default where the loss is computed in parts, or with a vision cache.
            In parts, a step's images wait for the backward pass in a temporary file (``TMPDIR``), 3 bytes a pixel.
        vision_cache: Folder in which the output of a frozen vision tower is kept (``frozen: [visual]``), so that an
            image is opened and computed once for all epochs and runs; none by default (extra ``vision-cache``).
        embedding_dim: Dimensions of an embedding.
        pooling: How tokens become one vector, by the name of Sentence Transformers' ``Pooling``: ``mean``,
            ``lasttoken``, ``weightedmean`` (later tokens weigh more) or ``max``. Or ``attention``: a learned query
            weighs the tokens, from the plain mean on. A folder with that is not portable: plain Sentence Transformers
            loads it only with this package installed and ``trust_remote_code=True``.
        max_seq_length: Most tokens of an input.
        min_pixels: Fewest pixels of an image after resizing.
        max_pixels: Most pixels of an image after resizing.
        dtype: Of the weights: ``float32`` by default, whatever the checkpoint's; ``bfloat16`` and ``float16`` round
            small updates away.
        attn_implementation: ``sdpa``, ``flash_attention_2`` or ``eager``; transformers chooses by default.
        epochs: Passes over the data.
        max_steps: Optimiser steps; in place of ``epochs`` where above 0.
        batch_size: Rows of a batch on each device.
        accumulation: Batches added up for each optimiser step.
        learning_rate: Peak learning rate of AdamW.
        learning_rates: Regular expression -> peak learning rate of the parameters whose names it finds, in place of
            ``learning_rate``: ``visual`` finds the vision tower, ``language_model`` the language model, ``linear`` the
            dense head; e.g. ``{"visual": 1e-5, "linear": 1e-3}``.
        frozen: Regular expressions; parameters whose names one of them finds are not trained, e.g. ``["visual"]``.
        tuning: ``full`` trains every weight; ``lora`` an adapter and the head (extra ``lora``); ``qlora`` the same on a
            base in 4 bits (extra ``qlora``).
        lora_r: Rank of the adapter's updates.
        lora_alpha: Their scale, divided by the rank.
        lora_dropout: Share of the adapter's inputs dropped in training.
        lora_targets: Regular expression that the whole name of a linear layer with an adapter matches; by default the
            language model's.
        merge: Whether ``model/`` holds the adapter merged into its base, a portable folder like any other; otherwise
            the adapter alone, which names its base and needs ``peft`` to load.
        adam_beta2: Decay of AdamW's second moment.
        schedule: Learning-rate schedule after the warm-up, by transformers' name.
        warmup_ratio: Share of the steps in which the rate rises to its peak.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        bf16: Whether to compute in bfloat16 (autocast); the weights stay as ``dtype`` says.
        gradient_checkpointing: Whether to recompute activations rather than keep them.
        temperature: Of InfoNCE.
        weights: Task -> term -> weight, in place of the task table's, or beside them.
        margins: Task -> margin, in place of the task table's.
        negatives: ``same_task`` or ``all``.
        pair_weight: ``score`` or ``uniform`` (published).
        triplet_scale: ``cosine`` or ``temperature`` (published).
        hidden_prefixes: Tasks whose prefix the loss alone reads: the model, in training and evaluation, never sees it.
        matryoshka_dims: Embedding sizes trained together, e.g. ``[1024, 512, 256, 128]``; none by default.
        loss_mini_batch_size: Rows of a forward pass where a batch is contrasted as a whole but computed in parts
            (GradCache): large batches in little memory, at one more forward pass. 0 for one pass.
        loss_mini_batch_tokens: Most tokens of such a part, in place of a fixed number of rows.
        gather_negatives: Whether the rows of all processes are each other's negatives.
        sampling: How batches are drawn from the tasks: ``proportional`` to their rows, or ``round_robin``.
        mix: Task -> its weight in the mix of batches, in place of the tasks' sizes; weights need not add up to 1. Or
            ``text`` -> that of all tasks of the data without an image, ``multimodal`` -> that of all others. Every task
            of the data must be covered, with 0 to leave it out.
        mix_temperature: Without a mix, a task of n batches weighs n to this power: 1 by size, 0.5 by its square root,
            0 the same for all.
        curriculum: Phases in place of a mix, each ``{"until": 0.3, "mix": {"text": 1.0}}``: the mix up to that share of
            the run's steps; the last until 1. Or ``drafts``, the paper drafts' own: six phases of equal length, from
            text alone by even steps (0, 2, 4, 6, 8, 10 fifteenths) to two thirds multimodal.
        mixed_batches: Whether a batch holds several tasks, as far as their records have the same columns; otherwise
            one, as negatives come from the same task.
        group_images: Rows whose anchors share the first image are drawn in runs of up to so many, so that it is
            computed once for them; 0 draws every row by itself.
        no_duplicates: Whether no content stands in two rows of a batch, which is then at most as large as there are
            distinct answers; the loss masks equal answers anyway.
        eval_steps: Optimiser steps between evaluations; 0 for before and after only.
        best_metric: What an evaluation is judged by: ``mean`` of the tasks' headline metrics, or a task's metric such
            as ``ocr/recall@1``. Higher is better; the best checkpoint becomes the model. None takes the last.
        patience: Evaluations without a better one after which the training stops; 0 for no end before the last step.
        ddp_timeout: Seconds that a process waits for the others before it gives up: longer than the first one takes to
            read and check the records, which it does alone.
        save_steps: Optimiser steps between checkpoints; 0 for none, or with ``best_metric`` one at each evaluation.
        keep_checkpoints: How many checkpoints are kept. The last one and, with ``best_metric``, the best one always
            are, so that 1 may leave two; while one is written, it is one more.
        logging_steps: Optimiser steps between lines of the log.
        report_to: Trackers: ``auto`` is TensorBoard; ``tensorboard``, ``wandb``, ``trackio`` and
            others of transformers' by name; ``none``.
        workers: Processes that prepare batches beside the main one.
        seed: Of sampling and of the dense head.
        resume: Whether to go on from the last checkpoint in ``output``.
    """

    base: str
    train: tuple[str, ...]
    output: str
    eval: str | None = None
    on_error: str = "raise"
    lazy_images: bool | None = None
    vision_cache: str | None = None
    embedding_dim: int | None = None
    pooling: str | None = None
    max_seq_length: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 24
    accumulation: int = 1
    learning_rate: float = 1e-4
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    tuning: str = FULL
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: str = LORA_TARGETS
    merge: bool = True
    adam_beta2: float = 0.999
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.001
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    temperature: float = TEMPERATURE
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    negatives: str = "same_task"
    pair_weight: str = "score"
    triplet_scale: str = "cosine"
    hidden_prefixes: tuple[str, ...] = ()
    matryoshka_dims: tuple[int, ...] = ()
    loss_mini_batch_size: int = 0
    loss_mini_batch_tokens: int | None = None
    gather_negatives: bool = False
    sampling: str = BY_ROWS
    mix: Mapping[str, float] = field(default_factory=dict)
    mix_temperature: float = PROPORTIONAL
    curriculum: tuple[Mapping[str, Any], ...] = ()
    mixed_batches: bool = False
    group_images: int = 0
    no_duplicates: bool = False
    eval_steps: int = 0
    best_metric: str | None = None
    patience: int = 0
    save_steps: int = 500
    keep_checkpoints: int = 2
    ddp_timeout: int = 2 * 3600
    logging_steps: int = 10
    report_to: tuple[str, ...] = (AUTO,)
    workers: int = 0
    seed: int = 42
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "logging_steps", "keep_checkpoints", "lora_r", "ddp_timeout"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("embedding_dim", "max_seq_length", "loss_mini_batch_tokens"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        for name in (*_STEPS, "workers", "weight_decay", "patience", *_SAMPLING, "loss_mini_batch_size"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("learning_rate", "epochs", "temperature", "max_grad_norm", "lora_alpha"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _check(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 up to, not including, 1")
        _check(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "from 0 up to, not including, 1")
        _check(0 < self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "between 0 and 1")
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), f"one of {list(choices)}")
        _check(bool(self.train), "train", self.train, "one JSONL file or more")
        least = MIN_PIXELS if self.min_pixels is None else self.min_pixels
        most = MAX_PIXELS if self.max_pixels is None else self.max_pixels
        _check(0 < least <= most, "min_pixels", least, f"from 1 to max_pixels, {most}")
        merge_margins(self.margins, merge_weights(self.weights))
        check_prefixes(self.hidden_prefixes)
        self._check_evaluation()
        self._check_sampling()

    def _check_evaluation(self) -> None:
        """The best checkpoint is told by evaluations, and patience is patience for a better one."""
        if self.best_metric is not None:
            task, slash, metric = self.best_metric.partition("/")
            known = self.best_metric == MEAN or (slash and metric and task in ALL_TASKS)
            allowed = f"{MEAN!r}, or a task of {list(ALL_TASKS)} and its metric, such as 'ocr/recall@1'"
            _check(bool(known), "best_metric", self.best_metric, allowed)
            _check(bool(self.eval and self.eval_steps), "best_metric", self.best_metric, _WITH_EVALUATION)
        _check(not self.patience or self.best_metric is not None, "patience", self.patience, "0 without best_metric")

    def _check_sampling(self) -> None:
        if mixed := self.mixes_tasks:
            task_mix_sampler(self.mix or None, self.mix_temperature, self.phases())
        wanted = f"{BY_ROWS!r} beside mix, mix_temperature or curriculum"
        _check(not mixed or self.sampling == BY_ROWS, "sampling", self.sampling, wanted)
        _check(
            not (mixed and self.mixed_batches), "mixed_batches", True, "False where tasks have shares of the batches"
        )

    @property
    def in_parts(self) -> bool:
        """Whether the loss contrasts a batch as a whole but computes it in parts."""
        return bool(self.loss_mini_batch_size or self.loss_mini_batch_tokens)

    @property
    def mixes_tasks(self) -> bool:
        """Whether tasks are drawn in another mix than by their size."""
        return bool(self.mix or self.curriculum or self.mix_temperature != PROPORTIONAL)

    def phases(self) -> list[Phase]:
        """The curriculum."""
        return [Phase(**phase) for phase in self.curriculum]

    def to_yaml(self) -> str:
        """The recipe as YAML, every setting spelt out."""
        plain = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file, or the name of a recipe shipped with the package (see :func:`shipped_recipes`).
        overrides: Settings that replace the file's, taken as they are.

    Raises:
        ValueError: If a setting is unknown, missing, of the wrong type or out of range; the message names it.
    """
    settings = dict(_read_yaml(path)) if path is not None else {}
    settings.update(overrides or {})
    fields = {item.name: item for item in dataclasses.fields(Recipe)}
    if unknown := sorted(set(settings) - set(fields)):
        raise ValueError(f"Unknown settings {unknown}; allowed are {list(fields)}.")
    required = [name for name, item in fields.items() if _is_required(item)]
    if missing := [name for name in required if settings.get(name) in (None, [], "")]:
        options = ", ".join(f"--{name}" for name in missing)
        raise ValueError(f"The recipe lacks {missing}: write them in the file, or give {options} to a command.")
    types = get_type_hints(Recipe)
    return Recipe(**{name: _coerce(name, value, types[name]) for name, value in settings.items()})


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("sentence_vipyloqwen.train") / "recipes"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_text(path: str | Path) -> str:
    """The text of a recipe, comments and all.

    Args:
        path: A YAML file, or the name of a recipe shipped with the package.

    Raises:
        ValueError: If it is neither.
    """
    if (file := Path(path)).is_file():
        return file.read_text(encoding="utf-8")
    if str(path) in shipped_recipes():
        return (resources.files("sentence_vipyloqwen.train") / "recipes" / str(path)).read_text(encoding="utf-8")
    raise ValueError(f"No recipe {str(path)!r}: neither a file nor one of the shipped {shipped_recipes()}.")


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    text = recipe_text(path)
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: a recipe is a mapping of settings to values; got {type(settings).__name__}.")
    return settings


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring a YAML value to the setting's type: YAML reads ``1e-4`` as a string and one file name as no list."""
    if name == "curriculum":
        return _curriculum(value)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(name, item, get_args(kind)[0]) for item in items)
    if get_origin(kind) is Mapping:
        _check(isinstance(value, Mapping), name, value, "a mapping")
        return {key: _coerce(f"{name}.{key}", item, get_args(kind)[1]) for key, item in value.items()}
    if kind is float:
        return _to_float(name, value)
    _check(type(value) is kind, name, value, f"of type {kind.__name__}")
    return value


def _curriculum(value: Any) -> tuple[dict[str, Any], ...]:
    """The phases of a curriculum, those of a named one spelt out."""
    if isinstance(value, str):
        _check(value in CURRICULA, "curriculum", value, f"{_PHASES}, or one of {list(CURRICULA)}")
        return tuple(dataclasses.asdict(phase) for phase in CURRICULA[value])
    return tuple(_phase(item) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _phase(value: Any) -> dict[str, Any]:
    _check(isinstance(value, Mapping) and set(value) == {"until", "mix"}, "curriculum", value, _PHASES)
    mix = _coerce("curriculum.mix", value["mix"], Mapping[str, float])
    return {"until": _to_float("curriculum.until", value["until"]), "mix": mix}


def _to_float(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    _check(math.isfinite(number), name, value, "a finite number")
    return number


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check(condition: bool, name: str, value: Any, allowed: str | Iterable[str]) -> None:
    if not condition:
        raise ValueError(f"Setting {name} is {value!r}; allowed is {allowed}.")

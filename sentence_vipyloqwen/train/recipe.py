"""The recipe of a training: every setting of a run in one YAML file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from sentence_vipyloqwen.losses.prefix_routed import (
    TEMPERATURE,
    Negatives,
    PairWeight,
    TripletScale,
    merge_margins,
    merge_weights,
)
from sentence_vipyloqwen.modules.qwen2_vl import MAX_PIXELS, MIN_PIXELS

DTYPE = "float32"
DTYPES = (DTYPE, "bfloat16", "float16")
_CHOICES = {
    "dtype": (None, *DTYPES),
    "negatives": get_args(Negatives),
    "pair_weight": get_args(PairWeight),
    "triplet_scale": get_args(TripletScale),
    "sampling": ("proportional", "round_robin"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    ``embedding_dim``, ``max_seq_length``, ``min_pixels`` and ``max_pixels`` are a new model's, by default those of
    ``ViPyloQwen.create``. A finished model keeps its own; one given that differs from them is refused.

    Attributes:
        base: Qwen2-VL checkpoint to start from (Hub id or folder), or a finished model to go on training.
        train: JSONL files of training records.
        output: Folder for checkpoints, log, metrics and, in ``model/``, the trained model.
        eval: JSONL file of held-out records; evaluated before, during and after training.
        embedding_dim: Dimensions of an embedding.
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
            ``learning_rate``, e.g. ``{"visual": 1e-5}``.
        frozen: Regular expressions; parameters whose names one of them finds are not trained, e.g. ``["visual"]``.
        adam_beta2: Decay of AdamW's second moment.
        schedule: Learning-rate schedule after the warm-up, by transformers' name.
        warmup_ratio: Share of the steps in which the rate rises to its peak.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        bf16: Whether to compute in bfloat16 (autocast); the weights stay as ``dtype`` says.
        gradient_checkpointing: Whether to recompute activations rather than keep them.
        temperature: Of InfoNCE.
        weights: Task -> term -> weight, in place of the task table's.
        margins: Task -> margin, in place of the task table's.
        negatives: ``same_task`` or ``all``.
        pair_weight: ``score`` or ``uniform`` (published).
        triplet_scale: ``cosine`` or ``temperature`` (published).
        matryoshka_dims: Embedding sizes trained together, e.g. ``[1024, 512, 256, 128]``; none by default.
        sampling: How batches are drawn from the tasks: ``proportional`` to their rows, or ``round_robin``.
        eval_steps: Optimiser steps between evaluations; 0 for before and after only.
        save_steps: Optimiser steps between checkpoints; 0 for none.
        keep_checkpoints: How many checkpoints are kept.
        logging_steps: Optimiser steps between lines of the log.
        workers: Processes that prepare batches beside the main one.
        seed: Of sampling and of the dense head.
        resume: Whether to go on from the last checkpoint in ``output``.
    """

    base: str
    train: tuple[str, ...]
    output: str
    eval: str | None = None
    embedding_dim: int | None = None
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
    matryoshka_dims: tuple[int, ...] = ()
    sampling: str = "proportional"
    eval_steps: int = 0
    save_steps: int = 0
    keep_checkpoints: int = 2
    logging_steps: int = 10
    workers: int = 0
    seed: int = 42
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "logging_steps", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("embedding_dim", "max_seq_length"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        for name in ("max_steps", "save_steps", "eval_steps", "workers", "weight_decay"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("learning_rate", "epochs", "temperature", "max_grad_norm"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _check(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 up to, not including, 1")
        _check(0 < self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "between 0 and 1")
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), f"one of {list(choices)}")
        _check(bool(self.train), "train", self.train, "one JSONL file or more")
        least = MIN_PIXELS if self.min_pixels is None else self.min_pixels
        most = MAX_PIXELS if self.max_pixels is None else self.max_pixels
        _check(0 < least <= most, "min_pixels", least, f"from 1 to max_pixels, {most}")
        merge_weights(self.weights)
        merge_margins(self.margins)

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
        raise ValueError(f"The recipe lacks {missing}: write them in the file, or give them on the command line.")
    types = get_type_hints(Recipe)
    return Recipe(**{name: _coerce(name, value, types[name]) for name, value in settings.items()})


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("sentence_vipyloqwen.train") / "recipes"
    return sorted(item.name for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file() and str(path) in shipped_recipes():
        text = (resources.files("sentence_vipyloqwen.train") / "recipes" / str(path)).read_text(encoding="utf-8")
    elif file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        raise ValueError(f"No recipe {str(path)!r}: neither a file nor one of the shipped {shipped_recipes()}.")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{path}: a recipe is a mapping of settings to values; got {type(settings).__name__}.")
    return settings


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring a YAML value to the setting's type: YAML reads ``1e-4`` as a string and one file name as no list."""
    if "tuple" in str(hint):
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(name, item, int if "int" in str(hint) else str) for item in items)
    if value is None and "None" in str(hint):
        return None
    if "Mapping" in str(hint):
        _check(isinstance(value, Mapping), name, value, "a mapping")
        return {key: _coerce(f"{name}.{key}", item, get_args(hint)[1]) for key, item in value.items()}
    kind = next(kind for kind in (bool, int, float, str) if kind.__name__ in str(hint))
    if kind is float:
        return _to_float(name, value)
    _check(type(value) is kind, name, value, f"of type {kind.__name__}")
    return value


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

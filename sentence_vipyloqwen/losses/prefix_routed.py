"""The prefix-routed composite loss: each row's task prefix selects its terms, their weights and its margin."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sentence_vipyloqwen.losses import functional
from sentence_vipyloqwen.losses.candidates import Candidates, Layout
from sentence_vipyloqwen.losses.ranks import missing_forwards, raise_together
from sentence_vipyloqwen.losses.rows import (
    TASK_INDEX,
    BatchRows,
    content_keys,
    hide_prefixes,
    select_rows,
    task_indices,
)
from sentence_vipyloqwen.losses.terms import LossTerms
from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.tasks import ALL_TASKS, COSINE, INFO_NCE, SCORE_MSE, TASKS, TRIPLET

Negatives = Literal["same_task", "all"]
PairWeight = Literal["score", "uniform"]
TripletScale = Literal["cosine", "temperature"]

TEMPERATURE = 0.07
TERMS = (INFO_NCE, SCORE_MSE, COSINE, TRIPLET)


class PrefixRoutedLoss(nn.Module):
    """Routes each row to the loss of its task; the batch loss is the mean over the rows.

    ========== ==================================================================== ===================
    task       terms                                                                weights (margin)
    ========== ==================================================================== ===================
    text_pair  symmetric InfoNCE + MSE of (cos + 1) / 2 against the score           1, 1
    instr      symmetric InfoNCE + (1 - cos)                                        1, 1
    ocr        symmetric InfoNCE + triplet margin                                   1, 1 (0.2)
    vqa_single symmetric InfoNCE + triplet margin                                   1, 1 (0.2)
    vqa_multi  symmetric InfoNCE + triplet margin                                   1, 1.5 (0.3)
    general    symmetric InfoNCE                                                    1
    ========== ==================================================================== ===================

    The task is the prefix token at the head of the anchor, right after its images, read from ``input_ids``; so the loss
    needs no extra column and works on a model that plain Sentence Transformers loaded, too.

    Inputs: columns (anchor, positive) or (anchor, positive, negative, ...), each text, image or both; optional labels:
    the scores of text pairs, NaN where a row has none.

    Args:
        model: The model to train.
        temperature: Divides the similarities in InfoNCE.
        weights: Task -> term -> weight, in place of the defaults named, or beside them: any task may have any term.
        margins: Task -> margin of its triplet term, in place of the defaults named.
        negatives: ``"same_task"``: rows of one task are each other's negatives; ``"all"``: all rows are.
        pair_weight: ``"score"``: InfoNCE weighs a scored pair by its score, so that an unlike pair is not pulled
            together; ``"uniform"``: the published form, weight 1.
        triplet_scale: ``"cosine"``: margins in units of cosine; ``"temperature"``: the published form, similarities
            divided by the temperature.
        hidden_prefixes: Tasks whose prefix the loss alone reads, and the model never sees: a routing without prompts.
        gather_across_devices: Whether the rows of all ranks are each other's negatives, as if one process had them all:
            a rank computes the losses of its own rows, embeddings are exchanged with their gradients, content keys rule
            out false negatives across ranks. Its loss is the sum over its rows / the average number of rows of a rank,
            so that the mean over the ranks, which DDP and full sharding take of the gradients, is exactly the loss of
            one process. Ranks may differ in tasks, rows and negative columns. Without effect in a single process.

    Under several ranks, each runs as many forward passes as the one with the most columns, for sharded and wrapped
    models wait for each other in every one of them; and a ``ValueError`` of one rank is raised by all.

    Raises:
        ValueError: If an option, a task or a term is unknown, or a number is out of range.

    Source of the method: EraX-AI, viPyloQwen README and paper drafts (2025).

    Example::

        loss = PrefixRoutedLoss(model, margins={"ocr": 0.3})
        trainer = SentenceTransformerTrainer(model, train_dataset=load_tasks("train.jsonl"), loss=loss)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = TEMPERATURE,
        weights: Mapping[str, Mapping[str, float]] | None = None,
        margins: Mapping[str, float] | None = None,
        negatives: Negatives = "same_task",
        pair_weight: PairWeight = "score",
        triplet_scale: TripletScale = "cosine",
        hidden_prefixes: Collection[str] = (),
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0.")
        self.model = model
        self.temperature = temperature
        self.weights = merge_weights(weights or {})
        self.margins = merge_margins(margins or {}, self.weights)
        self.negatives = _choice("negatives", negatives, Negatives)
        self.pair_weight = _choice("pair_weight", pair_weight, PairWeight)
        self.triplet_scale = _choice("triplet_scale", triplet_scale, TripletScale)
        self.hidden_prefixes = check_prefixes(hidden_prefixes)
        self.gather_across_devices = gather_across_devices
        self.control = ControlTokens.of(model.tokenizer)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> LossTerms:
        """Embed every column and route its rows.

        Returns:
            Term name, e.g. ``"ocr/triplet"``, -> its share of the batch loss; the same names at every step. Their sum
            is the loss.
        """
        columns = list(sentence_features)
        rows = self.read_rows_together(columns, labels)
        columns = [self.shown(features) for features in columns]
        idle = [select_rows(columns[1], [0]) for _ in range(missing_forwards(len(columns), rows.tasks.device))]
        embeddings = [self.model(features)["sentence_embedding"] for features in (*columns, *idle)]
        terms = self.compute_loss_from_embeddings(embeddings[: len(columns)], rows)
        return terms.with_idle(embeddings[len(columns) :])

    def shown(self, features: dict[str, Any]) -> dict[str, Any]:
        """What the model sees of a column: all but the hidden prefixes."""
        return hide_prefixes(features, self.control, self.hidden_prefixes) if self.hidden_prefixes else features

    def read_rows_together(self, columns: Sequence[Mapping[str, Tensor]], labels: Tensor | None) -> BatchRows:
        """:meth:`read_rows`, where an error of one rank is raised by all.

        Raises:
            ValueError: If any rank's columns or scores are not allowed.
        """
        device = columns[0]["input_ids"].device if columns else torch.device("cpu")
        return raise_together(lambda: self.read_rows(columns, labels), device)

    def read_rows(self, columns: Sequence[Mapping[str, Tensor]], labels: Tensor | None = None) -> BatchRows:
        """Read tasks, content keys and scores off the columns' features.

        Raises:
            ValueError: If there are fewer than two columns, or a score outside [0, 1].
        """
        if len(columns) < 2:
            raise ValueError(f"Got {len(columns)} column(s); needed are anchor and positive, then any negatives.")
        tasks = task_indices(columns[0], self.control)
        anchors, positives, *negatives = (content_keys(features) for features in columns)
        scores = torch.full(tasks.shape, float("nan"), device=tasks.device) if labels is None else labels.float()
        if bool(((scores < 0) | (scores > 1)).any()):
            known = scores[~scores.isnan()]
            raise ValueError(f"Scores of text pairs must lie in [0, 1]; got {known.min():g} to {known.max():g}.")
        stacked = torch.stack(negatives, dim=1) if negatives else anchors.new_empty(len(anchors), 0)
        return BatchRows(tasks, anchors, positives, stacked, scores)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], rows: BatchRows) -> LossTerms:
        """Route embedded rows.

        Args:
            embeddings: For each column (anchor, positive, negatives), (B, D) floats; normalised here. Half precision
                becomes float32 first, under autocast too: differences of cosines are small.
            rows: What routing needs to know of the rows.

        Returns:
            Term name -> scalar.
        """
        with torch.autocast(embeddings[0].device.type, enabled=False):
            units = [F.normalize(_at_least_float32(embedding), dim=-1) for embedding in embeddings]
            layout = Layout.of(units, self.gather_across_devices)
            values = self._term_values(units, rows, layout)
            return self._route(values, rows, layout.rows_per_rank)

    def _term_values(self, units: Sequence[Tensor], rows: BatchRows, layout: Layout) -> dict[str, Tensor]:
        """Each term's value for each own row, (B,)."""
        # 1. Of the candidates, only true negatives count.
        candidates = Candidates.of(rows, layout)
        forward_mask, explicit_mask, backward_mask = candidates.masks(self.negatives == "same_task")

        # 2. Similarities: of own anchors to positives and explicit negatives, of own positives to anchors.
        anchors, positives, negatives = layout.gather(units)  # (N, D), (N, D), (M, D)
        positive = (units[0] * units[1]).sum(dim=1)  # (B,)
        forward = _similarity(units[0], positives, forward_mask)  # (B, N)
        explicit = _similarity(units[0], negatives, explicit_mask)  # (B, M)
        backward = _similarity(units[1], anchors, backward_mask)  # (B, N)

        # 3. Every term for every row; the routing then takes each row's own.
        hardest = _hardest_negative(forward, explicit.masked_fill(~candidates.belongs(), -torch.inf))
        return {
            INFO_NCE: functional.info_nce(torch.cat([forward, explicit], dim=1), backward, positive, self.temperature),
            SCORE_MSE: functional.score_mse(positive, rows.scores),
            COSINE: functional.cosine_distance(positive),
            TRIPLET: functional.triplet_margin(positive, hardest, self._row_margins(rows.tasks), self._triplet_factor),
        }

    def _route(self, values: Mapping[str, Tensor], rows: BatchRows, rows_per_rank: float) -> LossTerms:
        terms = LossTerms()
        pair_weights = rows.scores.nan_to_num(nan=1.0)
        for task, weights in self.weights.items():
            members = rows.tasks == TASK_INDEX[task]
            for term, weight in weights.items():
                value = values[term]
                if term == INFO_NCE and SCORE_MSE in weights and self.pair_weight == "score":
                    value = value * pair_weights
                terms[f"{task}/{term}"] = weight * (value * members).sum() / rows_per_rank
        return terms

    @property
    def term_names(self) -> list[str]:
        """The names of the terms, in their order: the same at every step and on every rank."""
        return [f"{task}/{term}" for task, weights in self.weights.items() for term in weights]

    def _row_margins(self, tasks: Tensor) -> Tensor:
        margins = torch.tensor([self.margins.get(name, 0.0) for name in ALL_TASKS], device=tasks.device)
        return margins[tasks]

    @property
    def _triplet_factor(self) -> float:
        return 1 / self.temperature if self.triplet_scale == "temperature" else 1.0

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            "temperature": self.temperature,
            "weights": self.weights,
            "margins": self.margins,
            "negatives": self.negatives,
            "pair_weight": self.pair_weight,
            "triplet_scale": self.triplet_scale,
            "hidden_prefixes": list(self.hidden_prefixes),
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the InfoNCE objective, for the model card."""
        return """
@misc{oord2019representation,
      title={Representation Learning with Contrastive Predictive Coding},
      author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
      year={2019},
      eprint={1807.03748},
      archivePrefix={arXiv},
      primaryClass={cs.LG},
}
"""


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _similarity(own: Tensor, candidates: Tensor, mask: Tensor) -> Tensor:
    return (own @ candidates.T).masked_fill(~mask, -torch.inf)


def _hardest_negative(in_batch: Tensor, own: Tensor) -> Tensor:
    """(B,) similarity of each row's triplet negative: its own explicit one, the hardest of several, else in-batch."""
    own = F.pad(own, (1, 0), value=-torch.inf).amax(dim=1)  # there may be none at all
    return own.where(own > -torch.inf, in_batch.amax(dim=1))


def merge_weights(overrides: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The default weights of every task with some replaced or added.

    >>> merge_weights({"ocr": {"triplet": 2, "cosine": 1}})["ocr"]
    {'info_nce': 1.0, 'triplet': 2, 'cosine': 1}

    Raises:
        ValueError: If a task or a term is unknown, or a weight is negative.
    """
    merged = {name: dict(task.weights) for name, task in ALL_TASKS.items()}
    for task, weights in overrides.items():
        _check_known("task", task, merged)
        for term, weight in weights.items():
            _check_known(f"term of task {task!r}", term, TERMS)
            if not weight >= 0:
                raise ValueError(f"The weight of {task}/{term} is {weight}; it must be at least 0.")
            merged[task][term] = weight
    return merged


def merge_margins(overrides: Mapping[str, float], weights: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The default margins of the tasks that have a triplet term, with some replaced.

    Args:
        overrides: Task -> margin.
        weights: Task -> term -> weight, of all tasks.

    Raises:
        ValueError: If a task has no triplet term, or one and no margin; or if a margin is negative.
    """
    triplets = [name for name, terms in weights.items() if TRIPLET in terms]
    for task, margin in overrides.items():
        _check_known("task with a margin", task, triplets)
        if not margin >= 0:
            raise ValueError(f"The margin of {task} is {margin}; it must be at least 0.")
    merged = {name: overrides.get(name, ALL_TASKS[name].margin) for name in triplets}
    if missing := [name for name, margin in merged.items() if margin is None]:
        raise ValueError(f"No margin is given for the triplet term of {missing}, which have no default.")
    return {name: margin for name, margin in merged.items() if margin is not None}


def check_prefixes(tasks: Collection[str]) -> tuple[str, ...]:
    """The tasks, if all of them have a prefix.

    Raises:
        ValueError: If one has none or is unknown.
    """
    for task in tasks:
        _check_known("task with a prefix", task, TASKS)
    return tuple(tasks)


def _check_known(what: str, name: str, allowed: Iterable[str]) -> None:
    if name not in allowed:
        raise ValueError(f"Unknown {what}: {name!r}; allowed are {list(allowed)}.")


def _choice(name: str, value: str, literal: Any) -> Any:
    if value not in get_args(literal):
        raise ValueError(f"{name} is {value!r}; allowed are {list(get_args(literal))}.")
    return value

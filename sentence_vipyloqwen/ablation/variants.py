"""The table of variants: each changes one thing about a recipe, or about how its model is used.

A variant is compared with the one that differs from it in that thing alone, most with ``full``.

The model of ``attention_pooling`` is not portable: Sentence Transformers has no such module, and loads no class but its
own without ``trust_remote_code``. ``weighted_mean_pooling`` is what its ``Pooling`` has between the mean and the last
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sentence_vipyloqwen.losses.prefix_routed import TERMS
from sentence_vipyloqwen.model import EMBEDDING_DIM
from sentence_vipyloqwen.modules.attention_pooling import ATTENTION
from sentence_vipyloqwen.tasks import ALL_TASKS, INFO_NCE, TASKS
from sentence_vipyloqwen.train.recipe import Recipe

FULL = "full"
ONE_MARGIN = 0.2
SHORTEST = 8
"""What embeddings are cut to: one part in so many."""


def _unchanged(recipe: Recipe) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change, and what it asks.

    Attributes:
        name: Its name.
        change: What is changed, in a few words.
        question: What it answers.
        settings: Of the recipe that it changes, the settings that replace those.
        against: The variant that differs from it in this change alone; ``None`` for the reference.
        model_of: The variant whose trained model is evaluated in another way; ``None`` where it trains its own.
        hidden_prefixes: Of such an evaluation, the tasks whose prefix is left out.
        cut: Of such an evaluation, what part of its numbers an embedding is cut to, one in so many.
        only: The one task it trains on, with as many rows of it as the reference sees; its figures are of that task
            alone. ``None`` for all tasks.
    """

    name: str
    change: str
    question: str
    settings: Callable[[Recipe], Mapping[str, Any]] = _unchanged
    against: str | None = FULL
    model_of: str | None = None
    hidden_prefixes: tuple[str, ...] = ()
    cut: int = 1
    only: str | None = None


def _with(**settings: Any) -> Callable[[Recipe], Mapping[str, Any]]:
    """Settings that do not depend on the recipe's others."""
    return lambda recipe: settings


def _halves(recipe: Recipe) -> Mapping[str, Any]:
    """The whole embedding, its half, and so on to the shortest."""
    size = recipe.embedding_dim or EMBEDDING_DIM
    return {"matryoshka_dims": [size // part for part in (1, 2, 4, SHORTEST)]}


def _no_other_terms(task: str) -> Mapping[str, float]:
    """Weight 0 for all that a task has beside InfoNCE."""
    return {term: 0.0 for term in ALL_TASKS[task].weights if term != INFO_NCE}


def _without_prefix_of(task: str) -> Variant:
    return Variant(
        name=f"no_{task}_prefix",
        change=f"<{task}> is seen by the loss alone, in training and evaluation",
        question=f"Does the model need the prefix of {task}, if every other task keeps its own?",
        settings=_with(hidden_prefixes=[task]),
    )


def _only(task: str) -> Variant:
    return Variant(
        name=f"only_{task}",
        change=f"a model for {task} alone, of as many rows of it as in full",
        question=f"Would {task} be better off with a model of its own?",
        only=task,
    )


_VARIANTS = (
    Variant(
        name=FULL,
        change="none: the recipe as it is",
        question="What does the prefix-routed loss reach?",
        against=None,
    ),
    # The loss.
    Variant(
        name="info_nce_only",
        change="every task has InfoNCE alone (pairs weighted as before)",
        question="Do the terms beside InfoNCE help: score, cosine, triplet?",
        settings=_with(weights={task: _no_other_terms(task) for task in ALL_TASKS}),
    ),
    Variant(
        name="one_mix",
        change=f"all four terms with weight 1 and margin {ONE_MARGIN} for every task",
        question="Is it worth choosing terms by task, or does one mix serve them all?",
        settings=_with(
            weights={task: dict.fromkeys(TERMS, 1.0) for task in ALL_TASKS},
            margins=dict.fromkeys(ALL_TASKS, ONE_MARGIN),
        ),
    ),
    Variant(
        name="published_pair_weight",
        change="a scored pair counts in InfoNCE whatever its score",
        question="Does it help to weigh a pair by its score, rather than as published?",
        settings=_with(pair_weight="uniform"),
    ),
    Variant(
        name="published_triplet",
        change="the triplet term takes similarities divided by the temperature",
        question="Do margins in units of cosine help, rather than as published?",
        settings=_with(triplet_scale="temperature"),
    ),
    # Prefixes.
    Variant(
        name="no_prefix",
        change="prefixes are seen by the loss alone, in training and evaluation",
        question="Does the model need to see the task, or is it enough that the loss knows it?",
        settings=_with(hidden_prefixes=list(TASKS)),
    ),
    Variant(
        name="prefix_forgotten",
        change="the model of full, asked without prefixes",
        question="What does it cost to forget the prefix at inference?",
        model_of=FULL,
        hidden_prefixes=tuple(TASKS),
    ),
    *(_without_prefix_of(task) for task in TASKS),
    # Pooling.
    Variant(
        name="last_token_pooling",
        change="the last token is the embedding",
        question="Is the mean over all tokens better than the last one?",
        settings=_with(pooling="lasttoken"),
    ),
    Variant(
        name="attention_pooling",
        change="a learned query weighs the tokens",
        question="Is a plain mean enough, or should the model learn which tokens count?",
        settings=_with(pooling=ATTENTION),
    ),
    Variant(
        name="weighted_mean_pooling",
        change="later tokens weigh more in the mean",
        question="Is a plain mean enough where a token sees only what stands before it?",
        settings=_with(pooling="weightedmean"),
    ),
    # One model for all tasks.
    *(_only(task) for task in TASKS),
    # Negatives.
    Variant(
        name="mixed_batches",
        change="a batch holds several tasks; negatives are of the same",
        question="Does it matter whether a batch holds one task or several?",
        settings=_with(mixed_batches=True),
    ),
    Variant(
        name="all_negatives",
        change="mixed batches, where the rows of every task are negatives",
        question="Should negatives be of the same task, or of all?",
        settings=_with(mixed_batches=True, negatives="all"),
        against="mixed_batches",
    ),
    Variant(
        name="in_batch",
        change="24 rows contrasted, 32 such batches a step",
        question="How far do the batches of the published run get: few negatives, long steps?",
        settings=_with(batch_size=24, accumulation=32, loss_mini_batch_size=0, loss_mini_batch_tokens=None),
    ),
    Variant(
        name="grad_cache",
        change="768 rows contrasted as a whole, computed 24 at a time",
        question="Do more negatives help, at the same rows a step?",
        settings=_with(batch_size=768, accumulation=1, loss_mini_batch_size=24, loss_mini_batch_tokens=None),
        against="in_batch",
    ),
    # Size.
    Variant(
        name="cut",
        change=f"the model of full, its embeddings cut to 1/{SHORTEST}",
        question="What does it cost to cut embeddings that were not trained for it?",
        model_of=FULL,
        cut=SHORTEST,
    ),
    Variant(
        name="matryoshka",
        change=f"trained at whole, half, quarter and 1/{SHORTEST} of its size (Matryoshka)",
        question="What do whole embeddings lose if shorter ones are trained beside them?",
        settings=_halves,
    ),
    Variant(
        name="matryoshka_cut",
        change=f"the model of matryoshka, its embeddings cut to 1/{SHORTEST}",
        question="Does Matryoshka training help embeddings that are cut?",
        against="cut",
        model_of="matryoshka",
        cut=SHORTEST,
    ),
)

VARIANTS: Mapping[str, Variant] = MappingProxyType({variant.name: variant for variant in _VARIANTS})
"""Every variant by name, the reference first."""


def with_needed(names: Iterable[str]) -> list[Variant]:
    """Variants by name, with the reference and all that they are compared with or take their model from.

    >>> [variant.name for variant in with_needed(["matryoshka_cut"])]
    ['full', 'cut', 'matryoshka', 'matryoshka_cut']

    Returns:
        Each once, in the order of the table.

    Raises:
        ValueError: If a name is unknown.
    """
    wanted, queue = {FULL}, list(names)
    if unknown := [name for name in queue if name not in VARIANTS]:
        raise ValueError(f"Unknown variants {unknown}; allowed are {list(VARIANTS)}.")
    while queue:
        variant = VARIANTS[queue.pop()]
        wanted.add(variant.name)
        queue += [name for name in (variant.against, variant.model_of) if name and name not in wanted]
    return [variant for name, variant in VARIANTS.items() if name in wanted]

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

from sentence_vipyloqwen.losses.prefix_routed import TERMS, merge_weights
from sentence_vipyloqwen.model import EMBEDDING_DIM
from sentence_vipyloqwen.modules.attention_pooling import ATTENTION
from sentence_vipyloqwen.tasks import ALL_TASKS, COSINE, INFO_NCE, SCORE_MSE, TASKS, TRIPLET
from sentence_vipyloqwen.train.recipe import Recipe

FULL = "full"
LOSS, PREFIXES, POOLING, ONE_TASK, NEGATIVES, SIZE = "loss", "prefixes", "pooling", "one task", "negatives", "size"
NOT_SHOWN = "Not shown"
NOTHING_SHOWN = "Nothing that shows"
ONE_MARGIN = 0.2
SHORTEST = 8
"""What embeddings are cut to: one part in so many."""
PUBLISHED_BATCH = 24
"""Rows that the published run contrasts at a time."""
_TERMS_BESIDE = {SCORE_MSE: "the squared error of scores", COSINE: "the cosine term", TRIPLET: "the triplet term"}


def _unchanged(recipe: Recipe) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change, what it asks, and what an outcome means.

    Attributes:
        name: Its name.
        change: What is changed, in a few words.
        question: What it answers.
        family: What kind of change it is; reports put those of a family together, as the table does.
        side: Its own side of the comparison, as a sentence begins: ``"as published"``.
        other_side: The side of what it is compared with, as it follows a figure: ``"in units of cosine"``.
        if_better: The answer to the question where the variant is better than that.
        if_worse: The answer where it is worse.
        if_equal: The answer where nothing differs significantly.
        settings: Of the recipe that it changes, the settings that replace those.
        against: The variant that differs from it in this change alone; ``None`` for the reference.
        model_of: The variant whose trained model is evaluated in another way; ``None`` where it trains its own.
        hidden_prefixes: Of such an evaluation, the tasks whose prefix is left out.
        cut: Of such an evaluation, what part of its numbers an embedding is cut to, one in so many.
        only: The one task it trains on, with as many rows of it as the reference sees; its figures are of that task
            alone. ``None`` for all tasks.
        about: The one task that its question is about, and without which it has no meaning; ``None`` where it is about
            all of them, so that their average answers it.
    """

    name: str
    change: str
    question: str
    family: str = ""
    side: str = ""
    other_side: str = ""
    if_better: str = "Yes"
    if_worse: str = "No"
    if_equal: str = NOT_SHOWN
    settings: Callable[[Recipe], Mapping[str, Any]] = _unchanged
    against: str | None = FULL
    model_of: str | None = None
    hidden_prefixes: tuple[str, ...] = ()
    cut: int = 1
    only: str | None = None
    about: str | None = None


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


def _reweighed(recipe: Recipe, term: str, factor: float) -> Mapping[str, Mapping[str, float]]:
    """The weights of a recipe, those of one term times a factor wherever it takes part."""
    weights = {task: of[term] for task, of in merge_weights(recipe.weights).items() if of.get(term)}
    changed = {task: {**recipe.weights.get(task, {}), term: factor * weight} for task, weight in weights.items()}
    return {**recipe.weights, **changed}


def _without_term(term: str, what: str) -> Variant:
    """The weight of one term 0, whatever the recipe gives it."""
    users = [task for task in TASKS if term in TASKS[task].weights]
    return Variant(
        name=f"no_{term}",
        change=f"{what} ({', '.join(users)}) has weight 0; the other terms stay",
        question=f"Does {what} help?",
        family=LOSS,
        side=f"without {what}",
        other_side="with it",
        if_better="No",
        if_worse="Yes",
        about=users[0] if len(users) == 1 else None,
        settings=lambda recipe: {"weights": _reweighed(recipe, term, 0.0)},
    )


def _long_steps(batches: int, how_many: str, suffix: str = "") -> tuple[Variant, Variant]:
    """Steps of so many published batches, contrasted one by one, and as a whole."""
    rows = batches * PUBLISHED_BATCH
    one_by_one = Variant(
        name=f"in_batch{suffix}",
        change=f"{PUBLISHED_BATCH} rows contrasted at a time, as published, and {how_many} such batches a step",
        question="How far do the batches of the published run get: few negatives, long steps?",
        family=NEGATIVES,
        side="with few negatives and long steps",
        other_side="with the batches of the recipe",
        if_better="Further",
        if_worse="Less far",
        if_equal="As far, by what this shows",
        settings=_with(
            batch_size=PUBLISHED_BATCH, accumulation=batches, loss_mini_batch_size=0, loss_mini_batch_tokens=None
        ),
    )
    as_a_whole = Variant(
        name=f"grad_cache{suffix}",
        change=f"all rows of such a step contrasted as a whole, computed {PUBLISHED_BATCH} at a time (GradCache)",
        question="Do more negatives help, at the same rows a step?",
        family=NEGATIVES,
        side="with all rows of a step contrasted",
        other_side="with few at a time",
        settings=_with(
            batch_size=rows, accumulation=1, loss_mini_batch_size=PUBLISHED_BATCH, loss_mini_batch_tokens=None
        ),
        against=one_by_one.name,
    )
    return one_by_one, as_a_whole


def _published_triplet_weighed(recipe: Recipe) -> Mapping[str, Any]:
    """The published triplet term with gradients as large as those in units of cosine: only its margin is another.

    ``max(0, (n - p) / t + m)`` times ``t`` is ``max(0, n - p + m t)``.
    """
    return {"triplet_scale": "temperature", "weights": _reweighed(recipe, TRIPLET, recipe.temperature)}


def _without_prefix_of(task: str) -> Variant:
    return Variant(
        name=f"no_{task}_prefix",
        change=f"<{task}> is seen by the loss alone, in training and evaluation",
        question=f"Does the model need the prefix of {task}, if every other task keeps its own?",
        family=PREFIXES,
        side=f"without the prefix of {task}",
        other_side="with it",
        if_better="No",
        if_worse="Yes",
        about=task,
        settings=_with(hidden_prefixes=[task]),
    )


def _only(task: str) -> Variant:
    return Variant(
        name=f"only_{task}",
        change=f"a model for {task} alone, of as many rows of it as in full",
        question=f"Would {task} be better off with a model of its own?",
        family=ONE_TASK,
        side="with a model of its own",
        other_side="with one model for all tasks",
        only=task,
        about=task,
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
        family=LOSS,
        side="with InfoNCE alone",
        other_side="with the other terms",
        if_better="No",
        if_worse="Yes",
        settings=_with(weights={task: _no_other_terms(task) for task in ALL_TASKS}),
    ),
    *(_without_term(term, what) for term, what in _TERMS_BESIDE.items()),
    Variant(
        name="one_mix",
        change=f"all four terms with weight 1 and margin {ONE_MARGIN} for every task",
        question="Is it worth choosing terms by task, rather than one mix for all?",
        family=LOSS,
        side="with one mix for all",
        other_side="with terms by task",
        if_better="No",
        if_worse="Yes",
        settings=_with(
            weights={task: dict.fromkeys(TERMS, 1.0) for task in ALL_TASKS},
            margins=dict.fromkeys(ALL_TASKS, ONE_MARGIN),
        ),
    ),
    Variant(
        name="published_pair_weight",
        change="a scored pair counts in InfoNCE whatever its score",
        question="Does it help to weigh a pair by its score, rather than as published?",
        family=LOSS,
        side="as published",
        other_side="with pairs weighed by score",
        if_better="No",
        if_worse="Yes",
        settings=_with(pair_weight="uniform"),
    ),
    Variant(
        name="published_triplet",
        change="the triplet term takes similarities divided by the temperature",
        question="Do margins in units of cosine help, rather than as published?",
        family=LOSS,
        side="as published",
        other_side="in units of cosine",
        if_better="No",
        if_worse="Yes",
        settings=_with(triplet_scale="temperature"),
    ),
    Variant(
        name="published_triplet_weighed",
        change="the triplet term as published, its weight times the temperature",
        question="Is it by its weight that the published triplet term differs from ours, or by its margin?",
        family=LOSS,
        side="as published but weighed as ours",
        other_side="in units of cosine",
        if_better="By its margin too, which is better than ours",
        if_worse="By its margin too",
        if_equal="By its weight, as far as this shows",
        settings=_published_triplet_weighed,
    ),
    # Prefixes.
    Variant(
        name="no_prefix",
        change="prefixes are seen by the loss alone, in training and evaluation",
        question="Does the model need to see the task, or is it enough that the loss knows it?",
        family=PREFIXES,
        side="unseen by the model",
        other_side="with prefixes that it sees",
        if_better="It is enough that the loss knows it",
        if_worse="It needs to see it",
        if_equal="No need to see it is shown",
        settings=_with(hidden_prefixes=list(TASKS)),
    ),
    Variant(
        name="prefix_forgotten",
        change="the model of full, asked without prefixes",
        question="What does it cost to forget the prefix at inference?",
        family=PREFIXES,
        side="asked without prefixes",
        other_side="with them",
        if_better="Nothing",
        if_worse="It has a cost",
        if_equal=NOTHING_SHOWN,
        model_of=FULL,
        hidden_prefixes=tuple(TASKS),
    ),
    *(_without_prefix_of(task) for task in TASKS),
    # Pooling.
    Variant(
        name="last_token_pooling",
        change="the last token is the embedding",
        question="Is the mean over all tokens better than the last one?",
        family=POOLING,
        side="with the last token",
        other_side="with the mean of the tokens",
        if_better="No",
        if_worse="Yes",
        settings=_with(pooling="lasttoken"),
    ),
    Variant(
        name="attention_pooling",
        change="a learned query weighs the tokens",
        question="Is a plain mean of the tokens enough, or should the model learn which of them count?",
        family=POOLING,
        side="with weights that are learned",
        other_side="with a plain mean of the tokens",
        if_better="It should learn them",
        if_worse="A plain one is better",
        if_equal="A plain one is enough, as far as this shows",
        settings=_with(pooling=ATTENTION),
    ),
    Variant(
        name="weighted_mean_pooling",
        change="later tokens weigh more in the mean",
        question="Is a plain mean of the tokens enough, where a token sees only what stands before it?",
        family=POOLING,
        side="with later tokens weighing more",
        other_side="with a plain mean of the tokens",
        if_better="No",
        if_worse="Yes",
        if_equal="Yes, as far as this shows",
        settings=_with(pooling="weightedmean"),
    ),
    # One model for all tasks.
    *(_only(task) for task in TASKS),
    # Negatives.
    Variant(
        name="mixed_batches",
        change="a batch holds several tasks; negatives are of the same",
        question="Does it matter whether a batch holds one task or several?",
        family=NEGATIVES,
        side="with several tasks in a batch",
        other_side="with one",
        if_better="Yes, several are better",
        if_worse="Yes, one is better",
        if_equal="Not that it shows",
        settings=_with(mixed_batches=True),
    ),
    Variant(
        name="all_negatives",
        change="mixed batches, where the rows of every task are negatives",
        question="Should negatives be of the same task, or of all?",
        family=NEGATIVES,
        side="with negatives of all tasks",
        other_side="with those of the same",
        if_better="Of all",
        if_worse="Of the same",
        if_equal="Either, as far as this shows",
        settings=_with(mixed_batches=True, negatives="all"),
        against="mixed_batches",
    ),
    *_long_steps(32, "many"),
    *_long_steps(8, "only 8", "_192"),
    # Size.
    Variant(
        name="cut",
        change=f"the model of full, its embeddings cut to 1/{SHORTEST}",
        question="What does it cost to cut embeddings that were not trained for it?",
        family=SIZE,
        side="cut",
        other_side="whole",
        if_better="Nothing",
        if_worse="It has a cost",
        if_equal=NOTHING_SHOWN,
        model_of=FULL,
        cut=SHORTEST,
    ),
    Variant(
        name="matryoshka",
        change=f"trained at whole, half, quarter and 1/{SHORTEST} of its size (Matryoshka)",
        question="What do whole embeddings lose if shorter ones are trained beside them?",
        family=SIZE,
        side="with shorter ones trained beside them",
        other_side="without",
        if_better="Nothing, they gain",
        if_worse="They lose",
        if_equal=NOTHING_SHOWN,
        settings=_halves,
    ),
    Variant(
        name="matryoshka_cut",
        change=f"the model of matryoshka, its embeddings cut to 1/{SHORTEST}",
        question="Does Matryoshka training help embeddings that are cut?",
        family=SIZE,
        side="with Matryoshka training",
        other_side="without",
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

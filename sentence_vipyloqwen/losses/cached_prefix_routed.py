"""The prefix-routed loss by gradient caching: contrast among all rows of a batch, memory of one mini-batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from torch import Tensor, nn

from sentence_vipyloqwen.losses.prefix_routed import PrefixRoutedLoss
from sentence_vipyloqwen.losses.ranks import missing_forwards
from sentence_vipyloqwen.losses.rows import BatchRows, select_rows
from sentence_vipyloqwen.losses.terms import LossTerms
from sentence_vipyloqwen.modules.batching import PATCHES_PER_TOKEN, Load, PlannedImage, PlannedRow, plan_batches
from sentence_vipyloqwen.modules.closed_images import CLOSED_IMAGES, ROW_INDEX, ImageName, OpenedOnce
from sentence_vipyloqwen.modules.encoding import prepared_ahead, prepared_in_turn
from sentence_vipyloqwen.modules.qwen2_vl import Qwen2VLTransformer

MINI_BATCH_SIZE = 32


class CachedPrefixRoutedLoss(PrefixRoutedLoss):
    """:class:`PrefixRoutedLoss` by Sentence Transformers' GradCache: same loss, same gradients, less memory.

    1. Embed every mini-batch without gradients.
    2. Compute the loss among all rows, and its gradients with respect to the embeddings.
    3. In the backward pass, embed every mini-batch again, with gradients, and hand it those of its embeddings.

    It costs a forward pass more. Tasks, content keys and scores are read off the whole batch, once. Which rows form a
    mini-batch is free, so the longest run first, and rows that share images run together, where these are computed
    once; only a group that exceeds a mini-batch is split.

    Images that :attr:`Qwen2VLTransformer.lazy_images` left closed are opened and cut once a step, on an accelerator by
    a thread that opens those of the next mini-batch while the model runs one. Their bytes wait in a temporary file for
    the backward pass, so that memory holds those of two mini-batches. With a vision cache, which keeps what the tower
    made of them, the model opens those alone that it lacks.

    Args:
        model: The model to train.
        mini_batch_size: Most rows of a column that run at once; without effect beside ``mini_batch_num_tokens``.
        mini_batch_num_tokens: Most tokens that run at once, image tokens included, those of a shared image once; a row
            that exceeds it runs by itself.
        gather_across_devices: See :class:`PrefixRoutedLoss`.
        **options: All further arguments of :class:`PrefixRoutedLoss`.

    Under several ranks, each runs as many mini-batches as the one with the most, for what it lacks with a row whose
    gradient is 0.

    Raises:
        ValueError: If a mini-batch's bound is not a whole number of at least 1, or as :class:`PrefixRoutedLoss` says.

    Reference: Gao et al. 2021, https://arxiv.org/abs/2101.06983.

    Example::

        loss = CachedPrefixRoutedLoss(model, mini_batch_num_tokens=8192, gather_across_devices=True)
        trainer = SentenceTransformerTrainer(model, train_dataset=load_tasks("train.jsonl"), loss=loss)
    """

    uses_gradient_cache = True  # by this MatryoshkaLoss knows that it is to decorate `calculate_loss`

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        mini_batch_size: int = MINI_BATCH_SIZE,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, gather_across_devices=gather_across_devices, **options)
        self.mini_batch_size = _at_least_one("mini_batch_size", mini_batch_size)
        self.mini_batch_num_tokens = _at_least_one("mini_batch_num_tokens", mini_batch_num_tokens)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> LossTerms:
        """Embed every column by mini-batches and route its rows.

        Returns:
            Term name -> its share of the batch loss; the same names at every step. Their sum is the loss, and their sum
            alone bears gradients: the backward pass of one term would be that of all.
        """
        columns = list(sentence_features)
        rows = self.read_rows_together(columns, labels)
        columns = [self.shown(features) for features in columns]
        planned = [_Column(features, self._plan(features)) for features in columns]
        missing = missing_forwards(sum(len(column.mini_batches) for column in planned), rows.tasks.device)
        idle = [_Column(columns[1], [[0]] * missing)] if missing else []
        return _Pass(self, planned, idle).run(rows)

    def _plan(self, features: Mapping[str, Tensor]) -> list[list[int]]:
        most_rows = sys.maxsize if self.mini_batch_num_tokens else self.mini_batch_size
        budget = Load(most_rows, self.mini_batch_num_tokens or sys.maxsize, patches=sys.maxsize)
        return plan_batches(dict(enumerate(_planned_rows(features))), budget)

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: _Batch, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of all rows from the embeddings of their mini-batches; ``MatryoshkaLoss`` decorates this.

        Args:
            reps: For each column, the (b, D) embeddings of each of its mini-batches.
            labels: What is known of the rows.
            with_backward: Whether to compute the gradients of ``reps``, and return the loss without a graph.

        Returns:
            (K,) the terms in the order of :attr:`term_names`; their sum is the loss. A modifier weighs and adds them.
        """
        embedded = [torch.cat(list(mini_batches)) for mini_batches in reps]
        columns, idle = embedded[: len(labels.places)], embedded[len(labels.places) :]
        embeddings = [column[places] for column, places in zip(columns, labels.places, strict=True)]
        terms = self.compute_loss_from_embeddings(embeddings, labels.rows).with_idle(idle)
        values = torch.stack(list(terms.values()))
        if with_backward:
            values.sum().backward()
            return values.detach()
        return values

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {**super().get_config_dict(), **sizes}

    @property
    def citation(self) -> str:
        """BibTeX of the objective and of gradient caching, for the model card."""
        return f"""{super().citation}
@misc{{gao2021scaling,
      title={{Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup}},
      author={{Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan}},
      year={{2021}},
      eprint={{2101.06983}},
      archivePrefix={{arXiv}},
      primaryClass={{cs.LG}}
}}
"""


@dataclass(frozen=True)
class _Column:
    features: Mapping[str, Any]
    mini_batches: Sequence[Sequence[int]]

    @property
    def places(self) -> Tensor:
        """(B,) where each row stands when the mini-batches lie one behind the other."""
        order = [row for mini_batch in self.mini_batches for row in mini_batch]
        return torch.tensor(order, device=self.features["input_ids"].device).argsort()


@dataclass(frozen=True)
class _Batch:
    """What :meth:`CachedPrefixRoutedLoss.calculate_loss` is told beside the embeddings."""

    rows: BatchRows
    places: Sequence[Tensor]


class _Pass(CachedLossMixin):
    """One batch on its way through GradCache.

    To the machinery, a column's rows are our mini-batches, and it embeds them one by one; so it is ours to say which
    rows run together.
    """

    mini_batch_size = 1

    def __init__(self, loss: CachedPrefixRoutedLoss, columns: Sequence[_Column], idle: Sequence[_Column]) -> None:
        self.loss, self.model = loss, loss.model
        self.columns, self.idle = columns, idle
        self.images = _closed_images(loss.model, columns)

    def run(self, rows: BatchRows) -> LossTerms:
        batch = _Batch(rows, [column.places for column in self.columns])
        columns = [
            {"column": column, "mini_batches": torch.arange(len(column.mini_batches))}
            for column in (*self.columns, *self.idle)
        ]
        loss = self.forward_cached(columns, batch)
        terms = LossTerms(zip(self.loss.term_names, self.values.detach(), strict=True))
        bearer = self.loss.term_names[0]
        return LossTerms({**terms, bearer: terms[bearer] + (loss - loss.detach())})

    def calculate_loss(self, reps: list[list[Tensor]], labels: _Batch, *, with_backward: bool = False) -> Tensor:
        self.values = self.loss.calculate_loss(reps, labels, with_backward=with_backward)
        return self.values.sum()

    def embed_minibatch_iter(
        self, sentence_feature: dict[str, Any], *, ranges: Sequence[tuple[int, int]], **options: Any
    ) -> Iterator[tuple[Tensor, RandContext | None]]:
        column: _Column = sentence_feature["column"]
        with closing(self._parts(column, [column.mini_batches[begin] for begin, _ in ranges])) as parts:
            yield from super().embed_minibatch_iter({**sentence_feature, "parts": parts}, ranges=ranges, **options)

    def _parts(self, column: _Column, mini_batches: Iterable[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """The features of each mini-batch, with the images of its rows, as far as it is ours to open them."""
        if self.images is None or CLOSED_IMAGES not in column.features:
            yield from (select_rows(column.features, rows) for rows in mini_batches)
            return
        images, closed = self.images, column.features[CLOSED_IMAGES]
        prepared = prepared_ahead if runs_beside(column.features["input_ids"].device) else prepared_in_turn
        places = column.features[ROW_INDEX].cpu()

        def patches(rows: Sequence[int]) -> dict[ImageName, Tensor]:
            return images.patches(closed.at(places[list(rows)]))

        def features(pair: tuple[Sequence[int], Future[dict[ImageName, Tensor]]]) -> dict[str, Any]:
            rows, opened = pair
            return {**select_rows(column.features, rows), CLOSED_IMAGES: replace(closed, opened=opened.result())}

        with closing(prepared(patches, mini_batches)) as pairs:
            yield from map(features, pairs)  # a loop would hold one mini-batch's patches while the next are opened

    def embed_minibatch(
        self,
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        features = next(sentence_feature["parts"])
        rows = len(features["input_ids"])
        return super().embed_minibatch(features, 0, rows, with_grad, copy_random_state, random_state)


def runs_beside(device: torch.device) -> bool:
    """Whether a model on this device leaves the processor's cores to a thread that opens images."""
    return device.type != "cpu"


def _closed_images(model: nn.Module, columns: Iterable[_Column]) -> OpenedOnce | None:
    """What opens a step's closed images once; ``None`` without any, or where a vision cache says which to open."""
    if not any(CLOSED_IMAGES in column.features for column in columns):
        return None
    transformer = next(module for module in model.modules() if isinstance(module, Qwen2VLTransformer))
    return OpenedOnce(transformer.cut_closed) if transformer.vision_cache is None else None


def _planned_rows(features: Mapping[str, Any]) -> list[PlannedRow]:
    lengths = features["attention_mask"].sum(dim=1).tolist()
    known = features["image_keys"].tolist() if "image_keys" in features else None
    rows = []
    for row, (length, patches) in enumerate(zip(lengths, _patches(features), strict=True)):
        names = known[row] if known else [f"{row}/{place}" for place in range(len(patches))]  # unknown: like no other
        images = tuple(
            PlannedImage(str(name), size // PATCHES_PER_TOKEN + 2, size)
            for name, size in zip(names, patches, strict=False)  # a row's keys are padded
        )
        rows.append(PlannedRow(images, length - sum(image.tokens for image in images)))
    return rows


def _patches(features: Mapping[str, Any]) -> list[list[int]]:
    """For each row the patches of each of its images."""
    if CLOSED_IMAGES in features:
        return [[high * wide for high, wide in row.grids] for row in features[CLOSED_IMAGES].at(features[ROW_INDEX])]
    if "image_grid_thw" not in features:
        return [[] for _ in features["input_ids"]]
    sizes = features["image_grid_thw"].prod(dim=1)
    return [of_row.tolist() for of_row in sizes.split(features["num_images_per_sample"].tolist())]


def _at_least_one(name: str, value: int | None) -> Any:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} is {value!r}; allowed is a whole number of at least 1.")
    return value

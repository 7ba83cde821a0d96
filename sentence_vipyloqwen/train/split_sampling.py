"""How the rows of one split are dealt into batches: shuffled, by image if asked, without equal content if asked.

All chance comes from the seed and the number of the cycle, so that any batch of any cycle can be drawn again; and all
that is kept of a row is a few bytes, read from the Arrow columns in parts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler

logger = logging.getLogger(__name__)

_ROWS_READ = 100_000
_WAITING = 16
"""How many batches' rows may wait for a batch that does not hold their content yet."""


def grouped_batch_sampler(group_images: int = 0, no_duplicates: bool = False) -> Callable[..., SplitBatchSampler]:
    """How the rows of a split are dealt into batches: for ``batch_sampler``. By default, at random.

    Args:
        group_images: Rows whose anchors begin with the same image are drawn in runs of up to this many, so that the
            packed runtime computes the image once for all of them. Where a run meets the end of a batch, it goes on in
            the next. 0 and 1 draw every row by itself.
        no_duplicates: Let no content (images and text of an input, as written) stand in two rows of a batch. A row that
            finds no such batch is left out of the cycle. Off by default, as it caps a batch at the number of distinct
            answers, and the loss masks equal answers anyway.

    Returns:
        What makes the sampler once the trainer has the data; it can be pickled.

    Raises:
        ValueError: If `group_images` is below 0.
    """
    if group_images < 0:
        raise ValueError(f"group_images is {group_images!r}; allowed: 0 or above")
    return partial(SplitBatchSampler, group_images=group_images, no_duplicates=no_duplicates)


class SplitBatchSampler(DefaultBatchSampler):
    """Deals the rows of one split into batches, each row once a cycle; see `grouped_batch_sampler`.

    The order of a cycle follows from seed, number of rows and number of the cycle. It takes 4 bytes a row while it is
    read; groups take 8 bytes a row more, no duplicates 8 a row and column, for as long as the sampler lives.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = 0,
        *,
        group_images: int = 0,
        no_duplicates: bool = False,
    ) -> None:
        """Keep the split; nothing is read from it yet.

        Args:
            dataset: The split. A side is a text, or a struct of ``image``, a list of paths, and ``text``.
            batch_size: Rows of a batch.
            drop_last: Whether to leave out the rows of a cycle that fill no batch.
            valid_label_columns: Columns that are labels, not inputs.
            generator: Not used.
            seed: Of the order; 0 for ``None``.
            group_images: See `grouped_batch_sampler`, as for `no_duplicates`.
            no_duplicates: Whether content stands in a batch once.

        Raises:
            ValueError: If a column that is to be looked at is neither.
        """
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed or 0)
        self.dataset = dataset
        self.group_images = group_images
        self.no_duplicates = no_duplicates
        labels = {*(valid_label_columns or ()), "dataset_name"}
        self._inputs = [name for name in dataset.column_names if name not in labels]
        for name in self._inputs if no_duplicates else self._inputs[:1] if group_images > 1 else ():
            _check_side(name, dataset.features.arrow_schema.field(name).type)

    def __len__(self) -> int:
        """Batches of a cycle, exactly."""
        return len(self.dataset) // self.batch_size if self.drop_last else -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the cycle that `set_epoch` named."""
        return self.cycle(self.epoch)

    def cycle(self, cycle: int, start: int = 0) -> Iterator[list[int]]:
        """Yield the batches of a cycle, ``len(self)`` of them less those before `start`.

        Args:
            cycle: Its number, from 0.
            start: The first batch that is wanted.

        Raises:
            ValueError: Under `no_duplicates`, if the rows are too much alike to fill a batch.
        """
        if self.no_duplicates:
            yield from islice(self._distinct(cycle), start, len(self))
            return
        order = self._order(cycle)
        for batch in range(start, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def _order(self, cycle: int, attempt: int = 0) -> np.ndarray:
        """(rows,) int32 or int64: the rows in the order of a cycle."""
        rows = len(self.dataset)
        rng = np.random.default_rng([self.seed, rows, cycle, attempt])
        if self.group_images > 1:
            return _in_runs(*self._groups, self.group_images, rng)
        order = np.arange(rows, dtype=_index_type(rows))
        rng.shuffle(order)
        return order

    @cached_property
    def _groups(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) the rows, those of one image behind each other, and (groups,) how many each group has."""
        return _group(first_images(self.dataset, self._inputs[0]))

    @cached_property
    def _contents(self) -> np.ndarray:
        """(rows, columns) uint64: what each input goes by."""
        return np.stack([contents(self.dataset, name) for name in self._inputs], axis=1)

    def _distinct(self, cycle: int) -> Iterator[list[int]]:
        """The batches of a cycle, content once in each.

        What is short of ``len(self)`` at the end is drawn from a new order, as Sentence Transformers' sampler does.
        """
        missing, orders = len(self), 0
        while missing:
            before = missing
            for batch in islice(self._distinct_once(self._order(cycle, orders)), missing):
                if len(batch) < self.batch_size and (self.drop_last or missing > 1):
                    break
                yield batch
                missing -= 1
            if missing == before:
                self._refuse()
            orders += 1
            if missing and (cycle, orders) == (0, 1):  # it will be so in every cycle: once is enough
                logger.warning("no_duplicates: a split has rows too much alike; every cycle leaves some of them out.")

    def _distinct_once(self, order: np.ndarray) -> Iterator[list[int]]:
        """Batches from one order, as far as it goes; a row whose content is there already waits for the next."""
        rows = (row for start in range(0, len(order), _ROWS_READ) for row in order[start : start + _ROWS_READ].tolist())
        contents_of, waiting = self._contents, deque[int]()
        most = _WAITING * self.batch_size
        while True:
            batch: list[int] = []
            seen: set[int] = set()
            again: list[int] = []
            while len(batch) < self.batch_size and (row := waiting.popleft() if waiting else next(rows, -1)) >= 0:
                content = contents_of[row].tolist()
                if seen.isdisjoint(content):
                    batch.append(row)
                    seen.update(content)
                else:
                    again.append(row)
                    if len(again) > 2 * most:
                        self._refuse()
            if not batch:
                return
            yield batch
            waiting.extendleft(reversed(again))
            while len(waiting) > most:
                waiting.popleft()  # the oldest: what most rows have in common

    def _refuse(self) -> None:
        raise ValueError(
            f"no_duplicates: the {len(self.dataset)} rows of a split are too much alike to fill a batch of "
            f"{self.batch_size}; allowed: a smaller batch, or leave it off: the loss masks equal answers"
        )


def _index_type(rows: int) -> type[np.signedinteger]:
    return np.int32 if rows <= np.iinfo(np.int32).max else np.int64


def _group(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) the rows ordered by image, those without one last, and (groups,) the sizes of the groups."""
    alone = np.flatnonzero(images == 0).astype(_index_type(len(images)))
    shared = np.flatnonzero(images).astype(alone.dtype)
    shared = shared[np.argsort(images[shared], kind="stable")]
    starts = np.flatnonzero(np.diff(images[shared], prepend=np.uint64(0)))
    sizes = np.diff(starts, append=len(shared))
    return np.concatenate([shared, alone]), np.concatenate([sizes, np.ones(len(alone))]).astype(alone.dtype)


def _in_runs(rows: np.ndarray, sizes: np.ndarray, longest: int, rng: np.random.Generator) -> np.ndarray:
    """(rows,) the rows of groups, in runs of up to `longest` rows of one group.

    1. Shuffle the rows of each group.
    2. Cut the groups into runs.
    3. Shuffle the runs.
    """
    group = np.repeat(np.arange(len(sizes), dtype=np.float64), sizes)
    group += rng.random(len(rows))
    rows = rows[np.argsort(group, kind="stable")]  # 1
    del group
    runs = -(-sizes // longest)  # 2
    lengths = np.full(runs.sum(), longest, dtype=rows.dtype)
    lengths[np.cumsum(runs) - 1] = sizes - longest * (runs - 1)
    starts = (np.cumsum(lengths) - lengths).astype(rows.dtype)
    order = rng.permutation(len(lengths))  # 3
    starts, lengths = starts[order], lengths[order]
    places = np.repeat(starts - (np.cumsum(lengths) - lengths).astype(rows.dtype), lengths)
    places += np.arange(len(rows), dtype=rows.dtype)
    return rows[places]


# --- Reading columns ---


def has_images(split: Dataset) -> bool:
    """Whether any row of a split has an image in any column; it reads until it finds one."""
    sides = [field.name for field in split.features.arrow_schema if _is_side(field.type)]
    return any(len(paths) for name in sides for _, paths, _ in _read(split, name))


def first_images(split: Dataset, column: str) -> np.ndarray:
    """What the first image of each row goes by.

    Args:
        split: A dataset.
        column: A column of texts, or of structs of ``image`` and ``text``.

    Returns:
        (rows,) uint64, a hash of its path or data URI; 0 without an image.
    """
    found = np.zeros(len(split), dtype=np.uint64)
    place = 0
    for offsets, paths, _ in _read(split, column):
        rows = np.flatnonzero(np.diff(offsets))
        first = paths.take(pa.array(offsets[rows])).to_pylist()
        found[place + rows] = [xxhash.xxh3_64_intdigest(path) for path in first]
        place += len(offsets) - 1
    return found


def contents(split: Dataset, column: str) -> np.ndarray:
    """What the images and the text of each row go by.

    Args:
        split: A dataset.
        column: A column of texts, or of structs of ``image`` and ``text``.

    Returns:
        (rows,) uint64, a hash of them all, the same for a text and a struct of that text alone.
    """
    found = np.zeros(len(split), dtype=np.uint64)
    place = 0
    for offsets, paths, texts in _read(split, column):
        images, bounds = paths.to_pylist(), offsets.tolist()
        for row, text in enumerate(texts.to_pylist()):
            parts = [*images[bounds[row] : bounds[row + 1]], text or b""]
            found[place + row] = xxhash.xxh3_64_intdigest(b"\0".join(parts))
        place += len(texts)
    return found


def _read(split: Dataset, column: str) -> Iterator[tuple[np.ndarray, pa.Array, pa.Array]]:
    """A column in parts: (n + 1,) where each row's images begin, the images of all rows, the (n,) texts; in UTF-8."""
    table = split.with_format("arrow").select_columns([column])
    for part in table.iter(batch_size=_ROWS_READ):
        for chunk in part.column(0).chunks:
            if not pa.types.is_struct(chunk.type):
                yield np.zeros(len(chunk) + 1, dtype=np.int64), pa.array([], pa.binary()), chunk.cast(pa.binary())
                continue
            images = chunk.field("image")
            counts = pc.fill_null(pc.list_value_length(images), 0).to_numpy(zero_copy_only=False)
            yield (
                np.concatenate([[0], np.cumsum(counts)]),
                images.flatten().cast(pa.binary()),
                chunk.field("text").cast(pa.binary()),
            )


def _is_side(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"image", "text"}:
        return False
    images, text = kind.field("image").type, kind.field("text").type
    paths = images.value_type if pa.types.is_list(images) else images
    return pa.types.is_list(images) and paths in (pa.string(), pa.null()) and text == pa.string()


def _check_side(column: str, kind: pa.DataType) -> None:
    if not pa.types.is_string(kind) and not _is_side(kind):
        raise ValueError(f"column {column}: got {kind}; allowed: texts, or structs of image (a list of paths) and text")

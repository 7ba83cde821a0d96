"""Hard negatives: what a model takes for close to an anchor and is not its answer, written into the records.

A row's candidates are the distinct positives of its task (or of all tasks), by content: texts, and images by the bytes
of their files, so that two paths of one picture are one candidate.

1. **Read** the file: check every line, note where it begins and the keys of its anchor and its positive.
2. **Embed** each distinct content once. Vectors go to a cache on disk as they come, under the model's fingerprint and
   the content's key, so a killed job goes on where it stopped, and the next run of the same model begins with them.
3. **Search** the candidates nearest to each anchor by cosine: exactly, with FAISS, a chunk of rows by a block of
   candidates at a time.
4. **Choose** among them. What belongs to the row is left out: its anchor's own content, every positive of any row with
   an equal anchor, and every positive of any row whose anchor equals its positive (the rule of `PrefixRoutedLoss`). The
   others are ranked from 0, and a negative must

   - have a rank from ``skip_top`` to ``top - 1``, and
   - lie below the row's own positive by the margin: a candidate nearly as close as the positive, or closer, is often a
     second right answer that nobody wrote down.

   Of those the nearest are taken, or, with ``sample``, random ones.
5. **Write** the rows, in their order, with all their fields. A row that finds fewer than it should, or has negatives
   already, is written as it is. (It gets all or none, as `load_tasks` makes a split of each number of negatives.)

Rows with a score (``text_pair``) neither get negatives nor lend their positives. A score is a graded judgement: it says
how far apart two texts are, and no such judgement exists for a pair that mining puts together.

Memory, beside the model, grows by about 0.15 GB for each million rows: 26 bytes a row are kept, 4 a negative, and
16 for each content in the cache; the rest is for the sorting of keys. Texts, images and vectors are never all held. To
it comes what a chunk of the search takes, less than 1 GB at 1024 dimensions whatever the number of rows. On disk, 2 GB
for each million distinct contents of 1024 dimensions. The search multiplies every anchor with every candidate of its
pool: 2 * anchors * candidates * dimensions operations, on the CPU.

The default of the margin is NV-Retriever's (Moreira et al. 2024, https://arxiv.org/abs/2407.15831). Margins mean what
they mean to `sentence_transformers.util.mine_hard_negatives`; ``skip_top`` and ``top`` are its ``range_min`` and
``range_max``, here ranks among all that does not belong to the row, whether the margin allows it or not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import config as datasets_config
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.tasks import split_prefix
from sentence_vipyloqwen.train.hard_negatives import (
    Belongings,
    Bools,
    Floats,
    Ints,
    Keys,
    MiningOptions,
    choose,
    highest_cosines,
    nearest,
)
from sentence_vipyloqwen.train.record_file import (
    KEPT,
    OPEN,
    SCORED,
    TASK_NAMES,
    RecordFile,
    Rows,
    forget_images,
    read_rows,
    write_negatives,
)
from sentence_vipyloqwen.train.record_lines import StrPath
from sentence_vipyloqwen.train.records import Side
from sentence_vipyloqwen.train.vector_cache import VectorCache

CONTENTS_PER_CALL = 1024
"""How many contents are embedded between two writes to the cache: what a kill costs at most."""

ENTRIES_PER_CHUNK = 1 << 21
"""Rows searched together, times the candidates looked at for each."""

BLOCK_BYTES = 1 << 28
"""Candidates' vectors in memory at a time, as float32."""

_ANCHOR_SALT = np.uint64(0xBF58476D1CE4E5B9)
_RETRIEVAL_PROMPTS = ("query", "document", "passage", "corpus")
"""Names under which `encode_query` and `encode_document` look for a prompt."""


@dataclass(frozen=True)
class TaskMining:
    """What became of one task's rows.

    Attributes:
        rows: All of them.
        mined: Got negatives.
        too_few: Found fewer than they should, and were written as they were.
        kept: Had negatives, and were written as they were.
        scored: Bear a score, and were written as they were.
        positive_mean: Mean cosine of anchor and positive over the mined rows; NaN where there are none.
        negative_mean: Mean cosine of anchor and negatives over the mined rows; NaN where there are none.
    """

    rows: int
    mined: int
    too_few: int
    kept: int
    scored: int
    positive_mean: float
    negative_mean: float


@dataclass(frozen=True)
class MiningReport:
    """What `mine_negatives` did.

    Attributes:
        tasks: Task name -> what became of its rows, in the order of the task table.
        embedded: How many contents were embedded.
        reused: How many contents came from the cache.
        cache: The folder of the model's embeddings; it may be deleted.
        cache_bytes: Its size.
    """

    tasks: dict[str, TaskMining]
    embedded: int
    reused: int
    cache: str
    cache_bytes: int

    @property
    def mined(self) -> int:
        """Rows that got negatives."""
        return sum(task.mined for task in self.tasks.values())

    @property
    def too_few(self) -> int:
        """Rows that found fewer negatives than they should."""
        return sum(task.too_few for task in self.tasks.values())

    def table(self) -> Table:
        """A table for the screen, a row for each task; the last two columns are mean cosines to the anchor."""
        table = Table("task", title=f"{self.mined} rows mined")
        for title in ("rows", "mined", "too few", "kept", "scored", "positives", "negatives"):
            table.add_column(title, justify="right")
        for name, task in self.tasks.items():
            counts = (task.rows, task.mined, task.too_few, task.kept, task.scored)
            means = (task.positive_mean, task.negative_mean)
            table.add_row(name, *map(str, counts), *(f"{mean:.3f}" if task.mined else "" for mean in means))
        return table


def mine_negatives(
    model: SentenceTransformer,
    records: StrPath,
    output: StrPath,
    options: MiningOptions | None = None,
    *,
    batch_size: int = 64,
    cache_dir: StrPath | None = None,
    show_progress_bar: bool = False,
) -> MiningReport:
    """Write hard negatives into a file of records; see the module for what is done, and what it takes.

    The output appears when all of it is written. Image paths in it are relative to its own folder; absolute ones, data
    URIs and every other field are as they were.

    Args:
        model: A `ViPyloQwen`, or any `SentenceTransformer`. The prefix is left out for a model that has no such prompt;
            a model with prompts for queries and documents gets anchors and candidates through `encode_query` and
            `encode_document`.
        records: A JSONL file of records (see `sentence_vipyloqwen.train.records`).
        output: The JSONL file to write: another one than `records`. It may exist.
        options: Which candidates become negatives.
        batch_size: Passed to `model.encode`.
        cache_dir: Where embeddings are kept; ``vipyloqwen/embeddings`` in the cache of `datasets` if not given.
        show_progress_bar: Show the progress of each step on standard error.

    Returns:
        What became of the rows, by task.

    Raises:
        RecordError: At the first line that is not a record, names an image that cannot be read, or has an image where
            the model takes none; before anything is embedded.
        ValueError: If there is no record, the file changes meanwhile, the output is the file itself or a folder, or an
            embedding is not finite or all zeros.

    Example::

        mine_negatives(ViPyloQwen("model"), "train.jsonl", "mined.jsonl", MiningOptions(negatives=2))
        load_tasks("mined.jsonl")  # splits such as "ocr.negatives_2"
    """
    options = options or MiningOptions()
    _check_output(records, output)
    forget_images()
    embedder = _Embedder(model, batch_size)
    parent = Path(cache_dir or Path(datasets_config.HF_DATASETS_CACHE, "vipyloqwen", "embeddings")).expanduser()
    bars = Progress(console=Console(stderr=True), disable=not show_progress_bar)
    with closing(RecordFile(records)) as file, bars as progress:
        rows = read_rows(file, progress, replace=options.replace, takes_images=embedder.takes_images)  # 1
        cache = VectorCache.of(model, parent)
        embedded, reused = _embed(file, rows, options.all_tasks, embedder, cache, progress)  # 2
        search = _Search(rows, options, embedder, cache)
        search.run(progress)  # 3, 4
        write_negatives(file, rows, search.chosen, output, progress)  # 5
    return MiningReport(search.results(), embedded, reused, str(cache.folder), cache.bytes_on_disk)


def _check_output(records: StrPath, output: StrPath) -> None:
    if os.path.realpath(output) == os.path.realpath(records):
        raise ValueError(f"output: got {os.fspath(output)}, the file that is read; allowed is another one.")
    if os.path.isdir(output):
        raise ValueError(f"output: got the folder {os.fspath(output)}; allowed is a file.")
    Path(output).parent.mkdir(parents=True, exist_ok=True)  # what forbids it shows now, not after hours of embedding


# --- 2. Embedding ---------------------------------------------------------------------------------------------------


class _Embedder:
    """A model, and how it takes the sides of records."""

    def __init__(self, model: SentenceTransformer, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.takes_images = model.supports("image")
        self.tells_queries = any(model.prompts.get(name) for name in _RETRIEVAL_PROMPTS)

    def anchor_keys(self, keys: Keys) -> Keys:
        """The keys of anchors' vectors: where the model tells queries from documents, not those of candidates."""
        return keys ^ _ANCHOR_SALT if self.tells_queries else keys

    def __call__(self, sides: Sequence[Side], are_anchors: Bools) -> Floats:
        """Unit vectors, (sides, dim)."""
        if not self.tells_queries:
            return self._encode(self.model.encode, sides)
        vectors = np.empty((len(sides), self.model.get_embedding_dimension()), np.float32)
        for encode, which in ((self.model.encode_query, are_anchors), (self.model.encode_document, ~are_anchors)):
            if which.any():
                vectors[which] = self._encode(encode, [sides[place] for place in np.flatnonzero(which)])
        return vectors

    def _encode(self, encode: Callable[..., Any], sides: Sequence[Side]) -> Floats:
        vectors = encode(
            [self._input(side) for side in sides],
            batch_size=self.batch_size,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        norms = np.linalg.norm(vectors.astype(np.float32), axis=1)
        if (bad := ~(np.isfinite(norms) & (norms > 0))).any():
            side = sides[int(bad.argmax())].as_input()
            raise ValueError(f"the model's embedding of {side!r:.200} is not finite or all zeros; allowed: numbers")
        return vectors

    def _input(self, side: Side) -> dict[str, Any] | str:
        task, rest = split_prefix(side.text)
        if task.token and self.model.prompts.get(task.name) != task.prompt:  # to this model it is mere text
            side = Side(rest.lstrip(), side.images)
        return side.as_input() if self.takes_images else side.text  # a model of text alone may refuse a dict


def _embed(
    file: RecordFile, rows: Rows, all_tasks: bool, embedder: _Embedder, cache: VectorCache, progress: Progress
) -> tuple[int, int]:
    """Bring every vector that the search needs into the cache; how many were embedded, and how many were there."""
    keys, sides = _contents(rows, all_tasks, embedder)
    with cache.writing():
        missing = np.flatnonzero(cache.find(keys) < 0)
        missing = missing[sides[missing].argsort()]  # as in the file, where rows that share an image stand together
        bar = progress.add_task("Embedding", total=len(missing))
        for start in range(0, len(missing), CONTENTS_PER_CALL):
            chunk = missing[start : start + CONTENTS_PER_CALL]
            vectors = embedder([_side_at(file, rows, number) for number in sides[chunk]], sides[chunk] % 2 == 0)
            file.check_unchanged()  # or a vector might stand under the key of another content
            cache.append(keys[chunk], vectors)
            progress.advance(bar, len(chunk))
    return len(missing), len(keys) - len(missing)


def _contents(rows: Rows, all_tasks: bool, embedder: _Embedder) -> tuple[Keys, Ints]:
    """The distinct contents to embed: the key of each, and where it stands first.

    Where: 2 * row for the row's anchor, 2 * row + 1 for its positive.
    """
    keys, sides = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for open_rows, members in rows.pools(all_tasks):
        keys += [embedder.anchor_keys(rows.anchors[open_rows]), rows.positives[members]]
        sides += [2 * open_rows, 2 * members + 1]
    distinct, first = np.unique(np.concatenate(keys), return_index=True)
    return distinct, np.concatenate(sides)[first]


def _side_at(file: RecordFile, rows: Rows, number: int) -> Side:
    record = file.record_at(rows.offsets[number // 2])
    return record.positive if number % 2 else record.anchor


# --- 3, 4. Searching and choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """C distinct candidates, an entry of each array (C,).

    Attributes:
        rows: The first row that it is the positive of.
        keys: Its content key.
        vectors: The number of its vector in the cache.
    """

    rows: Ints
    keys: Keys
    vectors: Ints


class _Search:
    """The search for R rows' negatives.

    Attributes:
        chosen: (R, negatives) int32, the rows whose positives are a row's negatives; -1 where it has none.
        cosine_sums: (2, tasks) sums, over the mined rows, of the positive's cosine and of the negatives' mean cosine.
    """

    def __init__(self, rows: Rows, options: MiningOptions, embedder: _Embedder, cache: VectorCache) -> None:
        self.rows, self.options, self.embedder, self.cache = rows, options, embedder, cache
        self.chosen: NDArray[np.int32] = np.full((len(rows), options.negatives), -1, np.int32)
        self.cosine_sums = np.zeros((2, len(TASK_NAMES)))

    def run(self, progress: Progress) -> None:
        """Fill `chosen`, pool by pool."""
        rows, belongings = self.rows, Belongings(self.rows.anchors, self.rows.positives)
        bar = progress.add_task("Searching", total=int((rows.states == OPEN).sum()))
        for open_rows, members in rows.pools(self.options.all_tasks):
            pool = self._pool(members)
            own = 1 + belongings.count(rows.anchors[open_rows]) + belongings.count(rows.positives[open_rows])
            for chunk, depth in _chunks(open_rows, np.minimum(self.options.top + own, len(pool.rows))):
                self._search(chunk, depth, pool, belongings)
                progress.advance(bar, len(chunk))

    def results(self) -> dict[str, TaskMining]:
        """What became of the rows of each task."""
        return {TASK_NAMES[place]: self._result(place) for place in np.unique(self.rows.tasks)}

    def _pool(self, members: Ints) -> _Pool:
        _, first = np.unique(self.rows.positives[members], return_index=True)
        first.sort()  # in the order of the file, which is about that of the vectors on disk
        keys = self.rows.positives[members[first]]
        return _Pool(members[first], keys, self.cache.find(keys))

    def _search(self, chunk: Ints, depth: int, pool: _Pool, belongings: Belongings) -> None:
        """Choose the negatives of some rows from the `depth` candidates nearest to each."""
        anchors, positives = self.rows.anchors[chunk], self.rows.positives[chunk]
        distinct, place = np.unique(anchors, return_inverse=True)
        queries = self._vectors(self.embedder.anchor_keys(distinct))  # (distinct, dim)
        positive_scores = np.einsum("rd,rd->r", queries[place], self._vectors(positives))
        scores, found = (part[place] for part in nearest(queries, self._blocks(pool), depth))  # (rows, depth)
        own = belongings(anchors, positives, pool.keys[found])
        ceilings = highest_cosines(positive_scores, self.options)
        places, enough = choose(scores, own, ceilings, chunk, self.options)
        taken = np.take_along_axis(found, places, axis=1)[enough]  # (mined rows, negatives)
        self.chosen[chunk[enough]] = pool.rows[taken]
        means = np.take_along_axis(scores, places, axis=1)[enough].mean(axis=1)
        for sums, cosines in zip(self.cosine_sums, (positive_scores[enough], means), strict=True):
            np.add.at(sums, self.rows.tasks[chunk[enough]], cosines)

    def _vectors(self, keys: Keys) -> Floats:
        return self.cache.read(self.cache.find(keys))

    def _blocks(self, pool: _Pool) -> Iterator[Floats]:
        step = max(1, BLOCK_BYTES // (4 * self.cache.dim))
        for start in range(0, len(pool.vectors), step):
            yield self.cache.read(pool.vectors[start : start + step])

    def _result(self, place: int) -> TaskMining:
        states = self.rows.states[self.rows.tasks == place]
        mined = int((self.chosen[self.rows.tasks == place, 0] >= 0).sum())
        open_rows, kept, scored = (int((states == state).sum()) for state in (OPEN, KEPT, SCORED))
        means = (float(sums[place] / mined) if mined else math.nan for sums in self.cosine_sums)
        return TaskMining(len(states), mined, open_rows - mined, kept, scored, *means)


def _chunks(rows: Ints, depths: Ints) -> Iterator[tuple[Ints, int]]:
    """Rows in chunks, and how many candidates to look at for each row of a chunk; the deepest come first."""
    order = np.argsort(-depths, kind="stable")
    start = 0
    while start < len(order):
        depth = int(depths[order[start]])
        stop = start + max(1, ENTRIES_PER_CHUNK // depth)
        yield rows[order[start:stop]], depth
        start = stop

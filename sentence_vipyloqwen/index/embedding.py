"""From items to shards: read all, embed what no earlier run has, write each shard as soon as it is whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from sentence_vipyloqwen.files import measure
from sentence_vipyloqwen.fingerprint import Fingerprint
from sentence_vipyloqwen.index.items import encode_item, item_input, read_items, with_absolute_images
from sentence_vipyloqwen.index.shards import Shard, ShardContent, Skipped, find_shard, write_shard
from sentence_vipyloqwen.index.sources import Folder, Source

SHARD_ROWS = 1024
"""Items of a shard, and so the most that a kill can lose; many small shards are joined at the end."""

BATCHES_AT_ONCE = 16
"""Batches in one call of ``encode``, which sorts them and shares images among them."""

ON_ERROR = ("raise", "skip")


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How items are embedded.

    Attributes:
        batch_size: Items in one forward pass.
        prompt_name: Prompt they are embedded with; documents usually have none. All items of an index have the same.
        on_error: What an item does that is not allowed or cannot be embedded: ``"raise"``, or ``"skip"``, which leaves
            it out and goes on.
        shard_rows: Items written at once, and so the most that a kill can lose.
        show_progress_bar: Whether to show how far it is, at what rate, and the time left.
    """

    batch_size: int = 32
    prompt_name: str | None = None
    on_error: str = "raise"
    shard_rows: int = SHARD_ROWS
    show_progress_bar: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error is {self.on_error!r}; allowed is one of {list(ON_ERROR)}.")
        if self.shard_rows < 1 or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size} and shard_rows {self.shard_rows}; allowed is from 1.")


@dataclass(frozen=True)
class Share:
    """A part of the shards, where several processes embed them.

    Attributes:
        number: Which one, from 0: each ``of``-th shard, from the ``number``-th on.
        of: How many shares there are.
    """

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"share is {self.number} of {self.of}; allowed is from 0, below the number of shares.")

    def rows(self, count: int, size: int) -> int:
        """How many of so many items are this share's, in shards of a size.

        >>> [Share(number, 3).rows(45, 10) for number in range(3)]
        [20, 15, 10]
        """
        return sum(min(size, count - start) for start in range(self.number * size, count, self.of * size))


@dataclass(frozen=True)
class Embedded:
    """What became of some items.

    Attributes:
        shards: Where they are, in their order.
        ids: Their ids.
        skipped: Those left out.
    """

    shards: tuple[Shard, ...]
    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Row:
    """An item on its way: where it stood, itself, and what its images hold."""

    where: str
    item: dict[str, Any]
    images: tuple[str, ...]


def embed_items(
    model: SentenceTransformer,
    known: Fingerprint,
    source: Source,
    folder: Path,
    options: EmbedOptions,
    *,
    share: Share | None = None,
    taken: Collection[str] = frozenset(),
) -> Embedded:
    """Embed items into shards of an index folder, which nothing names yet.

    1. Read every item and the header of every image, so that a mistake shows before anything is computed.
    2. Take them shard by shard. A shard's name is a hash of the model, the prompt and the items, contents of images
       included; where an earlier run wrote it, it is used again.
    3. Embed the others, and write each shard when it is done: that is all a kill can lose.

    Args:
        model: What embeds them.
        known: Its fingerprint.
        source: The items.
        folder: The index folder.
        options: How they are embedded.
        share: Which of the shards are embedded; all by default.
        taken: Ids that may not occur.

    Raises:
        ValueError: If there are no items, or with ``on_error="raise"`` one is not allowed or cannot be embedded.
    """
    skipped: list[Skipped] = []
    share = share or Share()
    on_bad = skipped.append if options.on_error == "skip" else None
    with tempfile.TemporaryFile(dir=folder) as spool:
        items = read_items(source, folder, taken, on_bad, known.processing.get("max_pixels"))
        count = _spool(spool, items, folder, options)  # 1
        shards, ids = [], []
        own = share.rows(count, options.shard_rows)
        with tqdm(total=own, desc="Embedding", unit="item", disable=not options.show_progress_bar) as bar:
            chunks = _chunks(_unspool(spool), options.shard_rows)
            for rows in islice(chunks, share.number, None, share.of):  # 2
                name = _name(rows, known, options.prompt_name)
                if found := find_shard(folder, name):
                    shard, left_out = found
                    bar.update(len(rows))
                else:
                    content = _embed(model, rows, folder, options, bar)  # 3
                    shard, left_out = write_shard(folder, name, content), list(content.skipped)
                gone = {item.id for item in left_out}
                shards += [shard] if shard.rows else []
                ids += [row.item["id"] for row in rows if row.item["id"] not in gone]
                skipped += left_out
    if not ids and (share.of == 1 or not count):
        what = source.path if isinstance(source, Folder) else source if isinstance(source, (str, Path)) else "items"
        reasons = "".join(f" {item.where}: {item.reason}" for item in skipped[:3])
        raise ValueError(f"There are no items to index in {what}.{reasons}")
    return Embedded(tuple(shards), tuple(ids), tuple(skipped))


# --- 1. reading ---


def _spool(spool: IO[bytes], items: Iterable[tuple[str, dict[str, Any]]], folder: Path, options: EmbedOptions) -> int:
    """Write items to a file, so that memory does not hold them; how many there are."""
    count = 0
    digests: dict[str, str] = {}
    for where, item in tqdm(items, desc="Reading", unit="item", disable=not options.show_progress_bar):
        images = [_digest(str(folder / path), digests) for path in item["image"]]
        spool.write(encode_item({"where": where, "item": item, "images": images}))
        count += 1
    spool.seek(0)
    return count


def _digest(path: str, known: dict[str, str]) -> str:
    if path not in known:
        known[path] = measure(Path(path))["xxh3_128"]
    return known[path]


def _unspool(spool: IO[bytes]) -> Iterator[_Row]:
    for line in spool:
        row = json.loads(line)
        yield _Row(row["where"], row["item"], tuple(row["images"]))


def _chunks(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def _name(rows: Sequence[_Row], known: Fingerprint, prompt_name: str | None) -> str:
    """The name of the shard that holds these items as this model embeds them."""
    digest = xxhash.xxh3_128(json.dumps([asdict(known), prompt_name], sort_keys=True).encode())
    for row in rows:
        digest.update(encode_item({"item": row.item, "images": row.images}))
    return digest.hexdigest()


# --- 3. embedding ---


def _embed(
    model: SentenceTransformer, rows: Sequence[_Row], folder: Path, options: EmbedOptions, bar: tqdm
) -> ShardContent:
    contents = []
    for start in range(0, len(rows), step := options.batch_size * BATCHES_AT_ONCE):
        some = rows[start : start + step]
        contents.append(_embed_or_halve(model, some, folder, options))
        bar.update(len(some))
    return _joined(contents)


def _embed_or_halve(
    model: SentenceTransformer, rows: Sequence[_Row], folder: Path, options: EmbedOptions
) -> ShardContent:
    """Embed rows; where that fails, find the row at fault by halves, to name it or to leave it out."""
    inputs = [item_input(with_absolute_images(row.item, folder)) for row in rows]
    names = [f"item {row.item['id']!r} ({row.where})" for row in rows]
    try:
        vectors = embed(model, inputs, names, batch_size=options.batch_size, prompt_name=options.prompt_name)
    except (ValueError, OSError) as error:
        if len(rows) == 1:
            if options.on_error == "raise":
                raise ValueError(f"{rows[0].where}: {error}") from error
            skipped = Skipped(rows[0].where, str(error), rows[0].item["id"])
            dim = model.get_embedding_dimension()
            return ShardContent([], np.empty((0, dim), np.float32), [skipped])
        middle = len(rows) // 2
        return _joined([_embed_or_halve(model, half, folder, options) for half in (rows[:middle], rows[middle:])])
    return ShardContent([row.item for row in rows], vectors)


def _joined(contents: Sequence[ShardContent]) -> ShardContent:
    return ShardContent(
        [item for content in contents for item in content.items],
        np.concatenate([content.vectors for content in contents]),
        [item for content in contents for item in content.skipped],
    )


def embed(
    model: SentenceTransformer,
    inputs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
) -> np.ndarray:
    """Unit vectors (inputs, dim) float32.

    Raises:
        ValueError: If a vector has no direction; the message names its input.
    """
    encoded = model.encode(
        list(inputs),
        prompt_name=prompt_name,
        batch_size=batch_size,
        show_progress_bar=False,
        convert_to_numpy=True,
        normalize_embeddings=True,
    )
    vectors = np.ascontiguousarray(encoded, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # (inputs, 1)
    if bad := [name for name, norm in zip(names, norms[:, 0], strict=True) if not (np.isfinite(norm) and norm > 0)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"A vector has NaN or infinite values, or is all zeros: {', '.join(bad[:5])}{more}.")
    return vectors / norms  # half precision leaves them a little off 1

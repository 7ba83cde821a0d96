"""Embedding with several processes or machines: each writes shards of its own, and a build finds them all."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.index.embedding import SHARD_ROWS, EmbedOptions, embed_items
from sentence_vipyloqwen.index.fingerprint import fingerprint
from sentence_vipyloqwen.index.items import Source


def encode_share(
    model: SentenceTransformer,
    items: Source,
    folder: str | Path,
    share: int,
    shares: int,
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    on_error: str = "raise",
    shard_rows: int = SHARD_ROWS,
    show_progress_bar: bool = False,
) -> int:
    """Embed every ``shares``-th shard of some items into an index folder, from the ``share``-th on.

    Once all shares are done, :meth:`VectorIndex.build` with the same items, model, ``prompt_name`` and ``shard_rows``
    finds the shards and has nothing left to embed. Run a share again where it was killed, and it goes on. The folder
    must be one that all processes see; every process reads all items, and embeds its own.

    Args:
        model: What embeds them.
        items: As for :meth:`VectorIndex.build`, in the same order everywhere.
        folder: Where the index is to be.
        share: Which share, from 0: the rank of a process.
        shares: How many there are: the world size.
        batch_size: Items in one forward pass.
        prompt_name: Prompt the items are embedded with.
        on_error: What an item does that is not allowed or cannot be embedded: ``"raise"`` or ``"skip"``.
        shard_rows: Items of a shard.
        show_progress_bar: Whether to show how far it is.

    Returns:
        How many items the share holds.

    Raises:
        ValueError: As :meth:`VectorIndex.build`.
    """
    options = EmbedOptions(
        batch_size=batch_size,
        prompt_name=prompt_name,
        on_error=on_error,
        shard_rows=shard_rows,
        share=share,
        shares=shares,
        show_progress_bar=show_progress_bar,
    )
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return len(embed_items(model, fingerprint(model), items, folder, options).ids)

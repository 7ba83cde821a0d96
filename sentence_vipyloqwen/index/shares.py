"""Embedding with several processes or machines: each writes shards of its own, and a build finds them all."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from sentence_vipyloqwen.fingerprint import fingerprint
from sentence_vipyloqwen.index import writing
from sentence_vipyloqwen.index.embedding import EmbedOptions, Share, embed_items
from sentence_vipyloqwen.index.items import Source


def encode_share(
    model: SentenceTransformer,
    items: Source,
    folder: str | Path,
    share: int,
    shares: int,
    options: EmbedOptions | None = None,
) -> int:
    """Embed every ``shares``-th shard of some items into an index folder, from the ``share``-th on.

    Once all shares are done, :meth:`VectorIndex.build` with the same items, model and options finds the shards and has
    nothing left to embed. Run a share again where it was killed, and it goes on. The folder must be one that all
    processes see; every process reads all items, and embeds its own.

    Args:
        model: What embeds them.
        items: As for :meth:`VectorIndex.build`, in the same order everywhere.
        folder: Where the index is to be.
        share: Which share, from 0: the rank of a process.
        shares: How many there are: the world size.
        options: How they are embedded.

    Returns:
        How many items the share holds.

    Raises:
        ValueError: As :meth:`VectorIndex.build`, or if another process embeds the same share.
    """
    part = Share(share, shares)
    folder = Path(folder).resolve()
    writing.check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing.sharing(folder, share):
        return len(embed_items(model, fingerprint(model), items, folder, options or EmbedOptions(), share=part).ids)

"""Search over texts, images and mixed items: build an index, query it, look at the results."""

from __future__ import annotations

from sentence_vipyloqwen.fingerprint import Fingerprint, fingerprint
from sentence_vipyloqwen.index.embedding import EmbedOptions
from sentence_vipyloqwen.index.report import SearchResult, write_report
from sentence_vipyloqwen.index.shares import encode_share
from sentence_vipyloqwen.index.snapshot import Hit
from sentence_vipyloqwen.index.sources import Folder
from sentence_vipyloqwen.index.vector_index import VectorIndex

__all__ = [
    "EmbedOptions",
    "Fingerprint",
    "Folder",
    "Hit",
    "SearchResult",
    "VectorIndex",
    "encode_share",
    "fingerprint",
    "write_report",
]

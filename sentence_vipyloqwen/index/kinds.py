"""Kinds of index: what is looked through before vectors are compared exactly.

=============  ===================================  ====================================  ===========================
kind           what it is                           memory a vector of 1024 dimensions    for
=============  ===================================  ====================================  ===========================
``Flat``       every vector compared, exact         none of its own: mapped from disk     up to some 100,000 items
``HNSW``       a graph of neighbours                4.4 KB, slow to build                 millions, quickest queries
``IVF,SQ8``    lists of near vectors, 8 bits each   1 KB                                  millions
``IVF,PQ``     lists, product-quantised             0.13 KB                               tens of millions
``binary``     signs of the dimensions              0.13 KB, every code compared          tens of millions
``MRL256``     the first 256 dimensions             1 KB, every head compared             Matryoshka-trained models
=============  ===================================  ====================================  ===========================

All others are FAISS factory strings (https://github.com/facebookresearch/faiss/wiki/The-index-factory), such as
``HNSW48`` or ``IVF4096,PQ64x8``; ``MRL256,HNSW32`` puts one on the first 256 dimensions. Whatever the kind, the
candidates it finds are compared again by their whole vectors, so scores are cosines and only recall is approximate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import faiss
import numpy as np

from sentence_vipyloqwen.errors import first_line

AUTO, FLAT = "auto", "Flat"

EXACT_UP_TO = 200_000
"""``auto`` compares every vector up to so many: half a second a query and core at 1024 dimensions."""

TRAIN_PER_LIST = 64
"""Training vectors for each list of an IVF: FAISS asks for 39 at least, and more bring little."""

_RESCORED = {"PQ": 40, "LSH": 40, "MRL": 40, "SQ": 4}
"""Candidates compared exactly for each hit, by the coarsest coding in the factory string; 2 otherwise."""

_HEAD = re.compile(r"MRL(\d+)(?:,(.+))?")


def resolve(kind: str, count: int, dim: int) -> str | None:
    """The factory string of a kind for a number of vectors; ``None`` where every vector is to be compared.

    >>> resolve("auto", 1000, 1024), resolve("auto", 1_000_000, 1024), resolve("IVF,PQ", 1_000_000, 1024)
    (None, 'IVF4096,SQ8', 'IVF4096,PQ128x8')

    Args:
        kind: ``"auto"``, a name of the table above, or a factory string.
        count: Vectors.
        dim: Their dimensions.

    Raises:
        ValueError: If FAISS knows no such index for vectors of that dimension.
    """
    lists = _lists(count)
    names = {
        FLAT: None,
        AUTO: None if count <= EXACT_UP_TO else f"IVF{lists},SQ8",
        "HNSW": "HNSW32",
        "IVF,SQ8": f"IVF{lists},SQ8",
        "IVF,PQ": f"IVF{lists},PQ{_codes(dim)}x8",
        "binary": "LSH",
    }
    factory = names.get(kind, kind)
    if factory is not None:
        make(factory, dim)
    return factory


def make(factory: str, dim: int) -> faiss.Index:
    """An empty index.

    Raises:
        ValueError: If FAISS knows no such index for vectors of that dimension.
    """
    try:
        if head := _HEAD.fullmatch(factory):
            return _on_head(int(head[1]), head[2] or FLAT, dim)
        # Binary codes know one metric; of unit vectors it orders as the inner product does.
        metric = faiss.METRIC_L2 if "LSH" in factory else faiss.METRIC_INNER_PRODUCT
        return faiss.index_factory(dim, factory, metric)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"kind is {factory!r}, which FAISS does not make of {dim} dimensions ({first_line(error)}); allowed are "
            "auto, Flat, HNSW, 'IVF,SQ8', 'IVF,PQ', binary, MRL256 and FAISS factory strings."
        ) from error


def _on_head(size: int, factory: str, dim: int) -> faiss.IndexPreTransform:
    if not 0 < size <= dim:
        raise ValueError(f"MRL{size} takes the first {size} of {dim} dimensions")
    index = faiss.IndexPreTransform(faiss.NormalizationTransform(size, 2.0), make(factory, size))
    index.prepend_transform(faiss.RemapDimensionsTransform(dim, size, False))
    return index


def train_size(factory: str, count: int) -> int:
    """How many vectors an index is trained on: some for each of its lists, 65,536 for other codes, 0 for none.

    >>> train_size("IVF4096,SQ8", 1_000_000), train_size("HNSW32", 1_000_000)
    (262144, 0)
    """
    lists = re.search(r"IVF(\d+)", factory)
    wanted = TRAIN_PER_LIST * int(lists[1]) if lists else 65_536 if re.search("PQ|SQ|PCA", factory) else 0
    return min(count, wanted)


def candidates(factory: str, k: int) -> int:
    """How many candidates are compared exactly for k hits."""
    return k * next((times for code, times in _RESCORED.items() if code in factory), 2)


def set_effort(index: faiss.Index, found: int, effort: int | None = None) -> None:
    """How far a search looks: lists of an IVF, or nodes of a graph; more find more and take longer.

    Args:
        index: An index of :func:`make`.
        found: Candidates that a search is to find.
        effort: Lists or nodes; by default a 32nd of the lists (at least 8), or twice the candidates (at least 64).
    """
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(inner.nlist, effort or max(8, inner.nlist // 32))
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = effort or max(64, 2 * found)


def build(factory: str, parts: Sequence[faiss.IndexFlat], dim: int) -> faiss.Index:
    """Train an index on a sample and fill it, part by part, so that memory holds one of them.

    Args:
        factory: Of :func:`resolve`.
        parts: The vectors.
        dim: Their dimensions.
    """
    index = make(factory, dim)
    if size := train_size(factory, sum(part.ntotal for part in parts)):
        index.train(_sample(parts, size))
    for part in parts:
        index.add(part.reconstruct_n(0, part.ntotal))
    return index


def _sample(parts: Sequence[faiss.IndexFlat], size: int) -> np.ndarray:
    """(size, dim) vectors drawn without favour, the same ones every time."""
    ends = np.cumsum([part.ntotal for part in parts])
    rows = np.sort(np.random.default_rng(0).choice(ends[-1], size, replace=False))
    bounds = np.searchsorted(rows, [0, *ends])
    starts = [0, *ends[:-1]]
    drawn = [rows[bounds[i] : bounds[i + 1]] - starts[i] for i in range(len(parts))]
    return np.concatenate([part.reconstruct_batch(of) for part, of in zip(parts, drawn, strict=True) if len(of)])


def _lists(count: int) -> int:
    """About four times the square root of the count, a power of two, with 39 vectors or more in each."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(max(count, 1))))
    return max(1, min(wanted, 2 ** int(math.log2(max(1, count // 39)))))


def _codes(dim: int) -> int:
    """Bytes of a product code: one for 8 dimensions, as near as the dimension divides."""
    return next(codes for codes in range(max(1, dim // 8), 0, -1) if dim % codes == 0)

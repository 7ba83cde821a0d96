"""Search among many vectors: each kind of index beside a plain FAISS script of the same kind, and beside usearch.

Vectors are drawn, not embedded: unit vectors around random centres, whose noise says how alike the members of a cluster
are. (Points without any structure have no near neighbours, and every approximate index fails on them.) Queries
are drawn as the vectors are. The shards are written as `VectorIndex.build` writes them, without a model.

  build, s       shards to a searchable index: training, filling, writing
  rise, MB       what the process grows by while it is opened and searched; mapped files count as far as they were read
  p50, p99       milliseconds of one query by itself
  batch, ms      of 64 queries at once, which includes comparing candidates exactly and handing over the items
  over FAISS     our batch / that of FAISS with the very same index in memory: median (spread)
  over refine    our batch / that of FAISS's IndexRefine, which compares as many candidates by their whole vectors
  recall@10      share of the exact ten best that are found

Examples:
  python benchmarks/index.py --rows 100000
  python benchmarks/index.py --rows 1000000 --kind Flat IVF,SQ8 --output benchmarks/index.md

usearch comes with the `benchmarks` extra.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import common
import faiss
import measure
import numpy as np

from sentence_vipyloqwen.extras import require
from sentence_vipyloqwen.index import Fingerprint, kinds, writing
from sentence_vipyloqwen.index.manifest import Manifest, Shard, read_manifest
from sentence_vipyloqwen.index.shards import ShardContent, map_vectors, write_shard
from sentence_vipyloqwen.index.snapshot import Snapshot

KINDS = ("Flat", "HNSW", "IVF,SQ8", "IVF,PQ", "binary", "MRL256", "usearch")
QUERIES, BATCH, K = 256, 64, 10
CLUSTER_ROWS = 100
PEER = "usearch"
COLUMNS = (
    "kind",
    "factory",
    "build, s",
    "rise, MB",
    "p50, ms",
    "p99, ms",
    "batch, ms",
    "over FAISS",
    "over refine",
    "recall@10",
)


@dataclass(frozen=True)
class Draw:
    """Vectors around centres.

    Attributes:
        rows: How many.
        dim: Their dimensions.
        noise: Length of the noise around a centre of length 1.
    """

    rows: int
    dim: int
    noise: float

    def shards(self) -> Iterator[np.ndarray]:
        """(n, dim) unit vectors, shard by shard."""
        centres = self._centres()
        for start in range(0, self.rows, writing.JOINED_ROWS):
            yield self._around(centres, min(writing.JOINED_ROWS, self.rows - start), seed=1 + start)

    def queries(self, count: int) -> np.ndarray:
        """(count, dim) unit vectors."""
        return self._around(self._centres(), count, seed=0)

    def _centres(self) -> np.ndarray:
        rng = np.random.default_rng(7)
        return _unit(rng.standard_normal((max(1, self.rows // CLUSTER_ROWS), self.dim), dtype=np.float32))

    def _around(self, centres: np.ndarray, count: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((count, self.dim), dtype=np.float32) * (self.noise / np.sqrt(self.dim))
        return _unit(centres[rng.integers(len(centres), size=count)] + noise)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    """Measure the kinds asked for and report them."""
    options = parser().parse_args()
    if PEER in options.kind:
        require(PEER, "benchmarks")  # now, not after an hour
    faiss.omp_set_num_threads(options.threads)
    draw = Draw(options.rows, options.dim, options.noise)
    lines: list[list[Any]] = []
    with TemporaryDirectory(dir=options.folder) as folder:
        for line in compare(Path(folder), draw, options.kind, options.rounds):
            lines.append(line)
            report(lines, options)  # after each kind: the next may take an hour


def report(lines: list[list[Any]], options: argparse.Namespace) -> None:
    """Print the table so far, and put it into the file."""
    notes = [
        f"- {options.rows:,} vectors of {options.dim} dimensions around {options.rows // CLUSTER_ROWS:,} centres, "
        f"noise {options.noise}; {QUERIES} queries, k = {K}; batches of {BATCH}",
        "- over FAISS: the same index file, read into memory by a plain script, with the same lists or nodes looked "
        "through; its batch is without items and without comparing candidates exactly, which IndexRefine does",
        f"- FAISS {faiss.__version__}" + (f", usearch {version(PEER)}" if PEER in options.kind else ""),
        common.machine(options),
    ]
    body = "\n\n".join([common.table(COLUMNS, lines), "\n".join(notes)])
    some = "" if set(options.kind) == set(KINDS) else f": {' and '.join(options.kind)}"
    common.report(f"Search among {options.rows:,} vectors{some}", body, options.output)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    options.add_argument("--rows", type=int, default=100_000, help="vectors")
    options.add_argument("--dim", type=int, default=1024, help="their dimensions")
    options.add_argument("--noise", type=float, default=1.0, help="length of the noise around a centre")
    options.add_argument("--kind", nargs="+", default=list(KINDS), metavar="KIND", help="run these")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds of batches")
    options.add_argument("--threads", type=int, default=faiss.omp_get_max_threads(), help="threads of FAISS")
    options.add_argument("--folder", type=Path, help="where the index goes while it is measured; a large disk")
    options.add_argument("--output", type=Path, help="markdown file; this benchmark's section in it is replaced")
    return options


def compare(folder: Path, draw: Draw, names: list[str], rounds: int) -> Iterator[list[Any]]:
    """Measure kind by kind: the cells of the table's lines."""
    manifest = write(folder, draw)
    parts = [map_vectors(folder / shard.vectors, shard, draw.dim) for shard in manifest.shards]
    queries = draw.queries(QUERIES)
    flat = _joined(parts)
    exact = search_bare(flat, queries)
    for name in names:
        print(f"{name} ...", flush=True)
        if name == PEER:
            yield beside_peer(folder, manifest, name, queries, exact, rounds)
        else:
            yield beside_faiss(folder, manifest, name, queries, exact, rounds, flat)


def write(folder: Path, draw: Draw) -> Manifest:
    """Write the shards of an index, and its manifest without any approximate index."""
    shards: list[Shard] = []
    for number, vectors in enumerate(draw.shards()):
        first = sum(shard.rows for shard in shards)
        items = [
            {"id": f"{row:09}", "text": f"text {row}", "image": [], "metadata": {"row": row}}
            for row in range(first, first + len(vectors))
        ]
        shards.append(write_shard(folder, f"{number:032x}", ShardContent(items, vectors)))
    known = Fingerprint("drawn", draw.dim, {}, None, {})
    return writing.commit(folder, None, Manifest(known, draw.dim, draw.rows, None, "Flat", tuple(shards)))


def beside_faiss(
    folder: Path,
    manifest: Manifest,
    kind: str,
    queries: np.ndarray,
    exact: np.ndarray,
    rounds: int,
    flat: faiss.IndexFlatIP,
) -> list[Any]:
    """Our index of a kind, and plain scripts'."""
    start = time.perf_counter()
    written = writing.commit(folder, read_manifest(folder), replace(manifest, kind=kind, approximate=None))
    built = time.perf_counter() - start
    bare = bare_index(folder, written, flat)
    refined = refining(bare, written, flat)
    with measure.PeakMemory() as memory:
        index = Snapshot(folder, written)
        rows = [[int(hit.id) for hit in hits] for hits in index.search(queries, K)]
    singles = one_by_one(lambda query: index.search(query, K), queries)
    jobs = {
        "ours": lambda: index.search(queries[:BATCH], K),
        "bare": lambda: search_bare(bare, queries[:BATCH]),
        **({"refined": lambda: search_bare(refined, queries[:BATCH])} if refined else {}),
    }
    seconds = measure.interleave(jobs, rounds)
    ratios = {
        name: measure.spread([ours / other for ours, other in zip(seconds["ours"], taken, strict=True)])
        for name, taken in seconds.items()
    }
    factory = written.approximate.factory if written.approximate else "Flat"
    return [
        kind,
        factory,
        f"{built:.0f}",
        f"{memory.megabytes:.0f}",
        *(f"{value:.2f}" for value in singles),
        f"{1000 * median(seconds['ours']):.1f}",
        ratios["bare"],
        ratios.get("refined", ""),
        f"{recall(rows, exact):.3f}",
    ]


def bare_index(folder: Path, manifest: Manifest, flat: faiss.IndexFlatIP) -> faiss.Index:
    """What a plain script searches: the same index, read into memory, that looks as far as ours does."""
    if manifest.approximate is None:
        return flat
    index = faiss.read_index(str(folder / manifest.approximate.file))
    kinds.set_effort(index, kinds.candidates(manifest.approximate.factory, K))
    return index


def refining(bare: faiss.Index, manifest: Manifest, flat: faiss.IndexFlatIP) -> faiss.Index | None:
    """FAISS's own way to compare candidates by their whole vectors, of as many of them as we do.

    ``None`` where there is nothing to compare again, or where FAISS refuses: binary codes know no inner product.
    """
    if manifest.approximate is None or bare.metric_type != flat.metric_type:
        return None
    index = faiss.IndexRefine(bare, flat)
    index.k_factor = kinds.candidates(manifest.approximate.factory, K) / K
    return index


def _joined(parts: list[faiss.IndexFlat]) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(parts[0].d)
    for part in parts:
        index.add(part.reconstruct_n(0, part.ntotal))
    return index


def search_bare(index: faiss.Index, queries: np.ndarray) -> np.ndarray:
    """(Q, 10) rows."""
    return index.search(queries, K)[1]


def beside_peer(
    folder: Path, manifest: Manifest, name: str, queries: np.ndarray, exact: np.ndarray, rounds: int
) -> list[Any]:
    """The graph of usearch over the same vectors, with the connectivity and the expansions of our HNSW."""
    from usearch.index import Index

    parts = [map_vectors(folder / shard.vectors, shard, manifest.dim) for shard in manifest.shards]
    start = time.perf_counter()
    with measure.PeakMemory() as memory:
        index = Index(
            ndim=manifest.dim, metric="ip", dtype="f32", connectivity=32, expansion_add=40, expansion_search=64
        )
        first = 0
        for part in parts:
            index.add(np.arange(first, first + part.ntotal), part.reconstruct_n(0, part.ntotal))
            first += part.ntotal
    built = time.perf_counter() - start
    found = index.search(queries, K).keys
    singles = one_by_one(lambda query: index.search(query[0], K), queries)
    seconds = measure.interleave({"peer": lambda: index.search(queries[:BATCH], K)}, rounds)["peer"]
    rows = found.tolist()
    return [name, "connectivity 32", f"{built:.0f}", f"{memory.megabytes:.0f}"] + [
        *(f"{value:.2f}" for value in singles),
        f"{1000 * median(seconds):.1f}",
        "",
        "",
        f"{recall(rows, exact):.3f}",
    ]


def one_by_one(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> tuple[float, float]:
    """Median and 99th percentile of a query's milliseconds."""
    times = []
    for query in queries:
        start = time.perf_counter()
        search(query[None])
        times.append(1000 * (time.perf_counter() - start))
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def recall(found: list[list[int]], exact: np.ndarray) -> float:
    """Share of the exact best that were found.

    >>> recall([[1, 2], [3, 9]], np.array([[2, 1], [3, 4]]))
    0.75
    """
    hits = [len(set(rows) & set(best)) for rows, best in zip(found, exact.tolist(), strict=True)]
    return sum(hits) / exact.size


if __name__ == "__main__":
    main()

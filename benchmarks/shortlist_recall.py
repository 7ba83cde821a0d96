"""How many of the exact ten best a shortlist finds on a trained model's vectors: first dimensions, or signs.

A shortlist looks at the first dimensions of every vector (`MRL64`), or at the signs of all (`binary`), and the
candidates it finds are compared by their whole vectors. How much that loses is a matter of the model, so it is measured
on one: the sides of training records are the items, the anchors of other records the queries.

  candidates   compared exactly for each query; where they are all items, nothing can be lost
  recall@10    share of the exact ten best that are found; equal scores are as good as each other
  found whole  share of the queries whose ten best are all found

Examples:
  make demo
  cd demo-output
  python ../benchmarks/shortlist_recall.py training/model data/train.jsonl data/eval.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import numpy as np
import torch

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import kinds
from sentence_vipyloqwen.index.snapshot import Hit
from sentence_vipyloqwen.train.record_lines import read_records

K = 10
COLUMNS = ("kind", "candidates", "recall@10", "found whole")


def main() -> None:
    """Measure the kinds asked for and report them."""
    options = parser().parse_args()
    common.set_up(options)
    run(options)


def parser() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    options.add_argument("model", type=Path, help="folder of a trained model")
    options.add_argument("items", type=Path, help="training records, JSONL, whose anchors and positives are searched")
    options.add_argument("records", type=Path, help="training records, JSONL, whose anchors are the queries")
    options.add_argument("--items-at-most", type=int, default=20_000, help="most items, the first of them")
    options.add_argument("--kind", nargs="+", metavar="KIND", help="run these; by default halves, quarters and signs")
    options.add_argument("--queries", type=int, default=1000, help="most queries, spread evenly over the records")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options.add_argument("--output", type=Path, help="markdown file; this benchmark's section in it is replaced")
    return options


def run(options: argparse.Namespace) -> list[list[Any]]:
    """Measure; report a table and return its lines."""
    model = ViPyloQwen(str(options.model), device="cpu")
    size = model.get_embedding_dimension()
    queries = model.encode(anchors(options.records, options.queries), show_progress_bar=True)
    items = list(islice(sides(options.items), options.items_at_most))
    lines = []
    with TemporaryDirectory() as folder:
        for kind in options.kind or (f"MRL{size // 2}", f"MRL{size // 4}", "binary"):
            print(f"{kind} ...", flush=True)
            index = VectorIndex.build(model, items, Path(folder, "index"), kind=kind, overwrite=True)
            exact, found = (index.search_vectors(queries, K, exact=exact) for exact in (True, False))
            count = min(len(index), kinds.candidates(kinds.resolve(kind, len(index), size) or "", K))
            lines.append([kind, count, *(f"{share:.4f}" for share in shares(found, exact))])
    notes = [
        f"- {len(index):,} items, {len(queries):,} queries, {size} dimensions; the model was "
        + ("trained" if is_matryoshka(options.model) else "not trained")
        + " for fewer dimensions",
        common.machine(options),
    ]
    body = "\n\n".join([common.table(COLUMNS, lines), "\n".join(notes)])
    common.report("Shortlists on a trained model", body, options.output)
    return lines


def sides(path: Path) -> Iterator[dict[str, Any]]:
    """The different anchors and positives of records, as items."""
    seen = set()
    for record in read_records(path):
        for side in (record.anchor, record.positive):
            if side not in seen:
                seen.add(side)
                yield {"id": f"{len(seen):06}", **side.as_input()}


def anchors(path: Path, most: int) -> list[dict[str, Any]]:
    """The anchors of records, as inputs, spread evenly over the file."""
    records = list(read_records(path))
    rows = np.linspace(0, len(records) - 1, min(most, len(records))).astype(int)
    return [records[row].anchor.as_input() for row in rows]


def is_matryoshka(model: Path) -> bool:
    """Whether the recipe of the training that left this folder has fewer dimensions."""
    recipe = model.parent / "recipe.yaml"
    return recipe.exists() and "matryoshka_dims: []" not in recipe.read_text(encoding="utf-8")


def shares(found: Sequence[Sequence[Hit]], exact: Sequence[Sequence[Hit]]) -> tuple[float, float]:
    """Share of the exact best that are found, and of the queries that lack none; by score, so that ties are equal.

    >>> def hits(*scores):
    ...     return [Hit(rank, str(rank), score, {}) for rank, score in enumerate(scores, 1)]
    >>> shares([hits(0.9, 0.7), hits(0.8, 0.6)], [hits(0.9, 0.8), hits(0.8, 0.6)])
    (0.75, 0.5)
    """
    hit = [
        sum(hit.score >= best[-1].score for hit in of_query) / len(best)
        for of_query, best in zip(found, exact, strict=True)
    ]
    return float(np.mean(hit)), float(np.mean(np.array(hit) == 1))


if __name__ == "__main__":
    main()

"""Cross-modal retrieval, measured: find pictures by their captions, and captions by their pictures.

    python examples/cross_modal_retrieval.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn pictures and one index that holds both kinds. A condition says which kind is looked for.

recall@1 is the share of queries whose own partner comes first; MRR is the mean of 1 / its rank. One in so many is what
chance gives; texts found by texts would be easy, so the other kind is all that counts here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sentence_vipyloqwen import VectorIndex, ViPyloQwen

COLORS = {"red": "màu đỏ", "green": "màu xanh lá cây", "blue": "màu xanh dương", "gray": "màu xám"}
SHAPES = {"circle": "hình tròn", "rectangle": "hình chữ nhật", "triangle": "hình tam giác"}
CORNERS = {"circle": 32, "rectangle": 4, "triangle": 3}  # a polygon of many corners is round


def draw(path: Path, color: str, shape: str) -> str:
    """Draw a shape; the path of the picture."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).regular_polygon((32, 32, 20), CORNERS[shape], fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def ranks(index: VectorIndex, queries: list[dict[str, Any]], wanted: str) -> list[int]:
    """At which place each query's partner is found among the items of a kind."""
    found = index.search([query["query"] for query in queries], k=len(queries), where=f"kind = '{wanted}'")
    return [
        next(hit.rank for hit in hits if hit.item["metadata"]["pair"] == query["pair"])
        for query, hits in zip(queries, found, strict=True)
    ]


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")

    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    pictures = [draw(output / f"{color}-{shape}.png", color, shape) for color, shape in pairs]
    captions = [f"một {SHAPES[shape]} {COLORS[color]}" for color, shape in pairs]
    items = [
        {"id": f"{kind} {pair}", key: value, "metadata": {"kind": kind, "pair": pair}}
        for kind, key, values in (("picture", "image", pictures), ("caption", "text", captions))
        for pair, value in enumerate(values)
    ]
    index = VectorIndex.build(ViPyloQwen(model_path), items, output / "index", overwrite=True)

    for wanted, key, values in (("picture", "text", captions), ("caption", "image", pictures)):
        queries = [{"query": {key: value}, "pair": pair} for pair, value in enumerate(values)]
        places = ranks(index, queries, wanted)
        recall = sum(place == 1 for place in places) / len(places)
        mean_reciprocal = sum(1 / place for place in places) / len(places)
        print(f"{key} -> {wanted}: recall@1 {recall:.3f}, MRR {mean_reciprocal:.3f}, by chance {1 / len(places):.3f}")

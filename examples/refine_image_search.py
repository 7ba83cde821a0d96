"""Search by an image, refined by words: "like this one, but green".

    python examples/refine_image_search.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn pictures, as those of cross_modal_retrieval.py beside it, their index, and results.html.

There are two ways, and which one serves better depends on the model:

- One input: image and words are embedded together, and the model weighs them.
- Two inputs: image and words are embedded apart, and you weigh them. `share` 0 is the image alone, 1 the words alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from cross_modal_retrieval import SHAPES, draw

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import SearchResult, write_report


def mix(image: np.ndarray, words: np.ndarray, share: float) -> np.ndarray:
    """Weigh two unit vectors, (dim,) each; the result is one again, as cosines ask for."""
    mixed = (1 - share) * image + share * words
    return mixed / np.linalg.norm(mixed)


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
    model = ViPyloQwen(model_path)
    items = [
        {"id": f"{color} {shape}", "image": draw(output / f"{color}-{shape}.png", color, shape)}
        for color in ("red", "green", "blue")
        for shape in SHAPES
    ]
    index = VectorIndex.build(model, items, output / "index", overwrite=True)
    picture, words = draw(output / "query.png", "red", "circle"), "màu xanh lá cây"

    # One input.
    together = {"image": picture, "text": words}
    results = [SearchResult({"image": picture}, index.search({"image": picture}, k=3))]
    results.append(SearchResult(together, index.search(together, k=3)))
    for name, result in zip(("the image alone", "image and words in one input"), results, strict=True):
        print(f"{name}: {', '.join(f'{hit.id} {hit.score:.3f}' for hit in result.hits)}")

    # Two inputs.
    vectors = model.encode([{"image": picture}, {"text": words}])  # (2, dim)
    for share in (0.25, 0.5, 0.75):
        hits = index.search_vectors(mix(*vectors, share)[None], k=3)[0]
        print(f"share of the words {share}: {', '.join(f'{hit.id} {hit.score:.3f}' for hit in hits)}")
    print(f"Wrote {write_report(output / 'results.html', results, lang='vi')}")

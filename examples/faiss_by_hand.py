"""Search with FAISS by hand: `encode` gives unit vectors, so the inner product is the cosine.

    python examples/faiss_by_hand.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives vectors.faiss. `VectorIndex` does the same and keeps the items and the model's fingerprint with the vectors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
from PIL import Image

from sentence_vipyloqwen import ViPyloQwen

model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
output.mkdir(parents=True, exist_ok=True)
model = ViPyloQwen(model_path)

colors = ("red", "green", "blue", "yellow")
documents = [
    "Hà Nội là thủ đô của Việt Nam.",
    "The invoice is due on 25 December.",
    *(Image.new("RGB", (56, 56), color) for color in colors),
    {"image": Image.new("RGB", (56, 56), "black"), "text": "một hình vuông màu đen"},
]
names = ["Hanoi", "invoice", *colors, "black, with a text"]

# 1. Embed the documents and add them to an exact index.
vectors = model.encode(documents)  # (7, dim) float32
index = faiss.IndexFlatIP(vectors.shape[1])
index.add(vectors)
faiss.write_index(index, str(output / "vectors.faiss"))

# 2. Embed the queries, of any kind, and search. A prompt serves a whole call: `encode(..., prompt_name="ocr")`.
queries = {"thủ đô": "thủ đô", "a red picture": Image.new("RGB", (84, 84), "red")}
embedded = model.encode(list(queries.values()))  # (2, dim)
scores, rows = faiss.read_index(str(output / "vectors.faiss")).search(embedded, 3)  # (2, 3) each
for query, query_scores, query_rows in zip(queries, scores, rows, strict=True):
    print(query)
    for score, row in zip(query_scores, query_rows, strict=True):
        print(f"  {score:.4f}  {names[row]}")

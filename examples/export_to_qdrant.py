"""Export an index to Qdrant: read its Parquet shards, upsert them, and ask both the same.

    python examples/export_to_qdrant.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives an index, and in qdrant/ what Qdrant's client keeps without a server.

The shards are plain Parquet: id, text, image, metadata (JSON), vector. So `points` below needs neither the model nor
this package, and the way into any other vector database is the same. `index.json` says which shards belong to the index
and in which file the numbers of removed rows stand.

Qdrant's client comes with the `integration` extra. With a server it is `QdrantClient(url=...)`; all else stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models

from sentence_vipyloqwen import VectorIndex, ViPyloQwen

COLLECTION = "items"
AT_ONCE = 256  # points in one request, and rows in memory


def points(folder: Path) -> Iterator[models.PointStruct]:
    """The items of an index as Qdrant's points, in the order of their rows."""
    index = json.loads((folder / "index.json").read_bytes())
    removed = set(pq.read_table(folder / index["deleted"])["row"].to_pylist()) if index["deleted"] else set()
    number = 0
    for shard in index["shards"]:
        with pq.ParquetFile(folder / "shards" / f"{shard['name']}.parquet") as file:
            for batch in file.iter_batches(AT_ONCE):
                for row in batch.to_pylist():
                    if number not in removed:
                        yield point(row)
                    number += 1


def point(row: dict) -> models.PointStruct:
    """A row as a point. Qdrant's ids are numbers or UUIDs, so the item's id is made one, always the same."""
    payload = {key: row[key] for key in ("id", "text", "image")} | {"metadata": json.loads(row["metadata"])}
    return models.PointStruct(id=str(uuid5(NAMESPACE_URL, row["id"])), vector=row["vector"], payload=payload)


def export(folder: Path, client: QdrantClient) -> int:
    """Make a collection of an index, in place of one that is there; how many points it has."""
    dim = json.loads((folder / "index.json").read_bytes())["dim"]
    client.delete_collection(COLLECTION)  # else it would keep what the index has no more
    client.create_collection(COLLECTION, vectors_config=models.VectorParams(size=dim, distance=models.Distance.COSINE))
    waiting = points(folder)
    while batch := list(islice(waiting, AT_ONCE)):
        client.upsert(COLLECTION, batch)
    return client.count(COLLECTION).count


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
    model = ViPyloQwen(model_path)
    items = [
        {"id": f"{lang}-{number}", "text": text.format(number), "metadata": {"lang": lang, "page": number}}
        for lang, text in (("vi", "Hóa đơn tiền điện số {}"), ("en", "Electricity bill no. {}"))
        for number in range(1, 9)
    ]
    index = VectorIndex.build(model, items, output / "index", overwrite=True)
    index.remove(["vi-8"])

    client = QdrantClient(path=str(output / "qdrant"))
    print(f"{export(index.folder, client)} points")

    query = model.encode("Hóa đơn số 3")  # (dim,)
    condition = models.Filter(
        must=[
            models.FieldCondition(key="metadata.lang", match=models.MatchValue(value="vi")),
            models.FieldCondition(key="metadata.page", range=models.Range(gte=2)),
        ]
    )
    found = client.query_points(COLLECTION, query=query.tolist(), query_filter=condition, limit=3).points
    print("Qdrant: " + ", ".join(f"{hit.payload['id']} {hit.score:.3f}" for hit in found))
    hits = index.search_vectors(query[None], k=3, where="lang = 'vi' AND page >= 2")[0]
    print("index:  " + ", ".join(f"{hit.id} {hit.score:.3f}" for hit in hits))
    client.close()

"""Embed many items with Ray Data, on one machine or on a cluster, and join the vectors to an index.

    python examples/encode_with_ray.py MODEL [OUTPUT]

MODEL is the folder or Hub id of a finished model, e.g. demo-output/training/model. OUTPUT (example-output by default)
receives drawn pictures, items.jsonl and the index. On a cluster, it and MODEL lie on a disk that all machines see.

1. The work is cut into shares, each of them some of the index's shards: more than there are workers, so that a quick
   worker takes more of them.
2. Ray keeps a pool of workers. Each loads the model once, then embeds share after share and writes its Parquet shards.
   A share whose worker was lost is begun again by another one, and goes on from the last shard that was written.
3. A build with the same items finds all shards and has nothing left to embed.

Ray comes with the `integration` extra. It begins a cluster of this machine alone, or joins the one of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
from PIL import Image

from sentence_vipyloqwen import VectorIndex, ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions, encode_share

WORKERS, GPUS_EACH = 2, 0  # of a GPU, a worker may have all (1) or a part (0.5)
SHARES = 3 * WORKERS
OPTIONS = EmbedOptions(shard_rows=4)  # a thousand, as by default, where there are more than a handful of items


class ShareEncoder:
    """A worker with a model of its own."""

    def __init__(self, model_path: str, items: Path, folder: Path) -> None:
        self.model = ViPyloQwen(model_path)
        self.items, self.folder = items, folder

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        """Embed the share of this number; how many items it holds."""
        share = row["id"]
        count = encode_share(self.model, self.items, self.folder, share, SHARES, OPTIONS)
        return {"share": share, "items": count}


def write_items(output: Path) -> Path:
    """Write forty items, every fourth with a picture; the path of their file."""
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(40):
        item = {"id": f"item-{number:02}", "text": f"Hóa đơn số {number}", "metadata": {"number": number}}
        if number % 4 == 0:
            Image.new("RGB", (56, 56), (6 * number, 0, 90)).save(output / f"{number}.png")
            item["image"] = f"{number}.png"
        lines.append(json.dumps(item, ensure_ascii=False) + "\n")
    path = output / "items.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    model_path, output = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "example-output").resolve()
    items, folder = write_items(output), output / "index"

    # 1., 2. A row of the dataset is the number of a share.
    shares = ray.data.range(SHARES, override_num_blocks=SHARES).map(
        ShareEncoder,
        fn_constructor_args=(model_path, items, folder),
        compute=ray.data.ActorPoolStrategy(size=WORKERS),
        num_gpus=GPUS_EACH,
    )
    for row in sorted(shares.take_all(), key=lambda row: row["share"]):
        print(f"share {row['share']}: {row['items']} items")

    # 3.
    index = VectorIndex.build(ViPyloQwen(model_path), items, folder, OPTIONS, overwrite=True)
    print(f"{len(index)} items; nearest to 'Hóa đơn số 7': {index.search('Hóa đơn số 7', k=1)[0].id}")

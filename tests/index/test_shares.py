"""Several processes embed, one builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions, VectorIndex, encode_share

ITEMS = [{"id": f"{n:02}", "text": f"mục {n}"} for n in range(20)]


def test_a_build_finds_what_the_shares_wrote(make_model, tmp_path, monkeypatch):
    model, folder = make_model(), tmp_path / "index"
    counts = [encode_share(model, ITEMS, folder, share, 3, EmbedOptions(shard_rows=4)) for share in (2, 0, 1)]
    assert counts == [4, 8, 8]  # shards 2; 0 and 3; 1 and 4
    alone = VectorIndex.build(model, ITEMS, tmp_path / "alone", EmbedOptions(shard_rows=4))
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", lambda *_, **__: pytest.fail("embedded"))
        index = VectorIndex.build(model, ITEMS, folder, EmbedOptions(shard_rows=4))
    assert index.items == alone.items
    assert index.search("mục 7", k=20) == alone.search("mục 7", k=20)
    index.verify()


def test_a_share_may_be_empty_and_must_be_one_of_them(model, tmp_path):
    assert encode_share(model, ITEMS[:2], tmp_path / "index", 1, 2) == 0
    for share, shares in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"share is {share} of {shares}; allowed"):
            encode_share(model, ITEMS, tmp_path / "index", share, shares)
    with pytest.raises(ValueError, match="no items to index"):
        encode_share(model, [], tmp_path / "index", 1, 2)


def test_torchrun_gives_every_process_its_share(folder: Path, tmp_path: Path):
    items, index = tmp_path / "items.jsonl", tmp_path / "index"
    items.write_text("".join(f'{{"id": "{n}", "text": "mục {n}"}}\n' for n in range(3)), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sentence_vipyloqwen"]
    command = [*launch, "index", "encode", str(folder), str(items), str(index), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("Share")) == [
        "Share 0 of 2: 3 items.",
        "Share 1 of 2: 0 items.",
    ]
    model = ViPyloQwen(folder, device="cpu")
    model.encode = lambda *_, **__: pytest.fail("embedded")
    assert len(VectorIndex.build(model, items, index)) == 3

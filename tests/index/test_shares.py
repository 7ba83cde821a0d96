"""Several processes embed, one builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.index import EmbedOptions, VectorIndex, embedding, encode_share
from sentence_vipyloqwen.index.maintenance import compact_index

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


def test_a_folder_that_no_index_may_take_is_refused_at_the_start(model, tmp_path, monkeypatch):
    """Not by the build, after hours of embedding."""
    (tmp_path / "my.txt").write_text("mine")
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="exists and is no index: choose another folder"):
        encode_share(model, ITEMS, tmp_path, 0, 2)


def test_compacting_is_refused_until_shares_are_done(model, tmp_path, monkeypatch):
    """They write shards that no manifest names yet."""
    index = VectorIndex.build(model, ITEMS[:4], tmp_path / "index")
    encode = model.encode

    def meanwhile(*args, **kwargs):
        with pytest.raises(ValueError, match=r"Shares of .* are being embedded \(.share-1.lock\)"):
            compact_index(index.folder)
        with pytest.raises(ValueError, match="Share 1 of .* is being embedded by another process"):
            encode_share(model, ITEMS, index.folder, 1, 2)
        return encode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", meanwhile)
        assert encode_share(model, ITEMS, index.folder, 1, 2, EmbedOptions(shard_rows=4)) == 8
    index.compact()
    assert not list(index.folder.glob(".share-*"))


def test_the_bar_of_a_share_ends_at_its_own_items(model, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(embedding, "tqdm", lambda *args, **kwargs: bars.append(tqdm(*args, **kwargs)) or bars[-1])
    encode_share(model, ITEMS, tmp_path / "index", 2, 3, EmbedOptions(shard_rows=4, show_progress_bar=True))
    assert [(bar.n, bar.total) for bar in bars if bar.desc.startswith("Embedding")] == [(4, 4)]


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

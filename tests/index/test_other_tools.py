"""What docs/index.md tells users of other tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sentence_vipyloqwen.index import EmbedOptions, VectorIndex

GUIDE = Path(__file__).parents[2] / "docs" / "index.md"


def snippet(tool: str) -> str:
    """The Python block of the guide that imports a tool."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"import {tool}" in block]
    return found


def build(model, folder: Path) -> VectorIndex:
    """An index in shards whose metadata have other keys, and items removed and replaced."""
    facts = [{"lang": "vi" if n % 3 else "en", "page": n} for n in range(12)] + [{"note": 'a\n"b"'}, {}]
    items = [{"id": f"{n:02}", "text": f"mục {n}", "metadata": metadata} for n, metadata in enumerate(facts)]
    index = VectorIndex.build(model, items, folder, EmbedOptions(shard_rows=5))
    index.remove(["07"])
    index.update([{"id": "02", "text": "mới", "metadata": {"lang": "en", "page": 99}}])
    index.compact()
    return index


def test_pyarrow_filters_by_keys_of_metadata(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(model, tmp_path / "my-index")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(snippet("pyarrow.json"), found)
    hits = index.search("mục", k=99, where="lang = 'vi' AND page >= 2")
    assert sorted(found["ids"]) == sorted(hit.id for hit in hits) == ["04", "05", "08", "10", "11"]

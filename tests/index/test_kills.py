"""Whatever is killed, whenever: the index is as before or as after, and what was acknowledged is there."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import dying
import numpy as np
import pytest

from sentence_vipyloqwen.index import VectorIndex

Contents = dict[str, str]


def contents(folder: Path, model) -> Contents | None:
    """Id -> text of a whole and verified index; ``None`` where there is none."""
    if not (folder / "index.json").exists():
        return None
    index = VectorIndex.load(folder, model)
    found = index.verify()
    held = {item["id"]: item["text"] for item in index.items}
    assert found["items"] == len(held) == len(index)
    return held


def assert_searches_as_brute_force(folder: Path, model) -> None:
    index = VectorIndex.load(folder, model)
    items = index.items
    ids = [item["id"] for item in items]
    queries = ["mục 5 bản 1", "mục 0", "mục 17 bản 2", *(item["text"] for item in items[::7])]
    vectors, asked = (
        model.encode([{"text": text} for text in texts], normalize_embeddings=True).astype(np.float64)
        for texts in ([item["text"] for item in items], queries)
    )
    for of_query, hits in zip(asked @ vectors.T, index.search(queries, k=len(items) + 1, exact=True), strict=True):
        scores = dict(zip(ids, of_query, strict=True))
        assert sorted(hit.id for hit in hits) == sorted(ids)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert all(abs(hit.score - scores[hit.id]) < 1e-5 for hit in hits)
    of_first = asked[0] @ vectors.T
    expected = sorted(zip((-of_first).round(5), ids, strict=True))
    assert [hit.id for hit in index.search(queries[0], k=5)] == [id for _, id in expected[:5]]


@pytest.mark.parametrize("change", ["build", "rebuild", "add", "update", "remove", "compact"])
def test_a_kill_at_every_change_on_the_disk(model, tmp_path: Path, change: str) -> None:
    """Killed at each of its changes in turn, until it goes through; then done again, as a user would."""
    work, template = getattr(dying, change), tmp_path / "template"
    if change != "build":
        dying.build(template)
    if change == "compact":
        dying.remove(template)
        dying.add(template)
    before = contents(template, model) if change != "build" else None
    after = None
    states, code = [], dying.KILLED
    for event in range(1, 400):
        folder = tmp_path / str(event)
        if change != "build":
            shutil.copytree(template, folder)
        process = dying.start(dying.die_at_event, work, folder, event)
        process.join()
        code = process.exitcode
        states.append(contents(folder, model))
        if code == 0:
            after = states[-1]
            break
        assert code == dying.KILLED
        if event % 5 == 0:  # the next run of the same command ends what was begun
            done_before = states[-1] is not None and states[-1] != before
            if not (done_before and change in ("add", "remove")):
                work(folder)
            assert_searches_as_brute_force(folder, model)
            states.append(contents(folder, model))
        shutil.rmtree(folder, ignore_errors=True)
    assert code == 0
    assert after is not None
    assert all(state in (before, after) for state in states)
    assert before in states
    assert len(states) > 8
    if change == "compact":
        assert before == after


def test_thirty_kills_at_random_moments(model, tmp_path: Path) -> None:
    folder, acknowledged = tmp_path / "index", tmp_path / "acknowledged"
    moments, kills = random.Random(0), 0
    for _ in range(200):
        process = dying.start(dying.keep_changing, folder, acknowledged)
        process.join(moments.uniform(0.01, 0.12) if kills < 30 else None)
        ended = process.exitcode == 0
        kills += not ended
        process.kill()
        process.join()
        done = len(acknowledged.read_text().splitlines()) if acknowledged.exists() else 0
        held = contents(folder, model)
        assert set(held or {}) in (dying.ids_after(done), dying.ids_after(done + 1))
        if held:
            assert_searches_as_brute_force(folder, model)
        if ended:
            break
    assert kills == 30
    assert done == len(dying.PLAN)

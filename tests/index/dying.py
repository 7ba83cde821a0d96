"""Changes of an index in processes that die in the middle of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hash_model import make_hash_model

from sentence_vipyloqwen.index import EmbedOptions, VectorIndex

KILLED = 9
PRELOAD = ("sentence_transformers", "sentence_vipyloqwen.index", "dying")
_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}

Work = Callable[[Path], Any]


def items(*numbers: int, version: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"{n:03}", "text": f"mục {n} bản {version}", "metadata": {"version": version}} for n in numbers]


def build(folder: Path, *numbers: int) -> None:
    some = items(*(numbers or range(12)))
    VectorIndex.build(make_hash_model(), some, folder, EmbedOptions(shard_rows=4), kind="HNSW", overwrite=True)


def rebuild(folder: Path) -> None:
    build(folder, *range(4), 90, 91)


def add(folder: Path) -> None:
    VectorIndex.load(folder, make_hash_model()).add(items(*range(20, 26)), EmbedOptions(shard_rows=4))


def update(folder: Path) -> None:
    VectorIndex.load(folder, make_hash_model()).update(items(1, 2, 50, version=1), EmbedOptions(shard_rows=2))


def remove(folder: Path) -> None:
    VectorIndex.load(folder, make_hash_model()).remove(["003", "007"])


def compact(folder: Path) -> None:
    VectorIndex.load(folder, make_hash_model()).compact()


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    process = context.Process(target=target, args=args)
    process.start()
    return process


def die_at_event(work: Work, folder: Path, number: int) -> None:
    """Do a piece of work and die, without any cleaning up, at its n-th change to what is in a folder."""
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _CHANGES and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os._exit(KILLED)

    sys.addaudithook(audit)
    work(folder)


def keep_changing(folder: Path, acknowledged: Path) -> None:
    """Go through a plan of changes, from where the record of those acknowledged ends, and record each that returns."""
    done = len(acknowledged.read_text().splitlines()) if acknowledged.exists() else 0
    for step in range(done, len(PLAN)):
        PLAN[step](folder)
        with acknowledged.open("a") as file:
            file.write(f"{step}\n")
            file.flush()
            os.fsync(file.fileno())


def _add_some(first: int) -> Work:
    return lambda folder: VectorIndex.load(folder, make_hash_model()).update(
        items(*range(first, first + 9)), EmbedOptions(shard_rows=2)
    )


def _remove_some(first: int) -> Work:
    def work(folder: Path) -> None:
        index = VectorIndex.load(folder, make_hash_model())
        gone = {f"{n:03}" for n in range(first, first + 3)} & {item["id"] for item in index.items}
        if gone:
            index.remove(sorted(gone))

    return work


ROUNDS = 20
PLAN: list[Work] = [build]
for _round in range(ROUNDS):
    PLAN += [_add_some(100 + 10 * _round), _remove_some(100 + 10 * _round), compact]


def ids_after(steps: int) -> set[str]:
    """The ids of an index after so many steps of the plan; a step may be run twice."""
    ids = {f"{n:03}" for n in range(12)} if steps else set()
    for step in range(1, steps):
        first = 100 + 10 * ((step - 1) // 3)
        if (step - 1) % 3 == 0:
            ids |= {f"{n:03}" for n in range(first, first + 9)}
        elif (step - 1) % 3 == 1:
            ids -= {f"{n:03}" for n in range(first, first + 3)}
    return ids

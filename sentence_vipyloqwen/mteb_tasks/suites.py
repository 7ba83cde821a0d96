"""The tasks by name: each of `mteb`'s, ours, and lists of them for what these models are made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import mteb
from mteb.abstasks import AbsTask

from sentence_vipyloqwen.mteb_tasks.offline import OFFLINE_TASKS

VIETNAMESE = ["vie"]
MMEB_TASKS = (
    "CIRRIT2IRetrieval",
    "EDIST2ITRetrieval",
    "FashionIQIT2IRetrieval",
    "MSCOCOI2TRetrieval",
    "MSCOCOT2IRetrieval",
    "NIGHTSI2IRetrieval",
    "OKVQAIT2TRetrieval",
    "OVENIT2ITRetrieval",
    "VisualNewsI2TRetrieval",
    "VisualNewsT2IRetrieval",
    "WebQAT2ITRetrieval",
)
"""What `mteb` has of the retrieval and question answering data sets of MMEB (Jiang et al. 2024, arXiv 2410.05160)."""


def _of_benchmark(name: str) -> Callable[[], Sequence[AbsTask]]:
    return lambda: list(mteb.get_benchmark(name).tasks)


def _of_names(names: Iterable[str], languages: Sequence[str] | None = None) -> Callable[[], Sequence[AbsTask]]:
    return lambda: [mteb.get_task(name, languages=languages) for name in names]


SUITES: Mapping[str, Callable[[], Sequence[AbsTask]]] = {
    "offline": lambda: [task() for task in OFFLINE_TASKS.values()],
    "vn-mteb": _of_benchmark("VN-MTEB (vie, v1)"),
    "vidore-v1": _of_benchmark("ViDoRe(v1)"),
    "vidore-v2": _of_benchmark("ViDoRe(v2)"),
    "vidore-v3": _of_benchmark("ViDoRe(v3)"),
    "xm3600-vi": _of_names(("XM3600T2IRetrieval", "XM3600I2TRetrieval"), VIETNAMESE),
    "mmeb": _of_names(MMEB_TASKS),
}
"""Name of a list -> what makes its tasks. All but ``offline`` download their data from the Hugging Face Hub."""


def find_tasks(names: Iterable[str]) -> list[AbsTask]:
    """The tasks of names: of a list of `SUITES`, of ours, or any of `mteb`'s; each once.

    Raises:
        ValueError: If there is no task of a name; the message says what there is.
    """
    found: dict[str, AbsTask] = {}
    for name in names:
        for task in _find(name):
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def _find(name: str) -> Sequence[AbsTask]:
    if name in SUITES:
        return SUITES[name]()
    if name in OFFLINE_TASKS:
        return [OFFLINE_TASKS[name]()]
    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        raise ValueError(
            f"Unknown task {name!r} ({error.args[0]}); allowed are the lists {', '.join(SUITES)}, "
            f"our own tasks {', '.join(OFFLINE_TASKS)}, and every task of mteb."
        ) from error

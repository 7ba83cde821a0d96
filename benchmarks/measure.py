"""Fair timing of two sides, their peak memory, and our share of the machine's matrix-product rate."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil
from flops import MatrixProducts, Work
from sentence_transformers import SentenceTransformer
from torch import nn

from sentence_vipyloqwen import ViPyloQwen

MEGABYTE = 1e6
SAMPLE_SECONDS = 0.002
LOWEST_COSINE = 0.9999
COLUMNS = (
    "inputs",
    "rows",
    "times faster",
    "stock, s",
    "ours, s",
    "tokens, stock / ours",
    "stock, MB",
    "ours, MB",
    "useful TFLOP",
    "share of rate",
    "lowest cosine",
)

Jobs = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison.

    Attributes:
        name: What was compared on.
        rows: How many rows it has.
        seconds: Side -> seconds of each round.
        tokens: Side -> tokens that its language model computed, padding among them.
        megabytes: Side -> peak memory.
        work: Our useful work.
        rates: For each round, operations a second of bare matrix products of the two towers' shapes.
        cosine: The lowest cosine of what the two sides compute.
    """

    name: str
    rows: int
    seconds: Mapping[str, Sequence[float]]
    tokens: Mapping[str, int]
    megabytes: Mapping[str, float]
    work: Work
    rates: Sequence[Work]
    cosine: float

    def times_faster(self, side: str = "ours") -> list[float]:
        """Stock's seconds over those of a side, round by round."""
        return [stock / other for stock, other in zip(self.seconds["stock"], self.seconds[side], strict=True)]

    def shares(self) -> list[float]:
        """For each round: the time that our useful work takes as bare matrix products, over the time that we took."""
        return [self.work.seconds(rates) / taken for rates, taken in zip(self.rates, self.seconds["ours"], strict=True)]

    def line(self) -> list[Any]:
        """Its cells of the table, in the order of :data:`COLUMNS`."""
        sides = ("stock", "ours")
        return [
            self.name,
            self.rows,
            spread(self.times_faster()),
            *(f"{median(self.seconds[side]):.2f}" for side in sides),
            f"{self.tokens['stock'] / self.tokens['ours']:.2f}",
            *(f"{self.megabytes[side]:.0f}" for side in sides),
            f"{(self.work.language + self.work.vision) / 1e12:.3f}",
            f"{median(self.shares()):.0%}",
            f"{self.cosine:.6f}",
        ]


def timed(jobs: Jobs, model: ViPyloQwen, rounds: int) -> tuple[dict[str, list[float]], list[Work]]:
    """Time jobs in turn, with bare matrix products of the model's shapes among them.

    Args:
        jobs: What to time.
        model: Its float32 weights are multiplied.
        rounds: How often.

    Returns:
        Job -> seconds of each round, and for each round the rates of the products, in operations a second.
    """
    transformer = model[0].model
    layers = {"language": transformer.language_model.layers[0], "vision": transformer.visual.blocks[0]}
    products = {tower: MatrixProducts(layer) for tower, layer in layers.items()}
    interleave(products, rounds=1)
    seconds = interleave({**jobs, **products}, rounds)
    rates = {tower: [job.flops / taken for taken in seconds.pop(tower)] for tower, job in products.items()}
    return seconds, [Work(*of_round) for of_round in zip(rates["language"], rates["vision"], strict=True)]


def describe_rates(results: Sequence[Result]) -> str:
    """The median rates of matrix products over the rounds of several results, for the report's notes."""
    rates = [rate for result in results for rate in result.rates]
    language, vision = (median(getattr(rate, tower) for rate in rates) for tower in ("language", "vision"))
    return (
        f"float32 matrix products: {language / 1e9:.0f} GFLOP/s in shapes of the language model, "
        f"{vision / 1e9:.0f} in those of the vision tower"
    )


def spread(values: Sequence[float]) -> str:
    """Median and, in brackets, lowest and highest.

    >>> spread([3.0, 2.0, 2.5])
    '2.50 (2.00-3.00)'
    """
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def interleave(jobs: Jobs, rounds: int) -> dict[str, list[float]]:
    """Time jobs in turn, in the other order in every second round, so that drift of the machine hits all alike.

    Returns:
        Job -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name in list(jobs)[:: -1 if turn % 2 else 1]:
            gc.collect()
            start = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class PeakMemory:
    """Context manager: how far the resident set of this process rises above where it stood.

    A thread samples it every 2 ms. Memory that was freed before is handed back to the system first (glibc's
    ``malloc_trim``), or it would be used again unseen.

    Attributes:
        megabytes: The rise, in units of 10^6 bytes.
    """

    megabytes = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        self._done = threading.Event()
        self._start = psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(SAMPLE_SECONDS):
            self._record(process)
        self._record(process)

    def _record(self, process: psutil.Process) -> None:
        self.megabytes = max(self.megabytes, (process.memory_info().rss - self._start) / MEGABYTE)


class CountTokens:
    """Context manager: how many tokens the language model of a side computes, padding among them.

    Args:
        model: The model, of either side.

    Attributes:
        tokens: The count.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.tokens = 0
        self._language_model = model[0].model.language_model

    def __enter__(self) -> CountTokens:
        self._hook = self._language_model.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[:-1].numel()


def warm_up(jobs: Jobs) -> tuple[dict[str, Any], dict[str, float]]:
    """Run each job once: what it returns, and its peak memory in megabytes."""
    results, peaks = {}, {}
    for name, job in jobs.items():
        with PeakMemory() as memory:
            results[name] = job()
        peaks[name] = memory.megabytes
    return results, peaks


def lowest_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """The least cosine of two sides' vectors, (N, D) each, row by row."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())


def check_agreement(what: str, cosine: float) -> None:
    """Raise if two sides do not compute the same: their times would mean nothing.

    Raises:
        RuntimeError: If the cosine is below 0.9999.
    """
    if not cosine >= LOWEST_COSINE:
        raise RuntimeError(f"{what}: the sides disagree, cosine {cosine:.6f}; at least {LOWEST_COSINE} is expected.")

"""Run a function on several gloo ranks, each a process of its own; nothing hangs longer than its time-out."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers.utils.logging import disable_progress_bar

PRELOAD = ("accelerate", "peft", "sentence_transformers", "sentence_vipyloqwen.cli", "rank_workers")


class RanksFailed(RuntimeError):
    """A rank raised; the message is its traceback."""


class RanksHung(RuntimeError):
    """The ranks did not end in time."""


def run_ranks(
    folder: Path,
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    timeout: float = 120,
    patience: float = 60,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on every rank of a gloo group.

    Args:
        folder: An empty folder for the results.
        function: A function of a module on `sys.path`, as the ranks import it.
        *args: Its arguments.
        ranks: How many processes.
        timeout: Seconds until they are killed.
        patience: Seconds that a rank waits for the others in a collective operation before it raises.
        **kwargs: Its further arguments.

    Returns:
        What each rank returned.

    Raises:
        RanksFailed: If a rank raised.
        RanksHung: If one did not end in time.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, then forks: starting a rank costs no import
    context.set_forkserver_preload(list(PRELOAD))
    place = _free_port(), ranks, patience, folder
    processes = [
        context.Process(target=_run_rank, args=(rank, *place, partial(function, *args, **kwargs)))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        ended = _wait(processes, timeout)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    if failures := sorted(folder.glob("*.error")):
        raise RanksFailed("\n".join([f"exit codes {codes}", *(path.read_text() for path in failures)]))
    if any(codes):
        raise RanksFailed(f"exit codes {codes}")
    if not ended:
        raise RanksHung(f"not ended after {timeout} s")
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(ranks)]


def _wait(processes: Sequence[BaseProcess], timeout: float) -> bool:
    """Wait until all have ended, one has failed, or the time is up: then false."""
    deadline = time.monotonic() + timeout
    running = list(processes)
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        if any(process.exitcode for process in running):
            return True
        running = [process for process in running if process.exitcode is None]
    return not running


def _run_rank(rank: int, port: int, ranks: int, patience: float, folder: Path, function: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun has it; accelerate would set more threads than there are cores
    try:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=patience))
        torch.save(function(), folder / f"{rank}.result")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"Rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

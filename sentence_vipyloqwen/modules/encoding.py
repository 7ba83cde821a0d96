"""The loop behind ``encode``: batch by batch, the next one prepared meanwhile, smaller ones where memory runs out."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from sentence_vipyloqwen.modules.batching import Load, PlannedImage, PlannedRow, plan_batches
from sentence_vipyloqwen.modules.distinct import distinct_inputs
from sentence_vipyloqwen.modules.inputs import ParsedInput
from sentence_vipyloqwen.modules.patches import ImagePatchCache
from sentence_vipyloqwen.modules.qwen2_vl import Qwen2VLTransformer
from sentence_vipyloqwen.modules.rendering import RenderedInput

logger = logging.getLogger(__name__)

Features: TypeAlias = dict[str, Any]
Item, Prepared = TypeVar("Item"), TypeVar("Prepared")

_OUT_OF_MEMORY = ("not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What a ``RuntimeError`` says when memory runs out and accelerate does not know it: on Windows, in cuBLAS."""


def embed(
    inputs: Sequence[ParsedInput],
    transformer: Qwen2VLTransformer,
    forward: Callable[[Features], Tensor],
    budget: Load,
    max_length: int,
    report: Callable[[int], object],
    ahead: bool = True,
) -> list[Tensor]:
    """Embed inputs, each different one once.

    1. Merge equal inputs and render those that are left, which reads the headers of their images.
    2. Plan batches within the budget.
    3. Run one batch after the other, while a thread may open the images of the next one and plan its packed
       sequence.
    4. Where memory runs out, halve the budget and plan anew what is not done yet.
    5. Give each input its vector.

    Args:
        inputs: N inputs.
        transformer: What renders and collates them.
        forward: Turns the features of B rows into their vectors (B, D).
        budget: The most that a batch may hold.
        max_length: Most tokens of an input.
        report: Called after each batch with the number of inputs whose vectors it gave.
        ahead: Whether a thread prepares the next batch meanwhile. Not where the model runs on the CPU: it needs every
            core itself, and a thread that takes turns with it was measured to cost up to a sixth of the time.

    Returns:
        N vectors (D,), in the order of the inputs.

    Raises:
        ValueError: If an image cannot be read; what its header shows is found before anything is computed.
        RuntimeError, MemoryError: If memory does not suffice for one input alone; the message names its position.
    """
    distinct = distinct_inputs(inputs)  # 1
    rows = transformer.render(distinct.inputs, max_length)
    merge_size = transformer.image_processor.merge_size
    planned = [_planned(row, keys, merge_size) for row, keys in zip(rows, distinct.image_keys, strict=True)]
    repeats, cache = Counter(distinct.places), ImagePatchCache()
    vectors: dict[int, Tensor] = {}

    def keep(batch: list[int], embeddings: Tensor) -> None:
        vectors.update(zip(batch, embeddings, strict=True))
        report(sum(repeats[place] for place in batch))

    while waiting := {place: row for place, row in enumerate(planned) if place not in vectors}:
        batches = plan_batches(waiting, budget)  # 2
        prepared = (prepared_ahead if ahead else prepared_in_turn)(
            lambda batch: transformer.collate_packed([rows[place] for place in batch], cache), batches
        )
        failed = _run(rows, prepared, forward, keep)  # 3
        if failed:
            budget = _smaller(budget, {place: planned[place] for place in failed})  # 4
    return [vectors[place] for place in distinct.places]  # 5


def prepared_ahead(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Generator[tuple[Item, Future[Prepared]], None, None]:
    """Prepare items in one thread, one of them ahead of the caller; the first, which nothing runs beside, without it.

    Args:
        prepare: What is done with an item; what it raises, the item's future raises.
        items: The items.

    Yields:
        Each item and its future. The thread ends with the iteration, also when that is closed early.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
    ahead: deque[tuple[Item, Future[Prepared]]] = deque()
    try:
        for item in items:
            ahead.append((item, thread.submit(prepare, item) if ahead else _at_once(prepare, item)))
            if len(ahead) > 1:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def prepared_in_turn(
    prepare: Callable[[Item], Prepared], items: Iterable[Item]
) -> Generator[tuple[Item, Future[Prepared]], None, None]:
    """As :func:`prepared_ahead`, but each item when its turn comes, without a thread."""
    for item in items:
        yield item, _at_once(prepare, item)


def _at_once(prepare: Callable[[Item], Prepared], item: Item) -> Future[Prepared]:
    future: Future[Prepared] = Future()
    try:
        future.set_result(prepare(item))
    except Exception as error:
        future.set_exception(error)
    return future


def _planned(row: RenderedInput, keys: Sequence[str], merge_size: int) -> PlannedRow:
    grids = zip(keys, row.grids, strict=True)
    images = tuple(PlannedImage(key, high * wide // merge_size**2 + 2, high * wide) for key, (high, wide) in grids)
    text_tokens = len(row.token_ids) - sum(image.tokens for image in images)
    return PlannedRow(images, text_tokens, content=(row.source.task.name, row.source.text))


def _run(
    rows: Sequence[RenderedInput],
    prepared: Generator[tuple[list[int], Future[Features]], None, None],
    forward: Callable[[Features], Tensor],
    keep: Callable[[list[int], Tensor], None],
) -> list[int] | None:
    """Run batches; return the one for which memory did not suffice, if any."""
    with closing(prepared):
        for batch, features in prepared:
            try:
                embeddings = forward(features.result())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise type(error)(f"Input {rows[batch[0]].source.index} alone is too large: {error}") from error
                return batch
            keep(batch, embeddings)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def _smaller(budget: Load, failed: Mapping[int, PlannedRow]) -> Load:
    load, budget = Load.of(failed.values()), budget.halved(failed)
    logger.warning(
        f"Memory ran out with {load.rows} inputs of {load.tokens} tokens and {load.patches} patches; going on with "
        f"token_budget={budget.tokens}, patch_budget={budget.patches}, batch_size={budget.rows}."
    )
    clear_device_cache(garbage_collection=True)
    return budget

"""What a person is told when a step does not fit into memory: how large its batch was, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_vipyloqwen.errors import first_line
from sentence_vipyloqwen.modules.closed_images import CLOSED_IMAGES, ROW_INDEX
from sentence_vipyloqwen.modules.encoding import is_out_of_memory
from sentence_vipyloqwen.train.recipe import Recipe

_MASK, _GRIDS = "attention_mask", "image_grid_thw"
_SIZES = (_MASK, _GRIDS, CLOSED_IMAGES, ROW_INDEX)


class OutOfMemory(RuntimeError):
    """A step of a training does not fit into memory; the message says what to change."""


@dataclass(frozen=True)
class BatchSize:
    """How large a batch is, all columns together.

    Attributes:
        rows: Rows of a column.
        columns: Anchors, positives and negatives.
        tokens: Tokens without padding, image tokens among them.
        images: Images; one that several rows show counts in each.
        patches: Their patches.
    """

    rows: int
    columns: int
    tokens: int
    images: int
    patches: int

    @classmethod
    def of(cls, columns: Sequence[Mapping[str, Any]]) -> BatchSize:
        """That of a batch's features; on the CPU, as an accelerator has no room left."""
        grids = [grid for features in columns for grid in _grids(features)]
        tokens = sum(int(features[_MASK].cpu().sum()) for features in columns)
        patches = sum(down * across for down, across in grids)
        return cls(len(columns[0][_MASK]), len(columns), tokens, len(grids), patches)

    def __str__(self) -> str:
        """In words.

        >>> str(BatchSize(24, 2, 12345, 3, 7200))
        '24 rows in 2 columns, 12,345 tokens, 3 images (7,200 patches)'
        """
        return (
            f"{self.rows:,} rows in {self.columns} columns, {self.tokens:,} tokens, "
            f"{self.images:,} images ({self.patches:,} patches)"
        )


def _grids(features: Mapping[str, Any]) -> list[tuple[int, int]]:
    if CLOSED_IMAGES in features:
        return [grid for row in features[CLOSED_IMAGES].at(features[ROW_INDEX]) for grid in row.grids]
    return [(down, across) for _, down, across in features[_GRIDS].tolist()] if _GRIDS in features else []


class MemoryAdvice(TrainerCallback):
    """Knows the batch of the step under way, to name it where memory does not suffice.

    Args:
        loss: The loss that is trained; what it is called with is looked at.
        recipe: The settings, to say which of them to change.
    """

    def __init__(self, loss: nn.Module, recipe: Recipe) -> None:
        self.loss, self.recipe = loss, recipe
        self._step: int | None = None
        self._columns: list[dict[str, Any]] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step is under way."""
        self._step = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is done; memory that runs out now does not in a batch."""
        self._step, self._columns = None, []

    def _look(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Keep what tells a batch's size, and let its pixels go."""
        self._columns = [{name: of[name] for name in _SIZES if name in of} for of in arguments[0]]

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Name the batch in an error for want of memory.

        Raises:
            OutOfMemory: If memory did not suffice for a batch.
        """
        hook = self.loss.register_forward_pre_hook(self._look)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self._step is None or not self._columns:
                raise
            raise OutOfMemory(
                f"memory does not suffice for step {self._step}, whose batch has {BatchSize.of(self._columns)}. "
                f"What helps: {'; '.join(advice(self.recipe))}. ({first_line(error)})"
            ) from error
        finally:
            hook.remove()


def advice(recipe: Recipe) -> list[str]:
    """What to change in a recipe so that a step takes less memory, the cheapest first.

    >>> from sentence_vipyloqwen.train.recipe import Recipe
    >>> advice(Recipe(base="b", train=("t",), output="o", loss_mini_batch_tokens=4096, gradient_checkpointing=True))[0]
    'fewer loss_mini_batch_tokens (now 4096)'
    """
    found = []
    if recipe.loss_mini_batch_tokens:
        found.append(f"fewer loss_mini_batch_tokens (now {recipe.loss_mini_batch_tokens})")
    elif recipe.loss_mini_batch_size:
        found.append(f"a smaller loss_mini_batch_size (now {recipe.loss_mini_batch_size}), or loss_mini_batch_tokens")
    else:
        found.append("loss_mini_batch_tokens, such as 4096: so many tokens run at once, all rows are still contrasted")
    if not recipe.gradient_checkpointing:
        found.append("gradient_checkpointing: true")
    found.append(f"a smaller batch_size (now {recipe.batch_size}) with more accumulation, or a smaller max_pixels")
    return found

"""What the loss reads off the features of a batch: the task of each row and a key for its content.

Works on the features of our own modules and of stock Sentence Transformers alike; everything stays on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sentence_vipyloqwen.modules.rendering import ControlTokens
from sentence_vipyloqwen.tasks import ALL_TASKS, GENERAL

_TOKEN_FEATURES = ("input_ids", "attention_mask", "mm_token_type_ids")
TASK_INDEX: Mapping[str, int] = {name: index for index, name in enumerate(ALL_TASKS)}

# Odd 64-bit constants of the splitmix64 generator (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195), as
# int64; products wrap, and torch's signed shift serves as well for mixing.
_GOLDEN, _MIX_1, _MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class BatchRows:
    """What routing needs to know of B rows with N explicit negatives each.

    Attributes:
        tasks: (B,) position of each row's task in ``ALL_TASKS``.
        anchor_keys: (B,) content keys.
        positive_keys: (B,) content keys.
        negative_keys: (B, N) content keys.
        scores: (B,) scores in [0, 1]; NaN where a row has none.
    """

    tasks: Tensor
    anchor_keys: Tensor
    positive_keys: Tensor
    negative_keys: Tensor
    scores: Tensor


def task_indices(features: Mapping[str, Tensor], control: ControlTokens) -> Tensor:
    """The task of each row: that of the token which follows the images.

    Args:
        features: ``input_ids`` and ``attention_mask`` (B, L), padded on either side.
        control: Ids of the control tokens.

    Returns:
        (B,) int64 positions in ``ALL_TASKS``; the task without a prefix where no prefix stands at the head.
    """
    ids = features["input_ids"]
    token = ids.gather(1, _heads(features, control))
    tokens = torch.tensor(list(control.tasks.values()), device=ids.device)
    indices = torch.tensor([TASK_INDEX[name] for name in control.tasks], device=ids.device)
    match = token == tokens  # (B, 5)
    return torch.where(match.any(dim=1), indices[match.int().argmax(dim=1)], TASK_INDEX[GENERAL.name])


def _heads(features: Mapping[str, Tensor], control: ControlTokens) -> Tensor:
    """(B, 1) place of each row's first text token; 0 in a row of images alone."""
    ids = features["input_ids"]
    image_parts = torch.tensor([control.vision_start, control.image_pad, control.vision_end], device=ids.device)
    is_text = features["attention_mask"].bool() & ~torch.isin(ids, image_parts)
    return is_text.int().argmax(dim=1, keepdim=True)


def hide_prefixes(features: Mapping[str, Any], control: ControlTokens, tasks: Collection[str]) -> dict[str, Any]:
    """The features of a column without the prefixes of some tasks, as if they had never been written.

    Args:
        features: Those of B rows, padded on either side.
        control: Ids of the control tokens.
        tasks: Tasks that have a prefix.

    Returns:
        The same features; in rows of these tasks, the prefix gave way to one more token of padding.
    """
    hidden = torch.tensor([TASK_INDEX[name] for name in tasks], device=features["input_ids"].device)
    of_row = torch.isin(task_indices(features, control), hidden)  # (B,)
    places = torch.arange(features["input_ids"].shape[1], device=of_row.device)
    gone = of_row[:, None] & (places == _heads(features, control))  # (B, L)
    padded_left = features["attention_mask"][:, :1] == 0
    order = (gone ^ padded_left).int().argsort(dim=1, stable=True)  # (B, L): the prefix goes to the padding's side
    tokens = {**features, "attention_mask": features["attention_mask"] * ~gone}
    return {**features, **{name: tokens[name].gather(1, order) for name in _TOKEN_FEATURES if name in features}}


def content_keys(features: Mapping[str, Tensor]) -> Tensor:
    """A 64-bit key of each row's content: equal for equal tokens and equal images, and, but for chance, only then.

    Args:
        features: ``input_ids``, ``attention_mask`` and ``image_keys`` or the stock ``pixel_values``, ``image_grid_thw``
            and ``num_images_per_sample``.

    Returns:
        (B,) int64 keys.
    """
    mask = features["attention_mask"].long()
    position = mask.cumsum(dim=1) * mask  # 1-based among real tokens, so that padding on either side is the same
    keys = _mix(features["input_ids"], position) * mask
    return keys.sum(dim=1) + _image_part(features)


def _image_part(features: Mapping[str, Tensor]) -> Tensor | int:
    if "image_keys" in features:
        keys = features["image_keys"]
        column = torch.arange(1, keys.shape[1] + 1, device=keys.device)
        return (_mix(keys, -column) * (keys != 0)).sum(dim=1)
    if "pixel_values" in features:
        return _pixel_part(features)
    return 0


def _pixel_part(features: Mapping[str, Tensor]) -> Tensor:
    pixels = features["pixel_values"].float().contiguous().view(torch.int32)  # (P, C): the bits of each value
    column = torch.arange(pixels.shape[1], device=pixels.device)
    patches = (pixels * _mix(column, column)).sum(dim=1)  # (P,)
    images_per_row = features["num_images_per_sample"]
    patches_per_image = features["image_grid_thw"].prod(dim=1)
    row_of_image = torch.repeat_interleave(torch.arange(len(images_per_row), device=pixels.device), images_per_row)
    row_of_patch = torch.repeat_interleave(row_of_image, patches_per_image)
    first = torch.searchsorted(row_of_patch, torch.arange(len(images_per_row), device=pixels.device))
    position = torch.arange(len(patches), device=pixels.device) - first[row_of_patch]
    zeros = torch.zeros(len(images_per_row), dtype=torch.int64, device=pixels.device)
    return zeros.index_add(0, row_of_patch, _mix(patches, -1 - position))


def _mix(value: Tensor, position: Tensor) -> Tensor:
    """Scatter (value, position) pairs over 64 bits: two rounds of multiply and shift."""
    mixed = value * _MIX_2 + position * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    return mixed ^ (mixed >> 31)


def select_rows(features: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The features of some rows of a column, in the order given.

    Args:
        features: Those of B rows; patches lie one behind the other, as do images.
        rows: Places among the B.

    Returns:
        The features, images and patches of those rows alone, copied; without image features where none has an image.
    """
    places = torch.as_tensor(rows, device=features["input_ids"].device)
    picks: dict[str, Tensor] = {}
    if "pixel_values" in features:
        images = _spans(features["num_images_per_sample"], places)
        patches = _spans(features["image_grid_thw"].prod(dim=1), images)
        picks = {"image_grid_thw": images, "pixel_values": patches}
    wanted = {key: value for key, value in features.items() if key not in picks or len(picks[key])}
    return {key: value[picks.get(key, places)] if isinstance(value, Tensor) else value for key, value in wanted.items()}


def _spans(lengths: Tensor, places: Tensor) -> Tensor:
    """Of parts that lie one behind the other, the positions that some of them cover."""
    starts, chosen = lengths.cumsum(dim=0) - lengths, lengths[places]
    shift = starts[places] - (chosen.cumsum(dim=0) - chosen)
    return torch.arange(int(chosen.sum()), device=lengths.device) + shift.repeat_interleave(chosen)

"""Packing a batch: one sequence without padding, in which what several rows share stands once.

Images come first and attention is causal, so rows that begin with the same images have the same hidden states there.
A batch is read as a forest: each image, with what text another model's template may set before it, is a step down from
the root, the text is the last step, and rows that take the same steps meet in the same node. What is then computed, for
two questions on page A, one on the pages A and B, and a text of its own that occurs twice::

    row 0   A A A A q q q            packed    w w w | A A A A | r r | q q q | B B B s s
    row 1   A A A A r r              segment   0       1         2     3       4
    row 2   A A A A B B B s s        sees      0       1         1 2   1 3     1 4
    row 3   w w w
    row 4   w w w                    row 0 = 1 + 3, row 1 = 1 + 2, row 2 = 1 + 4, rows 3 and 4 = 0

`pack` makes the plan on the CPU, with no Python step per token; `attention.py` carries out its attention. Both are
exact: a row's hidden states and gradients are those of the padded batch.

Under dropout (of attention in training, of a LoRA adapter) what rows share is computed once, and so has one dropout
mask. For each row by itself the masks are drawn as ever, so that gradients stay unbiased; but equal rows of a batch get
equal vectors, where padded ones would differ. Whoever counts on that difference sets `Qwen2VLTransformer.packed` to
False.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sentence_vipyloqwen.modules.attention import Segments

NO_KEY = 0
"""In `image_keys`: no image here, or none known, which is then like no other."""


@dataclass(frozen=True)
class Packing:
    """Where each token of a batch stands in its packed sequence of T tokens.

    Attributes:
        source: (T,) for each packed token, its place in the flattened padded batch, row * L + column.
        positions: (3, 1, T) its M-RoPE positions: time, height, width.
        vision_rows: (V,) the merged vision token that stands for each image token among the T, in their order.
        image_tokens: (V,) where these image tokens stand among the T.
        images: Which of the batch's images go through the vision tower: each once, sorted by patches.
        grids: For each of these U, its frames (1), patch rows and patch columns.
        segments: The T tokens' segments, for attention.
        row_tokens: (B, L) for each token of the padded batch, its place among the T; -1 for padding.
        row_segments: (2, E) pairs of row and segment that make up the rows.
        lengths: (B,) tokens of each row.
    """

    source: Tensor
    positions: Tensor
    vision_rows: Tensor
    image_tokens: Tensor
    images: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    segments: Segments
    row_tokens: Tensor
    row_segments: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Packing:
        """This plan on another device; what its user must know as a number is one already."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def mean(self, tokens: Tensor) -> Tensor:
        """The mean over each row's tokens.

        Args:
            tokens: (T, H) of any floating dtype; summed in float32 at least.

        Returns:
            (B, H), of the same dtype.
        """
        wide = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
        rows, segments = self.row_segments
        sums = _sum_by(self.segments.of_tokens(wide.device), wide, len(self.segments.lengths))  # (S, H)
        totals = _sum_by(rows, sums[segments], len(self.lengths))  # (B, H)
        return (totals / self.lengths[:, None]).to(tokens.dtype)

    def last(self, tokens: Tensor) -> Tensor:
        """The last token of each row: packed (T, H) to (B, H)."""
        behind = (self.row_tokens >= 0).flip(1).int().argmax(dim=1, keepdim=True)  # (B, 1) padding on the right
        return tokens[self.row_tokens.gather(1, self.row_tokens.shape[1] - 1 - behind).squeeze(1)]

    def pad(self, tokens: Tensor) -> Tensor:
        """Packed (T, H) to padded (B, L, H), zero where there is no token."""
        real = self.row_tokens >= 0  # (B, L)
        return tokens[self.row_tokens].where(real[..., None], 0)


def _sum_by(group: Tensor, values: Tensor, groups: int) -> Tensor:
    """(groups, H) sums of the (N, H) values of each group."""
    return torch.index_add(values.new_zeros(groups, values.shape[1]), 0, group, values)


@torch.compiler.disable  # its result depends on what the tensors hold
def pack(features: Mapping[str, Tensor], merge_size: int, image_pad: int) -> Packing:
    """Plan the packed sequence of a batch.

    1. Read the images: where they stand in their rows, which are the same.
    2. Give every token its M-RoPE position, and every image token its merged vision token.
    3. Grow the forest of segments from the rows' images and texts.
    4. Lay the segments out one behind the other, and map the padded batch onto them.

    Args:
        features: ``input_ids`` and ``attention_mask`` (B, L), padded on one side; for images
            ``image_grid_thw`` (I, 3), ``num_images_per_sample`` (B,) and ``image_keys`` (B, K), without which every
            image is taken for another. Images of one key and one size are taken for the same, unseen.
        merge_size: Patches a side that make one vision token.
        image_pad: Id of the token that stands for one.

    Raises:
        ValueError: If a feature is missing, if a row has no token or its attention mask has a hole, or if the image
            tokens of a row are not those of its images.
    """
    required = ("attention_mask", *(["num_images_per_sample"] if "image_grid_thw" in features else []))
    if missing := [name for name in required if name not in features]:
        raise ValueError(f"The features have no {' and no '.join(missing)}; they have {sorted(features)}.")
    device = features["input_ids"].device
    heads, lengths = _extents(features["attention_mask"].cpu().numpy())
    ids = _roll(features["input_ids"].cpu().numpy(), heads)  # (B, L), padded on the right
    images = _Images.of(features, merge_size)  # 1
    columns = _columns(ids, images, image_pad)
    positions, vision = _positions(ids.shape, images, columns), _vision_rows(ids.shape, images, columns)  # 2
    forest = _grow(ids, lengths, images, columns)  # 3
    return _lay_out(forest, heads, lengths, positions, vision, images, device)  # 4


def _extents(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) the column of each row's first token, and (B,) its tokens, which stand in one stretch."""
    real = mask != 0  # (B, L)
    heads, lengths = real.argmax(axis=1), real.sum(axis=1)
    stretch = _roll(np.arange(real.shape[1]) < lengths[:, None], -heads)
    for wrong, what in ((lengths == 0, "has no token"), ((real != stretch).any(axis=1), "has a hole")):
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"The attention mask of row {row} {what}; allowed is one stretch of tokens, at least one.")
    return heads, lengths


def _roll(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    """(B, L) with each row moved to the left by a number of columns of its own.

    >>> _roll(np.array([[0, 0, 7], [8, 9, 0]]), np.array([2, 0]))
    array([[7, 0, 0],
           [8, 9, 0]])
    """
    columns = np.arange(rows.shape[1])
    return np.take_along_axis(rows, (columns + by[:, None]) % max(1, len(columns)), axis=1)


# --- 1. images ---


@dataclass(frozen=True)
class _Images:
    """The I images of a batch, in the order of their rows.

    Attributes:
        rows: (I,) the row of each.
        patches: (I, 2) its patches: down, across.
        grids: (I, 2) its merged vision tokens: down, across.
        unique: (I,) its place among the different images, which are sorted by size.
        first: (U,) for each different image, the first of the I that shows it.
        starts: (U,) where its merged tokens begin in the vision tower's output.
    """

    rows: np.ndarray
    patches: np.ndarray
    grids: np.ndarray
    unique: np.ndarray
    first: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, features: Mapping[str, Tensor], merge_size: int) -> _Images:
        if "image_grid_thw" not in features:
            none = np.zeros(0, dtype=np.int64)
            return cls(none, none.reshape(0, 2), none.reshape(0, 2), none, none, none)
        counts = features["num_images_per_sample"].cpu().numpy()
        patches = features["image_grid_thw"][:, 1:].cpu().numpy()
        grids = patches // merge_size
        shown = np.column_stack([_keys(features), patches])  # one key with two sizes: two images
        _, first, unique = np.unique(shown, axis=0, return_index=True, return_inverse=True)
        sizes = grids.prod(axis=1)
        order = np.lexsort((first, sizes[first]))  # images of one size lie together, in their own order
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        starts = np.cumsum(sizes[first[order]]) - sizes[first[order]]
        rows = np.repeat(np.arange(len(counts)), counts)
        return cls(rows, patches, grids, rank[unique.reshape(-1)], first[order], starts)

    @property
    def sizes(self) -> np.ndarray:
        """(I,) merged tokens of each."""
        return self.grids.prod(axis=1)

    def sum_before(self, values: np.ndarray) -> np.ndarray:
        """(I,) the sum of `values` over the images before each in its row."""
        before = np.cumsum(values) - values
        return before - before[np.searchsorted(self.rows, self.rows)]


def content_keys(features: Mapping[str, Tensor]) -> np.ndarray:
    """(I,) the content key of each image of a batch; 0 where it has none."""
    counts = features["num_images_per_sample"].cpu().numpy()
    if "image_keys" not in features:
        return np.full(int(counts.sum()), NO_KEY)
    table = features["image_keys"].cpu().numpy()
    missing = max(0, int(counts.max()) - table.shape[1])  # a slice of a batch may have lost columns
    table = np.pad(table, ((0, 0), (0, missing)), constant_values=NO_KEY)
    return table[np.arange(table.shape[1]) < counts[:, None]]


def _keys(features: Mapping[str, Tensor]) -> np.ndarray:
    """(I,) what images go by: their content key, or where there is none a number of their own."""
    known = content_keys(features)
    return np.where(known == NO_KEY, -1 - np.arange(len(known)), known)


def _columns(ids: np.ndarray, images: _Images, image_pad: int) -> np.ndarray:
    """(I,) the column of each image's first token: its tokens stand in one stretch, after those of the image before."""
    found = ids == image_pad  # (B, L)
    made = np.bincount(images.rows, weights=images.sizes, minlength=len(ids)).astype(np.int64)  # (B,)
    if (wrong := found.sum(axis=1) != made).any():
        row = int(wrong.argmax())
        raise ValueError(f"Row {row} has {found[row].sum()} image tokens; its images make {made[row]}.")
    columns = found.nonzero()[1]
    starts = np.cumsum(images.sizes) - images.sizes
    first, last = columns[starts], columns[starts + images.sizes - 1]
    if (torn := last - first + 1 != images.sizes).any():
        raise ValueError(f"Row {images.rows[torn][0]} has text within an image; its tokens belong in one stretch.")
    return first


# --- 2. positions and vision tokens ---


def _positions(shape: tuple[int, int], images: _Images, columns: np.ndarray) -> np.ndarray:
    """(3, B, L) M-RoPE positions (Wang et al. 2024, https://arxiv.org/abs/2409.12191).

    A text token stands one behind the token before it, in all three. An image's tokens share one time; its rows and
    columns count from there, and what follows stands behind the longer side.
    """
    saved = images.sizes - images.grids.max(axis=1, initial=0)  # an image has fewer positions than tokens
    shift = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)  # an image may be the last there is
    shift[images.rows, columns + images.sizes] = saved
    positions = np.broadcast_to(np.arange(shape[1]) - shift.cumsum(axis=1)[:, :-1], (3, *shape)).copy()
    image, offset = _spread(images.sizes)
    start, width = (columns - images.sum_before(saved))[image], images.grids[image, 1]
    positions[:, images.rows[image], columns[image] + offset] = (start, start + offset // width, start + offset % width)
    return positions


def _vision_rows(shape: tuple[int, int], images: _Images, columns: np.ndarray) -> np.ndarray:
    """(B, L) the merged vision token that stands for each token; -1 for text."""
    rows = np.full(shape, -1)
    image, offset = _spread(images.sizes)
    rows[images.rows[image], columns[image] + offset] = images.starts[images.unique[image]] + offset
    return rows


def _spread(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For runs of these sizes, one behind the other: of each member, its run and its place in the run.

    >>> _spread(np.array([2, 3]))
    (array([0, 0, 1, 1, 1]), array([0, 1, 0, 1, 2]))
    """
    run = np.repeat(np.arange(len(sizes)), sizes)
    return run, np.arange(len(run)) - (np.cumsum(sizes) - sizes)[run]


# --- 3. the forest ---

_Key: TypeAlias = bytes | tuple[int, bytes, bytes]


@dataclass
class _Node:
    """A stretch of tokens that one row or several have in common, after what its ancestors hold; later a segment.

    Attributes:
        row: A row that has it.
        start: Its first column there.
        stop: One behind its last column.
        children: What follows, by image and the text around it, or by the bytes of a text.
        ends: The rows that end with it.
    """

    row: int
    start: int
    stop: int
    children: dict[_Key, _Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.stop - self.start


def _grow(ids: np.ndarray, lengths: np.ndarray, images: _Images, columns: np.ndarray) -> list[_Node]:
    """The roots of the forest: a step for each image of a row, then one for its text; equal steps meet.

    An image's step has what stands between it and the step before, and the token behind it, which closes it.
    """
    root = _Node(0, 0, 0)
    ends = columns + images.sizes
    bounds = np.searchsorted(images.rows, np.arange(len(ids) + 1))
    for row, length in enumerate(lengths):
        node = root
        for image in range(bounds[row], bounds[row + 1]):
            stop = int(min(ends[image] + 1, length, *columns[image + 1 : bounds[row + 1]][:1]))
            around = ids[row, node.stop : columns[image]].tobytes(), ids[row, ends[image] : stop].tobytes()
            node = _step(node, (int(images.unique[image]), *around), row, stop)
        if node.stop < length:
            node = _step(node, ids[row, node.stop : length].tobytes(), row, int(length))
        node.ends.append(row)
    return [_join(child) for child in root.children.values()]


def _step(node: _Node, key: _Key, row: int, stop: int) -> _Node:
    return node.children.setdefault(key, _Node(row, node.stop, stop))


def _join(node: _Node) -> _Node:
    """Join a node with its child where all its rows go on to that one: what is not shared is not cut."""
    while len(node.children) == 1 and not node.ends:
        (child,) = node.children.values()
        node = _Node(child.row, node.start, child.stop, child.children, child.ends)
    node.children = {key: _join(child) for key, child in node.children.items()}
    return node


# --- 4. the sequence ---


def _lay_out(
    forest: Sequence[_Node],
    heads: np.ndarray,
    lengths: np.ndarray,
    positions: np.ndarray,
    vision: np.ndarray,
    images: _Images,
    device: torch.device,
) -> Packing:
    nodes, parents = _in_order(forest)
    sizes = np.array([node.length for node in nodes])
    starts = np.cumsum(sizes) - sizes
    segments = Segments(tuple(sizes.tolist()), tuple(parents))
    source = np.concatenate([node.row * vision.shape[1] + np.arange(node.start, node.stop) for node in nodes])
    row_tokens, row_segments = np.full(vision.shape, -1), []
    for last, node in enumerate(nodes):
        for segment in segments.path(last) if node.ends else ():
            here = nodes[segment]
            row_tokens[node.ends, here.start : here.stop] = starts[segment] + np.arange(here.length)
            row_segments += [(row, segment) for row in node.ends]
    shown = vision.reshape(-1)[source]
    arrays = {
        "source": source + np.repeat(heads[[node.row for node in nodes]], sizes),
        "positions": positions.reshape(3, 1, -1)[:, :, source],
        "vision_rows": shown[shown >= 0],
        "image_tokens": np.flatnonzero(shown >= 0),
        "row_tokens": _roll(row_tokens, -heads),
        "row_segments": np.array(row_segments).T,
        "lengths": lengths,
    }
    on_device = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    grids = tuple((1, down, across) for down, across in images.patches[images.first].tolist())
    return Packing(**on_device, images=tuple(images.first.tolist()), grids=grids, segments=segments)


def _in_order(forest: Sequence[_Node]) -> tuple[list[_Node], list[int]]:
    """Segments as they are laid out, and the place of each one's parent (-1: none).

    First those that stand alone, by length, so that attention finds like beside like; then each family: the parent, its
    children without children by length, and the families below.
    """
    nodes: list[_Node] = []
    parents: list[int] = []

    def lay(siblings: Sequence[_Node], parent: int) -> None:
        for node in sorted(siblings, key=lambda node: (bool(node.children), node.length)):
            nodes.append(node)
            parents.append(parent)
            if node.children:
                lay(list(node.children.values()), len(nodes) - 1)

    lay(forest, -1)
    return nodes, parents

"""From a parsed input to a row of token ids: images first, then the prefix, then the text.

``<|vision_start|>`` ``<|image_pad|>`` * n ``<|vision_end|>`` for each image, the task token, the text's own tokens. The
chat template that is saved with a model renders the same from the messages of Sentence Transformers.

A model that was made elsewhere has a chat template of its own, and is shown what stock Sentence Transformers would show
it: see :func:`render_by_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.base.modality import InputFormatter
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from sentence_vipyloqwen.modules.inputs import ParsedInput
from sentence_vipyloqwen.modules.patches import Grid
from sentence_vipyloqwen.tasks import TASK_TOKENS, TASKS

VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")


@dataclass(frozen=True)
class ControlTokens:
    """The ids of the tokens that a text can never produce by itself.

    Attributes:
        vision_start: Id that opens an image.
        image_pad: Id that stands for one merged vision token.
        vision_end: Id that closes an image.
        tasks: Task name -> id of its prefix; none in a model that was made elsewhere.
    """

    vision_start: int
    image_pad: int
    vision_end: int
    tasks: dict[str, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """Look the ids up in a tokenizer.

        Raises:
            ValueError: If the tokenizer lacks one of them.
        """
        control = cls._of(tokenizer, (VISION_START, IMAGE_PAD, VISION_END, *TASK_TOKENS))
        vocabulary = tokenizer.get_vocab()
        tasks = {task.name: vocabulary[task.token] for task in TASKS.values() if task.token}
        return replace(control, tasks=tasks)

    @classmethod
    def without_tasks(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """Look the ids up for a model that knows no tasks.

        Raises:
            ValueError: If the tokenizer lacks one of them.
        """
        return cls._of(tokenizer, (VISION_START, IMAGE_PAD, VISION_END))

    @classmethod
    def _of(cls, tokenizer: PreTrainedTokenizerBase, needed: Sequence[str]) -> ControlTokens:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in needed if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer lacks the tokens {missing}: make a model of the checkpoint with ViPyloQwen.create."
            )
        return cls(vocabulary[VISION_START], vocabulary[IMAGE_PAD], vocabulary[VISION_END], {})


def has_own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model was made elsewhere: it has a chat template, which is not this package's."""
    return tokenizer.chat_template not in (None, CHAT_TEMPLATE)


def add_task_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the five prefixes to a tokenizer, in the order of the task table; tokens it has already stay as they are.

    ``lstrip`` makes white space before a prefix part of it, so that a prefix in a text and a prompt give the same ids.
    """
    tokenizer.add_tokens([AddedToken(token, lstrip=True, special=True) for token in TASK_TOKENS], special_tokens=True)


@dataclass(frozen=True, eq=False)
class RenderedInput:
    """One input as the model reads it, but for the pixels: complete in length, nothing decoded.

    Attributes:
        source: The parsed input: its images, not opened yet, and its index for errors.
        token_ids: (L,) int32, the whole row: images, prefix, text; cut to the limit.
        grids: Patch rows and patch columns of each image after resizing.
    """

    source: ParsedInput
    token_ids: np.ndarray
    grids: tuple[Grid, ...]


def render(
    inputs: Sequence[ParsedInput],
    grids: Sequence[Sequence[Grid]],
    tokenizer: PreTrainedTokenizerBase,
    control: ControlTokens,
    merge_size: int,
    max_length: int,
) -> list[RenderedInput]:
    """Render a batch to rows of token ids, unpadded.

    Only text is cut to fit ``max_length``. Control tokens written in a text are plain text.

    Args:
        inputs: The parsed inputs.
        grids: For each input, the patch rows and columns of each of its images.
        tokenizer: Tokenizer that has the task tokens.
        control: The ids of its control tokens.
        merge_size: Side of the square of patches that becomes one token.
        max_length: Most tokens of a row, images and prefix included.

    Raises:
        ValueError: If the images and the prefix of an input alone exceed ``max_length``.
    """
    texts = _tokenize([item.text for item in inputs], tokenizer)
    rows = []
    for item, of_images, text in zip(inputs, grids, texts, strict=True):
        head = _head(item, of_images, control, merge_size)
        if len(head) > max_length:
            raise ValueError(
                f"Input {item.index}: its {len(of_images)} images and prefix take {len(head)} tokens, over the limit "
                f"of {max_length}; allow more tokens (max_seq_length) or fewer pixels for each image (max_pixels)."
            )
        tail = np.array(text[: max_length - len(head)], dtype=np.int32)
        rows.append(RenderedInput(item, np.concatenate([head, tail]), tuple(of_images)))
    return rows


def _head(item: ParsedInput, grids: Sequence[Grid], control: ControlTokens, merge_size: int) -> np.ndarray:
    """The token ids of the images and the prefix."""
    parts = [_image_tokens(rows * columns // merge_size**2, control) for rows, columns in grids]
    prefix = [control.tasks[item.task.name]] if item.task.name in control.tasks else []
    return np.concatenate([*parts, np.array(prefix, dtype=np.int32)])


def _image_tokens(length: int, control: ControlTokens) -> np.ndarray:
    tokens = np.full(length + 2, control.image_pad, dtype=np.int32)
    tokens[0], tokens[-1] = control.vision_start, control.vision_end
    return tokens


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not any(texts):
        return [[] for _ in texts]
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    return encoded["input_ids"]


# --- models that were made elsewhere ---


def render_by_template(
    inputs: Sequence[ParsedInput],
    grids: Sequence[Sequence[Grid]],
    tokenizer: PreTrainedTokenizerBase,
    control: ControlTokens,
    merge_size: int,
    max_length: int,
    options: Mapping[str, Any],
) -> list[RenderedInput]:
    """Render a batch by the tokenizer's own chat template, as stock Sentence Transformers does.

    1. Make each input a message of a user, behind the prompt as the system's, and write it out by the template.
    2. Tokenize; control tokens written in a text count as such.
    3. Put an image token for each merged vision token.
    4. Cut to the limit. A row without images keeps what the template ends with, such as the token that is pooled.

    Args:
        inputs: The parsed inputs, as written.
        grids: For each input, the patch rows and columns of each of its images.
        tokenizer: The tokenizer.
        control: The ids of its control tokens.
        merge_size: Side of the square of patches that becomes one token.
        max_length: Most tokens of a row.
        options: Further arguments of the template.

    Raises:
        ValueError: If an image token is cut, or the text has image tokens of its own.
    """

    def tokenize(item: ParsedInput) -> np.ndarray:
        text = tokenizer.apply_chat_template(_conversation(item, tokenizer), tokenize=False, **options)  # 1
        return np.array(tokenizer(text)["input_ids"], dtype=np.int32)  # 2

    rows = []
    for item, of_images in zip(inputs, grids, strict=True):
        ids = tokenize(item)
        is_image = ids == control.image_pad
        if is_image.sum() != len(of_images):
            raise ValueError(
                f"Input {item.index} has {len(of_images)} images, but {is_image.sum()} image tokens where the model's "
                f"chat template has set it; allowed is one for each image: is {IMAGE_PAD} written in its text?"
            )
        repeats = np.ones_like(ids)
        repeats[is_image] = [high * wide // merge_size**2 for high, wide in of_images]
        ids = ids.repeat(repeats)  # 3
        if len(ids) > max_length:  # 4
            if (ids[max_length:] == control.image_pad).any():
                raise ValueError(
                    f"Input {item.index}: its {len(of_images)} images end beyond the limit of {max_length} tokens; "
                    "allow more tokens (max_seq_length) or fewer pixels for each image (max_pixels)."
                )
            ids = ids[:max_length]
            if not of_images:
                fillers = (tokenize(replace(item, text=text)).tolist()[::-1] for text in ("0", "1 2 3 4"))
                end = commonprefix(list(fillers))[::-1][-max_length:]
                ids[len(ids) - len(end) :] = end
        rows.append(RenderedInput(item, ids, tuple(of_images)))
    return rows


def _conversation(item: ParsedInput, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    formatter = InputFormatter("qwen2_vl", processor=tokenizer)
    parts = {"image": list(item.images)} if item.images else {}
    if item.text or not item.images:
        parts = {"text": item.text, **parts} if item.text_first else {**parts, "text": item.text}
    messages = [formatter.to_message(parts)]
    if item.prompt:
        messages = formatter.prepend_prompt_to_messages(messages, item.prompt)
    return messages[0]

from __future__ import annotations

from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.modules.inputs import parse_inputs
from sentence_vipyloqwen.modules.patches import Grid
from sentence_vipyloqwen.modules.rendering import CHAT_TEMPLATE, ControlTokens, RenderedInput, render


def row(model: ViPyloQwen, item: Any, grids: tuple[Grid, ...] = (), limit: int = 100) -> RenderedInput:
    module = model[0]
    return render(parse_inputs([item]), [grids], module.tokenizer, module.control, 2, limit)[0]


def tokens(model: ViPyloQwen, *args: Any) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(row(model, *args).token_ids.tolist())


def test_a_row_knows_its_source_and_its_grids(model: ViPyloQwen) -> None:
    rendered = row(model, {"text": "<ocr> a", "image": ["x", "y"]}, ((2, 4), (2, 2)))
    assert rendered.token_ids.dtype == np.int32
    assert rendered.token_ids.shape == (9,)
    assert rendered.grids == ((2, 4), (2, 2))
    assert rendered.source.images == ("x", "y")
    assert row(model, "a").token_ids.tolist() == model.tokenizer.encode("a")


def test_images_then_prefix_then_text(model: ViPyloQwen) -> None:
    rendered = tokens(model, {"text": "<ocr> a", "image": ["x", "y"]}, ((2, 4), (2, 2)))
    first = ["<|vision_start|>", "<|image_pad|>", "<|image_pad|>", "<|vision_end|>"]
    assert rendered == [*first, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<ocr>", "Ġa"]


def test_text_is_cut_and_images_are_not(model: ViPyloQwen) -> None:
    item = {"image": "x", "text": "<ocr>" + "a b c d " * 20}
    whole = tokens(model, item, ((2, 6),))
    assert tokens(model, item, ((2, 6),), 9) == whole[:9]
    assert tokens(model, item, ((2, 6),), 6) == whole[:6] == [*whole[:5], "<ocr>"]
    with pytest.raises(ValueError, match="Input 0: its 1 images and prefix take 6 tokens, over the limit of 5"):
        tokens(model, item, ((2, 6),), 5)


def test_control_tokens_in_a_text_are_plain_text(model: ViPyloQwen) -> None:
    control = {*model.tokenizer.all_special_tokens, "<ocr>", "<|image_pad|>"}
    rendered = tokens(model, "<instr> a <|image_pad|> <ocr> <|vision_start|> <|endoftext|>")
    assert rendered[0] == "<instr>"
    assert not control & set(rendered[1:])
    assert model.tokenizer.convert_tokens_to_string(rendered[1:]).strip().startswith("a <|image_pad|> <ocr>")


def test_the_chat_template_renders_the_same_text() -> None:
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    user = [{"type": "text", "text": "<image>a"}, {"type": "image", "image": "x"}, {"type": "image", "image": "y"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "<ocr> "}]},
        {"role": "user", "content": user},
        {"role": "user", "content": "b<image>"},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert template.render(messages=messages) == image + image + "<ocr> ab"


def test_a_tokenizer_without_the_task_tokens_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match=r"lacks the tokens \['<text_pair>', .*ViPyloQwen.create"):
        ControlTokens.of(AutoTokenizer.from_pretrained(base))

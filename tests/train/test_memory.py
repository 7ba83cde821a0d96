"""A step that memory does not suffice for ends with its batch and with what to change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerControl, TrainerState

from sentence_vipyloqwen import PrefixRoutedLoss, ViPyloQwen, cli
from sentence_vipyloqwen.train.memory import BatchSize, MemoryAdvice, OutOfMemory
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train

Make = Callable[..., Recipe]
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB.\nAnd more."
CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize("lazy", [True, False])
def test_the_size_of_a_batch(model: ViPyloQwen, picture: Callable[..., Image.Image], lazy: bool) -> None:
    model[0].lazy_images = lazy
    anchors = [{"image": [picture(56, 84), picture(112, 56)], "text": "<ocr> a"}, {"image": picture(56, 84)}, "b"]
    columns = [model.preprocess(column) for column in (anchors, list("xyz"))]
    tokens = sum(int(features["attention_mask"].sum()) for features in columns)
    assert BatchSize.of(columns) == BatchSize(3, 2, tokens, 3, 2 * 4 * 6 + 8 * 4)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), RuntimeError(CPU), RuntimeError(CUBLAS), MemoryError()]
)
@pytest.mark.parametrize("settings", [{}, {"loss_mini_batch_size": 2, "gradient_checkpointing": True}])
def test_a_run_out_of_memory_says_what_to_change(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, settings: dict[str, Any]
) -> None:
    """In the third batch, which is that of the second step."""
    calls = []
    read_rows = PrefixRoutedLoss.read_rows

    def fail(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise error
        return read_rows(*args)

    monkeypatch.setattr(PrefixRoutedLoss, "read_rows", fail)
    with pytest.raises(OutOfMemory) as told:
        train(recipe(accumulation=2, **settings), device="cpu")
    words = str(told.value)
    assert "for step 2, whose batch has 2 rows in 2 columns, " in words or "2 rows in 3 columns, " in words
    assert "a smaller batch_size (now 2)" in words
    assert ("loss_mini_batch_tokens, such as" in words) is not bool(settings)
    assert ("loss_mini_batch_size (now 2)" in words) is bool(settings)
    assert ("gradient_checkpointing: true" in words) is not bool(settings)
    assert (str(error).splitlines() or ["MemoryError"])[0] in words
    assert "And more" not in words


def test_other_errors_stay_what_they_are(model: ViPyloQwen, recipe: Make) -> None:
    advice = MemoryAdvice(loss := PrefixRoutedLoss(model), recipe())
    state, control = TrainerState(), TrainerControl()
    advice.on_step_begin(None, state, control)
    with pytest.raises(RuntimeError, match="^shapes differ$"), advice.explaining():
        loss([model.preprocess(["a", "b"]), model.preprocess(["c", "d"])])
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="^Input 3 alone is too large"), advice.explaining():
        loss([model.preprocess(["a", "b"]), model.preprocess(["c", "d"])])
        advice.on_step_end(None, state, control)  # what follows is an evaluation
        raise RuntimeError(f"Input 3 alone is too large: {CUDA}")
    assert not loss._forward_pre_hooks


def test_the_command_line_says_it_in_a_line(
    recipe: Make, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(recipe: object, device: str | None) -> None:
        raise OutOfMemory("memory does not suffice for step 7")

    monkeypatch.setattr("sentence_vipyloqwen.train.run.train", fail)
    monkeypatch.setattr(
        sys, "argv", ["vipyloqwen", "train", "--base", "b", "--train", str(data / "train.jsonl"), "--output", "o"]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    told = capsys.readouterr().err
    assert "memory does not suffice for step 7" in told
    assert "Traceback" not in told

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, get_type_hints

import pytest
import yaml

from sentence_vipyloqwen.train.recipe import Recipe, _coerce, load_recipe, recipe_text, shipped_recipes
from sentence_vipyloqwen.train.sampling import DRAFT_CURRICULUM

NEEDED = {"base": "b", "train": "t.jsonl", "output": "o"}


def test_the_published_settings() -> None:
    recipe = load_recipe("viPyloqwen-2b.yaml", {"train": "t.jsonl", "output": "o"})
    assert recipe.base == "Qwen/Qwen2-VL-2B-Instruct"
    assert (recipe.learning_rate, recipe.schedule, recipe.warmup_ratio) == (1e-4, "cosine", 0.05)
    assert (recipe.epochs, recipe.batch_size, recipe.accumulation) == (2, 24, 8)
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.bf16) == (0.001, 1.0, True)
    assert (recipe.attn_implementation, recipe.max_seq_length) == ("flash_attention_2", 8192)
    assert (recipe.temperature, recipe.margins["ocr"], recipe.embedding_dim) == (0.07, 0.2, 1024)


def test_every_shipped_recipe_loads() -> None:
    assert shipped_recipes() == ["tiny.yaml", "viPyloqwen-2b.yaml"]
    for name in shipped_recipes():
        load_recipe(name, NEEDED)


def test_the_published_recipe_names_every_setting() -> None:
    """In force or behind a #, where each is one that a recipe takes: a newcomer needs no other page."""
    text = recipe_text("viPyloqwen-2b.yaml")
    given = {"train", "eval", "output"}  # on the command line
    for item in dataclasses.fields(Recipe):
        assert item.name in given or re.search(rf"^(# )?{item.name}:", text, re.MULTILINE), item.name
    for line in re.findall(r"^# ([a-z_0-9]+: .*)$", text, re.MULTILINE):
        setting = yaml.safe_load(line)
        needs = {"eval": "e.jsonl", "eval_steps": 1, "best_metric": "mean"} if "patience" in setting else {}
        needs |= {"eval": "e.jsonl", "eval_steps": 1} if "best_metric" in setting else {}
        load_recipe(None, {**NEEDED, **needs, **setting})
    curriculum = re.search(r"^# curriculum:\n((#   - .*\n)+)", text, re.MULTILINE)
    assert curriculum is not None
    assert len(load_recipe(None, {**NEEDED, **yaml.safe_load(curriculum[0].replace("# ", ""))}).phases()) == 3


def test_what_is_given_replaces_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**NEEDED, "epochs": 2, "learning_rate": "1e-4", "seed": 1}))
    recipe = load_recipe(file, {"epochs": 3, "margins": {"ocr": "1e-1"}, "matryoshka_dims": [64, 32]})
    assert (recipe.epochs, recipe.learning_rate, recipe.seed) == (3.0, 1e-4, 1)
    assert recipe.train == ("t.jsonl",)
    assert recipe.margins == {"ocr": 0.1}
    assert recipe.matryoshka_dims == (64, 32)


def test_what_is_given_is_taken_as_it_is() -> None:
    recipe = load_recipe(None, {"base": "0123", "train": "no", "output": "runs/a #1", "eval": "null"})
    assert (recipe.base, recipe.train, recipe.output, recipe.eval) == ("0123", ("no",), "runs/a #1", "null")


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load_recipe(None, {**NEEDED, "weights": {"ocr": {"triplet": 2.0}}, "matryoshka_dims": [4, 2]})
    assert load_recipe(None, yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 1}, r"Unknown settings \['lr'\]; allowed are \['base'"),
        ({"base": None}, r"lacks \['base'\]"),
        ({"train": []}, r"lacks \['train'\]"),
        ({"learning_rate": "fast"}, "Setting learning_rate is 'fast'; allowed is a finite number"),
        ({"learning_rate": 0}, "Setting learning_rate is 0.0; allowed is above 0"),
        ({"batch_size": 2.5}, "Setting batch_size is 2.5; allowed is of type int"),
        ({"batch_size": 0}, "Setting batch_size is 0; allowed is at least 1"),
        ({"bf16": 1}, "Setting bf16 is 1; allowed is of type bool"),
        ({"warmup_ratio": 1}, "Setting warmup_ratio is 1.0"),
        ({"embedding_dim": 0}, "Setting embedding_dim is 0; allowed is at least 1"),
        ({"keep_checkpoints": 0}, "Setting keep_checkpoints is 0; allowed is at least 1"),
        ({"max_steps": -1}, "Setting max_steps is -1; allowed is at least 0"),
        ({"save_steps": -1}, "Setting save_steps is -1; allowed is at least 0"),
        ({"eval_steps": -1}, "Setting eval_steps is -1; allowed is at least 0"),
        ({"workers": -1}, "Setting workers is -1; allowed is at least 0"),
        ({"weight_decay": -0.1}, "Setting weight_decay is -0.1; allowed is at least 0"),
        ({"adam_beta2": 1}, "Setting adam_beta2 is 1.0; allowed is between 0 and 1"),
        ({"dtype": "int8"}, "Setting dtype is 'int8'; allowed is one of .None, 'float32'"),
        ({"negatives": "none"}, "Setting negatives is 'none'; allowed is one of .'same_task', 'all'"),
        ({"pair_weight": "one"}, "Setting pair_weight is 'one'"),
        ({"triplet_scale": "one"}, "Setting triplet_scale is 'one'"),
        ({"weights": {"ocr": {"cosin": 1}}}, "Unknown term of task 'ocr': 'cosin'"),
        ({"hidden_prefixes": "general"}, "Unknown task with a prefix: 'general'"),
        ({"pooling": "cls"}, "Setting pooling is 'cls'; allowed is one of .None, 'mean', 'lasttoken', .* 'attention'"),
        ({"weights": {"ocr": 2}}, "Setting weights.ocr is 2; allowed is a mapping"),
        ({"margins": {"instr": 0.1}}, "Unknown task with a margin: 'instr'"),
        ({"margins": {"ocr": "wide"}}, "Setting margins.ocr is 'wide'; allowed is a finite number"),
        ({"sampling": "random"}, "Setting sampling is 'random'; allowed is one of"),
        ({"margins": 3}, "Setting margins is 3; allowed is a mapping"),
        ({"min_pixels": 10**9}, "Setting min_pixels is 1000000000; allowed is from 1 to max_pixels"),
        ({"max_pixels": 0}, "allowed is from 1 to max_pixels, 0"),
        ({"tuning": "half"}, "Setting tuning is 'half'; allowed is one of .'full', 'lora', 'qlora'"),
        ({"lora_r": 0}, "Setting lora_r is 0; allowed is at least 1"),
        ({"lora_dropout": 1}, "Setting lora_dropout is 1.0"),
        ({"patience": 2}, "Setting patience is 2; allowed is 0 without best_metric"),
        ({"best_metric": "mean"}, "Setting best_metric is 'mean'; allowed is one only with eval"),
        ({"best_metric": "recall@1"}, "Setting best_metric is 'recall@1'; allowed is 'mean', or a task of"),
        ({"loss_mini_batch_size": -1}, "Setting loss_mini_batch_size is -1; allowed is at least 0"),
        ({"loss_mini_batch_tokens": 0}, "Setting loss_mini_batch_tokens is 0; allowed is at least 1"),
        ({"mix": {"poetry": 1}}, "mix: got 'poetry'; allowed: "),
        (
            {"mix": {"ocr": 1}, "sampling": "round_robin"},
            "Setting sampling is 'round_robin'; allowed is 'proportional'",
        ),
        (
            {"mix": {"ocr": 1}, "mixed_batches": True},
            "Setting mixed_batches is True; allowed is False where tasks have",
        ),
        ({"mix_temperature": -1}, "Setting mix_temperature is -1.0; allowed is at least 0"),
        (
            {"curriculum": [{"until": 0.5, "mix": {"ocr": 1}}]},
            r"its phases end at \[0.5\]; allowed: rising, the last 1",
        ),
        ({"curriculum": [{"until": 2, "mix": {"ocr": 1}}]}, "until is 2.0; allowed: above 0, up to 1"),
        ({"curriculum": [{"mix": {"ocr": 1}}]}, "Setting curriculum is .* allowed is a list of phases"),
        ({"curriculum": {"until": 1}}, "Setting curriculum is .* allowed is a list of phases"),
        (
            {"curriculum": "draft"},
            r"Setting curriculum is 'draft'; allowed is a list of phases, .* or one of \['drafts'\]",
        ),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {**NEEDED, **settings})


def test_the_curriculum_of_the_drafts_by_its_name() -> None:
    recipe = load_recipe(None, {**NEEDED, "curriculum": "drafts"})
    assert tuple(recipe.phases()) == DRAFT_CURRICULUM
    assert recipe.mixes_tasks
    assert load_recipe(None, yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        ("float | None", "1e-4", 1e-4),
        ("Optional[float]", None, None),
        ("tuple[float, ...]", ["1e-4", 2], (1e-4, 2.0)),
        ("tuple[int, ...] | None", 3, (3,)),
        ("Mapping[str, tuple[int, ...]]", {"a": 1}, {"a": (1,)}),
        ("Mapping[str, Mapping[str, float]]", {"integer": {"none": 1}}, {"integer": {"none": 1.0}}),
    ],
)
def test_a_value_is_brought_to_the_type_that_its_hint_names(hint: str, value: Any, expected: Any) -> None:
    """By the type itself, not by what stands in its name."""
    names = {"Mapping": Mapping, "Optional": Optional}
    types = get_type_hints(type("Settings", (), {"__annotations__": {"it": hint}}), names)
    found = _coerce("it", value, types["it"])
    assert found == expected
    assert type(found) is type(expected)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No recipe 'x.yaml': neither a file nor one of the shipped \['tiny.yaml'"):
        load_recipe("x.yaml")
    for text, message in (("a: [", "not YAML"), ("- a", "a recipe is a mapping")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "x.yaml")

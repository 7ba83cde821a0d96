from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sentence_vipyloqwen.train.recipe import Recipe, load_recipe, shipped_recipes

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


def test_what_is_given_replaces_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**NEEDED, "epochs": 2, "learning_rate": "1e-4", "seed": 1}))
    recipe = load_recipe(file, {"epochs": "3", "margins": "{ocr: 0.1}", "matryoshka_dims": "[64, 32]"})
    assert (recipe.epochs, recipe.learning_rate, recipe.seed) == (3.0, 1e-4, 1)
    assert recipe.train == ("t.jsonl",)
    assert recipe.margins == {"ocr": 0.1}
    assert recipe.matryoshka_dims == (64, 32)


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = load_recipe(None, {**NEEDED, "weights": {"ocr": {"triplet": 2.0}}, "matryoshka_dims": [4, 2]})
    assert Recipe(**{**yaml.safe_load(recipe.to_yaml()), "train": ("t.jsonl",), "matryoshka_dims": (4, 2)}) == recipe
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
        ({"sampling": "random"}, "Setting sampling is 'random'; allowed is one of"),
        ({"margins": 3}, "Setting margins is 3; allowed is a mapping"),
        ({"min_pixels": 10**9}, "Setting min_pixels is 1000000000; allowed is from 1 to max_pixels"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {**NEEDED, **settings})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No recipe 'x.yaml': neither a file nor one of the shipped \['tiny.yaml'"):
        load_recipe("x.yaml")
    for text, message in (("a: [", "not YAML"), ("- a", "a recipe is a mapping")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "x.yaml")

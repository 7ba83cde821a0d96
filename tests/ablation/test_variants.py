"""The table, and what becomes of a recipe under each variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from sentence_vipyloqwen import CachedPrefixRoutedLoss
from sentence_vipyloqwen.ablation.plan import plan
from sentence_vipyloqwen.ablation.variants import FULL, VARIANTS, with_needed
from sentence_vipyloqwen.losses.prefix_routed import TERMS
from sentence_vipyloqwen.tasks import ALL_TASKS, TASKS
from sentence_vipyloqwen.train.build import make_arguments, make_loss, make_model
from sentence_vipyloqwen.train.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
TRAINED = [name for name, variant in VARIANTS.items() if not variant.model_of]


def test_the_table_is_whole() -> None:
    assert next(iter(VARIANTS)) == FULL
    assert [name for name, variant in VARIANTS.items() if variant.against is None] == [FULL]
    for variant in VARIANTS.values():
        assert {variant.against, variant.model_of} - {None} <= set(VARIANTS), variant.name
        assert variant.question.endswith("?")
        before = list(VARIANTS)[: list(VARIANTS).index(variant.name)]
        assert {variant.against, variant.model_of} - {None} <= set(before), variant.name  # known when it is planned
        assert bool(variant.model_of) == bool(variant.hidden_prefixes or variant.cut > 1)
    families = [variant.family for variant in VARIANTS.values()]
    assert [family for place, family in enumerate(families) if family not in families[:place]] == [
        family for family, before in zip(families, ["none", *families], strict=False) if family != before
    ]  # those of a family stand together
    assert {f"no_{task}_prefix" for task in TASKS} <= set(VARIANTS)


def test_what_a_variant_needs_comes_with_it() -> None:
    assert [variant.name for variant in with_needed(["grad_cache", "prefix_forgotten"])] == [
        "full",
        "prefix_forgotten",
        "in_batch",
        "grad_cache",
    ]
    with pytest.raises(ValueError, match=r"Unknown variants \['triplet'\]; allowed are \['full', 'info_nce_only'"):
        with_needed(["triplet"])


@pytest.mark.parametrize("name", TRAINED)
def test_a_variant_takes_a_step(name: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = next(run for run in plan(make_recipe(tmp_path), [name], seeds=1) if run.variant.name == name)
    model = make_model(run.recipe, make_arguments(run.recipe, tmp_path, "cpu"), tmp_path, "cpu")
    loss = make_loss(run.recipe, model)
    columns = [["<ocr> a", "<instr> b", "<ocr> c", "<text_pair> d"], ["u", "v", "w", "<text_pair> x"]]
    scores = torch.tensor([torch.nan, torch.nan, torch.nan, 0.5])
    terms = loss([model.preprocess(column) for column in columns], scores)
    torch.stack(list(terms.values())).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients)


def test_a_term_is_left_out_of_the_weights_of_the_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    own = {"instr": {"score_mse": 0.5, "info_nce": 2.0}, "text_pair": {"score_mse": 0.0}}
    recipe = make_recipe(tmp_path, weights=own)
    (run,) = (run for run in plan(recipe, ["no_score_mse"], seeds=1) if run.variant.name != FULL)
    assert run.recipe.weights == {**own, "instr": {"score_mse": 0.0, "info_nce": 2.0}}
    told: list[str] = []
    plan(make_recipe(tmp_path, weights={"instr": {"cosine": 0}}), seeds=1, tell=told.append)
    (line,) = (line for line in told if line.startswith("no_cosine"))
    assert "under this recipe it is the same as full" in line


def test_what_the_losses_are(make_recipe: MakeRecipe, model: object, tmp_path: Path) -> None:
    recipes = {run.variant.name: run.recipe for run in plan(make_recipe(tmp_path), seeds=1)}
    losses = {name: make_loss(recipe, model) for name, recipe in recipes.items()}
    only = losses["info_nce_only"].weights
    assert {term for task in only for term, weight in only[task].items() if weight} == {"info_nce"}
    for term in set(TERMS) - {"info_nce"}:
        assert losses[f"no_{term}"].weights == {
            task: {name: 0.0 if name == term else weight for name, weight in weights.items()}
            for task, weights in losses[FULL].weights.items()
        }
    assert losses["one_mix"].weights == {task: dict.fromkeys(TERMS, 1.0) for task in ALL_TASKS}
    assert losses["one_mix"].margins == dict.fromkeys(ALL_TASKS, 0.2)
    assert losses["no_prefix"].hidden_prefixes == tuple(TASKS)
    assert losses["no_ocr_prefix"].hidden_prefixes == ("ocr",)
    assert losses["all_negatives"].negatives == "all"
    assert isinstance(losses["grad_cache"], CachedPrefixRoutedLoss)
    assert isinstance(losses["matryoshka"], MatryoshkaLoss)
    assert recipes["matryoshka"].matryoshka_dims == (16, 8, 4, 2)

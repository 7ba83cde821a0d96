"""Planning, doing and going on with an ablation; what is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

from sentence_vipyloqwen import ViPyloQwen
from sentence_vipyloqwen.ablation import runs as module
from sentence_vipyloqwen.ablation.plan import Run, plan
from sentence_vipyloqwen.ablation.runs import ablate
from sentence_vipyloqwen.ablation.variants import VARIANTS
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.evaluation import evaluate
from sentence_vipyloqwen.train.progress import read_log
from sentence_vipyloqwen.train.recipe import Recipe
from sentence_vipyloqwen.train.run import train

MakeRecipe = Callable[..., Recipe]


def results_of(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output / "results.json").read_text(encoding="utf-8"))["runs"]
    return found


def names_of(runs: list[Run]) -> list[tuple[str, int]]:
    return [(run.variant.name, run.recipe.seed) for run in runs]


@pytest.fixture(scope="module")
def everything(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Every variant of the table with one seed: its folder, and the runs that were trained."""
    output, trained = tmp_path_factory.mktemp("everything"), []

    def counted(recipe: Recipe, device: str | None) -> Any:
        trained.append(Path(recipe.output).parent.name)
        return train(recipe, device=device)

    own = {"in_batch": {"batch_size": 2, "accumulation": 2}, "grad_cache": {"batch_size": 4, "loss_mini_batch_size": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", counted)
        patch.setattr(module, "write_report", lambda output: None)  # as slow as a run of two steps; see test_report
        ablate(make_recipe(output, save_steps=1), seeds=1, own=own, device="cpu")
    return output, trained


def test_every_variant_leaves_its_figures(everything: tuple[Path, list[str]]) -> None:
    found = results_of(everything[0])
    assert [run["variant"] for run in found] == list(VARIANTS)
    for run in found:
        assert run["failure"] is None
        assert set(run["after"]["tasks"]) == {"ocr", "vqa_single", "vqa_multi", "text_pair", "instr", "general"}
        assert bool(run["before"]) is not bool(VARIANTS[run["variant"]].model_of)
        assert set(run["versions"]) >= {"torch", "transformers", "sentence-transformers", "sentence-vipyloqwen"}
        assert run["machine"]["cores"] >= 1


def test_evaluations_alone_do_not_train(everything: tuple[Path, list[str]]) -> None:
    output, trained = everything
    assert trained == [name for name, variant in VARIANTS.items() if not variant.model_of]
    assert {path.name for path in (output / "runs" / "cut" / "seed-5").iterdir()} == {"run.json"}


def test_evaluations_use_the_models_of_others_in_their_own_way(
    everything: tuple[Path, list[str]], make_recipe: MakeRecipe
) -> None:
    output = everything[0]
    found = {run["variant"]: run["after"] for run in results_of(output)}
    records = str(make_recipe(output).eval)
    full = ViPyloQwen(output / "runs" / "full" / "seed-5" / "model", device="cpu")
    assert found["full"] == evaluate(full, records).to_dict()
    assert found["cut"] == evaluate(full, records, dims=[2]).dims[2].to_dict()
    forgotten = evaluate(full, records, hidden_prefixes=list(VARIANTS["prefix_forgotten"].hidden_prefixes))
    assert found["prefix_forgotten"] == forgotten.to_dict()
    nested = ViPyloQwen(output / "runs" / "matryoshka" / "seed-5" / "model", device="cpu")
    assert found["matryoshka_cut"] == evaluate(nested, records, dims=[2]).dims[2].to_dict()


def test_a_model_trained_without_prefixes_is_measured_without(
    everything: tuple[Path, list[str]], make_recipe: MakeRecipe
) -> None:
    output = everything[0]
    found = {run["variant"]: run["after"] for run in results_of(output)}
    model = ViPyloQwen(output / "runs" / "no_prefix" / "seed-5" / "model", device="cpu")
    hidden = VARIANTS["prefix_forgotten"].hidden_prefixes
    assert found["no_prefix"] == evaluate(model, str(make_recipe(output).eval), hidden_prefixes=hidden).to_dict()
    tokens = model[0].model.get_input_embeddings().weight.detach()[list(model.task_token_ids.values())]
    np.testing.assert_allclose(tokens, tokens[:1].expand_as(tokens))  # never seen, all alike as they began


def test_results_name_no_place(everything: tuple[Path, list[str]], base: Path) -> None:
    text = (everything[0] / "results.json").read_text(encoding="utf-8")
    for place in (base, everything[0], Path.cwd(), Path.home()):
        assert str(place) not in text


def test_results_have_the_curves_that_runs_logged(everything: tuple[Path, list[str]]) -> None:
    curves = {run["variant"]: run["curves"] for run in results_of(everything[0])}
    logged = read_log(everything[0] / "runs" / "full" / "seed-5" / "log.jsonl")
    tasks = {key.removesuffix("/info_nce") for entry in logged for key in entry if key.endswith("/info_nce")}
    assert tasks  # of two steps, two at most
    assert curves["full"] == {
        task: [[entry["step"], entry[f"{task}/info_nce"]] for entry in logged if f"{task}/info_nce" in entry]
        for task in tasks
    }
    assert curves["prefix_forgotten"] == {}


def test_checkpoints_of_a_run_that_is_done_are_gone(everything: tuple[Path, list[str]]) -> None:
    folder = everything[0] / "runs" / "full" / "seed-5"
    assert not (folder / "checkpoints").exists()
    assert (folder / "model" / "modules.json").exists()


def test_every_variant_has_the_same_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=1700, batch_size=64)
    recipes = {run.variant.name: run.recipe for run in plan(recipe, seeds=1)}
    rows = {name: made.max_steps * made.batch_size * made.accumulation for name, made in recipes.items()}
    assert rows["full"] == 1700 * 64
    single = {name for name in rows if name.startswith("only_")}
    assert all(abs(rows[name] / rows["full"] - 1) < 0.01 for name in rows.keys() - single)
    assert recipes["in_batch"].max_steps == recipes["grad_cache"].max_steps == 142
    own = {"grad_cache": {"batch_size": 256, "max_steps": 9}, "in_batch": {"accumulation": 4}}
    recipes = {run.variant.name: run.recipe for run in plan(recipe, seeds=1, own=own)}
    assert (recipes["grad_cache"].batch_size, recipes["grad_cache"].max_steps) == (256, 9)
    assert (recipes["in_batch"].batch_size, recipes["in_batch"].max_steps) == (24, 1133)


def test_a_model_for_one_task_has_that_task_s_share_of_the_steps(
    make_recipe: MakeRecipe, records: Path, tmp_path: Path
) -> None:
    mine = [line for line in records.read_text().splitlines() if json.loads(line).get("task") in ("instr", "text_pair")]
    more = [json.dumps({"task": "instr", "anchor": f"Số {i}", "positive": f"number {i}"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join([*mine, *more]))  # 12 instructions, 4 pairs
    given = {"train": str(tmp_path / "train.jsonl"), "max_steps": 100}
    names = ["only_instr", "only_text_pair"]
    recipes = {run.variant.name: run.recipe for run in plan(make_recipe(tmp_path, **given), names, seeds=1)}
    assert (recipes["only_instr"].max_steps, recipes["only_text_pair"].max_steps) == (75, 25)
    assert recipes["only_instr"].mix == {"instr": 1.0, "text_pair": 0.0}
    mixed = make_recipe(tmp_path, **given, mix={"instr": 1.0, "text_pair": 4.0})
    recipes = {run.variant.name: run.recipe for run in plan(mixed, names, seeds=1)}
    assert (recipes["only_instr"].max_steps, recipes["only_text_pair"].max_steps) == (20, 80)
    passes = make_recipe(tmp_path, **{**given, "max_steps": 0, "epochs": 2.0})
    recipes = {run.variant.name: run.recipe for run in plan(passes, names, seeds=1)}
    assert (recipes["full"].epochs, recipes["only_instr"].epochs) == (2.0, 1.5)
    with pytest.raises(ValueError, match=r"only_ocr: its share of the steps is not known.*\['instr', 'text_pair'\]"):
        plan(make_recipe(tmp_path, **given), ["only_ocr"], seeds=1)
    with pytest.raises(ValueError, match=r"only_instr: its mix is its task alone; got \{'text': 1.0\}"):
        plan(make_recipe(tmp_path, **given), ["only_instr"], seeds=1, own={"only_instr": {"mix": {"text": 1.0}}})


@pytest.mark.parametrize(
    ("settings", "single"),
    [
        ({}, {"only_instr", "only_ocr"}),
        ({"mix": {"instr": 1.0, "ocr": 0.0}}, {"only_instr"}),
        ({"mix": {"text": 1.0, "multimodal": 1.0}}, set()),
        ({"mix_temperature": 0.5}, set()),
        ({"sampling": "round_robin"}, set()),
        ({"best_metric": "mean", "eval_steps": 1}, set()),
    ],
)
def test_models_for_one_task_are_tried_where_they_are_fair_peers(
    make_recipe: MakeRecipe, records: Path, tmp_path: Path, settings: dict[str, Any], single: set[str]
) -> None:
    """All variants are the default, whatever tasks the data has; those that do not fit are only refused by name."""
    lines = [line for line in records.read_text().splitlines() if json.loads(line).get("task") in ("instr", "ocr")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    for image in records.parent.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    recipe = make_recipe(tmp_path, train=str(tmp_path / "train.jsonl"), **settings)
    for name in ("only_instr", "only_ocr"):
        if name in single:
            assert plan(recipe, [name], seeds=1)
        else:
            with pytest.raises(ValueError, match=f"Variant {name}: its share of the steps is not known"):
                plan(recipe, [name], seeds=1)
    if not settings:
        assert {name for name, _ in names_of(plan(recipe, seeds=1)) if name.startswith("only_")} == single


def test_every_variant_is_tried_before_any_is_tried_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = plan(make_recipe(tmp_path), ["prefix_forgotten", "one_mix"], seeds=2)
    assert names_of(runs) == [(name, seed) for seed in (5, 6) for name in ("full", "one_mix", "prefix_forgotten")]
    assert len({run.folder for run in runs}) == len(runs)
    assert runs[2].recipe == runs[0].recipe


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"seeds": 0}, "seeds is 0; allowed is at least 1"),
        ({"eval": None}, {}, "setting eval is None; allowed is a JSONL file"),
        ({"pair_weight": "uniform"}, {}, "Variant published_pair_weight .* is the same as full under this recipe"),
        (
            {},
            {"own": {"cut": {"seed": 1}}},
            r"for the variants \['cut'\]; among those that train are \['info_nce_only'",
        ),
        ({}, {"own": {"full": {"epochs": 1}}}, r"for the variants \['full'\]"),
        ({}, {"own": {"one_mix": {"epoch": 1}}}, r"Unknown settings \['epoch'\]"),
    ],
)
def test_a_bad_plan_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(make_recipe(tmp_path, **settings), **arguments)


def test_a_kill_between_runs_or_within_one_loses_no_finished_run(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, save_steps=1)
    trained: list[tuple[str, int]] = []

    def killed_in_the_third(recipe: Recipe, device: str | None) -> Any:
        trained.append((Path(recipe.output).parent.name, recipe.seed))
        if len(trained) == 3:
            train(replace(recipe, report_to=("none",)), device=device)
            raise KeyboardInterrupt  # trained, not written down
        return train(recipe, device=device)

    monkeypatch.setattr(module, "train", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablate(recipe, ["one_mix"], seeds=2, device="cpu")
    assert trained == [("full", 5), ("one_mix", 5), ("full", 6)]
    first = results_of(tmp_path)
    assert [(run["variant"], run["seed"]) for run in first] == [("full", 5), ("one_mix", 5)]
    checkpoint = tmp_path / "runs" / "full" / "seed-6" / "checkpoints" / "checkpoint-2"
    assert checkpoint.exists()

    told: list[str] = []
    ablate(recipe, ["one_mix"], seeds=2, device="cpu", tell=told.append)
    assert trained[3:] == [("full", 6), ("one_mix", 6)]
    assert [line.split(": ", 1)[1] for line in told] == ["done before"] * 2 + [
        VARIANTS[name].change for name in ("full", "one_mix")
    ]
    second = results_of(tmp_path)
    assert [(run["variant"], run["seed"]) for run in second] == [(n, s) for n in ("full", "one_mix") for s in (5, 6)]
    assert [run for run in second if run["seed"] == 5] == first
    assert second[1]["before"]  # from before the kill

    ablate(recipe, ["one_mix"], seeds=1, device="cpu")
    assert results_of(tmp_path) == second  # fewer are asked for, none is dropped
    with pytest.raises(ValueError, match=r"full.seed-5 holds a run of other settings \(learning_rate: 0.001 -> 0.01\)"):
        ablate(replace(recipe, learning_rate=0.01), ["one_mix"], device="cpu")
    assert len(trained) == 5


def test_processes_share_the_runs(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has under way is left for later, with what takes its model, and waited for at the end."""
    recipe, trained, told = make_recipe(tmp_path), [], []

    def counted(recipe: Recipe, device: str | None) -> Any:
        trained.append((Path(recipe.output).parent.name, recipe.seed))
        with pytest.raises(Timeout):  # it is ours now
            FileLock(f"{recipe.output}.lock").acquire(timeout=0)
        return train(recipe, device=device)

    monkeypatch.setattr(module, "train", counted)
    monkeypatch.setattr(module, "LOOK_AGAIN", 0)
    runs = {(run.variant.name, run.recipe.seed): run for run in plan(recipe, ["prefix_forgotten", "one_mix"], seeds=2)}
    theirs = {
        name: FileLock(f"{run.folder}.lock") for name, run in runs.items() if name in [("full", 5), ("one_mix", 6)]
    }
    (tmp_path / "runs" / "full").mkdir(parents=True)
    (tmp_path / "runs" / "one_mix").mkdir()
    for lock in theirs.values():
        lock.acquire()

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == len(runs):  # the other process ends one run, and dies in the other
            ended = {
                "variant": "one_mix",
                "seed": 6,
                "settings": runs["one_mix", 6].settings(),
                "data": module._data(recipe),
            }
            run_file = runs["one_mix", 6].folder / "run.json"
            run_file.parent.mkdir()
            run_file.write_text(json.dumps({**results_of(tmp_path)[0], **ended}), encoding="utf-8")
            for lock in theirs.values():
                lock.release()

    ablate(recipe, ["prefix_forgotten", "one_mix"], seeds=2, device="cpu", tell=tell)
    assert trained == [("one_mix", 5), ("full", 6), ("full", 5)]
    waits = "under way in another process, or waits for what is"
    assert told == [
        f"1/6  full, seed 5: {waits}",
        f"2/6  one_mix, seed 5: {VARIANTS['one_mix'].change}",
        f"3/6  prefix_forgotten, seed 5: {waits}",
        f"4/6  full, seed 6: {VARIANTS['full'].change}",
        f"5/6  one_mix, seed 6: {waits}",
        f"6/6  prefix_forgotten, seed 6: {VARIANTS['prefix_forgotten'].change}",
        f"1/6  full, seed 5: {VARIANTS['full'].change}",
        f"3/6  prefix_forgotten, seed 5: {VARIANTS['prefix_forgotten'].change}",
        "5/6  one_mix, seed 6: done before",
    ]
    assert {(run["variant"], run["seed"]) for run in results_of(tmp_path)} == set(runs)


def test_a_run_that_diverges_is_kept_as_one_that_failed(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(recipe: Recipe, device: str | None) -> Any:
        raise NonFiniteStep("the loss of step 1 is NaN")

    monkeypatch.setattr(module, "train", diverges)
    ablate(make_recipe(tmp_path), ["cut"], seeds=1, device="cpu")
    full, cut = results_of(tmp_path)
    assert (full["after"], full["failure"]) == (None, "the loss or the gradients of a step were not finite")
    assert (cut["after"], cut["failure"]) == (None, "the run whose model it takes has failed")
    page = (tmp_path / "ablation.html").read_text(encoding="utf-8")
    assert "Every run failed." in page
    assert full["failure"] in page


def test_several_processes_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="has one process; got 2"):
        ablate(make_recipe(tmp_path))

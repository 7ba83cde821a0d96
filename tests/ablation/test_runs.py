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
from sentence_vipyloqwen.ablation.results import load_about
from sentence_vipyloqwen.ablation.runs import ablate
from sentence_vipyloqwen.ablation.variants import VARIANTS
from sentence_vipyloqwen.tasks import ALL_TASKS, TASKS
from sentence_vipyloqwen.train.batches import NonFiniteStep
from sentence_vipyloqwen.train.evaluation import evaluate
from sentence_vipyloqwen.train.memory import OutOfMemory
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


def test_results_have_the_rows_seen_and_the_size_of_the_model(everything: tuple[Path, list[str]]) -> None:
    found = {run["variant"]: run for run in results_of(everything[0])}
    assert sum(found["full"]["rows"].values()) == 2 * 4
    assert found["only_ocr"]["rows"] == {"ocr": 4}  # its share of two steps
    model = ViPyloQwen(everything[0] / "runs" / "full" / "seed-5" / "model", device="cpu")
    assert found["full"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (found["cut"]["rows"], found["cut"]["parameters"]) == ({}, None)


def test_checkpoints_of_a_run_that_is_done_are_gone(everything: tuple[Path, list[str]]) -> None:
    folder = everything[0] / "runs" / "full" / "seed-5"
    assert not (folder / "checkpoints").exists()
    assert (folder / "model" / "modules.json").exists()


def test_every_variant_has_the_same_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=1700, batch_size=64, logging_steps=100)
    recipes = {run.variant.name: run.recipe for run in plan(recipe, seeds=1)}
    rows = {name: made.max_steps * made.batch_size * made.accumulation for name, made in recipes.items()}
    assert rows["full"] == 1700 * 64
    single = {name for name in rows if name.startswith("only_")}
    assert all(abs(rows[name] / rows["full"] - 1) < 0.01 for name in rows.keys() - single)
    assert recipes["in_batch"].max_steps == recipes["grad_cache"].max_steps == 142
    assert all(15 <= made.max_steps / made.logging_steps <= 19 for made in recipes.values())  # lines of the log
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
    given = {"train": str(tmp_path / "train.jsonl"), "max_steps": 100, "logging_steps": 20}
    names = ["only_instr", "only_text_pair"]
    recipes = {run.variant.name: run.recipe for run in plan(make_recipe(tmp_path, **given), names, seeds=1)}
    assert (recipes["only_instr"].max_steps, recipes["only_text_pair"].max_steps) == (75, 25)
    assert (recipes["only_instr"].logging_steps, recipes["only_text_pair"].logging_steps) == (15, 5)
    assert recipes["only_instr"].mix == {"instr": 1.0, "text_pair": 0.0}
    mixed = make_recipe(tmp_path, **given, mix={"instr": 1.0, "text_pair": 4.0})
    recipes = {run.variant.name: run.recipe for run in plan(mixed, names, seeds=1)}
    assert (recipes["only_instr"].max_steps, recipes["only_text_pair"].max_steps) == (20, 80)
    some = make_recipe(tmp_path, mix={task: float(task in ("instr", "ocr")) for task in ALL_TASKS})
    (*_, alone) = plan(some, ["only_instr"], seeds=1)
    assert alone.recipe.mix == {task: float(task == "instr") for task in ALL_TASKS}  # every task of the data is named
    passes = make_recipe(tmp_path, **{**given, "max_steps": 0, "epochs": 2.0})
    recipes = {run.variant.name: run.recipe for run in plan(passes, names, seeds=1)}
    assert (recipes["full"].epochs, recipes["only_instr"].epochs) == (2.0, 1.5)
    with pytest.raises(
        ValueError, match=r"only_ocr does not apply: the data has no ocr; it has \['instr', 'text_pair'\]"
    ):
        plan(make_recipe(tmp_path, **given), ["only_ocr"], seeds=1)
    with pytest.raises(ValueError, match=r"only_instr does not apply: its mix is its task alone; got \{'text': 1.0\}"):
        plan(make_recipe(tmp_path, **given), ["only_instr"], seeds=1, own={"only_instr": {"mix": {"text": 1.0}}})


@pytest.mark.parametrize(
    ("settings", "single"),
    [
        ({}, {"only_instr", "only_ocr"}),
        ({"mix": {"instr": 1.0, "ocr": 2.0}}, {"only_instr", "only_ocr"}),
        ({"mix": {"instr": 1.0, "ocr": 0.0}}, set()),  # one task alone is the reference's
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
            with pytest.raises(
                ValueError, match=f"Variant {name} does not apply: (its share of the steps is not|the refer)"
            ):
                plan(recipe, [name], seeds=1)
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
        (
            {"pair_weight": "uniform"},
            {"names": ["published_pair_weight"]},
            "Variant published_pair_weight does not apply: under this recipe it is the same as full",
        ),
        (
            {},
            {"own": {"cut": {"seed": 1}}},
            r"for the variants \['cut'\]; among those that train are \['info_nce_only'",
        ),
        ({}, {"own": {"full": {"epochs": 1}}}, r"for the variants \['full'\]"),
        ({}, {"own": {"one_mix": {"epoch": 1}}}, r"Variant one_mix does not apply: Unknown settings \['epoch'\]"),
        (
            {"mix_temperature": 0.5},
            {"names": ["all_negatives"]},
            r"Variant mixed_batches does not apply: Setting mixed_batches is True; .*\n"
            "Variant all_negatives does not apply: it is compared with mixed_batches, which does not apply",
        ),
        (
            {"embedding_dim": 4},
            {"names": ["cut"]},
            "Variant cut does not apply: embedding_dim is 4; allowed is at least 8",
        ),
    ],
)
def test_a_bad_plan_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(make_recipe(tmp_path, **settings), **arguments)


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, {}),
        (
            {"pair_weight": "uniform"},
            {"published_pair_weight": "under this recipe it is the same as full (a scored pair"},
        ),
        (
            {"mix": {"text": 1.0, "multimodal": 1.0}},
            {
                **{f"only_{task}": "its share of the steps is not known" for task in TASKS},
                "mixed_batches": "Setting mixed_batches is True; allowed is False",
                "all_negatives": "it is compared with mixed_batches, which does not apply",
            },
        ),
        (
            {"hidden_prefixes": list(TASKS)},
            {
                "no_prefix": "under this recipe it is the same as full",
                "prefix_forgotten": "under this recipe it is the same as full",
            },
        ),
        (
            {"embedding_dim": 4},
            dict.fromkeys(("cut", "matryoshka"), "embedding_dim is 4; allowed is at least 8")
            | {"matryoshka_cut": "it is compared with cut, which does not apply"},
        ),
    ],
)
def test_what_does_not_apply_is_left_out_and_said(
    make_recipe: MakeRecipe, tmp_path: Path, settings: dict[str, Any], left_out: dict[str, str]
) -> None:
    told: list[str] = []
    found = names_of(plan(make_recipe(tmp_path, **settings), seeds=1, tell=told.append))
    assert [name for name, _ in found] == [name for name in VARIANTS if name not in left_out]
    assert [line.split(" ")[0] for line in told] == [name for name in VARIANTS if name in left_out]
    for line in told:
        name = line.split(" ")[0]
        assert line.startswith(f"{name} is left out: {left_out[name]}")


def test_what_is_about_a_task_that_the_data_lacks_is_left_out(
    make_recipe: MakeRecipe, records: Path, tmp_path: Path
) -> None:
    lines = [line for line in records.read_text().splitlines() if json.loads(line).get("task") == "instr"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    recipe, told = make_recipe(tmp_path, train=str(tmp_path / "train.jsonl")), []
    found = {name for name, _ in names_of(plan(recipe, seeds=1, tell=told.append))}
    assert {name for name in found if VARIANTS[name].about} == {"no_cosine", "no_instr_prefix"}  # not only_instr
    assert "only_instr is left out: the reference trains on that task alone." in told
    assert "no_ocr_prefix is left out: the data has no ocr; it has ['instr']." in told
    with pytest.raises(ValueError, match=r"Variant no_ocr_prefix does not apply: the data has no ocr; it has \['instr"):
        plan(recipe, ["no_ocr_prefix"], seeds=1)


def test_a_finished_model_keeps_its_pooling_and_its_sizes(
    make_recipe: MakeRecipe, folder: Path, tmp_path: Path
) -> None:
    size, told = ViPyloQwen(folder, device="cpu").get_embedding_dimension(), []
    recipe = make_recipe(tmp_path, base=str(folder), embedding_dim=size)
    found = {name for name, _ in names_of(plan(recipe, seeds=1, tell=told.append))}
    pooled = [name for name, variant in VARIANTS.items() if variant.family == "pooling"]
    assert set(VARIANTS) - found == set(pooled)
    assert told[0] == (
        "last_token_pooling is left out: pooling is 'lasttoken'; the base is a finished model, which keeps its own."
    )
    unknown = make_recipe(tmp_path, base=str(folder), embedding_dim=None)
    assert names_of(plan(unknown, ["cut"], seeds=1)) == [("full", 5), ("cut", 5)]
    with pytest.raises(
        ValueError, match="Variant matryoshka does not apply: the size of a finished model's embeddings"
    ):
        plan(unknown, ["matryoshka"], seeds=1)
    with pytest.raises(ValueError, match="Variant one_mix does not apply: embedding_dim is 8; the base is a finished"):
        plan(recipe, ["one_mix"], seeds=1, own={"one_mix": {"embedding_dim": 8}})


def test_nothing_is_trained_that_cannot_be_drawn(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, extra: str) -> Any:
        raise ImportError(f"{name} of {extra}")

    monkeypatch.setattr("sentence_vipyloqwen.ablation.plots.require", missing)
    with pytest.raises(ImportError, match="matplotlib.figure of demo"):
        ablate(make_recipe(tmp_path), ["one_mix"], device="cpu")
    assert list(tmp_path.iterdir()) == []


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


def test_a_run_without_memory_is_kept_and_tried_again_when_asked_for(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs after it are done; others' settings may be given when it is tried again."""
    trained: list[tuple[str, int]] = []

    def out_of_memory(recipe: Recipe, device: str | None) -> Any:
        name = Path(recipe.output).parent.name
        trained.append((name, recipe.batch_size))
        if name == "matryoshka" and recipe.batch_size > 2:
            raise OutOfMemory("memory does not suffice for step 1, whose batch has 4 rows")
        return train(recipe, device=device)

    monkeypatch.setattr(module, "train", out_of_memory)
    monkeypatch.setattr(module, "write_report", lambda output: None)
    recipe, names = make_recipe(tmp_path), ["matryoshka_cut", "matryoshka"]
    ablate(recipe, names, seeds=1, device="cpu")
    ablate(recipe, names, seeds=1, device="cpu")
    assert trained == [("full", 4), ("matryoshka", 4)]
    failures = {run["variant"]: run["failure"] for run in results_of(tmp_path)}
    assert failures == {
        "full": None,
        "cut": None,
        "matryoshka": "memory does not suffice for step 1, whose batch has 4 rows",
        "matryoshka_cut": "the run whose model it takes has failed",
    }
    smaller = {"matryoshka": {"batch_size": 2}}
    with pytest.raises(ValueError, match=r"holds a run of other settings \(batch_size: 4 -> 2"):
        ablate(recipe, names, seeds=1, own=smaller, device="cpu")
    ablate(recipe, names, seeds=1, own=smaller, device="cpu", retry_failed=True)
    assert trained[2:] == [("matryoshka", 2)]
    assert [run["failure"] for run in results_of(tmp_path)] == [None] * 4


def test_any_other_error_ends_the_ablation(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(recipe: Recipe, device: str | None) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        ablate(make_recipe(tmp_path), ["cut"], seeds=1, device="cpu")
    assert not list(tmp_path.rglob("run.json"))


def test_a_model_that_was_deleted_is_no_failure(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(module, "write_report", lambda output: None)
    ablate(recipe, ["cut"], seeds=1, device="cpu")
    cut, full = (tmp_path / "runs" / name / "seed-5" for name in ("cut", "full"))
    figures = results_of(tmp_path)[1]["after"]
    (full / "model").rename(tmp_path / "elsewhere")
    ablate(recipe, ["cut"], seeds=1, device="cpu")  # done before
    failed = {**json.loads((cut / "run.json").read_text()), "after": None, "failure": "the run has failed"}
    (cut / "run.json").unlink()
    with pytest.raises(ValueError, match=r"cut, seed 5 takes the model of .*full.seed-5, where model was deleted"):
        ablate(recipe, ["cut"], seeds=1, device="cpu")
    assert not (cut / "run.json").exists()
    (cut / "run.json").write_text(json.dumps(failed))  # as an earlier version left it
    (tmp_path / "elsewhere").rename(full / "model")
    ablate(recipe, ["cut"], seeds=1, device="cpu")
    assert results_of(tmp_path)[1]["after"] == figures


def test_runs_of_an_unknown_variant_stand_last(tmp_path: Path, run_of: Callable[..., dict[str, Any]]) -> None:
    for name in ("a_renamed_one", "one_mix", "full"):
        folder = tmp_path / "runs" / name / "seed-0"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run_of(name, 0, 0.5, ocr=0.5)))
    module.write_results(tmp_path)
    assert [run["variant"] for run in results_of(tmp_path)] == ["full", "one_mix", "a_renamed_one"]


def test_what_base_and_data_are_is_said_once(tmp_path: Path, run_of: Callable[..., dict[str, Any]]) -> None:
    for given, kept in ((None, ""), ("Pages.", "Pages."), (None, "Pages."), ("Lines.", "Lines.")):
        module.write_results(tmp_path, given)
        assert load_about(tmp_path) == kept


def test_several_processes_are_refused(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="has one process; got 2"):
        ablate(make_recipe(tmp_path))

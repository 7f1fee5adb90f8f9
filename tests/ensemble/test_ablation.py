"""An ablation: each run an ordinary one, trained once, and differences by the runs' own files."""

import json

import numpy as np
import pytest

from kutils.data.datasets import load_datasets
from kutils.ensemble import ablation
from kutils.runs import finished, recipes

BASE = "datasets=toy input_size=32 epochs=2 lr=1e-3 num_workers=0 device=cpu global_batch_size=8 max_local_batch_size=8"


@pytest.fixture
def config(workspace, tiny_recipe):
    path = workspace / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    return path


def test_every_change_is_a_recipe(config):
    trials = ablation.plan_trials(config, BASE, seeds=(3,))
    assert [trial.change for trial in trials] == list(ablation.CHANGES)
    first, *others = [trial.run.recipe for trial in trials]
    published = {
        "optimizer": "madgrad",
        "augment": "published",
        "head_init": "xavier",
        "ema_decay": 0.0,
        "loss": "cosine",
    }
    assert {key: getattr(first, key) for key in published} == published
    for trial, recipe in zip(trials[1:], others, strict=True):
        changed = {key for key in recipe.values() if getattr(recipe, key) != getattr(first, key)} - {"prefix"}
        named = {text.partition("=")[0] for text in ablation.CHANGES[trial.change].split()}
        assert changed and changed <= named and recipe.seed == 3, trial.change
        assert {text.partition("=")[0] for text in trial.keys.split()} == named
    assert len({trial.run.folder for trial in trials}) == len(trials)
    by_name = {trial.change: trial.run.recipe for trial in trials}
    assert by_name["larger_input"].input_size == 48 and by_name["second_stage"].input_size == 32
    assert by_name["larger_input"].initial_checkpoint(0) == first.checkpoint_path(0)
    assert by_name["second_stage"].lr == pytest.approx(first.lr / 10)


def test_a_change_has_a_rate_of_its_own(config):
    trials = ablation.plan_trials(config, BASE + " clip_grad=2", ["all", "seed@3e-3", "all@1e-4"], seeds=(0,))
    assert trials[0].run.recipe.clip_grad == 2 and trials[2].run.recipe.clip_grad == 1
    rates = {trial.change: trial.run.recipe.lr for trial in trials}
    assert rates == {"seed": 1e-3, "seed@3e-3": 3e-3, "all": 1e-3, "all@1e-4": 1e-4}
    assert [trial.change for trial in trials] == list(rates)
    folders = [trial.run.folder.name for trial in trials]
    assert folders[1::2] == ["ablation_tiny_toy_seed_lr3e-3_seed0_fold0", "ablation_tiny_toy_all_lr1e-4_seed0_fold0"]
    assert trials[3].run.recipe.values() | {"lr": 1e-3, "prefix": ""} == trials[2].run.recipe.values() | {"prefix": ""}


def test_a_second_stage_at_a_larger_input_goes_on_from_the_seeds_run(config, capsys):
    trials = ablation.plan_trials(config, BASE, ["larger_input"], seeds=(0,))
    second = ablation.run_trials(trials)[1]
    assert second.recipe.input_size == 48 and second.recipe.stage == 2
    table = ablation.gains(trials, "larger_input")
    assert table.loc["larger_input", "difference"] == 0 and table.loc["seed", "difference"] != 0
    assert "different commits" not in capsys.readouterr().out
    path = second.folder / "environment.json"
    path.write_text(json.dumps(second.environment | {"git_commit": "0123456789abcdef"}))
    ablation.run_trials(trials)
    assert ", 1 by 01234567), and differences may come from the code" in capsys.readouterr().out
    lines = ablation.as_markdown(table, "larger_input").splitlines()
    assert lines[3].startswith("| larger_input | `stage=2` `initialize_from=") and lines[3].endswith("| | | |")
    assert " | -" in lines[2] or " | +" in lines[2]


def test_the_small_set_is_made_where_it_is_named_and_missing(workspace, config, monkeypatch):
    commands = []
    monkeypatch.setattr(ablation.launch, "run_module", lambda *command: commands.append(command))
    recipe = ablation.plan_trials(config, BASE.replace("toy", "shapes_small"), ["ema"])[0].run.recipe
    with pytest.raises(ValueError, match="shapes_small"):  # what would make it was not run
        ablation.make_missing_datasets(recipe)
    assert [command[1] for command in commands] == ["generate", "folds"]
    assert commands[1][2:] == (str(workspace / "input" / "shapes_small.tsv"), "--folds", "4")
    ablation.make_missing_datasets(ablation.plan_trials(config, BASE, ["ema"])[0].run.recipe)
    assert len(commands) == 2


def test_differences_by_the_runs_own_files(config, capsys):
    trials = ablation.plan_trials(config, BASE, ["ema", "adamw"], seeds=(0, 1), folds=(0, 1))
    assert [trial.change for trial in trials[:6]] == ["seed", "seed", "adamw", "adamw", "ema", "ema"]
    runs = ablation.run_trials(trials)
    assert "run 12 of 12: ablation_tiny_toy_ema_seed1, fold 1" in capsys.readouterr().out
    assert [run.folder for run in runs] == [trial.run.folder for trial in trials]
    assert all((run.folder / "metrics.jsonl").is_file() for run in runs)
    assert all(trial.run.recipe.checkpoint_path(trial.run.fold).is_file() for trial in trials)
    table = ablation.gains(trials)

    data = load_datasets(["toy"])
    cosines = {}
    for trial in trials:
        saved = np.load(trial.run.folder / f"fold{trial.run.fold}_predictions.npz")
        values = np.einsum("nd,nd->n", saved["embeddings"], data.targets(saved["row"]))
        cosines.setdefault(trial.change, {}).setdefault(trial.seed, []).append(values.astype(np.float64))
    means = {name: np.stack([np.concatenate(own[seed]) for seed in (0, 1)]) for name, own in cosines.items()}
    for name in ("adamw", "ema"):
        difference = means[name] - means["seed"]
        assert table.loc[name, "cosine"] == pytest.approx(means[name].mean(), abs=1e-7)
        assert table.loc[name, "difference"] == pytest.approx(difference.mean(), abs=1e-7)
        assert table.loc[name, "spread"] == pytest.approx(difference.mean(axis=1).std(ddof=1), abs=1e-7)
        assert table.loc[name, "low"] <= table.loc[name, "difference"] <= table.loc[name, "high"]
        prompts = difference.mean(axis=0).reshape(-1, 2).mean(axis=1)  # two images of each prompt, side by side
        error = prompts.std(ddof=1) / len(prompts) ** 0.5
        width = table.loc[name, "high"] - table.loc[name, "low"]
        assert width == pytest.approx(2 * 1.96 * error, rel=0.35)
    assert table.loc["seed", "difference"] == 0 and (table["runs"] == 4).all()
    lines = ablation.as_markdown(table).splitlines()
    assert (
        len(lines) == 5 and lines[3].startswith("| adamw | `optimizer=adamw` | 4 | ") and lines[2].endswith("| | | |")
    )


def test_what_is_finished_is_not_trained_again(config, monkeypatch, capsys):
    trials = ablation.plan_trials(config, BASE, ["angular"], seeds=(0,))
    ablation.run_trials(trials[:1])
    before = (trials[0].run.folder / "result.json").read_bytes()
    ablation.run_trials(trials)
    assert capsys.readouterr().out.count("already finished") == 1
    assert (trials[0].run.folder / "result.json").read_bytes() == before
    assert finished.read_result(trials[1].run.folder).epochs == 2


def test_what_does_not_exist_is_named(config):
    with pytest.raises(ValueError, match="no change 'adam'; did you mean 'adamw'"):
        ablation.plan_trials(config, changes=["adam"])
    with pytest.raises(recipes.ConfigError, match="no key 'epoch'; did you mean 'epochs'"):
        ablation.plan_trials(config, "epoch=1")

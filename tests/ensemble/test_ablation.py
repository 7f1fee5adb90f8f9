"""An ablation: each run an ordinary one, trained once, and differences by the runs' own files."""

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
    assert len({trial.run.folder for trial in trials}) == len(trials)


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

"""The nearest training prompts as a prediction: against plain NumPy on a run whose predictions are made here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset, unit_rows
from fixtures.finished_runs import RESULT

from kutils.__main__ import run as run_command
from kutils.data.datasets import load_datasets
from kutils.ensemble import blending, neighbours
from kutils.system.ranks import Ranks
from kutils.training import out_of_fold


def save_run(folder, data, rows, predicted):
    origin, ranks = {"fold": 3, "prefix": "tiny", "checkpoint": "x"}, Ranks(0, 1, torch.device("cpu"))
    path = folder / "fold3_predictions.npz"
    predicted = torch.from_numpy(predicted)
    out_of_fold.save_predictions(path, data, rows, predicted, torch.ones(len(rows)), ranks, **origin)


@pytest.fixture
def run(workspace, tiny_recipe):
    """A finished run on 400 prompts: predictions near the truth."""
    make_dataset(workspace / "input", num_prompts=400, size=8)
    recipe = tiny_recipe()
    folder = workspace / "working" / "runs" / "tiny_fold3"
    folder.mkdir(parents=True)
    data = load_datasets(recipe.datasets)
    rows = data.validation_rows(3)
    predicted = data.targets(rows) + 0.5 * unit_rows(len(rows), seed=9)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    save_run(folder, data, rows, predicted)
    (folder / "config.yaml").write_text(recipe.to_yaml())
    replace(RESULT, fold=3).write(folder)
    return folder, data, rows, predicted


def test_it_is_chosen_on_one_half_and_scored_on_the_other(run, capsys):
    folder, data, rows, predicted = run
    targets = data.targets(rows)
    groups = blending.topics(targets, data.prompt_codes[rows], 0)
    seen = blending.split_groups(groups, 0)
    training = data.targets(np.arange(0, 800, 2))[np.arange(400) % 10 != 3]
    cosines = predicted @ training.T
    order = np.argsort(-cosines, axis=1)

    def score(some, k, temperature):
        nearest = order[some, :k]
        weights = np.exp(np.take_along_axis(cosines[some], nearest, axis=1) / temperature)
        mean = np.einsum("nk,nkd->nd", weights, training[nearest])
        return np.sum(mean * targets[some], axis=1) / np.linalg.norm(mean, axis=1)

    pairs = [(k, temperature) for k in (2, 6) for temperature in (0.05, 0.5)]
    best = max(pairs, key=lambda pair: score(seen, *pair).mean())
    found = neighbours.measure_neighbours(folder, (2, 6), (0.05, 0.5), device="cpu")
    assert (found.neighbours, found.temperature) == best and found.bank == 360 and found.rows == (~seen).sum()
    own = np.sum(predicted * targets, axis=1)[~seen]
    assert found.own == pytest.approx(own.mean(), abs=1e-6)
    assert found.nearest == pytest.approx(score(~seen, *best).mean(), abs=1e-6)
    assert found.chosen == pytest.approx(score(seen, *best).mean(), abs=1e-6)
    assert found.gain["mean"] == pytest.approx(found.nearest - found.own, abs=1e-6)

    assert run_command("neighbours", ["tiny*", "--k", "2,6", "--temperature", "0.05,0.5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == str(found) + "\n"
    assert f"own predictions                        {found.own:.4f}" in str(found)


def test_more_neighbours_than_there_are_prompts_are_all_of_them(run):
    folder, *_ = run
    assert neighbours.measure_neighbours(folder, (9000,), (0.05,), device="cpu").neighbours == 360


def test_one_prompt_cannot_be_split_into_halves(run):
    folder, data, rows, predicted = run
    assert data.prompts[rows[0]] == data.prompts[rows[1]]
    save_run(folder, data, rows[:2], predicted[:2])
    with pytest.raises(ValueError, match="holds predictions of 1 prompts; choosing and scoring take two or more"):
        neighbours.measure_neighbours(folder, device="cpu")


def test_what_cannot_be_measured_is_said(run, capsys):
    folder, *_ = run
    for arguments, message in [
        (["tiny_fold4"], "no finished run 'tiny_fold4'"),
        (["tiny_fold3", "--k", "many"], "argument --k: invalid prompt_counts value: 'many'"),
        (["tiny_fold3", "--k", "5,"], "argument --k: invalid prompt_counts value: '5,'"),
        (["tiny_fold3", "--k", "5,-5"], "argument --k: -5 is no number of prompts"),
        (["tiny_fold3", "--temperature", "0.1,0"], "argument --temperature: 0.0 is no temperature"),
        (["tiny_fold3", "--temperature", "inf"], "argument --temperature: inf is no temperature"),
    ]:
        try:
            assert run_command("neighbours", arguments) == 1
        except SystemExit as stopped:
            assert stopped.code == 2
        assert message in capsys.readouterr().err
    (folder / "fold3_predictions.npz").unlink()
    assert (
        run_command("neighbours", ["tiny_fold3"]) == 1
        and "fold3_predictions.npz is not there" in capsys.readouterr().err
    )

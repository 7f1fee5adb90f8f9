"""Runs beside each other: who compares with whom, what differs, how sure a difference is; and the notebook."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
from fixtures.notebooks import assert_readable, execute, figures, printed

from kutils.data import datasets
from kutils.ensemble import comparison
from kutils.runs.finished import read_result
from kutils.system import paths


def cosines(root, name, fold=0):
    """Of a run's predictions with the prompts of its fold: plain NumPy."""
    data = datasets.load_datasets(["toy"])
    with np.load(root / "working" / "runs" / name / f"fold{fold}_predictions.npz") as saved:
        return (saved["embeddings"].astype(np.float64) * data.targets(data.validation_rows(fold))).sum(axis=1)


def test_runs_of_other_rows_are_another_group(finished):
    chosen = comparison.select_runs()
    first, second = (read_result(finished / "working" / "runs" / f"{name}_fold0") for name in ("first", "second"))
    order = ["first_fold0", "second_fold0"]
    if second.cosine_similarity > first.cosine_similarity:
        order.reverse()
    assert [run.name for run in chosen] == [*order, "first_fold1"]
    table = comparison.runs_table(chosen)
    assert table["rows"].tolist() == ["A", "A", "B"] and table["fold"].tolist() == [0, 0, 1]
    assert table.loc["first_fold0", "cosine"] == first.cosine_similarity
    gain = first.cosine_similarity - first.mean_prompt_baseline
    assert table.loc["first_fold0", "gain"] == pytest.approx(gain)
    assert all(pd.api.types.is_numeric_dtype(table[name]) for name in ("cosine", "gain", "seconds", "images/s"))
    told = comparison.groups_text(chosen).splitlines()
    assert told[0].startswith("A: fold 0, 12 rows of toy: ") and told[1].startswith("B: fold 1, 12 rows")
    assert "do not compare" in told[2]
    assert [run.name for run in comparison.pick_group(chosen)] == order
    assert [run.name for run in comparison.pick_group(chosen, "B")] == ["first_fold1"]
    with pytest.raises(ValueError, match="no group 'C'; there is A, B"):
        comparison.pick_group(chosen, "C")


def test_the_same_fold_of_other_data_is_another_group(finished):
    folder = finished / "working" / "runs" / "third_fold0"
    shutil.copytree(finished / "working" / "runs" / "first_fold0", folder)
    path = folder / "fold0_predictions.npz"
    with np.load(path) as saved:
        content = dict(saved)
    np.savez(path, **content | {"targets_hash": "another"})
    assert comparison.runs_table(comparison.select_runs("*_fold0"))["rows"].tolist() == ["A", "A", "B"]
    path.unlink()  # without predictions a run is alone
    assert comparison.runs_table(comparison.select_runs("*_fold0"))["rows"].tolist() == ["A", "A", "B"]


def test_other_images_of_the_same_prompts_are_another_group(finished):
    inputs, folder = finished / "input", finished / "working" / "runs" / "third_fold0"
    for suffix in (".tsv", ".npy"):
        shutil.copy(inputs / f"toy{suffix}", inputs / f"redrawn{suffix}")
    shutil.copytree(finished / "working" / "runs" / "first_fold0", folder)
    config = folder / "config.yaml"
    config.write_text(re.sub(r"datasets:.*\n(- toy\n)?", "datasets: [redrawn]\n", config.read_text()))
    table = comparison.runs_table(comparison.select_runs("*_fold0"))
    assert table.loc["third_fold0", "data sets"] == "redrawn" and sorted(table["rows"]) == ["A", "A", "B"]


def test_two_folders_of_one_name_are_refused(finished):
    elsewhere = finished / "elsewhere" / "first_fold0"
    shutil.copytree(finished / "working" / "runs" / "first_fold0", elsewhere)
    with pytest.raises(ValueError, match=rf"2 runs are named first_fold0 \(.*{elsewhere}\)"):
        comparison.select_runs(f"first_fold0,{elsewhere}")


def test_predictions_that_are_not_finite_are_refused(finished):
    path = finished / "working" / "runs" / "first_fold0" / "fold0_predictions.npz"
    with np.load(path) as saved:
        content = dict(saved)
    content["embeddings"][3] = np.nan
    np.savez(path, **content)
    with pytest.raises(ValueError, match=rf"{path} holds predictions that are not finite; train it: kutils train"):
        comparison.same_rows(comparison.pick_group(comparison.select_runs()))


def test_runs_are_chosen_by_name(finished):
    names = [run.name for run in comparison.select_runs("first_fold1, first_fold0")]
    assert names == ["first_fold1", "first_fold0"]
    with pytest.raises(ValueError, match="no finished run 'frst'"):
        comparison.select_runs("frst")
    shutil.rmtree(finished / "working" / "runs")
    with pytest.raises(ValueError, match="no finished run yet"):
        comparison.select_runs()


def test_only_keys_that_differ_are_shown(finished):
    frame = comparison.configurations(comparison.select_runs("first_fold0,second_fold0"))
    assert sorted(frame.index) == ["lr", "seed"]
    assert frame.loc["lr", "second_fold0"] == "0.0001" and frame.loc["seed", "second_fold0"] == "3"
    assert comparison.configurations(comparison.select_runs("first*")).empty  # folds differ, configurations do not


def test_the_difference_is_of_the_same_images(finished):
    same = comparison.same_rows(comparison.pick_group(comparison.select_runs()))
    own = {name: cosines(finished, name) for name in same.cosines}
    for name, values in own.items():
        np.testing.assert_allclose(same.cosines[name], values, atol=1e-6)
    best, other = sorted(own, key=lambda name: -own[name].mean())
    told = same.against_best()
    assert told.index.tolist() == [best, other] and told["cosine"].tolist() == pytest.approx(
        [own[best].mean(), own[other].mean()]
    )
    difference = own[other] - own[best]
    sums = (difference - difference.mean()).reshape(6, 2).sum(axis=1)  # two images of each of six prompts
    error = 1.96 * np.sqrt(6 / 5 * np.square(sums).sum()) / 12
    expected = [difference.mean(), difference.mean() - error, difference.mean() + error, np.mean(difference > 0)]
    assert told.loc[other, ["difference", "low", "high", "wins"]].tolist() == pytest.approx(expected, abs=1e-6)
    assert told.loc[best, "difference"] == 0 and told.loc[best, ["low", "high", "wins"]].isna().all()

    sliced = same.by_slice()
    short = np.arange(12) // 2 % 2 == 0  # prompts 0, 10, 20, ... in turn
    assert sliced["kind"].loc["short", best] == pytest.approx(own[best][short].mean(), abs=1e-6)
    assert sliced["kind"].loc["long", "images"] == 6
    joined = comparison.join_slices(sliced)
    assert list(joined)[:3] == ["by", "slice", "images"] and len(joined) == sum(map(len, sliced.values()))


def test_runs_that_cannot_be_compared_row_by_row_are_refused(finished):
    with pytest.raises(ValueError, match="were validated on different rows"):
        comparison.same_rows(comparison.select_runs("first*"))
    path = paths.input_dir() / "toy.npy"
    np.save(path, np.roll(np.load(path), 2, axis=0))
    with pytest.raises(ValueError, match="was made for other validation rows"):
        comparison.same_rows(comparison.select_runs("*_fold0"))


def test_letters_of_groups():
    assert [comparison.letter(number) for number in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]


@pytest.mark.slow
def test_the_notebook_shows_all_of_it(finished):
    executed = execute("compare", finished / "out.ipynb")
    assert_readable(figures(executed), 3)  # curves, scores, slices
    said = printed(executed)
    assert "A: fold 0, 12 rows of toy" in said and "do not compare" in said
    outputs = [output.get("data", {}) for cell in executed for output in cell.get("outputs", [])]
    shown = ["".join(each["text/html"]) for each in outputs if "text/html" in each]
    assert len(shown) == 4 and all('<table class="sortable">' in each for each in shown)
    score = read_result(finished / "working" / "runs" / "second_fold0").cosine_similarity
    assert f">{score:.4f}</td>" in shown[0] and "lr</th>" in shown[1]

"""The ladder: each rung against its definition, ranks by hand, intervals against theory."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from kutils import __main__
from kutils.data import datasets
from kutils.ensemble import bootstrap, ladder
from kutils.views import ladder_plots


def test_the_interval_is_that_of_a_mean_over_prompts():
    """Of 2,000 independent prompts it is the normal one; a second, equal image of each prompt makes nothing surer."""
    values = np.random.default_rng(1).normal(0.5, 0.2, 2000)
    low, high = bootstrap.interval(values, np.arange(2000))
    half = 1.96 * values.std() / 2000**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1) and (low + high) / 2 == pytest.approx(
        values.mean(), abs=1e-3
    )
    twice = bootstrap.interval(np.repeat(values, 2), np.repeat(np.arange(2000), 2))
    assert twice == pytest.approx((low, high))
    assert bootstrap.interval(np.repeat(values, 2), np.arange(4000))[1] < high  # taken for images, it would be


def test_differences_are_paired():
    random = np.random.default_rng(2)
    one = random.normal(0.5, 0.2, 500)
    other = one + 0.01 + random.normal(0, 0.001, 500)
    low, high = bootstrap.interval(other - one, np.arange(500))
    assert 0.009 < low < 0.01 < high < 0.011
    means = [bootstrap.resampled_means(values, np.arange(500)) for values in (one, other)]
    np.testing.assert_allclose(means[1] - means[0], bootstrap.resampled_means(other - one, np.arange(500)))


def test_the_learning_curve_is_continued():
    prompts = np.array([250, 500, 1000, 2000, 4000])
    curve = pd.DataFrame({"prompts": prompts, "cosine": 0.7 - 1.5 / prompts**0.4})
    a, b, c = ladder.fit_curve(curve)
    assert (a, b, c) == pytest.approx((0.7, 1.5, 0.4), rel=1e-2)
    assert ladder.fit_curve(curve[:3]) is None
    for cosine in (-0.2, 0.99):  # of an untrained network; of copies: the fit begins within its bounds
        a, *_ = ladder.fit_curve(curve.assign(cosine=cosine))
        assert 0 <= a <= 1


def test_the_longest_predictions_come_first():
    cosines = np.array([-1.0] * 5 + [1] * 5)  # the short half is wrong
    means = ladder.by_length(np.arange(1.0, 11), cosines)
    assert means == pytest.approx([1] * 5 + [4 / 6, 3 / 7, 2 / 8, 1 / 9, 0], abs=1e-6)


def test_whole_prompts_are_drawn():
    codes = np.tile(10 * np.arange(50), 2)
    kept = ladder.draw_prompts(codes, 21, seed=0)
    assert len(kept) == 20 and set(np.unique(codes[kept], return_counts=True)[1]) == {2}
    assert set(codes[kept]) != set(codes[ladder.draw_prompts(codes, 21, seed=1)])
    assert ladder.draw_prompts(codes, 100, seed=0).tolist() == list(range(100))
    assert len(ladder.draw_prompts(codes, 1, seed=0)) == 2


def test_ranks_and_recall_by_hand(workspace):
    """Row 0's prediction is its prompt; row 1's is nearer to nine other prompts of the bank; both have two images."""
    data = datasets.load_datasets(["toy"])
    rows = np.array([0, 20])
    own = data.targets(rows)
    bank = ladder.bank_of(data, rows, most=40, seed=0)
    assert len(bank) == 40 and len(set(data.prompt_codes[bank])) == 40
    cosines = data.targets(bank) @ own[1]
    tenth = data.targets(bank)[np.argsort(-cosines)[10]]
    predicted = np.stack([own[0], tenth])
    place = 1 + int((data.targets(bank) @ tenth > own[1] @ tenth + 1e-6).sum())
    cosines = {"one": np.einsum("nd,nd->n", predicted, own, dtype=np.float64)}
    means = {"one": bootstrap.resampled_means(cosines["one"], data.prompt_codes[rows])}
    line = ladder.score_rungs({"one": predicted}, cosines, means, data, rows, bank).loc["one"]
    assert line["cosine"] == pytest.approx((1 + own[1] @ tenth) / 2, abs=1e-6) and np.isnan(line["gain"])
    assert place > 1 and line["median_rank"] == (1 + place) / 2 and line["recall_1"] == 0.5
    assert line["recall_10"] == (1.0 if place <= 10 else 0.5)


@pytest.mark.slow
def test_the_ladder_of_a_fold(finished, tiny_recipe, capsys):
    """The ceiling sees another image of the same prompt; shuffled pairs teach nothing."""
    path = finished / "features.yaml"
    path.write_text(tiny_recipe(datasets=("toy",)).to_yaml())
    result = json.loads((finished / "working/runs/first_fold0/result.json").read_text())
    arguments = ["first_fold0", "second_fold0", "--datasets", "toy", "--config", str(path)]
    assert __main__.run("ladder", arguments) == 0
    printed = capsys.readouterr().out
    folder = finished / "working" / "ladder"
    assert (folder / "ladder.txt").read_text() in printed and (folder / "ladder.png").read_bytes()[1:4] == b"PNG"
    table = pd.read_csv(folder / "ladder.tsv", sep="\t", index_col="rung")
    data = datasets.load_datasets(["toy"])
    assert table.index[:2].tolist() == [ladder.SHUFFLED, ladder.MEAN_PROMPT] and table.index[-1] == ladder.CEILING
    assert table.loc[ladder.MEAN_PROMPT, "cosine"] == pytest.approx(data.mean_prompt_baseline(0), abs=1e-5)
    assert table.loc["first_fold0", "cosine"] == pytest.approx(result["cosine_similarity"], abs=1e-5)
    assert {"second_fold0", "ensemble of equal weights"} <= set(table.index)
    assert table["gain"][1:].to_numpy() == pytest.approx(np.diff(table["cosine"]), abs=1e-9)
    assert (table["low"] <= table["cosine"]).all() and (table["cosine"] <= table["high"]).all()
    assert table.loc[ladder.CEILING, "cosine"] > table["cosine"].drop(ladder.CEILING).max()
    assert abs(table.loc[ladder.SHUFFLED, "cosine"]) < 0.2
    pairs = pd.read_csv(folder / "ladder_differences.tsv", sep="\t").set_index(["rung", "other"])
    assert len(pairs) == len(table) * (len(table) - 1) / 2
    gain = pairs.loc["first_fold0", ladder.MEAN_PROMPT]
    with np.load(finished / "working/runs/first_fold0/fold0_predictions.npz") as saved:
        predicted, lengths = saved["embeddings"], saved["lengths"]
    rows = np.flatnonzero(data.folds == 0)
    over = np.einsum("nd,nd->n", predicted - data.training_mean(0), data.targets(rows))
    assert gain["mean"] == pytest.approx(over.mean(), abs=1e-6)
    assert gain[["low", "high"]].tolist() == pytest.approx(bootstrap.interval(over, data.prompt_codes[rows]), abs=1e-6)
    cosines = np.einsum("nd,nd->n", predicted, data.targets(rows))
    longest = cosines[np.argsort(-lengths)][: round(len(rows) / 2)].mean()
    assert re.search(rf"first_fold0 .*{longest:.4f}", printed.partition("mean cosine of the longest predictions")[2])


def test_without_a_model_the_other_rungs_stand(workspace, tiny_recipe):
    found = ladder.climb(["toy"], 0, [], tiny_recipe(), most=30)
    names = [ladder.SHUFFLED, ladder.MEAN_PROMPT, ladder.SMALL, ladder.SIMILAR, ladder.FROZEN, ladder.CEILING]
    assert list(found.table.index) == names and found.bank == 30
    assert "no finished run was validated on fold 0" in ladder_plots.format_ladder(found)
    assert list(found.coverage) == [ladder.FROZEN] and found.coverage.index[-1] == 1
    assert found.coverage[ladder.FROZEN].iloc[-1] == pytest.approx(found.table.loc[ladder.FROZEN, "cosine"], abs=1e-6)


def test_a_recipe_that_starts_from_a_checkpoint_has_no_frozen_backbone(workspace, tiny_recipe):
    recipe = tiny_recipe(initialize_from="x.pth", stage=2)
    with pytest.raises(ValueError, match="frozen backbone is that of pretrained weights; give a recipe of stage 1"):
        ladder.climb(["toy"], 0, [], recipe)

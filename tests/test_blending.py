"""Combining and fitting, against sums by hand, a search over a grid, and data whose right weights are known."""

import numpy as np
import pytest
from conftest import unit_rows

from kutils import blending


def noisy(targets, noise, seed):
    """The targets with random vectors of length `noise` added, as unit rows."""
    return blending.unit(targets + noise * unit_rows(len(targets), seed))


def test_combine_adds_weighted_unit_rows():
    predictions = {"a": np.array([[2.0, 0.0], [0.0, 1.0]]), "b": np.array([[0.0, 5.0], [0.0, -3.0]])}
    combined = blending.combine(predictions, {"a": 0.75, "b": 0.25})
    assert combined.dtype == np.float32
    np.testing.assert_allclose(combined, [[3 / np.sqrt(10), 1 / np.sqrt(10)], [0, 1]], atol=1e-6)
    per_dimension = blending.combine(predictions, {"a": [1.0, 0.5], "b": [0.0, 1.5]})
    np.testing.assert_allclose(per_dimension, [[1 / np.sqrt(3.25), 1.5 / np.sqrt(3.25)], [0, -1]], atol=1e-6)


def test_a_missing_prediction_leaves_the_others_and_then_the_fallback():
    nothing = [np.nan, np.nan]
    predictions = {"a": np.array([[1.0, 0.0], nothing, nothing]), "b": np.array([[0.0, 1.0], [0.0, 1.0], nothing])}
    weights = {"a": 0.9, "b": 0.1}
    assert np.isnan(blending.combine(predictions, weights)[2]).all()
    combined = blending.combine(predictions, weights, fallback=[0.6, 0.8])
    np.testing.assert_allclose(combined[1:], [[0, 1], [0.6, 0.8]], atol=1e-7)
    only_a = blending.combine({"a": predictions["a"]}, weights, fallback=[0.6, 0.8])  # b was dropped
    np.testing.assert_allclose(only_a, [[1, 0], [0.6, 0.8], [0.6, 0.8]], atol=1e-7)


def test_members_that_differ_do_not_make_a_family_count_less():
    averaged = blending.average([np.array([[1.0, 0.0], [1, 0]]), np.array([[0.0, 1.0], [np.nan, np.nan]])])
    np.testing.assert_allclose(averaged, [[np.sqrt(0.5), np.sqrt(0.5)], [1, 0]], atol=1e-7)


def test_agreement_is_the_mean_cosine_of_all_pairs():
    predictions = {name: unit_rows(6, seed) for seed, name in enumerate("abc")}
    predictions["c"][4:] = np.nan
    predictions["b"][5] = np.nan
    a, b, c = predictions.values()
    cosine = lambda x, y: np.einsum("nd,nd->n", x, y)  # noqa: E731
    expected = (cosine(a, b) + cosine(a, c) + cosine(b, c)) / 3
    expected[4] = cosine(a, b)[4]
    np.testing.assert_allclose(blending.agreement(predictions), [*expected[:5], np.nan], atol=1e-6)


def test_family_weights_are_the_best_on_a_grid():
    targets = unit_rows(300, 1)
    predictions = np.stack([noisy(targets, 0.9, 2), noisy(targets, 1.2, 3), noisy(targets, 2.0, 4)])
    weights = blending.fit_family_weights(predictions, targets)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)

    def score(values):
        total = np.einsum("f,fnd->nd", values, predictions.astype(np.float64))
        return np.mean(np.sum(total * targets, axis=1) / np.linalg.norm(total, axis=1))

    grid = [np.array([i, j, 50 - i - j]) / 50 for i in range(51) for j in range(51 - i)]
    best = max(grid, key=score)
    assert score(weights) >= score(best)
    np.testing.assert_allclose(weights, best, atol=0.02)


def test_family_weights_of_independent_noise_are_known():
    """x = (t + s n) / sqrt(1 + s^2): the shares of t + s n are best in proportion to 1 / s^2."""
    targets = unit_rows(3000, 1)
    noises = np.array([0.8, 1.6])
    predictions = np.stack([noisy(targets, noise, 5 + number) for number, noise in enumerate(noises)])
    expected = np.sqrt(1 + noises**2) / noises**2
    np.testing.assert_allclose(blending.fit_family_weights(predictions, targets), expected / expected.sum(), atol=0.01)


def test_a_family_that_knows_nothing_gets_no_weight():
    targets = unit_rows(400, 1)
    predictions = np.stack([noisy(targets, 0.5, 2), blending.unit(unit_rows(400, 9) - 0.3 * targets)])
    np.testing.assert_allclose(blending.fit_family_weights(predictions, targets), [1, 0], atol=1e-6)


def test_ridge_solves_its_least_squares():
    targets, family_weights, strength = unit_rows(50, 1), np.array([0.7, 0.3]), 2.0
    predictions = np.stack([noisy(targets, 1, 2), noisy(targets, 2, 3)]).astype(np.float64)
    weights = blending.ridge(predictions, targets, family_weights, strength)
    combined = family_weights @ predictions.transpose(1, 0, 2)
    prior = family_weights * (combined * targets).sum() / (combined**2).sum()
    pull = np.sqrt(strength * np.mean(predictions**2) * 50)
    solutions = [
        np.linalg.lstsq(
            np.vstack([predictions[:, :, d].T, pull * np.eye(2)]), np.concatenate([targets[:, d], pull * prior])
        )[0]
        for d in range(384)
    ]
    expected = np.stack(solutions, axis=1)
    np.testing.assert_allclose(weights, expected / expected.sum(axis=0).mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(blending.ridge(predictions, targets, family_weights, np.inf)[:, 5], family_weights)


def test_dimension_weights_find_what_each_family_knows():
    targets, groups = unit_rows(800, 1), np.arange(800)
    first, second = targets.copy(), targets.copy()
    first[:, 192:] = unit_rows(800, 2)[:, 192:]
    second[:, :192] = unit_rows(800, 3)[:, :192]
    weights, report = blending.fit_and_score({"first": first, "second": second}, targets, groups)
    scores = report["scores"]
    assert scores["dimension"] > 0.99 and scores["family"] < 0.85
    assert scores["family"] == pytest.approx(scores["equal"], abs=1e-3)
    assert np.mean(weights["dimension"]["first"][:192]) > 0.85 and np.mean(weights["dimension"]["first"][192:]) < 0.15


def test_halves_share_no_prompt_and_are_the_same_again():
    groups = np.repeat(np.arange(101), 3)
    half = blending.split_groups(groups, seed=4)
    assert not set(groups[half]) & set(groups[~half]) and len(set(groups[half])) == 51
    np.testing.assert_array_equal(half, blending.split_groups(groups, seed=4))
    assert (half != blending.split_groups(groups, seed=5)).any()


def test_the_report_is_of_the_unseen_half():
    targets, groups = unit_rows(600, 1), np.repeat(np.arange(300), 2)
    good, bad = noisy(targets, 0.8, 2), noisy(targets, 1.5, 3)
    weights, report = blending.fit_and_score({"good": good, "bad": bad}, targets, groups, seed=7)
    unseen = ~blending.split_groups(groups, seed=7)
    assert report["rows"] == {"fit": 300, "unseen": 300}
    scores = report["scores"]
    assert scores["members"]["bad"] == pytest.approx(np.sum(bad * targets, axis=1)[unseen].mean(), abs=1e-6)
    total = weights["family"]["good"] * good + weights["family"]["bad"] * bad
    expected = np.sum(total * targets, axis=1)[unseen] / np.linalg.norm(total, axis=1)[unseen]
    assert scores["family"] == pytest.approx(expected.mean(), abs=1e-6)
    assert scores["family"] > scores["members"]["good"] + 0.02
    alone = {"good": scores["members"]["bad"], "bad": scores["members"]["good"]}
    assert report["leave_one_out"] == pytest.approx(alone, abs=1e-6)
    errors = [(rows - targets)[unseen].ravel() for rows in (good, bad)]
    assert report["error_correlations"]["good"]["bad"] == pytest.approx(np.corrcoef(errors)[0, 1], abs=1e-5)

    # what the fit never saw does not move it
    changed = {"good": np.where(unseen[:, None], -good, good), "bad": bad}
    again, worse = blending.fit_and_score(changed, targets, groups, seed=7)
    assert again == weights and worse["scores"]["family"] < 0


def test_dimension_weights_fall_back_on_the_family_weights():
    """With 30 rows 768 weights cannot be had from data that hold two: the pull must not be let go."""
    targets = unit_rows(60, 1)
    _, report = blending.fit_and_score({"a": noisy(targets, 1, 2), "b": noisy(targets, 1.3, 3)}, targets, np.arange(60))
    assert report["scores"]["dimension"] == pytest.approx(report["scores"]["family"], abs=0.005)


def test_one_family_is_its_own_ensemble_and_one_prompt_is_no_test():
    targets = unit_rows(40, 1)
    weights, report = blending.fit_and_score({"only": noisy(targets, 1, 2)}, targets, np.arange(40))
    assert weights["family"] == {"only": 1.0} and report["leave_one_out"] == {}
    assert report["scores"]["family"] == pytest.approx(report["scores"]["members"]["only"])
    with pytest.raises(blending.BlendingError, match="one prompt"):
        blending.fit_and_score({"only": targets}, targets, np.zeros(40, int))

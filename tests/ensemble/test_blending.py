"""Combining and fitting, against sums by hand, a search over a grid, and data whose right weights are known."""

import numpy as np
import pytest
from fixtures.datasets import unit_rows
from scipy.optimize import minimize

from kutils.ensemble import blending


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


def test_pulled_weights_are_the_best_near_by():
    """Against the same objective by scipy's SLSQP, which is given the constraint as one."""
    targets, family_weights, pull = unit_rows(50, 1)[:, :6], np.array([0.7, 0.3]), 1e-2
    targets = blending.unit(targets)
    random = np.random.default_rng(2)
    predictions = np.stack([blending.unit(targets + noise * random.standard_normal((50, 6))) for noise in (0.6, 0.9)])
    weights = blending.pulled_weights(predictions, targets, family_weights, pull)
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)

    def objective(flat):
        tried = flat.reshape(2, 6)
        total = np.einsum("fd,fnd->nd", tried, predictions.astype(np.float64))
        cosines = (total * targets).sum(axis=1) / np.linalg.norm(total, axis=1)
        return pull * np.square(tried - family_weights[:, None]).sum() - cosines.mean()

    start = np.repeat(family_weights, 6)
    sums = {"type": "eq", "fun": lambda flat: flat.reshape(2, 6).sum(axis=0) - 1}
    best = minimize(objective, start, method="SLSQP", constraints=[sums], tol=1e-12)
    assert objective(weights.ravel()) == pytest.approx(best.fun, abs=1e-6)
    assert objective(start) - best.fun > 1e-4  # there is something to be found
    np.testing.assert_allclose(weights.ravel(), best.x, atol=5e-3)
    np.testing.assert_array_equal(
        blending.pulled_weights(predictions, targets, family_weights, np.inf)[:, 5], [0.7, 0.3]
    )


def test_dimension_weights_do_not_learn_how_large_a_dimension_is_in_these_rows():
    """Two equal families and targets of which one dimension is large in all rows: nothing tells the families apart."""
    targets = unit_rows(300, 1)
    targets[:, 0] += 1
    targets = blending.unit(targets)
    shrunk = targets.copy()
    shrunk[:, 0] /= 2
    predictions = {"a": blending.unit(shrunk), "b": blending.unit(shrunk)}
    weights, _ = blending.fit_and_score(predictions, targets, np.arange(300))
    total = np.add(weights["dimension"]["a"], weights["dimension"]["b"])
    np.testing.assert_allclose(total, 1, atol=1e-9)


def test_of_very_many_rows_some_are_drawn(monkeypatch):
    targets = unit_rows(400, 1)
    predictions = np.stack([noisy(targets, 0.8, 2), noisy(targets, 1.2, 3)])
    monkeypatch.setattr(blending, "MOST_ROWS", 100)
    seen = []
    whole = blending.pulled_weights
    monkeypatch.setattr(
        blending, "pulled_weights", lambda rows, *rest: seen.append(rows.shape[1]) or whole(rows, *rest)
    )
    blending.fit_dimension_weights(predictions, targets, np.array([0.6, 0.4]), np.arange(400))
    assert max(seen) == 100


def test_topics_are_of_like_prompts_and_hold_all_rows_of_one():
    centers = unit_rows(5, 1)
    prompts = np.repeat(np.arange(100), 2)
    targets = blending.unit(
        np.repeat(centers[np.arange(100) % 5], 2, axis=0) + 0.3 * np.repeat(unit_rows(100, 2), 2, 0)
    )
    topics = blending.topics(targets, prompts, seed=3)
    assert (topics[::2] == topics[1::2]).all() and len(set(topics)) >= 5
    kinds = prompts % 5
    assert all(len(set(kinds[topics == topic])) == 1 for topic in set(topics))
    np.testing.assert_array_equal(topics, blending.topics(targets, prompts, seed=3))
    few = blending.topics(targets[:20], prompts[:20])
    assert len(set(few)) == 10  # too few for topics: each prompt is a group


def test_the_error_of_a_gain_knows_that_rows_of_a_topic_are_alike():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 10)
    effect = np.repeat(random.normal(0.02, 0.1, 200), 10)
    gain = blending.gain(effect, np.zeros(2000), groups)
    assert gain["mean"] == pytest.approx(effect.mean())
    assert gain["error"] == pytest.approx(effect[::10].std(ddof=1) / np.sqrt(200), rel=1e-6)  # 200 numbers, not 2,000
    alone = blending.gain(effect, np.zeros(2000), np.arange(2000))
    assert alone["error"] == pytest.approx(effect.std(ddof=1) / np.sqrt(2000), rel=1e-6)
    assert blending.gain(effect, np.zeros(2000), np.arange(2000) % 4)["error"] is None  # too few


def test_dimension_weights_find_what_each_family_knows():
    targets, groups = unit_rows(800, 1), np.arange(800)
    first, second = targets.copy(), targets.copy()
    first[:, 192:] = unit_rows(800, 2)[:, 192:]
    second[:, :192] = unit_rows(800, 3)[:, :192]
    weights, report = blending.fit_and_score({"first": first, "second": second}, targets, groups)
    scores = report["scores"]
    assert scores["dimension"] > 0.95 and scores["family"] < 0.85
    gain = report["over_equal"]["dimension"]
    assert (
        gain["mean"] == pytest.approx(scores["dimension"] - scores["equal"]) and gain["mean"] > 10 * gain["error"] > 0
    )
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
    with pytest.raises(ValueError, match="one prompt"):
        blending.fit_and_score({"only": targets}, targets, np.zeros(40, int))

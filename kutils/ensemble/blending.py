"""Combines the predictions of several model families and fits their weights; works on arrays alone."""

from collections.abc import Mapping, Sequence

import numpy as np

METHODS = ("equal", "family", "dimension")
# strengths of the penalty that pulls `dimension` weights towards `family` weights; infinite: no change
PULLS = (np.inf, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
MOST_ROWS = 20_000  # rows on which weights per dimension are fitted: enough for 1,536 numbers
PROMPTS_PER_TOPIC, MOST_TOPICS = 8, 50
LEAST_GROUPS = 5  # needed to estimate a standard error


# ---------------------------------------------------------------- combining


def unit(rows: np.ndarray) -> np.ndarray:
    """[n, D] scaled to length 1, float32; a row that is zero or not finite becomes zero, which means no prediction."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0).astype(np.float32, copy=False)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=rows, where=lengths > 0)


def combine(
    predictions: Mapping[str, np.ndarray], weights: Mapping[str, float | Sequence[float]], fallback=np.nan
) -> np.ndarray:
    """Weighted sum of unit rows, scaled to unit length; for each row, families without a prediction are left out.

    Args:
        predictions: family -> float [n, D], at least one family; a row with NaN is no prediction.
        weights: family -> a number, or one per dimension.
        fallback: [D] or a number, for rows that no family predicts.
    Returns: float32 [n, D], unit rows.
    """
    total = unit(weighted_total(predictions, weights))
    return np.where(total.any(axis=1, keepdims=True), total, np.asarray(fallback, np.float32))


def weighted_total(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float | Sequence[float]]) -> np.ndarray:
    """Weighted sum of unit rows, before it is scaled to unit length: the longer, the more the families agree.

    Args: as for `combine`.
    Returns: float32 [n, D], lengths from 0 to the sum of the weights.
    """
    return sum(np.asarray(weights[name], np.float32) * unit(rows) for name, rows in predictions.items())


def average(members: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the predictions of a family's members, scaled to unit length: float32 [n, D]; NaN if none has one.

    The family's weight was fitted with a single member of unit length, so the mean must have it too.
    """
    return combine(dict(enumerate(members)), dict.fromkeys(range(len(members)), 1.0))


def agreement(predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean cosine between the families' predictions of each image: [n]; NaN where fewer than two predict it."""
    rows = np.stack([unit(values) for values in predictions.values()])
    count = rows.any(axis=2).sum(axis=0)
    squared = np.square(rows.sum(axis=0)).sum(axis=1)  # = count + the cosines of all ordered pairs
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 1, (squared - count) / (count * (count - 1)), np.nan)


def mean_cosine(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Mean cosine between corresponding rows, of any norm, of two arrays [n, D]."""
    return float(np.einsum("nd,nd->n", unit(predicted), unit(targets)).mean(dtype=np.float64))


# ---------------------------------------------------------------- fitting


def fit_family_weights(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nonnegative weights, summing to 1, that maximise the mean cosine of the weighted sum with the targets.

    Equal weights and every single family are candidates too, so neither is better on these rows.

    Args:
        predictions: [F, n, D], unit rows.
        targets: [n, D], unit rows.
    Returns: float64 [F].
    """
    from scipy.optimize import minimize  # for fitting alone: where a model predicts, SciPy may be missing

    to_target = np.einsum("fnd,nd->nf", predictions, targets).astype(np.float64)
    products = np.einsum("fnd,gnd->nfg", predictions, predictions).astype(np.float64)

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        pulled = products @ weights
        lengths = np.sqrt(np.maximum(pulled @ weights, 1e-24))
        cosines = to_target @ weights / lengths
        gradient = to_target / lengths[:, None] - (cosines / lengths**2)[:, None] * pulled
        return -cosines.mean(), -gradient.mean(axis=0)

    num_families = len(predictions)
    candidates = [np.full(num_families, 1 / num_families), *np.eye(num_families)]
    for start in list(candidates):
        fitted = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * num_families).x
        candidates.append(fitted / max(fitted.sum(), 1e-12))
    return min(candidates, key=lambda weights: loss_and_gradient(weights)[0])


def fit_dimension_weights(
    predictions: np.ndarray, targets: np.ndarray, family_weights: np.ndarray, groups: np.ndarray, seed: int = 0
) -> np.ndarray:
    """One weight per family and dimension that maximise the mean cosine, pulled towards the family weights.

    In every dimension the weights sum to 1. Without this constraint they also fit the scale of each dimension in these
    rows, which differs in new images (measured on the rendered shapes, 390 rows: 0.654 on rows like these and 0.596 on
    fresh prompts, family weights 0.615 and 0.611; with a sum of 1, 0.615 and 0.611). The strength of the pull is chosen
    by cross-validation on two halves of these rows; if none helps, the result is the family weights.

    Args:
        predictions, targets: as in `fit_family_weights`; at most MOST_ROWS random rows are used.
        family_weights: [F].
        groups: int [n]; rows of one group are never in both halves.
    Returns: float64 [F, D].
    """
    if len(targets) > MOST_ROWS:
        drawn = np.random.default_rng(seed).choice(len(targets), MOST_ROWS, replace=False)
        predictions, targets, groups = predictions[:, drawn], targets[drawn], groups[drawn]
    first = split_groups(groups, seed)

    def validation_score(pull: float) -> float:
        scores = []
        for a, b in ((first, ~first), (~first, first)):
            weights = pulled_weights(predictions[:, a], targets[a], family_weights, pull)
            scores.append(mean_cosine(weighted_sum(weights, predictions[:, b]), targets[b]))
        return sum(scores)

    pull = np.inf if first.all() else max(PULLS, key=validation_score)
    return pulled_weights(predictions, targets, family_weights, pull)


def pulled_weights(predictions: np.ndarray, targets: np.ndarray, family_weights: np.ndarray, pull: float) -> np.ndarray:
    """Maximise mean cosine - pull * |weights - family weights|^2 with a sum of 1 in every dimension: float64 [F, D]."""
    from scipy.optimize import minimize  # for fitting alone: where a model predicts, SciPy may be missing

    prior = np.repeat(family_weights[:, None], targets.shape[1], axis=1)
    if np.isinf(pull):
        return prior

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        change = flat.reshape(prior.shape)
        change = change - change.mean(axis=0)  # the sum over the families stays
        total = weighted_sum(prior + change, predictions)
        lengths = np.linalg.norm(total, axis=1, keepdims=True)
        cosines = np.einsum("nd,nd->n", total, targets)[:, None] / lengths
        slope = (targets / lengths - cosines * total / lengths**2) / len(targets)
        gradient = 2 * pull * change - np.stack([np.einsum("nd,nd->d", slope, rows) for rows in predictions])
        loss = pull * np.square(change).sum() - cosines.mean(dtype=np.float64)
        return float(loss), (gradient - gradient.mean(axis=0)).ravel().astype(np.float64)

    fitted = minimize(loss_and_gradient, np.zeros(prior.size), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    change = fitted.reshape(prior.shape)
    return prior + change - change.mean(axis=0)


def weighted_sum(weights: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """[F, D] x [F, n, D] -> [n, D]."""
    return sum(each.astype(np.float32) * rows for each, rows in zip(weights, predictions, strict=True))


def topics(targets: np.ndarray, prompts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Groups of rows for a split by topic: k-means clusters of their prompts.

    Args:
        targets: float32 [n, D], unit rows.
        prompts: int [n], index of each row's prompt.
        Returns: int [n]; with fewer than 2 * PROMPTS_PER_TOPIC prompts, each is a group.
    """
    from sklearn.cluster import MiniBatchKMeans

    _, first, numbers = np.unique(prompts, return_index=True, return_inverse=True)
    count = min(MOST_TOPICS, len(first) // PROMPTS_PER_TOPIC)
    if count < 2:
        return numbers
    return MiniBatchKMeans(count, random_state=seed, n_init=3).fit_predict(targets[first])[numbers]


def split_groups(groups: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: the rows of a random half of the groups."""
    distinct, numbers = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    return (order < len(distinct) / 2)[numbers]


def gain(better: np.ndarray, than: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """Mean difference of two scores of the same rows, and its standard error, since rows of a group are not
    independent.

    Args:
        better, than: float [n], cosines.
        groups: int [n].
    Returns: `mean` and `error` (cluster-robust: Liang and Zeger 1986, of a mean; None for less than LEAST_GROUPS).
    """
    difference = better.astype(np.float64) - than
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.bincount(numbers, difference - difference.mean())
    mean, count = float(difference.mean()), len(sums)
    if count < LEAST_GROUPS:
        return {"mean": mean, "error": None}
    return {"mean": mean, "error": float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(difference))}


def fit_and_score(
    predictions: Mapping[str, np.ndarray], targets: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[dict[str, dict], dict]:
    """Fit every method on half of the groups; score the methods, and each family alone, on the other half.

    Args:
        predictions: family -> float32 [n, D], unit rows: out-of-fold predictions of one member each.
        targets: float32 [n, D], unit rows.
        groups: int [n]: the rows' topics or prompts; no group is in both halves.
    Returns: method -> family -> weight (a number, or a list per dimension); and a report with scores (members by
        family, and one number per method), over_equal (method -> `gain` over equal weights), leave_one_out (score of
        `family` refitted without one), error_correlations (of predictions minus targets), rows (fit, unseen).
    Raises: ValueError for a single group.
    """
    names, stacked = list(predictions), np.stack([unit(rows) for rows in predictions.values()])
    seen = split_groups(groups, seed)
    if seen.all():
        raise ValueError(f"{len(targets)} rows of one prompt: a fit and its test need rows of at least two")
    inside, outside, fit_targets, targets = stacked[:, seen], stacked[:, ~seen], targets[seen], targets[~seen]
    family = fit_family_weights(inside, fit_targets)
    weights = {
        "equal": np.full(len(names), 1 / len(names)),
        "family": family,
        "dimension": fit_dimension_weights(inside, fit_targets, family, groups[seen], seed),
    }

    def cosines(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", combine(dict(enumerate(rows)), dict(enumerate(values))), targets)

    def score(rows: np.ndarray, values: np.ndarray) -> float:
        return float(cosines(rows, values).mean(dtype=np.float64))

    equal = cosines(outside, weights["equal"])

    without = {name: [other for other in range(len(names)) if other != index] for index, name in enumerate(names)}
    correlations = np.corrcoef((outside - targets).reshape(len(names), -1)).reshape(len(names), -1)
    report = {
        "scores": {
            "members": {name: mean_cosine(rows, targets) for name, rows in zip(names, outside, strict=True)},
            **{method: score(outside, values) for method, values in weights.items()},
        },
        "over_equal": {method: gain(cosines(outside, weights[method]), equal, groups[~seen]) for method in METHODS[1:]},
        "leave_one_out": {
            name: score(outside[others], fit_family_weights(inside[others], fit_targets))
            for name, others in without.items()
            if others
        },
        "error_correlations": {
            name: dict(zip(names, row, strict=True)) for name, row in zip(names, correlations.tolist(), strict=True)
        },
        "rows": {"fit": int(seen.sum()), "unseen": int((~seen).sum())},
    }
    return {method: dict(zip(names, values.tolist(), strict=True)) for method, values in weights.items()}, report

"""Computes 95 % confidence intervals of means over images, by bootstrap over prompts, not over images."""

import numpy as np

DRAWS = 1000
LEVELS = (0.025, 0.975)


def resampled_means(values: np.ndarray, prompts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of a column in DRAWS resampled sets of prompts, each prompt with all its images (Efron 1979).

    Images of one prompt have one target and are not independent, so prompts are resampled, with replacement. The same
    seed draws the same prompts, so that differences of two results are paired.

    Args:
        values: float [n], one per image.
        prompts: int [n], each image's prompt.
    Returns: float64 [DRAWS].
    """
    codes = np.unique(prompts, return_inverse=True)[1]
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    random = np.random.default_rng(seed)
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        times = np.bincount(random.integers(0, len(counts), len(counts)), minlength=len(counts))
        means[draw] = times @ sums / (times @ counts)
    return means


def interval(values: np.ndarray, prompts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, or of a difference row by row; see `resampled_means`."""
    low, high = np.quantile(resampled_means(values, prompts, seed), LEVELS)
    return float(low), float(high)

"""Assigns distinct prompts to folds by one of several methods; a prompt heavier than a fold gets one of its own."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from kutils.prompts.near_duplicates import greedy_leaders
from kutils.prompts.partition import (
    fold_cost,
    folds_by_partition,
    folds_of_groups,
    groups_by_components,
    groups_by_kmeans,
)
from kutils.prompts.similarity import SimilarPairs
from kutils.prompts.stratified import folds_by_strata, topics_of

FOLD_METHODS = ("stratified", "partition", "components", "leader", "kmeans")
CUTTING = FOLD_METHODS[:2]  # methods that may cut groups of similar prompts
MOST_UNEVEN = 0.2  # largest relative deviation of a stratified fold's size from the mean


def assign(
    num_rows: np.ndarray,
    pairs: SimilarPairs,
    num_folds: int,
    method: str,
    seed: int,
    embeddings: np.ndarray | None = None,
    sources: np.ndarray | None = None,
) -> np.ndarray:
    """Assign folds to distinct prompts by one of FOLD_METHODS.

    Args:
        num_rows: int [prompts], rows of the data sets that hold the prompt; fold sizes count these.
        pairs: similar prompts; without effect for kmeans.
        seed: of stratified, partition and kmeans.
        embeddings: float32 [prompts, D], for kmeans, and for the topics of stratified.
        sources: int [prompts], for stratified.
    Returns: int8 [prompts], each fold from 0 to num_folds - 1 at least once.
    Raises: ValueError if the prompts cannot fill the folds.
    """
    if method == "kmeans":
        return folds_of_groups(groups_by_kmeans(embeddings, num_folds, seed), num_rows, num_folds)
    if method not in CUTTING:
        groups = (groups_by_components if method == "components" else greedy_leaders)(len(num_rows), pairs)
        return folds_of_groups(groups, num_rows, num_folds)
    heavy = heavy_prompts(num_rows, num_folds)
    rest = np.setdiff1d(np.arange(len(num_rows)), heavy)
    strata = [] if sources is None else [sources[rest]]
    strata += [] if embeddings is None or method == "partition" else [topics_of(embeddings, seed)[rest]]
    folds = np.empty(len(num_rows), np.int8)
    folds[heavy] = num_folds - 1 - np.arange(len(heavy))
    some_pairs = among(rest, pairs, len(num_rows))
    folds[rest] = cut_evenly(num_rows[rest], some_pairs, num_folds - len(heavy), method, seed, strata)
    if len(np.unique(folds)) < num_folds:
        raise ValueError(f"{len(num_rows)} prompts did not fill {num_folds} folds; ask for fewer folds")
    return folds


def cut_evenly(
    num_rows: np.ndarray,
    pairs: SimilarPairs,
    num_folds: int,
    method: str,
    seed: int,
    strata: Sequence[np.ndarray],
) -> np.ndarray:
    """Assign folds by one of CUTTING, or by the other one if it fails; arguments as for `folds_by_strata`.

    Stratified folds can be uneven if groups nearly as large as a fold stay whole; a partition cuts these. A partition
    of few prompts can leave a fold empty.
    """
    by_partition = partial(folds_by_partition, num_rows, pairs, num_folds, seed)
    by_strata = partial(folds_by_strata, num_rows, pairs, num_folds, strata, seed)
    first, other = (by_strata, by_partition) if method == "stratified" else (by_partition, by_strata)
    folds = first() if num_folds > 1 else np.zeros(len(num_rows), np.int8)
    (unevenness, _), is_full = fold_cost(folds, num_rows, pairs, num_folds), len(np.unique(folds)) == num_folds
    if is_full and (method == "partition" or unevenness <= MOST_UNEVEN):
        return folds
    return min(folds, other(), key=lambda each: (-len(np.unique(each)), fold_cost(each, num_rows, pairs, num_folds)))


def heavy_prompts(num_rows: np.ndarray, num_folds: int) -> list[int]:
    """The prompts, heaviest first, with more rows than a fold's even share of what heavier prompts leave over."""
    heavy, rows_left = [], int(num_rows.sum())
    for prompt in np.argsort(-num_rows, kind="stable")[: num_folds - 1].tolist():
        if num_rows[prompt] * (num_folds - len(heavy)) <= rows_left:
            break
        heavy.append(prompt)
        rows_left -= int(num_rows[prompt])
    return heavy


def among(some: np.ndarray, pairs: SimilarPairs, num_prompts: int) -> SimilarPairs:
    """The pairs between some of the prompts (int, ascending), renumbered by their position in `some`."""
    number = np.full(num_prompts, -1)
    number[some] = np.arange(len(some))
    inside = (number[pairs.first] >= 0) & (number[pairs.second] >= 0)
    return SimilarPairs(number[pairs.first[inside]], number[pairs.second[inside]], pairs.cosine[inside])

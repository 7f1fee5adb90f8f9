"""Assigns distinct prompts to folds by one of several methods; a prompt heavier than a fold gets one of its own."""

import numpy as np

from kutils.prompts.near_duplicates import greedy_leaders
from kutils.prompts.partition import folds_by_partition, folds_of_groups, groups_by_components, groups_by_kmeans
from kutils.prompts.similarity import SimilarPairs
from kutils.prompts.stratified import folds_by_strata, topics_of

FOLD_METHODS = ("stratified", "partition", "components", "leader", "kmeans")
CUTTING = FOLD_METHODS[:2]  # methods that cut the graph where they must


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
    some_rows, some_pairs, some_folds = num_rows[rest], among(rest, pairs, len(num_rows)), num_folds - len(heavy)
    folds = np.empty(len(num_rows), np.int8)
    folds[heavy] = num_folds - 1 - np.arange(len(heavy))
    if method == "partition" and some_folds > 1:
        folds[rest] = folds_by_partition(some_rows, some_pairs, some_folds, seed)
    if method == "stratified" or len(np.unique(folds)) < num_folds:  # METIS can leave small parts empty
        folds[rest] = folds_by_strata(some_rows, some_pairs, some_folds, strata, seed)
    if len(np.unique(folds)) < num_folds:
        raise ValueError(f"{len(num_rows)} prompts did not fill {num_folds} folds; ask for fewer folds")
    return folds


def heavy_prompts(num_rows: np.ndarray, num_folds: int) -> list[int]:
    """The prompts, heaviest first, that have more rows than an even share of the folds that heavier ones leave."""
    heavy, rows_left = [], int(num_rows.sum())
    for prompt in np.argsort(-num_rows, kind="stable")[: num_folds - 1].tolist():
        if num_rows[prompt] * (num_folds - len(heavy)) <= rows_left:
            break
        heavy.append(prompt)
        rows_left -= int(num_rows[prompt])
    return heavy


def among(some: np.ndarray, pairs: SimilarPairs, num_prompts: int) -> SimilarPairs:
    """The pairs between some of the prompts (int, ascending), which are numbered in their order."""
    number = np.full(num_prompts, -1)
    number[some] = np.arange(len(some))
    inside = (number[pairs.first] >= 0) & (number[pairs.second] >= 0)
    return SimilarPairs(number[pairs.first[inside]], number[pairs.second[inside]], pairs.cosine[inside])

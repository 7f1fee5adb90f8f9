"""Similar pairs against float64 brute force; leaders and de-duplication worked out by hand."""

import numpy as np
import pytest
from conftest import unit_rows

from kutils.similarity import GroupingError, SimilarPairs, deduplicate, greedy_leaders, similar_pairs


def neighbourhoods(num_groups: int, group_size: int, noise: float, seed: int = 0) -> np.ndarray:
    """float32 unit rows in shuffled order, in groups around random centres."""
    random = np.random.default_rng(seed)
    rows = np.repeat(unit_rows(num_groups, seed), group_size, axis=0)
    rows = random.permutation(rows + noise * random.standard_normal(rows.shape) / np.sqrt(384))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def cosines(rows: np.ndarray) -> np.ndarray:
    """float64 [n, n]"""
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def brute_force(rows: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    return list(zip(*np.nonzero(np.triu(cosines(rows) >= threshold, k=1)), strict=True))


@pytest.mark.parametrize("threshold", [0.02, 0.7, 0.78, 0.99])
@pytest.mark.parametrize("block_rows", [16, 37, 1000])
def test_pairs_are_those_of_brute_force(threshold, block_rows):
    rows = neighbourhoods(num_groups=30, group_size=5, noise=0.55)  # cosines within a group: 0.7 to 0.83
    pairs = similar_pairs(rows, threshold, block_rows=block_rows)
    assert list(zip(pairs.first, pairs.second, strict=True)) == brute_force(rows, threshold)
    np.testing.assert_allclose(pairs.cosine, cosines(rows)[pairs.first, pairs.second], atol=1e-6)
    assert pairs.first.dtype == pairs.second.dtype == np.int64 and pairs.cosine.dtype == np.float32
    assert len(pairs.first) > 50 or threshold == 0.99


def test_pairs_at_the_threshold_are_decided_in_float64():
    rows = neighbourhoods(num_groups=1, group_size=400, noise=0.65)
    values = np.sort(cosines(rows)[np.triu_indices(400, k=1)])
    gaps = np.flatnonzero((np.diff(values) > 2e-8) & (np.diff(values) < 4e-8))[::16]  # float32 products err by 6e-8
    assert len(gaps) > 100
    for gap in gaps:
        threshold = (values[gap] + values[gap + 1]) / 2
        assert len(similar_pairs(rows, threshold).first) == np.sum(values >= threshold)


def test_equal_rows_are_similar_at_every_threshold():
    rows = unit_rows(5)[[0, 1, 2, 1, 3, 1]]
    pairs = similar_pairs(rows, 1.0)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(1, 3), (1, 5), (3, 5)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_similar(count):
    rows = unit_rows(count)
    assert len(similar_pairs(rows, 0.9).first) == 0
    assert deduplicate(rows, 0.9).tolist() == [True] * count


@pytest.mark.parametrize(("factor", "length"), [(np.nan, "nan"), (np.inf, "inf"), (0, "0.0"), (2, "[12].[90]")])
def test_rows_that_are_no_unit_vectors_are_named(factor, length):
    rows = unit_rows(6)
    rows[4] *= factor
    with pytest.raises(GroupingError, match=f"row 4 of the embeddings has length {length}.*embed it again"):
        similar_pairs(rows, 0.7)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.1, float("nan")])
def test_threshold_is_checked(threshold):
    with pytest.raises(GroupingError, match=r"threshold .* is not in \(0, 1\]"):
        similar_pairs(unit_rows(3), threshold)


def pairs_of(*triples) -> SimilarPairs:
    first, second, cosine = zip(*triples, strict=True)
    return SimilarPairs(np.array(first), np.array(second), np.array(cosine, np.float32))


def test_leaders_by_hand():
    # 1 follows 0. 2 resembles 1 alone, a follower: it leads. 3 resembles both leaders, 2 more. 4 resembles nothing.
    pairs = pairs_of((0, 1, 0.8), (0, 3, 0.75), (1, 2, 0.9), (2, 3, 0.85), (3, 5, 0.7))
    assert greedy_leaders(6, pairs).tolist() == [0, 0, 2, 2, 4, 5]


def test_dedup_keeps_one_of_each_neighbourhood():
    rows = neighbourhoods(num_groups=40, group_size=4, noise=0.3)
    keep = deduplicate(rows, 0.9)
    similar = cosines(rows) >= 0.9
    np.fill_diagonal(similar, False)
    assert 40 <= keep.sum() < 100
    assert not similar[np.ix_(keep, keep)].any()
    for row in np.flatnonzero(~keep):
        assert similar[row, :row][keep[:row]].any()  # an earlier one that was kept

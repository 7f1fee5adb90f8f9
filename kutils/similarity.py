"""Similar prompts: all pairs above a cosine, exactly, and a list without near-duplicates."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kutils.devices import pick_device
from kutils.progress import progress_bar

UNIT_TOLERANCE = 1e-3  # of an embedding's length


class GroupingError(ValueError):
    """Prompts that cannot be grouped as asked; the message says what to do."""


class SimilarPairs(NamedTuple):
    """Pairs of rows, sorted by first, then second."""

    first: np.ndarray  # int64 [pairs]
    second: np.ndarray  # int64 [pairs], first < second
    cosine: np.ndarray  # float32 [pairs]


def similar_pairs(
    embeddings: np.ndarray, threshold: float, *, block_rows: int = 2048, device: str = "auto", progress: bool = False
) -> SimilarPairs:
    """All pairs of rows with cosine >= threshold, exactly: float32 products, and float64 wherever those could err.

    Only the upper triangle is computed, in blocks. Memory: the embeddings, the pairs and about 5 * block_rows ** 2
    bytes. 60,000 real prompts at 0.7 take 28 s on one CPU core.

    Args:
        embeddings: float32 [n, D], unit rows (lengths within 0.001 of 1 are made exact here).
        threshold: in (0, 1].
        block_rows: rows and columns of a block.
        device: auto, cpu or cuda.
        progress: show a bar if it takes more than 5 s.
    Raises: GroupingError for another threshold, or a row that is not finite or not of unit length.
    """
    check_threshold(threshold)
    rows = unit_rows(embeddings).to(pick_device(device))
    blocks = range(0, len(rows), block_rows)
    num_blocks = len(blocks) * (len(blocks) + 1) // 2
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    with progress_bar(num_blocks, "block", "pairs", delay=5, disable=not progress) as bar:
        for top in blocks:
            for left in range(top, len(rows), block_rows):
                first, second, cosine = pairs_between(
                    rows[top : top + block_rows], rows[left : left + block_rows], threshold
                )
                first, second = first + top, second + left
                above = first < second  # on the diagonal: each pair once, and no row with itself
                found.append(tuple(values[above].cpu().numpy() for values in (first, second, cosine)))
                bar.update()
    first, second, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((second, first))
    return SimilarPairs(first[order], second[order], cosine[order])


def pairs_between(left: Tensor, right: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (row of left, row of right, cosine) at or above the threshold: int64, int64, float32, sorted.

    Args:
        left, right: float32 [m, D] and [n, D], unit rows.
    """
    margin = left.shape[1] * 2.0**-23  # twice the bound D * u on the rounding error of a float32 scalar product
    product = left @ right.T
    row, column = (product >= threshold - margin).nonzero(as_tuple=True)
    cosine = product[row, column]
    doubtful = (cosine < threshold + margin).nonzero().flatten()
    a, b = left[row[doubtful]].double(), right[column[doubtful]].double()
    exact = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    keep = torch.ones_like(row, dtype=torch.bool)
    keep[doubtful] = exact >= threshold - 1e-12  # so that equal rows are found at 1.0
    cosine[doubtful] = exact.float()
    return row[keep], column[keep], cosine[keep]


def unit_rows(embeddings: np.ndarray) -> Tensor:
    """A float32 copy with rows of length 1; GroupingError for a row that is not finite or far from it."""
    rows = torch.from_numpy(np.array(embeddings, np.float32))
    lengths = rows.norm(dim=1, keepdim=True)
    bad = (~((lengths - 1).abs() < UNIT_TOLERANCE)).nonzero()  # NaN compares false
    if len(bad):
        row = int(bad[0, 0])
        raise GroupingError(f"row {row} of the embeddings has length {lengths[row].item()}, not 1; embed it again")
    return rows.div_(lengths)


def check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise GroupingError(f"threshold {threshold} is not in (0, 1]; 0.7 groups similar prompts, 0.9 near-duplicates")


def greedy_leaders(num_prompts: int, pairs: SimilarPairs) -> np.ndarray:
    """In order, make each prompt a leader unless an earlier leader is similar; else it follows the most similar one.

    Returns: int64 [num_prompts], the leader's row; its own for a leader.
    """
    leaders = np.arange(num_prompts)
    order = np.argsort(pairs.second, kind="stable")
    first, second, cosine = pairs.first[order], pairs.second[order], pairs.cosine[order]
    bounds = np.flatnonzero(np.diff(second, prepend=-1, append=-1))  # where the pairs of another second one begin
    for begin, end in pairwise(bounds):
        earlier = first[begin:end]
        is_leader = leaders[earlier] == earlier
        if is_leader.any():
            leaders[second[begin]] = earlier[np.argmax(np.where(is_leader, cosine[begin:end], -1))]
    return leaders


def deduplicate(embeddings: np.ndarray, threshold: float = 0.9, **pairs_options) -> np.ndarray:
    """Which prompts to keep so that no two kept ones have cosine >= threshold and each left out is that close to one.

    Earlier rows have priority. Options go to `similar_pairs`.

    Returns: bool [n].
    """
    pairs = similar_pairs(embeddings, threshold, **pairs_options)
    return greedy_leaders(len(embeddings), pairs) == np.arange(len(embeddings))

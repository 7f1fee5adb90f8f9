"""Finds all pairs of prompts at or above a cosine, exactly, within one set of embeddings or between two."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kutils.system import checksums, paths
from kutils.system.devices import autocast_dtype, pick_device
from kutils.system.embedding_files import UNIT_TOLERANCE
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks

BLOCK_ROWS = {"cpu": 2048, "cuda": 16_384}  # a CPU keeps the products of such a block in its cache
GROUP = 64  # rows whose largest cosine is compared first: most groups hold no candidate
DENSE = 1 / 50  # share of candidates in a block from which all float32 products cost less than single ones
CROWDED = 1 / 16  # share of groups with a candidate from which a block is quartered, if it has CROWDED_ROWS twice
CROWDED_ROWS = 2048
VERIFIED = 32_768  # candidates verified at a time: 100 MB
COPIED = 65_536  # embeddings copied at a time
EXACTLY = 1e-12  # tolerance in float64, so that equal rows count as similar at a threshold of 1.0


class SimilarPairs(NamedTuple):
    """Pairs of rows, sorted by first, then second."""

    first: np.ndarray  # int32 [pairs]
    second: np.ndarray  # int32 [pairs]; within one set: first < second
    cosine: np.ndarray  # float32 [pairs]


@dataclass(frozen=True)
class UnitRows:
    """Embeddings on the device, padded with zeros to a multiple of GROUP, with a rounded copy to find candidates in."""

    exact: Tensor  # float32 [padded, D], rows of length 1
    rounded: Tensor  # [padded, D] in bfloat16, float16 or float32
    num_rows: int
    error: float  # largest distance between a row and its rounded copy: 0.0017 to 0.002 in bfloat16


def similar_pairs(
    embeddings: np.ndarray,
    threshold: float,
    *,
    others: np.ndarray | None = None,
    block_rows: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    folder: Path | None = None,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> SimilarPairs:
    """Find all pairs of rows with cosine >= threshold, exactly.

    Products in bfloat16 (float16, float32) select candidates: no pair below the threshold by more than the rounding
    error can reach it. Each candidate is verified in float32, and in float64 if float32 could err. The work is divided
    into strips of `block_rows` rows, and each strip into blocks, from the diagonal on. It takes memory for the
    embeddings in both precisions, the pairs, 4 * block_rows ** 2 bytes, and up to 40 * 2,048 ** 2 bytes if most rows
    are similar.

    Args:
        embeddings: float32 [n, D], unit rows, also a memory map. Lengths within 0.001 of 1 are made exact here.
        others: float32 [m, D]: find pairs of a row of `embeddings` and a row of these instead.
        block_rows: rows and columns of a block; 0: 2,048 on the CPU, 16,384 on a GPU.
        device: auto, cpu or cuda; without effect if ranks are given.
        dtype: of the products that select candidates: auto (what the device multiplies fast), bfloat16, float16 or
            float32.
        folder: for finished strips, so that an interrupted call continues. Several ranks need it, and share it.
    Returns: all pairs on the main rank, none on the others.
    Raises: ValueError for a threshold out of range, or a row that is not finite or not of unit length.
    """
    check_threshold(threshold)
    ranks = ranks or Ranks(0, 1, pick_device(device))
    assert ranks.world_size == 1 or folder is not None
    left = put_rows(embeddings, ranks.device, dtype)
    right = left if others is None else put_rows(others, ranks.device, dtype)
    if left.exact.shape[1] != right.exact.shape[1]:
        raise ValueError(f"rows of {left.exact.shape[1]} and of {right.exact.shape[1]} numbers cannot be compared")
    block_rows = block_rows or BLOCK_ROWS[ranks.device.type]
    block_rows += -block_rows % GROUP
    tops = list(range(0, left.num_rows, block_rows))
    blocks_of = {top: range(top if others is None else 0, right.num_rows, block_rows) for top in tops}
    path_of = {top: None if folder is None else strip_path(folder, top, block_rows) for top in tops}
    missing = [top for top in tops if path_of[top] is None or not path_of[top].is_file()]
    own = share_strips(ranks.gather_objects(missing)[0], ranks)  # as the main rank sees it
    total = sum(len(blocks_of[top]) for top in own)
    with exact_products(), progress_bar(total, "block", "pairs", delay=5, disable=not progress) as bar:

        def pairs_of_strip(top: int) -> SimilarPairs:
            parts = []
            for start in blocks_of[top]:
                parts.append(pairs_of_block(left, right, top, start, block_rows, threshold))
                bar.update()
            pairs = concatenate_pairs(parts, sort=True)
            write_strip(path_of[top], pairs)
            return pairs

        strips = {top: pairs_of_strip(top) for top in own}
        ranks.barrier()
        if not ranks.is_main:
            return concatenate_pairs([])
        for top in set(tops) - set(own):  # of other ranks, and of an interrupted call
            saved = read_strip(path_of[top])
            strips[top] = pairs_of_strip(top) if saved is None else saved
        return concatenate_pairs([strips[top] for top in tops])


def share_strips(tops: list[int], ranks: Ranks) -> list[int]:
    """This rank's share of the strips, named by their first rows.

    Later strips are shorter. Dealing them forwards and backwards in turn gives all ranks about the same work.
    """
    cycle = [*range(ranks.world_size), *reversed(range(ranks.world_size))]
    return [top for number, top in enumerate(tops) if cycle[number % len(cycle)] == ranks.rank]


def put_rows(embeddings: np.ndarray, device: torch.device, dtype: str) -> UnitRows:
    """Copy embeddings (float32 [n, D]) to the device in float32, scaled to length 1, and in a faster precision."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings of shape {list(embeddings.shape)} are no rows of numbers")
    num_rows, dimension = embeddings.shape
    exact = torch.zeros(num_rows + -num_rows % GROUP, dimension, device=device)
    for start in range(0, num_rows, COPIED):
        block = unit_rows(embeddings[start : start + COPIED], start)
        exact[start : start + len(block)] = block.to(device)
    rounded = exact.to(autocast_dtype(dtype, device))
    blocks = zip(exact.split(COPIED), rounded.split(COPIED), strict=True)
    error = max(float((a - b.float()).norm(dim=1).amax()) if len(a) else 0.0 for a, b in blocks)
    return UnitRows(exact, rounded, num_rows, error)


def unit_rows(embeddings: np.ndarray, first_row: int = 0) -> Tensor:
    """A copy on the CPU, float32 [n, D], whose rows have length 1.

    Raises: ValueError for a row that is not finite or not of unit length; it counts from `first_row`.
    """
    rows = torch.from_numpy(np.array(embeddings, np.float32))
    lengths = rows.norm(dim=1, keepdim=True)
    bad = (~((lengths - 1).abs() < UNIT_TOLERANCE)).nonzero()  # NaN compares false
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"row {first_row + row} of the embeddings has length {lengths[row].item()}, not 1; embed it again"
        )
    return rows.div_(lengths)


def check_threshold(threshold: float) -> None:
    """Raise ValueError for a threshold that is not in (0, 1]."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]; 0.7 groups similar prompts, 0.9 near-duplicates")


def pairs_of_block(
    left: UnitRows, right: UnitRows, top: int, start: int, block_rows: int, threshold: float
) -> SimilarPairs:
    """The pairs of one block: rows `top` to `top + block_rows` of left and `start` to `start + block_rows` of right.

    A large block with many candidates is quartered, since their lists would take more memory than its products.
    """
    limit = candidate_limit(left, right, threshold)
    half = block_rows // 2 if block_rows % (2 * GROUP) == 0 else 0
    here, there = slice(top, top + block_rows), slice(start, start + block_rows)
    selected = candidates(left.rounded[here], right.rounded[there], limit, CROWDED if half >= CROWDED_ROWS else 1)
    if selected is None:
        corners = [(i, j) for i in (top, top + half) for j in (start, start + half)]
        corners = [(i, j) for i, j in corners if i < left.num_rows and j < right.num_rows]
        return concatenate_pairs([pairs_of_block(left, right, *corner, half, threshold) for corner in corners])
    row, column = selected
    within = (row + top < left.num_rows) & (column + start < right.num_rows)  # not in the padding
    if left is right:
        within &= row + top < column + start  # each pair once, and no row with itself
    row, column = row[within], column[within]
    a, b = left.exact[here], right.exact[there]
    if len(row) > DENSE * len(a) * len(b):
        cosine = (a @ b.T)[row, column]
    else:
        parts = zip(row.split(VERIFIED), column.split(VERIFIED), strict=True)
        cosine = torch.cat([(a[i] * b[j]).sum(dim=1) for i, j in parts])
    keep = cosine >= threshold
    doubtful = ((cosine - threshold).abs() < float32_margin(a.shape[1])).nonzero().flatten()
    for some in doubtful.split(VERIFIED):
        u, v = a[row[some]].double(), b[column[some]].double()
        exact = (u * v).sum(dim=1) / (u.norm(dim=1) * v.norm(dim=1))
        keep[some] = exact >= threshold - EXACTLY
        cosine[some] = exact.float()
    row, column = (row[keep] + top).int(), (column[keep] + start).int()
    return SimilarPairs(*(values.cpu().numpy() for values in (row, column, cosine[keep])))


def float32_margin(dimension: int) -> float:
    """Twice the bound D * u on the rounding error of a scalar product of unit rows in float32."""
    return dimension * 2.0**-23


def candidate_limit(left: UnitRows, right: UnitRows, threshold: float) -> Tensor:
    """The smallest product of rounded rows that a pair of the threshold's cosine can have, in the rows' precision.

    With a' = a + d, |d| <= e, and likewise b': |a'b' - ab| <= e_a (1 + e_b) + e_b. Sums are made in float32. The result
    is rounded once more to the precision of the rows, which adds at most 1.01 times its unit roundoff.
    """
    dtype = left.rounded.dtype
    error = left.error * (1 + right.error) + right.error
    error += 1.01 * torch.finfo(dtype).eps / 2 + float32_margin(left.exact.shape[1])
    limit = torch.tensor(threshold - error, dtype=torch.float64)
    rounded = limit.to(dtype)
    below = torch.nextafter(rounded, torch.tensor(-torch.inf, dtype=dtype))
    return (below if rounded.double() > limit else rounded).to(left.rounded.device)


def candidates(left: Tensor, right: Tensor, limit: Tensor, most: float = 1) -> tuple[Tensor, Tensor] | None:
    """Find the products of a row of left and a row of right that are not below the limit.

    Args:
        left, right, limit: [m, D], m a multiple of GROUP; [n, D]; and a scalar, all of one dtype.
        most: share of the groups of products that may hold a candidate.
    Returns: row and column of each, int64; None if more groups hold candidates.
    """
    groups = (left @ right.T).view(-1, GROUP, len(right))
    group, column = (groups.amax(dim=1) >= limit).nonzero(as_tuple=True)
    if len(group) > most * len(groups) * len(right):
        return None
    hit, member = (groups[group, :, column] >= limit).nonzero(as_tuple=True)
    return group[hit] * GROUP + member, column[hit]


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products without TF32, and sums in float32, inside the block, as the error bounds assume."""
    matmul, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    settings = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = settings


def concatenate_pairs(parts: list[SimilarPairs], sort: bool = False) -> SimilarPairs:
    """The pairs of all parts, in their order or sorted by first, then second."""
    empty = SimilarPairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    pairs = SimilarPairs(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))
    if sort:
        order = np.lexsort((pairs.second, pairs.first))
        pairs = SimilarPairs(*(column[order] for column in pairs))
    return pairs


@contextmanager
def strips_folder(embeddings: np.ndarray, *settings, ranks: Ranks | None = None) -> Iterator[Path]:
    """Name a folder for the strips of these embeddings, the same one after a kill; removed if the block succeeds.

    Args:
        embeddings: float32 [n, D].
        settings: all else that the pairs depend on, such as the threshold.
        ranks: share the folder; the main one removes it.
    """
    digest = hashlib.sha256(repr((embeddings.shape, *settings)).encode())
    for start in range(0, len(embeddings), COPIED):
        digest.update(np.ascontiguousarray(embeddings[start : start + COPIED]))
    folder = paths.working_dir() / "cache" / f"pairs-{digest.hexdigest()[:16]}"
    yield folder
    if ranks is None or ranks.is_main:  # it may still read when the others are done
        shutil.rmtree(folder, ignore_errors=True)


def strip_path(folder: Path, top: int, block_rows: int) -> Path:
    """The file of a strip; another device may use blocks of another size."""
    return folder / f"{top:09d}-{block_rows}.npz"


def read_strip(path: Path | None) -> SimilarPairs | None:
    """The pairs of a finished strip; None if there is no file, or a damaged one."""
    if path is None or not path.is_file():
        return None
    try:
        return SimilarPairs(**checksums.read_arrays(path, SimilarPairs._fields))
    except (OSError, ValueError):
        return None


def write_strip(path: Path | None, pairs: SimilarPairs) -> None:
    """Save a finished strip, atomically; nothing without a path."""
    if path is not None:
        with paths.atomic_path(path) as temporary:
            np.savez(temporary, **pairs._asdict())

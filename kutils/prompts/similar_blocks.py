"""Finds the similar pairs of one block of rows; short rows, of the fastest width, select candidates."""

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kutils.prompts.candidates import GROUP, candidates
from kutils.prompts.shortening import (
    Shortening,
    fit_shortening,
    float32_margin,
    principal_axes,
    smallest_product,
)
from kutils.system.devices import autocast_dtype
from kutils.system.embedding_files import UNIT_TOLERANCE

SAMPLE_ROWS = {"cpu": (1024, 4096), "cuda": (16_384, 16_384)}  # of a block by which ways to shorten rows are compared
CLOSE, TURNS = 1.25, 3  # times the least time, up to which ways are timed again, and how often
FEW_PAIRS = 2**24  # of rows, up to which comparing ways costs more than it saves
WIDTHS = (192, 128, 96, 64, 48, 32)  # of short rows that are tried, beside the full width
SLOWER = 2  # times the least time, from which narrower short rows are not tried: they have yet more candidates
SPARE = 1.05  # times the largest number of a sample: few blocks have a row with a larger one, and err more for it
DENSE = {"cpu": 1 / 8, "cuda": 1 / 50}  # share of candidates from which all float32 products cost less than single ones
CROWDED = 1 / 16  # share of candidates, or of groups with one, from which a block of twice CROWDED_ROWS is quartered
CROWDED_ROWS = 2048
VERIFIED = 32_768  # candidates verified at a time: 100 MB
COPIED = 1024  # embeddings copied at a time: 3 MB in float64, which a CPU's cache holds
EXACTLY = 1e-12  # tolerance in float64, so that equal rows count as similar at a threshold of 1.0


class SimilarPairs(NamedTuple):
    """Pairs of rows, sorted by first, then second."""

    first: np.ndarray  # int32 [pairs]
    second: np.ndarray  # int32 [pairs]; within one set: first < second
    cosine: np.ndarray  # float32 [pairs]


def concatenate_pairs(parts: list[SimilarPairs], sort: bool = False) -> SimilarPairs:
    """The pairs of all parts, in their order or sorted by first, then second."""
    empty = SimilarPairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    pairs = SimilarPairs(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))
    if sort:
        order = np.lexsort((pairs.second, pairs.first))
        pairs = SimilarPairs(*(column[order] for column in pairs))
    return pairs


@dataclass(frozen=True)
class UnitRows:
    """Embeddings on the device, with short ones to find candidates by."""

    exact: Tensor  # float32 [n, D], as given
    lengths: Tensor  # float64 [n]
    short: Tensor  # [padded, width], padded with zeros to a multiple of GROUP
    errors: Tensor  # float32 [n], as `Shortening.round` returns them


def put_rows(embeddings: np.ndarray, device: torch.device, run: Callable) -> UnitRows:
    """Copy embeddings (float32 [n, D]) to the device, and measure their lengths; no short rows yet.

    Raises: ValueError for a row that is not finite or not of unit length.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings of shape {list(embeddings.shape)} are no rows of numbers")
    exact = torch.empty(embeddings.shape, device=device)
    lengths = torch.empty(len(embeddings), dtype=torch.float64, device=device)

    def put(start: int) -> None:
        block = torch.from_numpy(np.array(embeddings[start : start + COPIED], np.float32))
        exact[start : start + len(block)] = block.to(device)
        lengths[start : start + len(block)] = check_lengths(block, start).to(device)

    list(run(put, range(0, len(embeddings), COPIED)))
    return UnitRows(exact, lengths, exact[:0], exact[:0, 0])


def shorten(rows: UnitRows, how: Shortening, run: Callable) -> UnitRows:
    """Rows with their short ones, in place of others."""
    num_rows = len(rows.exact)
    short = torch.zeros(num_rows + -num_rows % GROUP, how.width, dtype=how.dtype, device=rows.exact.device)
    errors = torch.empty(num_rows, device=rows.exact.device)

    def put(start: int) -> None:
        some = slice(start, min(start + COPIED, num_rows))
        short[some], errors[some] = how.round(rows.exact[some].double() / rows.lengths[some, None])

    list(run(put, range(0, num_rows, COPIED)))
    return replace(rows, short=short, errors=errors)


def check_lengths(rows: Tensor, first_row: int) -> Tensor:
    """float64 [n], of float32 [n, D].

    Raises: ValueError for a row that is not finite or not of unit length; it counts from `first_row`.
    """
    lengths = rows.double().norm(dim=1)
    bad = (~((lengths - 1).abs() < UNIT_TOLERANCE)).nonzero()  # NaN compares false
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(
            f"row {first_row + row} of the embeddings has length {lengths[row].item()}, not 1; embed it again"
        )
    return lengths


def fastest_shortening(left: UnitRows, right: UnitRows, threshold: float, dtype: str, run: Callable) -> Shortening:
    """The way to shorten rows with which the pairs among a sample of them are found in the least time.

    The widest short rows have the fewest candidates to verify, the narrowest the cheapest products. So widths are tried
    from the full one down, until candidates cost more than products save. Where the bound helps nothing, as among
    random rows, the full width wins. Full rows show which dtype multiplies fastest. A few rows are multiplied as they
    are; the more there are, the larger the sample.

    Args:
        dtype: of the short rows; auto: int8 or what the device multiplies fast.
    """
    device, width = left.exact.device, left.exact.shape[1]
    num_pairs = len(left.exact) * len(right.exact)
    count = int(np.clip(math.isqrt(num_pairs) // 64, *SAMPLE_ROWS[device.type]))
    wide = [sample_of(rows, 2 * count, seed) for seed, rows in enumerate((left, right))]
    samples = [sample_of(rows, count, 0) for rows in wide]
    numbers = torch.cat([rows.exact.double() / rows.lengths[:, None] for rows in wide])
    dtypes = [autocast_dtype(dtype, device)]
    if num_pairs <= FEW_PAIRS:
        return fit_shortening(numbers, None, width, dtypes[0])
    if dtype == "auto" and device.type == "cpu":
        dtypes.append(torch.int8)

    def timed(how: Shortening) -> TimedShortening:
        here, there = (shorten(rows, how, run) for rows in samples)
        once = functools.partial(time_block, here, there, threshold, how)
        return TimedShortening(how, once, min(once(), once()))  # the first prepares the product

    ways = [fastest([timed(fit_shortening(numbers[::4], None, width, name)) for name in dtypes])]
    axes, name = principal_axes(numbers), ways[0].how.dtype
    for size in (size for size in WIDTHS if size < width):
        narrower = timed(fit_shortening(numbers[::4], axes, size, name))
        if narrower.seconds > SLOWER * min(one.seconds for one in ways):
            break
        ways.append(narrower)
    return fit_shortening(numbers, axes, fastest(ways).how.width, name, SPARE)


class TimedShortening(NamedTuple):
    """A way to shorten rows, and what it takes."""

    how: Shortening
    once: Callable[[], float]  # does it once more: seconds
    seconds: float  # at first


def fastest(ways: list[TimedShortening]) -> TimedShortening:
    """The one of the least time; those close to it are repeated in turn, so that other work delays all alike."""
    close = [one for one in ways if one.seconds <= CLOSE * min(one.seconds for one in ways)]
    if len(close) == 1:
        return close[0]
    turns = [[one.once() for one in close] for _ in range(TURNS)]
    return close[int(np.min(turns, axis=0).argmin())]


def sample_of(rows: UnitRows, count: int, seed: int) -> UnitRows:
    """Up to `count` of the rows, drawn at random."""
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows.exact))[:count]).to(rows.exact.device)
    return replace(rows, exact=rows.exact[chosen], lengths=rows.lengths[chosen])


def time_block(left: UnitRows, right: UnitRows, threshold: float, how: Shortening) -> float:
    """Seconds that the pairs of one block take: of this thread on a CPU, whatever else it does, else by the clock."""
    clock = time.thread_time if left.exact.device.type == "cpu" else time.perf_counter
    began = clock()
    pairs_of_block(left, right, 0, 0, max(len(left.short), len(right.short)), threshold, how)
    return clock() - began  # the pairs are on the host: a GPU has been waited for


def pairs_of_block(
    left: UnitRows,
    right: UnitRows,
    top: int,
    start: int,
    block_rows: int,
    threshold: float,
    how: Shortening,
    fused: bool = False,
) -> SimilarPairs:
    """The pairs of one block: rows `top` to `top + block_rows` of left and `start` to `start + block_rows` of right.

    A large block with many candidates is quartered, since their lists would take more memory than its products.

    Args:
        fused: as in `similar_pairs`; for whole blocks, as each other size would be compiled by itself.
    """
    half = block_rows // 2 if block_rows % (2 * GROUP) == 0 else 0
    here, there = slice(top, top + block_rows), slice(start, start + block_rows)
    mirrored = left is right and top == start
    short, others = left.short[here], right.short[there]
    limit = smallest_product(threshold, how, (float(left.errors[here].amax()), float(right.errors[there].amax())))
    most = CROWDED if half >= CROWDED_ROWS else 1
    fused &= len(short) == len(others) == block_rows
    selected = candidates(short, short if mirrored else others, limit, most, fused)
    if selected is None:
        corners = [(i, j) for i in (top, top + half) for j in (start, start + half) if not mirrored or i <= j]
        corners = [(i, j) for i, j in corners if i < len(left.exact) and j < len(right.exact)]
        return concatenate_pairs([pairs_of_block(left, right, *corner, half, threshold, how) for corner in corners])
    row, column = selected
    a, b = left.exact[here], right.exact[there]
    if mirrored or min(len(a), len(b)) < block_rows:
        within = (row < len(a)) & (column < len(b))  # not in the padding
        if mirrored:
            within &= row < column  # each pair once, and no row with itself
        row, column = row[within], column[within]
    least = (threshold - float32_margin(a.shape[1])) * left.lengths[here].amin() * right.lengths[there].amin()
    product = products_of(a, b, row, column)
    possible = (product >= least.to(product.dtype)).nonzero().flatten()  # few
    row, column = row[possible], column[possible]
    lengths = left.lengths[here][row] * right.lengths[there][column]
    cosine = product[possible] / lengths
    keep = cosine >= threshold
    doubtful = ((cosine - threshold).abs() < float32_margin(a.shape[1])).nonzero().flatten()
    for some in doubtful.split(VERIFIED):
        exact = (a[row[some]].double() * b[column[some]].double()).sum(dim=1) / lengths[some]
        keep[some] = exact >= threshold - EXACTLY
        cosine[some] = exact
    row, column = (row[keep] + top).int(), (column[keep] + start).int()
    return SimilarPairs(*(values.cpu().numpy() for values in (row, column, cosine[keep].float())))


def products_of(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The products in float32 of some rows of a with rows of b, which are sorted by row: float32 [pairs]."""
    if len(row) > DENSE[a.device.type] * len(a) * len(b):
        return (a @ b.T)[row, column]
    if a.device.type == "cpu":  # 20 times as fast as copies of the rows
        ends = torch.searchsorted(row, torch.arange(len(a) + 1))
        places = torch.sparse_csr_tensor(ends, column, torch.zeros(len(row)), size=(len(a), len(b)))
        return torch.sparse.sampled_addmm(places, a, b.T, beta=0).values()
    parts = zip(row.split(VERIFIED), column.split(VERIFIED), strict=True)
    return torch.cat([(a[i] * b[j]).sum(dim=1) for i, j in parts])


@contextmanager
def threads(device: torch.device) -> Iterator[Callable]:
    """Yields a `map` whose calls run side by side on the cores of a CPU, each on one, and one by one on a GPU."""
    if device.type != "cpu":
        yield map
        return
    silence_sparse()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)


@functools.cache
def silence_sparse() -> None:
    """Let torch say here, unheard, what it says once: that sparse matrices are new, and not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))

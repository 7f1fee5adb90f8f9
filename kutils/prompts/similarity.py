"""Finds all pairs of prompts at or above a cosine, exactly, within one set of embeddings or between two."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kutils.prompts.candidates import GROUP
from kutils.prompts.shortening import exact_products
from kutils.prompts.similar_blocks import (
    SimilarPairs,
    concatenate_pairs,
    fastest_shortening,
    pairs_of_block,
    put_rows,
    shorten,
    threads,
)
from kutils.system import checksums, paths
from kutils.system.devices import pick_device
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks

BLOCK_ROWS = {"cpu": 4096, "cuda": 16_384}  # short rows of such a block fit a CPU's cache
HASHED = 65_536  # embeddings hashed at a time


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
    fused: bool = False,
) -> SimilarPairs:
    """Find all pairs of rows with cosine >= threshold, exactly: as float64 decides for the rows as they are given.

    Products of short rows select candidates: `shortening` proves that no pair of the threshold's cosine is left out.
    Each candidate is verified in float32, and in float64 if float32 could err. Precision and width of the short rows
    are those with which a sample of the pairs takes the least time on this machine. The work is divided into strips of
    `block_rows` rows, and each strip into blocks, from the diagonal on. It takes memory for the embeddings, the short
    rows (32 to 1,536 bytes each), the pairs and 50 bytes more for each of a strip, and on each core of a CPU
    10 to 30 * 2,048 ** 2 bytes, on a GPU 4 * block_rows ** 2 bytes.

    Args:
        embeddings: float32 [n, D], rows of length 1 within 0.001, also a memory map.
        others: float32 [m, D]: find pairs of a row of `embeddings` and a row of these instead.
        block_rows: rows and columns of a block; 0: 4,096 on the CPU, 16,384 on a GPU.
        device: auto, cpu or cuda; without effect if ranks are given.
        dtype: of the products that select candidates: int8, bfloat16, float16, float32, or auto (the fastest here).
        folder: for finished strips, so that an interrupted call continues. Several ranks need it, and share it.
        fused: on a GPU, compare products in the kernel that makes them, by torch.compile: 1 byte a pair is written in
            place of 2. It compiles for a minute, and its gain was not measured yet; without effect on a CPU.
    Returns: all pairs on the main rank, none on the others.
    Raises: ValueError for a threshold out of range, or a row that is not finite or not of unit length.
    """
    check_threshold(threshold)
    ranks = ranks or Ranks(0, 1, pick_device(device))
    assert ranks.world_size == 1 or folder is not None
    device_type = ranks.device.type
    block_rows = block_rows or BLOCK_ROWS[device_type]
    block_rows += -block_rows % GROUP
    with exact_products(), threads(ranks.device) as run:
        left = put_rows(embeddings, ranks.device, run)
        right = left if others is None else put_rows(others, ranks.device, run)
        if left.exact.shape[1] != right.exact.shape[1]:
            raise ValueError(f"rows of {left.exact.shape[1]} and of {right.exact.shape[1]} numbers cannot be compared")
        how = fastest_shortening(left, right, threshold, dtype, run)
        left = shorten(left, how, run)
        right = left if others is None else shorten(right, how, run)
        tops = list(range(0, len(left.exact), block_rows))
        blocks_of = {top: range(top if others is None else 0, len(right.exact), block_rows) for top in tops}
        path_of = {top: None if folder is None else strip_path(folder, top, block_rows) for top in tops}
        missing = [top for top in tops if path_of[top] is None or not path_of[top].is_file()]
        own = share_strips(ranks.gather_objects(missing)[0], ranks)  # as the main rank sees it
        total = sum(len(blocks_of[top]) for top in own)
        with progress_bar(total, "block", "pairs", delay=5, disable=not progress) as bar:

            def begin(top: int) -> Iterator[SimilarPairs]:
                return run(
                    lambda start: pairs_of_block(left, right, top, start, block_rows, threshold, how, fused),
                    blocks_of[top],
                )

            def finish(top: int, blocks: Iterator[SimilarPairs]) -> SimilarPairs:
                parts = []
                for pairs in blocks:
                    parts.append(pairs)
                    bar.update()
                pairs = concatenate_pairs(parts, sort=True)
                write_strip(path_of[top], pairs)
                return pairs

            strips, begun = {}, begin(own[0]) if own else None
            for top, following in itertools.zip_longest(own, own[1:]):  # the next begins while a core ends this one
                blocks, begun = begun, None if following is None else begin(following)
                strips[top] = finish(top, blocks)
            ranks.barrier()
            if not ranks.is_main:
                return concatenate_pairs([])
            for top in set(tops) - set(own):  # of other ranks, and of an interrupted call
                saved = read_strip(path_of[top])
                strips[top] = finish(top, begin(top)) if saved is None else saved
            return concatenate_pairs([strips[top] for top in tops])


def share_strips(tops: list[int], ranks: Ranks) -> list[int]:
    """This rank's share of the strips, named by their first rows.

    Later strips are shorter. Dealing them forwards and backwards in turn gives all ranks about the same work.
    """
    cycle = [*range(ranks.world_size), *reversed(range(ranks.world_size))]
    return [top for number, top in enumerate(tops) if cycle[number % len(cycle)] == ranks.rank]


def check_threshold(threshold: float) -> None:
    """Raise ValueError for a threshold that is not in (0, 1]."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]; 0.7 groups similar prompts, 0.9 near-duplicates")


@contextmanager
def strips_folder(embeddings: np.ndarray, *settings, ranks: Ranks | None = None) -> Iterator[Path]:
    """Name a folder for the strips of these embeddings, the same one after a kill; removed if the block succeeds.

    Args:
        embeddings: float32 [n, D].
        settings: all else that the pairs depend on, such as the threshold.
        ranks: share the folder; the main one removes it.
    """
    digest = hashlib.sha256(repr((embeddings.shape, *settings)).encode())
    for start in range(0, len(embeddings), HASHED):
        digest.update(np.ascontiguousarray(embeddings[start : start + HASHED]))
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

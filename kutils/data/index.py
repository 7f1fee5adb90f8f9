"""Parses and checks a combination of data sets once, and keeps the result in a memory-mapped file.

The first call parses, checks and hashes all rows (five million in the published data). Later calls, ranks and workers
map the file below `working/cache/`, and share its pages.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.system import arrow, paths
from kutils.system.embedding_files import EMBEDDING_DIM, check_digest, checked_blocks, describe_mismatch
from kutils.system.tables import MAX_FOLDS, check_rows, folds_hash, hash_prompts, read_table

INDEX_VERSION = 2  # of the file's layout; a file of another version is built anew


@dataclass(frozen=True)
class DatasetIndex:
    """The columns of all data sets one after the other, memory-mapped, and facts about each set."""

    images: pa.ChunkedArray  # large_string [n], relative to input/
    prompts: pa.ChunkedArray  # large_string [n]
    folds: np.ndarray  # int8 [n], -1 for not assigned
    prompt_codes: np.ndarray  # int32 [n]: the same number for the same prompt, in order of first appearance
    num_rows: list[int]  # of each set
    folds_hashes: dict[str, str]  # of every set's assignment of prompts to folds
    rows_hashes: dict[str, str]  # of every set's images, prompts and folds, in order
    targets_hashes: dict[str, str]  # of every set's embeddings, in order
    fold_counts: np.ndarray  # int64 [10]: rows
    fold_sums: np.ndarray  # float64 [10, 384]: sums of the embeddings, each scaled to length 1


def open_index(root: Path, names: Sequence[str]) -> DatasetIndex:
    """Map the index of the named data sets; build it first if it is missing, or if one of their files has changed.

    Processes that start together build it once. If `working/cache/` cannot be written, each process keeps it in memory.

    Args:
        names: of the data sets, in the order of their rows.
    Raises: ValueError for a set that cannot be trained on for another reason than its folds.
    """
    current = fingerprint(root, names)
    built = functools.cache(lambda: build_index(root, names, current))  # called twice if the file cannot be written
    return index_of(arrow.map_once(cache_path(root, names, ".arrow"), current, lambda: built().to_reader()))


def cache_path(root: Path, names: Sequence[str], suffix: str) -> Path:
    """Path of a cache file about a combination of data sets."""
    key = hashlib.sha256("\n".join([str(root), *names]).encode()).hexdigest()[:16]
    return paths.working_dir() / "cache" / f"{key}{suffix}"


def fingerprint(root: Path, names: Sequence[str]) -> dict:
    """Sizes, times and inodes of the tables and embeddings: another fingerprint means that a file has changed."""
    files = [root / f"{name}{suffix}" for name in names for suffix in (".tsv", ".npy")]
    status = [file.stat() for file in files]
    return {"version": INDEX_VERSION, "files": [[item.st_size, item.st_mtime_ns, item.st_ino] for item in status]}


def index_of(table: pa.Table) -> DatasetIndex:
    """The index that a mapped file holds."""
    facts = arrow.facts_of(table)
    return DatasetIndex(
        images=table["image"],
        prompts=table["prompt"],
        folds=table["fold"].chunk(0).to_numpy(),
        prompt_codes=table["prompt_code"].chunk(0).to_numpy(),
        num_rows=facts["num_rows"],
        folds_hashes=facts["folds_hashes"],
        rows_hashes=facts["rows_hashes"],
        targets_hashes=facts["targets_hashes"],
        fold_counts=np.array(facts["fold_counts"]),
        fold_sums=np.array(facts["fold_sums"]),
    )


def build_index(root: Path, names: Sequence[str], fingerprint: dict) -> pa.Table:
    """Read and check every data set.

    Returns: columns image, prompt, fold and prompt_code, each in one chunk, and the facts of `DatasetIndex`.
    """
    tables, hashes, sums, counts = [], {"folds_hashes": {}, "rows_hashes": {}, "targets_hashes": {}}, 0.0, 0
    for name in names:
        table = read_table(root / f"{name}.tsv", ["image", "prompt", "fold"])
        check_rows(root / f"{name}.tsv", table)
        if problem := describe_mismatch(root / f"{name}.tsv", table["prompt"]):
            raise ValueError(problem)
        folds = table["fold"].to_numpy()
        set_sums, set_counts, digest = sum_by_fold(root / f"{name}.npy", folds)
        check_digest(root / f"{name}.npy", digest)
        hashes["targets_hashes"][name] = digest
        sums, counts = sums + set_sums, counts + set_counts
        hashes["folds_hashes"][name] = folds_hash(table["prompt"], folds)
        columns = [hash_prompts(table["image"]), hash_prompts(table["prompt"]), hashlib.sha256(folds).hexdigest()]
        hashes["rows_hashes"][name] = hashlib.sha256("".join(columns).encode()).hexdigest()
        tables.append(table.select(["image", "prompt", "fold"]))
    large = pa.schema({"image": pa.large_string(), "prompt": pa.large_string(), "fold": pa.int8()})
    whole = pa.concat_tables([table.cast(large) for table in tables]).combine_chunks()
    whole = whole.append_column("prompt_code", whole["prompt"].chunk(0).dictionary_encode().indices)
    facts = {
        "fingerprint": fingerprint,
        "num_rows": [table.num_rows for table in tables],
        **hashes,
        "fold_counts": counts.tolist(),
        "fold_sums": sums.tolist(),
    }
    return whole.replace_schema_metadata(arrow.with_facts(whole.schema, facts).metadata)


def sum_by_fold(path: Path, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Check and hash all embeddings, scale each to length 1, and add them up by fold.

    Args:
        folds: int8 [n], -1 for none.
    Returns: float64 [10, 384], the sum over each fold's rows; int64 [10], the number of rows; hex SHA-256 of all rows.
    Raises: ValueError naming file and row.
    """
    sums, counts = np.zeros((MAX_FOLDS, EMBEDDING_DIM)), np.zeros(MAX_FOLDS, np.int64)
    digest = hashlib.sha256()
    for start, block, lengths in checked_blocks(path, len(folds)):
        members = folds[start : start + len(block)] == np.arange(MAX_FOLDS)[:, None]  # [10, n]
        sums += (members / lengths).astype(np.float32) @ block
        counts += members.sum(axis=1)
        digest.update(block)
    return sums, counts, digest.hexdigest()

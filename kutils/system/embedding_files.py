"""Maps, checks and copies embeddings on disk: float32 `.npy` files of unit rows beside their tables."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kutils.system import checksums, paths
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.progress import progress_bar
from kutils.system.tables import hash_prompts, read_table

UNIT_TOLERANCE = 1e-3  # of an embedding's length; float16 storage would still pass
DIGEST_KEY = "rows_sha256"  # key of the record `<name>.npy.json`: the hash of all rows
BLOCK = 16_384  # rows read at a time: 25 MB


def map_embeddings(path: Path, num_rows: int) -> np.ndarray:
    """Memory-map float32 [num_rows, 384]; ValueError (naming the file) for anything else."""
    try:
        embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = "it is no .npy file" if "pickle" in str(error) else error
        raise ValueError(f"{path} cannot be read ({reason}); {make_again(path)}") from error
    if embeddings.shape != (num_rows, EMBEDDING_DIM) or embeddings.dtype != np.float32:
        actual = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise ValueError(f"{path} is {actual}, its TSV needs float32 [{num_rows}, {EMBEDDING_DIM}]; {make_again(path)}")
    return embeddings


def make_again(path: Path) -> str:
    return f"make it again: python input/gen_prompt_embedding.py {path.with_suffix('.tsv')} --overwrite"


def checked_blocks(path: Path, num_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Read all embeddings of an .npy file, and check that each has length 1.

    Yields: first row, rows float32 [n, 384], and their lengths [n].
    Raises: ValueError naming file and row.
    """
    embeddings = map_embeddings(path, num_rows)
    with progress_bar(num_rows, "row", f"checking {path.name}", delay=5, leave=False) as bar:
        for start in range(0, num_rows, BLOCK):
            block = np.asarray(embeddings[start : start + BLOCK])
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
            bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN compares false
            if len(bad):
                raise ValueError(
                    f"{path}, row {start + bad[0]} (line {start + bad[0] + 2} of the TSV) has length "
                    f"{lengths[bad[0]]}, not 1; {make_again(path)}"
                )
            yield start, block, lengths
            bar.update(len(block))


def open_embeddings(path: Path, num_rows: int) -> np.ndarray:
    """Memory-map float32 [num_rows, 384] and check every row; ValueError (naming file and row) for anything else."""
    check_digest(path, hash_rows(path, num_rows))
    return map_embeddings(path, num_rows)


def hash_rows(path: Path, num_rows: int) -> str:
    """Check every row, and return the hex SHA-256 of all."""
    digest = hashlib.sha256()
    for _, block, _ in checked_blocks(path, num_rows):
        digest.update(block)
    return digest.hexdigest()


def check_digest(path: Path, digest: str) -> None:
    """Raise ValueError if the record beside the embeddings has another hash of their rows; old records have none."""
    if (paths.read_record(path.with_suffix(".npy.json")) or {}).get(DIGEST_KEY, digest) != digest:
        raise checksums.Damaged(f"{path} is damaged: its checksum does not fit; {make_again(path)}")


def record_embeddings(path: Path, record: dict) -> None:
    """Write the record beside embeddings: their prompts, their encoder, and the hash of their rows."""
    digest = hash_rows(path, record["rows"])
    paths.save_record(path.with_suffix(".npy.json"), record | {DIGEST_KEY: digest})


def are_whole(path: Path, record: dict) -> bool:
    """Whether embeddings exist with this record and are undamaged; reads all of them.

    An old record without a hash gets one.
    """
    previous = paths.read_record(path.with_suffix(".npy.json"))
    if not path.is_file() or previous is None or {**previous, DIGEST_KEY: ""} != {**record, DIGEST_KEY: ""}:
        return False
    try:
        open_embeddings(path, record["rows"])
    except ValueError as error:
        print(f"warning: {str(error).partition(';')[0]}; it is made again", flush=True)
        return False
    if DIGEST_KEY not in previous:
        record_embeddings(path, record)
    return True


def take_embeddings(source_path: Path | str, target_path: Path | str) -> bool:
    """Write `<name>.npy` beside a table by copying, for each row, the embedding that another table has of its prompt.

    Without a record, nothing says which prompts a file's embeddings belong to: such a file is neither copied from nor
    replaced.

    Args:
        source_path: the embedded table, in which the prompts of the target occur, in any order and number.
    Returns: whether the target has these embeddings now; False if the source has no embeddings of its own prompts with
        a record, if it lacks a prompt of the target, or if the target's embeddings have no record.
    """
    source_path, target_path = Path(source_path), Path(target_path)
    source_npy, target_npy = source_path.with_suffix(".npy"), target_path.with_suffix(".npy")
    record_path = target_npy.with_suffix(".npy.json")
    record, previous = paths.read_record(source_npy.with_suffix(".npy.json")), paths.read_record(record_path)
    if record is None or (target_npy.is_file() and previous is None):
        return False
    available, prompts = (read_table(path, ["prompt"])["prompt"] for path in (source_path, target_path))
    rows = pc.index_in(prompts, value_set=available)
    if not len(rows) or rows.null_count or describe_mismatch(source_path, available):
        return False
    record = record | {"rows": len(prompts), "prompts_sha256": hash_prompts(prompts)}
    if are_whole(target_npy, record):
        return True
    source = open_embeddings(source_npy, len(available))
    record_path.unlink(missing_ok=True)  # a kill from here on leaves no record beside another file
    copy_rows(source, rows.to_numpy(), target_npy)
    record_embeddings(target_npy, record)
    return True


def copy_rows(embeddings: np.ndarray, rows: np.ndarray, npy_path: Path) -> None:
    """Write some rows of mapped embeddings to a file of their own, block by block, whole or not at all."""
    with paths.atomic_path(npy_path) as temporary:
        out = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(rows), EMBEDDING_DIM))
        reserve(temporary)
        for start in range(0, len(rows), BLOCK):
            out[start : start + BLOCK] = embeddings[rows[start : start + BLOCK]]
        out.flush()


def reserve(path: Path) -> None:
    """Allocate a new file's disk space now: a memory map on a full disk would end the process with SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)


def is_embedded(tsv_path: Path) -> bool:
    """Whether a table has an .npy file beside it whose record, if any, is of the table's prompts."""
    is_there = tsv_path.with_suffix(".npy").is_file()
    return is_there and not describe_mismatch(tsv_path, read_table(tsv_path, ["prompt"])["prompt"])


def describe_mismatch(tsv_path: Path, prompts: pa.ChunkedArray) -> str:
    """An error message if the record beside a table's .npy file is of other prompts; empty if it fits or is missing."""
    npy_path, record = tsv_path.with_suffix(".npy"), paths.read_record(tsv_path.with_suffix(".npy.json"))
    if record is None or record.get("prompts_sha256") == hash_prompts(prompts):
        return ""
    return f"{npy_path} is of other prompts, or in another order; {make_again(npy_path)}"

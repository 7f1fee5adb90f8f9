"""What is worked out once about a combination of data sets, in one memory-mapped file below `working/cache/`.

Five million rows are parsed, checked and hashed in the first open; every later one, and every rank and worker, maps the
same file and shares its pages.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from kutils.runs.recipes import EMBEDDING_DIM
from kutils.system import paths
from kutils.system.progress import progress_bar
from kutils.system.tables import folds_hash, read_table

VERSION = 1  # of the file; another version is built anew
NUM_FOLDS = 10
UNIT_TOLERANCE = 1e-3  # of an embedding's length; float16 storage would still pass
BLOCK = 16_384  # rows of embeddings that are looked at together: 25 MB


class DataError(ValueError):
    """A data set that cannot be trained on; the message names file and row and says what to do."""


@dataclass(frozen=True)
class DatasetIndex:
    """Columns over all rows of all data sets, mapped, and facts about each."""

    images: pa.ChunkedArray  # large_string [n], relative to input/
    prompts: pa.ChunkedArray  # large_string [n]
    folds: np.ndarray  # int8 [n], -1 for not assigned
    prompt_codes: np.ndarray  # int32 [n]: the same number for the same prompt, in order of first appearance
    num_rows: list[int]  # of each set
    folds_hashes: dict[str, str]  # of every set's assignment of prompts to folds
    fold_counts: np.ndarray  # int64 [10]: rows
    fold_sums: np.ndarray  # float64 [10, 384]: sums of the embeddings, each scaled to length 1


def open_index(root: Path, names: Sequence[str]) -> DatasetIndex:
    """Map the index of the named data sets; build it first where it is not there or a file of theirs has changed.

    Processes that start together build it once. Where `working/cache/` cannot be written it is kept in memory.

    Raises: DataError or TableError for a set that could not be trained on, apart from its folds.
    """
    wanted = fingerprint(root, names)
    built = functools.cache(lambda: build(root, names, wanted))  # asked for again where it cannot be written
    return as_index(map_once(cache_path(root, names, ".arrow"), wanted, lambda: built().to_reader()))


def cache_path(root: Path, names: Sequence[str], suffix: str) -> Path:
    """Where something about a combination of data sets is kept."""
    key = hashlib.sha256("\n".join([str(root), *names]).encode()).hexdigest()[:16]
    return paths.working_dir() / "cache" / f"{key}{suffix}"


def map_once(path: Path, wanted: dict, make: Callable[[], pa.RecordBatchReader]) -> pa.Table:
    """Map an Arrow file; make it first where it is not there, or of other files.

    Processes that start together make it once. Where it cannot be written it is kept in memory.

    Args:
        wanted: the `fingerprint` of its files.
        make: its batches, written as they come, and asked for again where that fails; their schema's metadata holds
            `{"fingerprint": wanted, ...}`.
    """
    if (table := read_index(path, wanted)) is not None:
        return table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()  # released by the `with` below
    except OSError as error:
        print(f"warning: {path.parent} cannot be written ({error}); every process keeps its own", flush=True)
        return make().read_all()
    with lock:
        if (table := read_index(path, wanted)) is not None:  # made by another process meanwhile
            return table
        reader = make()
        try:
            with paths.atomic_path(path) as temporary, pa.ipc.new_file(temporary, reader.schema) as writer:
                for batch in reader:
                    writer.write_batch(batch)
        except OSError as error:  # a full disk
            print(f"warning: {path} cannot be written ({error}); every process keeps its own", flush=True)
    return read_index(path, wanted) or make().read_all()


def fingerprint(root: Path, names: Sequence[str]) -> dict:
    """What tells whether the files are still those that the index was built from, without reading them."""
    files = [root / f"{name}{suffix}" for name in names for suffix in (".tsv", ".npy")]
    status = [file.stat() for file in files]
    return {"version": VERSION, "files": [[item.st_size, item.st_mtime_ns, item.st_ino] for item in status]}


def read_index(path: Path, wanted: dict) -> pa.Table | None:
    """The mapped table, or None if it is not there, of other files, or damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return table if facts_of(table)["fingerprint"] == wanted else None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None


def facts_of(table: pa.Table) -> dict:
    return json.loads((table.schema.metadata or {})[b"kutils"])


def as_index(table: pa.Table) -> DatasetIndex:
    facts = facts_of(table)
    return DatasetIndex(
        images=table["image"],
        prompts=table["prompt"],
        folds=table["fold"].chunk(0).to_numpy(),
        prompt_codes=table["prompt_code"].chunk(0).to_numpy(),
        num_rows=facts["num_rows"],
        folds_hashes=facts["folds_hashes"],
        fold_counts=np.array(facts["fold_counts"]),
        fold_sums=np.array(facts["fold_sums"]),
    )


def build(root: Path, names: Sequence[str], wanted: dict) -> pa.Table:
    """Read and check every set; returns one chunk per column, facts in the schema's metadata."""
    tables, hashes, sums, counts = [], {}, 0.0, 0
    for name in names:
        table = read_table(root / f"{name}.tsv", ["image", "prompt", "fold"])
        check_rows(root / f"{name}.tsv", table)
        folds = table["fold"].to_numpy()
        set_sums, set_counts = sum_by_fold(root / f"{name}.npy", folds)
        sums, counts = sums + set_sums, counts + set_counts
        hashes[name] = folds_hash(table["prompt"], folds)
        tables.append(table.select(["image", "prompt", "fold"]))
    large = pa.schema({"image": pa.large_string(), "prompt": pa.large_string(), "fold": pa.int8()})
    whole = pa.concat_tables([table.cast(large) for table in tables]).combine_chunks()
    whole = whole.append_column("prompt_code", whole["prompt"].chunk(0).dictionary_encode().indices)
    facts = {
        "fingerprint": wanted,
        "num_rows": [table.num_rows for table in tables],
        "folds_hashes": hashes,
        "fold_counts": counts.tolist(),
        "fold_sums": sums.tolist(),
    }
    return whole.replace_schema_metadata({"kutils": json.dumps(facts)})


def check_rows(path: Path, table: pa.Table) -> None:
    """Raise DataError for the first row that training could not use, apart from its fold."""
    if table.num_rows == 0:
        raise DataError(f"{path} has a header and no rows")
    for column, bad, advice in unusable(table):
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise DataError(f"{path}, line {row + 2}: {column} is {table[column][row].as_py()!r}; {advice}")


def unusable(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray, str]]:
    """What training cannot use in a table: column, which rows (bool), and what to do about them."""
    unsafe = r"^[/~]|^[A-Za-z]:|\\|(^|/)\.\.(/|$)|^\s*$"
    yield "prompt", pc.equal(pc.utf8_trim_whitespace(table["prompt"]), ""), "remove the row or give it a prompt"
    if "image" in table.column_names:  # a list of prompts has none yet
        advice = "image paths are relative to input/, without .."
        yield "image", pc.match_substring_regex(table["image"], unsafe), advice


def map_embeddings(path: Path, num_rows: int) -> np.ndarray:
    """Memory-map float32 [num_rows, 384]; DataError (naming the file) for anything else."""
    try:
        embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {make_again(path)}") from error
    if embeddings.shape != (num_rows, EMBEDDING_DIM) or embeddings.dtype != np.float32:
        found = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise DataError(f"{path} is {found}, its TSV needs float32 [{num_rows}, {EMBEDDING_DIM}]; {make_again(path)}")
    return embeddings


def make_again(path: Path) -> str:
    return f"make it again: python input/gen_prompt_embedding.py {path.with_suffix('.tsv')} --overwrite"


def checked_blocks(path: Path, num_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Read all embeddings of an .npy file, and check that each has length 1.

    Yields: first row, rows float32 [n, 384], and their lengths [n].
    Raises: DataError naming file and row.
    """
    embeddings = map_embeddings(path, num_rows)
    with progress_bar(num_rows, "row", f"checking {path.name}", delay=5, leave=False) as bar:
        for start in range(0, num_rows, BLOCK):
            block = np.asarray(embeddings[start : start + BLOCK])
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
            bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN compares false
            if len(bad):
                raise DataError(
                    f"{path}, row {start + bad[0]} (line {start + bad[0] + 2} of the TSV) has length "
                    f"{lengths[bad[0]]}, not 1; {make_again(path)}"
                )
            yield start, block, lengths
            bar.update(len(block))


def open_embeddings(path: Path, num_rows: int) -> np.ndarray:
    """Memory-map float32 [num_rows, 384] and check every row; DataError (naming file and row) for anything else."""
    for _ in checked_blocks(path, num_rows):
        pass
    return map_embeddings(path, num_rows)


def sum_by_fold(path: Path, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check all embeddings and add them up, each scaled to length 1.

    Args:
        folds: int8 [n], -1 for none.
    Returns: float64 [10, 384], the sum over each fold's rows, and int64 [10], their number.
    """
    sums, counts = np.zeros((NUM_FOLDS, EMBEDDING_DIM)), np.zeros(NUM_FOLDS, np.int64)
    for start, block, lengths in checked_blocks(path, len(folds)):
        members = folds[start : start + len(block)] == np.arange(NUM_FOLDS)[:, None]  # [10, n]
        sums += (members / lengths).astype(np.float32) @ block
        counts += members.sum(axis=1)
    return sums, counts

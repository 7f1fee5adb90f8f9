"""Writes `submission.csv` in chunks, 384 rows per image, and checks it as the competition reads it."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from kutils.system import paths
from kutils.system.embedding_files import EMBEDDING_DIM, UNIT_TOLERANCE

SUBMISSION_HEADER = "imgId_eId,val"
COLUMNS = SUBMISSION_HEADER.split(",")
CHUNK_IMAGES = 256  # images written or checked at a time: 98,304 rows
BLOCK_BYTES = 1 << 20  # read at a time
DECIMALS = 6  # of a value; rounding changes a unit vector by at most 1e-5


def write_submission(path: Path | str, ids: Sequence[str], embeddings: np.ndarray) -> None:
    """Write `imgId_eId,val`, 384 rows per image, in chunks and atomically.

    16,000 images (6.1 M rows, 142 MB) take 2 s and 30 MB of memory.

    Args:
        path: the CSV file; an existing one is replaced.
        ids: file names without extension, in the order of the rows.
        embeddings: float32 [n, 384], finite, unit rows.
    Raises: ValueError for ids that are repeated or invalid in a CSV, or rows that are not finite unit vectors.
    """
    check_ids(ids)
    if embeddings.shape != (len(ids), EMBEDDING_DIM):
        raise ValueError(f"{len(ids)} images with embeddings {list(embeddings.shape)}, not [n, {EMBEDDING_DIM}]")
    check_unit(embeddings, ids, "the embeddings")
    schema = pa.schema([(COLUMNS[0], pa.string()), (COLUMNS[1], pa.float64())])
    options = csv.WriteOptions(include_header=False, quoting_style="none", batch_size=65_536)
    with paths.atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(f"{SUBMISSION_HEADER}\n".encode())
        with csv.CSVWriter(stream, schema, write_options=options) as writer:
            for start in range(0, len(ids), CHUNK_IMAGES):
                values = embeddings[start : start + CHUNK_IMAGES].astype(np.float64).round(DECIMALS).ravel()
                keys = row_ids(ids[start : start + CHUNK_IMAGES])
                writer.write_batch(pa.record_batch([keys, pa.array(values)], schema=schema))


def submission_report_path(path: Path) -> Path:
    """The file beside a submission in which a finished run lists models, weights and times: `<name>_report.json`."""
    return path.with_name(f"{path.stem}_report.json")


def set_previous_aside(path: Path) -> None:
    """Move a previous submission and its report to `<name>.bak`, before a new run begins.

    A previous submission without a report is of an unfinished run, and does not replace a finished one in .bak.
    """
    report = submission_report_path(path)
    if report.is_file() or not Path(f"{path}.bak").exists():
        for previous in (path, report):
            if previous.is_file():
                previous.replace(f"{previous}.bak")


def row_ids(ids: Sequence[str]) -> pa.Array:
    """`<id>_0` to `<id>_383` for every image: strings [len(ids) * 384]."""
    images = pa.array(np.repeat(np.arange(len(ids)), EMBEDDING_DIM))
    numbers = pa.array(np.tile(np.arange(EMBEDDING_DIM), len(ids))).cast(pa.string())
    return pc.binary_join_element_wise(pa.array(ids, pa.string()).take(images), numbers, "_")


def check_submission(path: Path | str, ids: Sequence[str]) -> int:
    """Read a submission back and check everything that the competition requires; in blocks, with 150 MB of memory.

    Args:
        ids: file names without extension of all images, in order.
    Returns: number of rows, 384 per image.
    Raises: ValueError naming the line or image: another header, missing or surplus rows, an id out of place, a
        value that is no finite number, an embedding that is not of unit length.
    """
    check_ids(ids)
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    with path.open("rb") as stream:
        header = stream.readline(200).decode(errors="replace").rstrip("\r\n")
    if header != SUBMISSION_HEADER:
        raise ValueError(f"{path}: the first line is {header!r}, not {SUBMISSION_HEADER!r}")
    num_rows, expected_rows = 0, len(ids) * EMBEDDING_DIM
    for start, keys, values in read_images(path):
        expected = row_ids(ids[start : start + CHUNK_IMAGES])
        common = min(len(keys), len(expected))
        differing = pc.index(pc.equal(keys[:common], expected[:common]), False).as_py()
        if differing >= 0:
            line = start * EMBEDDING_DIM + differing + 2
            raise ValueError(f"{path}, line {line}: the id is {keys[differing]}, not {expected[differing]}")
        num_rows += len(keys)
        if len(keys) != len(expected):
            break
        check_unit(values.reshape(-1, EMBEDDING_DIM), ids[start:], str(path))
    if num_rows != expected_rows:
        more = "more than" if num_rows > expected_rows else "not"
        raise ValueError(f"{path} has {num_rows:,} rows, {more} {len(ids):,} x {EMBEDDING_DIM} = {expected_rows:,}")
    return num_rows


def read_images(path: Path) -> Iterator[tuple[int, pa.Array, np.ndarray]]:
    """Read a submission in chunks of images.

    Yields: number of the first image, ids of the rows, float64 values (NaN where there is no number).
    Raises: ValueError for a line that is no `text,number`.
    """
    convert = csv.ConvertOptions(column_types={COLUMNS[0]: pa.string(), COLUMNS[1]: pa.float64()})
    chunk, start = CHUNK_IMAGES * EMBEDDING_DIM, 0
    waiting = pa.table({COLUMNS[0]: pa.array([], pa.string()), COLUMNS[1]: pa.array([], pa.float64())})
    try:
        reader = csv.open_csv(path, csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES), convert_options=convert)
        for batch in reader:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            while len(waiting) >= chunk:
                yield start, *columns_of(waiting.slice(0, chunk))
                waiting, start = waiting.slice(chunk), start + CHUNK_IMAGES
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as {SUBMISSION_HEADER}: {error}") from error
    if len(waiting):
        yield start, *columns_of(waiting)


def columns_of(table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    keys, values = (column.combine_chunks() for column in table.columns)
    return keys, values.to_numpy(zero_copy_only=False)


def read_ids(path: Path | str) -> list[str]:
    """The image ids of a submission in order, from every 384th row; `check_submission` checks the others."""
    keys = itertools.chain.from_iterable(keys[::EMBEDDING_DIM].to_pylist() for _, keys, _ in read_images(Path(path)))
    return [key.rpartition("_")[0] for key in keys]


def check_ids(ids: Sequence[str]) -> None:
    """Raise ValueError for an id that is empty, repeated, not UTF-8 or would break the CSV."""
    if len(set(ids)) < len(ids):
        repeated = next(name for number, name in enumerate(ids) if name in ids[:number])
        raise ValueError(f"two images have the id {repeated!r}; an id names one image")
    broken = [name for name in ids if not name or set(name) & set(',"\r\n') or not is_utf8(name)]
    if broken:
        raise ValueError(f"{broken[0]!r} cannot be an id in a CSV file; rename the image")


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written as UTF-8; in other names Python stores bytes as lone surrogates."""
    return name.encode(errors="ignore").decode() == name


def check_unit(embeddings: np.ndarray, ids: Sequence[str], where: str) -> None:
    """Raise ValueError naming the first image whose embedding is not finite or not of unit length."""
    lengths = np.linalg.norm(embeddings, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN compares false
    if not len(bad):
        return
    not_finite = np.flatnonzero(~np.isfinite(embeddings[bad[0]]))
    if len(not_finite):
        raise ValueError(f"{where}: the value {ids[bad[0]]}_{not_finite[0]} is no finite number")
    raise ValueError(f"{where}: the embedding of {ids[bad[0]]} has length {lengths[bad[0]]:.4f}, not 1")

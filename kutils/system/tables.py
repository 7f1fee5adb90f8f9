"""Reads and writes tab-separated tables: UTF-8, one header line, no quoting (a quote is a plain character)."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from kutils.system import paths
from kutils.system.output import cut, quoted
from kutils.system.text_files import describe_file

MAX_FOLDS = 10  # a fold is one digit: in tables, in recipes, in the names of checkpoints


def read_table(path: Path | str, columns: Sequence[str]) -> pa.Table:
    """Read all columns of a TSV: `fold` as int8, the others as strings.

    Reads 5 M rows in seconds; pandas' default quoting would join rows wherever a prompt holds a `"`.

    Args:
        path: the file; row i is on line i + 2.
        columns: names that the table must have.
    Raises: ValueError for a missing file or column, a row of another length, bytes that are not UTF-8, a fold that is
        no integer of -1 to 9, or an empty line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder, not a table' if path.is_dir() else 'not there'}")
    if what := describe_file(path):
        raise ValueError(f"{path} is no table: it is {what}")
    with path.open("rb") as stream:
        header = stream.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
    missing = [name for name in columns if name not in header]
    if missing or len(set(header)) < len(header):
        lacks = (
            f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            if missing
            else "names a column twice"
        )
        raise ValueError(f"{path} {lacks}; its first line is {cut(' | '.join(header))} (columns are separated by tabs)")
    try:
        try:
            table = parse_table(path, header)
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
            table = parse_table(path, header, min(path.stat().st_size + 1, 2**31 - 1))  # a line above a megabyte
        if "fold" in header:
            folds = pc.cast(table["fold"], pa.int8())
            if len(table) and (pc.min(folds).as_py() < -1 or pc.max(folds).as_py() > 9):
                raise pa.ArrowInvalid("fold out of range")
            table = table.set_column(header.index("fold"), "fold", folds)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {first_bad_line(path, header) or error}") from error
    return table.combine_chunks()


def parse_table(path: Path, header: Sequence[str], block_bytes: int = 1 << 20) -> pa.Table:
    """All columns as texts; ArrowInvalid for a bad row, or for one that is longer than a block."""
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=block_bytes),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False),
    )


def first_bad_line(path: Path, header: Sequence[str]) -> str | None:
    """What is wrong with the first bad line of a table, found slowly in plain Python; None if nothing is."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad = line[error.start : error.start + 4]
                return f"line {number} is not UTF-8 (byte {error.start}: {bad!r}); save it as UTF-8"
            text = text.removesuffix("\n").removesuffix("\r")
            values = text.split("\t")
            if "\r" in text:
                return f"line {number} holds a carriage return inside a value; remove it: {text[:80]!r}"
            if not text:
                return f"line {number} is empty; remove it"
            if len(values) != len(header):
                return f"line {number} has {len(values)} columns, the header has {len(header)}: {text[:80]!r}"
            if number > 1 and "fold" in header:
                fold = values[header.index("fold")]
                if not re.fullmatch(r"-1|[0-9]", fold):
                    return f"line {number} has fold {quoted(fold)}; a fold is 0 to 9, or -1 for not assigned yet"
    return None


def write_table(path: Path | str, columns: Mapping[str, Sequence] | pa.Table) -> None:
    """Write a TSV in the format that `read_table` reads, atomically.

    Args:
        path: the file; an existing one is replaced.
        columns: an Arrow table, or name -> values (strings or integers; Arrow or NumPy arrays or lists).
    Raises: ValueError for a value with a tab or line break in it.
    """
    if isinstance(columns, pa.Table):
        columns = dict(zip(columns.column_names, columns.columns, strict=True))
    arrays = {}
    for name, values in columns.items():
        values = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
        arrays[name] = pc.cast(values, pa.string())
        broken = pc.index(pc.match_substring_regex(arrays[name], r"[\t\n\r]"), True).as_py()
        if broken >= 0:
            raise ValueError(
                f"{path}: {name} of row {broken} holds a tab or line break: {quoted(arrays[name][broken].as_py())}"
            )
    with paths.atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(("\t".join(columns) + "\n").encode())
        for batch in pa.table(arrays).to_batches(max_chunksize=100_000):
            stream.write(encode_rows(batch))


def encode_rows(batch: pa.RecordBatch) -> bytes:
    """Lines of a TSV; no value may hold a tab or line break. Arrow's own writer refuses quotes without quoting."""
    rows = zip(*(pc.cast(column, pa.string()).to_pylist() for column in batch.columns), strict=True)
    return "".join("\t".join(row) + "\n" for row in rows).encode()


def holds(path: Path | str, table: pa.Table) -> bool:
    """Whether a TSV has exactly the rows of `table`, in its order; further columns are ignored."""
    there, names = read_table(path, []), table.column_names
    return set(names) <= set(there.column_names) and there.select(names).equals(table.combine_chunks())


def hash_prompts(prompts: pa.Array | pa.ChunkedArray) -> str:
    """Hex SHA-256 of the prompts in row order, one per line."""
    digest = hashlib.sha256()
    for start in range(0, len(prompts), 100_000):
        add_lines(digest, prompts.slice(start, 100_000))
    return digest.hexdigest()


def add_lines(digest, texts: pa.Array | pa.ChunkedArray) -> None:
    """Update the digest of `hash_prompts` with more texts."""
    digest.update("".join(line + "\n" for line in texts.to_pylist()).encode())


def folds_hash(prompts: pa.Array | Sequence[str], folds: np.ndarray) -> str:
    """Hex SHA-256 of the assignment of prompts to folds, which does not depend on row order or images per prompt."""
    pairs = pa.table(
        {"prompt": pa.array(prompts) if isinstance(prompts, Sequence) else prompts, "fold": np.asarray(folds, np.int8)}
    )
    distinct = (
        pairs.group_by(["prompt", "fold"]).aggregate([]).sort_by([("prompt", "ascending"), ("fold", "ascending")])
    )
    digest = hashlib.sha256()
    for batch in distinct.to_batches(max_chunksize=100_000):
        for prompt, fold in zip(batch["prompt"].to_pylist(), batch["fold"].to_pylist(), strict=True):
            digest.update(f"{prompt}\t{fold}\n".encode())
    return digest.hexdigest()


def check_rows(path: Path, table: pa.Table) -> None:
    """Raise ValueError for the first row that training could not use, apart from its fold."""
    if table.num_rows == 0:
        raise ValueError(f"{path} has a header and no rows")
    for column, bad, advice in unusable(table):
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise ValueError(f"{path}, line {row + 2}: {column} is {quoted(table[column][row].as_py())}; {advice}")


def unusable(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray, str]]:
    """Yields what training cannot use in a table: a column, its bad rows (bool), and what to do about them."""
    unsafe = r"^[/~]|^[A-Za-z]:|\\|\x00|(^|/)\.\.(/|$)|^\s*$"
    yield "prompt", pc.equal(pc.utf8_trim_whitespace(table["prompt"]), ""), "remove the row or give it a prompt"
    if "image" in table.column_names:  # a list of prompts has no such column
        advice = "image paths are relative to input/, without .."
        yield "image", pc.match_substring_regex(table["image"], unsafe), advice

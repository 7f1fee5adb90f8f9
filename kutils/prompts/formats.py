"""Reads the prompts of each file format one by one; an error names the file and the line."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
from pyarrow import parquet

from kutils.prompts.cleaning import SourceEntry, excerpt
from kutils.prompts.table_forms import (
    PROMPT_COLUMNS,
    describe_form,
    first_lines,
    recognise_format,
    recognise_table,
)
from kutils.system.text_files import CUT_OFF, csv_rows, open_text

PARQUET_ROWS = 10_000  # in memory at a time
EXPECTED = ("rejected caption", "precanned caption")  # flags of VizWiz: captions with them are dropped without an error
COUNTED_ENTRIES = 100_000  # examined after the first flaw, to count the flawed ones


def source_entry(number: int, value: object) -> SourceEntry:
    """The entry of a value, with a flaw if the value cannot be a prompt."""
    if isinstance(value, str) and value.isascii():
        return SourceEntry(number, value)
    if value is None:
        return SourceEntry(number, "", "no value")
    if not isinstance(value, str):
        return SourceEntry(number, str(value), "no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return SourceEntry(number, value, "not UTF-8")
    return SourceEntry(number, value)


def find_column(path: Path, names: Sequence[str], column: str | None) -> str:
    """The column or key that holds the prompts.

    Args:
        column: the one to use; None: the first of PROMPT_COLUMNS, in upper or lower case.
    Raises: ValueError naming the columns of the file.
    """
    lower = {name.lower(): name for name in reversed(names)}
    usual = [lower[name] for name in PROMPT_COLUMNS if name in lower]
    chosen = column or (usual[0] if usual else None)
    if names.count(chosen) > 1:
        raise ValueError(f"{path} has the column {chosen!r} twice; rename one of them")
    if chosen in names:
        return chosen
    lacks = f"has no column {column!r}" if column else f"has none of the columns {', '.join(PROMPT_COLUMNS)}"
    available = ", ".join(map(repr, names)) or "none"
    raise ValueError(f"{path} {lacks}; name the right one by --column (there are: {available})")


def read_text(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Text: a prompt on each line."""
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            yield source_entry(number, line.rstrip("\r\n"))


def read_captions(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Image name and caption, no header, as Flickr8k."""
    with open_text(path) as stream:
        yield from tab_separated(stream, first_number=1, num_columns=2, index=1)


def read_conceptual(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Conceptual Captions: caption and URL, no header."""
    with open_text(path) as stream:
        yield from tab_separated(stream, first_number=1, num_columns=2, index=0)


def read_tsv(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Tab-separated, with a header and without quoting."""
    with open_text(path) as stream:
        header = [name.strip() for name in stream.readline().rstrip("\r\n").split("\t")]
        index = header.index(find_column(path, header, column))
        yield from tab_separated(stream, first_number=2, num_columns=len(header), index=index)


def tab_separated(stream: TextIO, first_number: int, num_columns: int, index: int) -> Iterator[SourceEntry]:
    """The entries of tab-separated lines, from the current line on."""
    for number, line in enumerate(stream, start=first_number):
        values = line.rstrip("\r\n").split("\t")
        if len(values) != num_columns:
            yield SourceEntry(number, line, "wrong number of columns")
        else:
            yield source_entry(number, values[index] or None)


def read_csv(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Separated by commas, semicolons, bars or tabs, with a header and standard quoting.

    An entry with line breaks has the number of its last line.

    This is Python's reader, since it names the line of an error. Arrow and pandas cannot, after a value with a line
    break or a bad byte.

    Raises: ValueError for an unclosed quote, even if bad lines are skipped: nothing says which lines inside it are
        good.
    """
    with open_text(path) as stream:
        names = [column.strip().lower()] if column else PROMPT_COLUMNS
        separator = recognise_table(first_lines(stream), names, ",").separator
    with open_text(path) as stream:
        rows = csv_rows(stream, separator)
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: {error}") from error
        index = header.index(find_column(path, header, column))
        while True:
            first = rows.line_num + 1
            try:
                values = next(rows, None)
            except csv.Error as error:
                if rows.line_num > first:
                    raise ValueError(
                        f"{path}, lines {first} to {rows.line_num}: a quote opened in line {first} is not closed; "
                        f"close it, or double it where it is a part of the text ({error})"
                    ) from error
                yield SourceEntry(rows.line_num, str(error), "broken quoting")
                continue
            if values is None:
                return
            if len(values) not in (0, len(header)):
                yield SourceEntry(rows.line_num, separator.join(values), "wrong number of columns")
            else:
                yield source_entry(rows.line_num, (values[index] or None) if values else "")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type is one of Arrow's string types, or a dictionary of strings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def parquet_entries(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """Parquet: a column of any of Arrow's string types, or of UTF-8 bytes."""
    try:
        table = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or is damaged ({error})") from error
    with table:
        name = find_column(path, table.schema_arrow.names, column)
        kind = table.schema_arrow.field(name).type
        if not (is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(f"{path}: the column {name!r} holds {kind}, not text; name another one by --column")
        number = 0
        try:
            for batch in table.iter_batches(PARQUET_ROWS, columns=[name]):
                values = batch.column(0)
                values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
                for value in values.cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield source_entry(number, value and value.decode(errors="surrogateescape"))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged behind row {number:,} ({error})") from error


def read_jsonl(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """JSON lines: on each line an object with the key, or a text."""
    key = None
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                yield SourceEntry(number, line, "broken JSON")
                continue
            if isinstance(value, dict):
                key = key or find_column(path, list(value), column)
                value = value.get(key) or None
            yield source_entry(number, value)


def read_json_list(path: Path, column: str | None) -> Iterator[SourceEntry]:
    """A JSON list of objects with the key, or of texts; or an object with such a list under `annotations`, as in COCO.

    The file is read whole.
    """
    with open_text(path) as stream:
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            place = f"{path}, line {error.lineno}, column {error.colno}"
            raise ValueError(f"{place}: broken JSON ({error.msg})") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply to be a list of prompts") from error
    items = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(items, list):
        there = f"; its keys are {', '.join(map(repr, content))}" if isinstance(content, dict) else ""
        raise ValueError(f"{path} is neither a JSON list nor an object with a list of `annotations`{there}")
    key = None
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            yield source_entry(number, item)
            continue
        key = key or find_column(path, list(item), column)
        entry = source_entry(number, item.get(key) or None)
        for mark, flaw in zip(("is_rejected", "is_precanned"), EXPECTED, strict=True):
            entry = entry._replace(flaw=flaw) if item.get(mark) else entry
        yield entry


# name -> what the number of an entry counts, and the reader
READERS: dict[str, tuple[str, Callable[[Path, str | None], Iterator[SourceEntry]]]] = {
    "text": ("line", read_text),
    "csv": ("line", read_csv),
    "tsv": ("line", read_tsv),
    "conceptual": ("line", read_conceptual),
    "captions": ("line", read_captions),
    "parquet": ("row", parquet_entries),
    "jsonl": ("line", read_jsonl),
    "json": ("item", read_json_list),
}


def read_source(
    path: Path | str, *, column: str | None = None, source_format: str = "auto", skip_bad_lines: bool = False
) -> Iterator[SourceEntry]:
    """Read the entries of one file in order, a few at a time (a JSON list is read whole).

    Args:
        column: name of the column or key; None: the first of PROMPT_COLUMNS in the file.
        source_format: a key of READERS, or auto.
        skip_bad_lines: return entries with a flaw, instead of an error; for files with a few bad lines among many.
    Raises: ValueError naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder; name its files' if path.is_dir() else 'not there'}")
    num_entries = 0
    try:
        source_format = recognise_format(path, column) if source_format == "auto" else source_format
        if column and source_format in ("text", "conceptual", "captions"):
            raise ValueError(f"{path} is read as {source_format}, without names of columns: leave --column out")
        unit, reader = READERS[source_format]
        entries = reader(path, column)
        for entry in entries:
            num_entries += 1
            if is_bad(entry) and not skip_bad_lines:
                shown = f"{path}, {unit} {entry.number}: {entry.flaw} ({excerpt(entry.text)[:80]!r})"
                raise ValueError(f"{shown}; {advise(entry, entries, num_entries, source_format)}")
            yield entry
    except CUT_OFF as error:
        raise ValueError(f"{path} is damaged or cut off behind entry {num_entries:,} ({error})") from error
    except UnicodeDecodeError as error:
        what = f"is no whole text in {error.encoding.upper()}, as its beginning tells"
        raise ValueError(f"{path} {what}: damaged behind entry {num_entries:,} ({error.reason})") from error
    if not num_entries:
        raise ValueError(f"{path} is empty, or has a header alone")


def describe_source(path: Path, *, column: str | None = None, source_format: str = "auto", **_) -> str:
    """How `read_source` reads a file, if its name does not tell; empty if it does, or if the file is refused."""
    try:
        source_format = recognise_format(path, column) if source_format == "auto" else source_format
        return describe_form(path, source_format, column)
    except (ValueError, OSError, *CUT_OFF):
        return ""


def is_bad(entry: SourceEntry) -> bool:
    return bool(entry.flaw) and entry.flaw not in EXPECTED


def advise(first: SourceEntry, others: Iterator[SourceEntry], num_entries: int, source_format: str) -> str:
    """Advice about an entry with a flaw: if most entries have one, the file is probably read in the wrong format."""
    num_bad = 1
    try:
        for entry in islice(others, COUNTED_ENTRIES):
            num_entries, num_bad = num_entries + 1, num_bad + is_bad(entry)
    except (ValueError, *CUT_OFF):  # a fault of the file further on
        pass
    correct = "convert the file: iconv -f CP1252 -t UTF-8" if first.flaw == "not UTF-8" else "correct it"
    if num_bad > 1 and num_bad > num_entries // 2:
        return (
            f"{num_bad:,} of {num_entries:,} entries have a flaw when the file is read as {source_format}: "
            f"{correct}, or give another --format or --column"
        )
    return (
        f"{correct}, or leave such entries ({num_bad:,} of {num_entries:,}) out by --skip-bad-lines, which counts them"
    )

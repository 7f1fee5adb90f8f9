"""Recognises by its content whether a file holds prompts as lines, as a table (and its separator), or as JSON."""

import csv
import itertools
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from kutils.system.text_files import MOST_CHARACTERS, csv_rows, open_text

PROMPT_COLUMNS = ("prompt", "caption", "text", "description", "sentence")  # searched for in this order, ignoring case
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
SAMPLE_LINES = 50  # by which a file is recognised
IMAGE_NAME = r"[^\t]*\.(jpe?g|png|webp|gif|bmp|tiff?)(#\w+)?"
FORMS = {  # names of formats in messages
    "text": "a prompt on each line",
    "tsv": "a table separated by tabs",
    "conceptual": "captions with their URL",
    "captions": "image names with their caption",
}
URL = re.compile(r"https?://")
SUFFIXES = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class TableForm(NamedTuple):
    """How the lines of a table are divided."""

    separator: str
    is_quoted: bool  # cells may be quoted


def recognise_table(lines: Sequence[str], names: Collection[str], expected: str = "") -> TableForm | None:
    """The separator and quoting of a table, recognised by its first lines; None if it is no table.

    Args:
        names: known column names in lower case; a header with one of them decides.
        expected: the separator by the file's suffix; empty: unknown, then only a header with a known column makes a
            table.
    """
    candidates = sorted(SEPARATORS, key=lambda separator: separator != expected)
    for separator in candidates:
        header = [name.strip().lower() for name in split_lines(lines[:1], separator, True)[0]] if lines else []
        if len(header) > 1 and not set(names).isdisjoint(header):
            return TableForm(separator, separator != "\t" or looks_quoted(lines))
    if not expected:
        return None
    even = [separator for separator in candidates if is_even(lines, separator)]
    separator = even[0] if even else expected
    return TableForm(separator, separator != "\t" or looks_quoted(lines))


def split_lines(lines: Sequence[str], separator: str, is_quoted: bool) -> list[list[str]]:
    """The rows of some lines; if they are no such table, the rows before the fault, and an empty one."""
    rows = []
    try:
        rows.extend(csv_rows(iter(lines), separator, quoted=is_quoted))
    except csv.Error:
        rows.append([])
    return rows or [[]]


def is_even(lines: Sequence[str], separator: str) -> bool:
    """Whether all rows have as many cells, more than one."""
    counts = {len(row) for row in split_lines(lines, separator, separator != "\t") if row}
    return len(counts) == 1 and counts.pop() > 1


def looks_quoted(lines: Sequence[str]) -> bool:
    """Whether tab-separated cells are quoted as a spreadsheet does it; else a quote is a plain character.

    They are if the header is quoted, or a quoted cell has doubled quotes inside, and no cell only begins with a quote.
    """
    cells = [line.rstrip("\r\n").split("\t") for line in lines]
    if cells and all(re.fullmatch(r'"[^"]+"', cell) for cell in cells[0]):
        return True
    doubled = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
    begun = [cell for row in cells for cell in row if cell.startswith('"')]
    whole = re.compile(r'"(?:[^"]|"")*"')
    return any(map(doubled.fullmatch, begun)) and all(map(whole.fullmatch, begun))


def first_lines(stream: TextIO) -> list[str]:
    """The first lines of a text."""
    return list(itertools.islice(iter(lambda: stream.readline(MOST_CHARACTERS), ""), SAMPLE_LINES))


def recognise_json(lines: Sequence[str]) -> str:
    """`json` for one list or object, `jsonl` for an object on each line; empty for neither."""
    first = "".join(lines[:1]).lstrip()
    if not re.match(r'\{\s*("|$)|\[\s*([{"\[\]]|$)', first):
        return ""
    try:
        complete = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        complete = False
    return "jsonl" if complete and "".join(lines[1:]).strip() else "json"


def recognise_format(path: Path, column: str | None = None) -> str:
    """The format of a file, a key of `formats.READERS`, from its beginning and its suffix.

    Raises: ValueError for an unknown format, or for a .txt file that looks like a table without a header.
    """
    with path.open("rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".bz2", ".xz", ".zip")]
    by_suffix = SUFFIXES.get(suffixes[-1] if suffixes else "")
    if by_suffix == "parquet":
        return by_suffix
    with open_text(path) as stream:
        lines = first_lines(stream)
    if (kind := recognise_json(lines)) and (by_suffix != "jsonl" or lines[0].lstrip().startswith("[")):
        return kind
    if by_suffix == "jsonl":
        return by_suffix
    full = [line.rstrip("\r\n") for line in lines if line.strip()]
    cells = [line.split("\t") for line in full]
    if full and len(cells[0]) == 2:
        if URL.match(cells[0][1]):
            return "conceptual"
        if sum(bool(re.fullmatch(IMAGE_NAME, row[0], re.IGNORECASE)) for row in cells) > 0.8 * len(cells):
            return "captions"
    names = [column.strip().lower()] if column else PROMPT_COLUMNS
    form = recognise_table(lines, names, {"csv": ",", "tsv": "\t"}.get(by_suffix, ""))
    if form:
        return "csv" if form.is_quoted else "tsv"
    if by_suffix != "text":
        raise ValueError(f"{path}: neither its name nor its beginning tells the format; give --format")
    if not column and (what := table_without_prompts(full)):
        raise ValueError(f"{path} looks like {what}; if each line is a prompt, give --format text")
    return "text"


def describe_form(path: Path, source_format: str, column: str | None) -> str:
    """How a text is read, if that differs from its suffix and UTF-8; else empty."""
    if source_format == "parquet":
        return ""
    with open_text(path) as stream:
        lines, encoding = first_lines(stream), stream.encoding
    names = [column.strip().lower()] if column else PROMPT_COLUMNS
    separator = recognise_table(lines, names, ",").separator if source_format == "csv" else ""
    kind = FORMS.get(source_format, source_format) if not separator else f"a table separated by {SEPARATORS[separator]}"
    by_suffix = {source_format for suffix in path.suffixes if SUFFIXES.get(suffix.lower()) == source_format}
    usual = (by_suffix or path.suffix == f".{source_format}") and separator in ("", ",")
    texts = ([] if usual else [kind]) + ([] if encoding == "utf-8-sig" else [f"in {encoding.upper()}"])
    return ", ".join(texts)


def table_without_prompts(lines: Sequence[str]) -> str:
    """What the lines of a text seem to be if not prompts; else empty."""
    if lines and all(re.fullmatch(IMAGE_NAME, line, re.IGNORECASE) and " " not in line for line in lines):
        return "a list of image names"
    for separator, what in SEPARATORS.items():
        header = "".join(lines[:1]).split(separator)
        named = separator == "\t" or (len(lines) > 2 and all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in header))
        if named and is_even(lines, separator):
            advice = f"if so, name its column by --column (its first line is {', '.join(map(repr, header))})"
            return f"a table separated by {what}; {advice[:400]}"
    return ""

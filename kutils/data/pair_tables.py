"""Reads pairs from tables: Parquet with images inside, and lists (JSON, JSON lines, CSV, TSV) that name image files."""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow as pa
from pyarrow import parquet

from kutils.data.pairs import (
    EMBEDDING_KEYS,
    IMAGE_KEYS,
    PROMPT_KEYS,
    Fault,
    Keys,
    Pair,
    find_key,
    list_keys,
)
from kutils.prompts.formats import is_text
from kutils.prompts.table_forms import TableForm, first_lines, recognise_table
from kutils.system.output import quoted
from kutils.system.paths import is_safe_relative
from kutils.system.text_files import CUT_OFF, csv_rows, open_text

BATCH_BYTES = 1 << 25  # of a table, decoded at a time: 32 MB
MOST_BATCH_ROWS = 1024
READ_CHARACTERS = 1 << 20  # of a JSON list, read at a time
SEPARATORS = re.compile(r"[\s,]*")


# ---------------------------------------------------------------- Parquet


class Layout(NamedTuple):
    """The roles of a Parquet file's columns."""

    prompt: str
    images: list[str]  # one pair per row for each of these columns
    embedding: str | None
    fields: list[str]  # all other columns of texts or numbers


def find_layout(path: Path, schema: pa.Schema, keys: Keys) -> Layout:
    """Find the columns by their names and types; ValueError that lists the columns of the file."""
    available = f"(columns: {list_keys(schema.names)})"
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"{path} has the column {twice[0]!r} twice; rename one of them {available}")
    kinds = {field.name: field.type for field in schema}
    asked = [name.strip() for name in keys.image.split(",") if name.strip()]
    images = asked or [name for name, kind in kinds.items() if holds_images(kind)]
    if not images and (named := find_key([name for name, kind in kinds.items() if is_text(kind)], IMAGE_KEYS)):
        images = [named]
    if not images or not set(images) <= set(kinds):
        lacks = f"has no column {keys.image!r}" if asked else "has no column with images"
        raise ValueError(f"{path} {lacks}; name it by --image-key {available}")
    texts = [name for name, kind in kinds.items() if is_text(kind) and name not in images]
    prompt = find_key(texts, PROMPT_KEYS, keys.prompt)
    if prompt is None:
        lacks = f"has no column {keys.prompt!r} with texts" if keys.prompt else "has no column with prompts"
        raise ValueError(f"{path} {lacks}; name it by --prompt-key {available}")
    vectors = [name for name, kind in kinds.items() if is_vector(kind)]
    embedding = find_key(vectors, EMBEDDING_KEYS, keys.embedding)
    if keys.embedding and embedding is None:
        raise ValueError(f"{path} has no column {keys.embedding!r} with lists of numbers {available}")
    others = [name for name, kind in kinds.items() if name not in (*images, prompt) and is_plain(kind)]
    return Layout(prompt, images, embedding, others)


def holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_vector(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists) and pa.types.is_floating(kind.value_type)


def is_plain(kind: pa.DataType) -> bool:
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal)
    return is_text(kind) or any(is_kind(kind) for is_kind in numbers)


def row_groups(path: Path) -> tuple[list[tuple[int, int]], pa.Schema]:
    """Rows and bytes of every row group, and the schema; ValueError if this is no Parquet file."""
    try:
        with parquet.ParquetFile(path) as table:
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups], table.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or is damaged ({error})") from error


def read_parquet(path: Path, keys: Keys, first: int, count: int) -> Iterator[Pair | Fault]:
    """The pairs of some row groups, a few rows in memory at a time; after damage, the rest of the row group is
    skipped."""
    # a buffered stream: a whole column of a row group can take gigabytes
    with parquet.ParquetFile(path, buffer_size=READ_CHARACTERS, pre_buffer=False) as table:
        layout = find_layout(path, table.schema_arrow, keys)
        columns = [layout.prompt, *layout.images, *layout.fields, *filter(None, [layout.embedding])]
        groups = [table.metadata.row_group(number) for number in range(first + count)]
        start = sum(group.num_rows for group in groups[:first])
        for number, group in enumerate(groups[first:], start=first):
            row, start = start, start + group.num_rows
            batch_rows = max(1, min(MOST_BATCH_ROWS, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            try:
                for batch in table.iter_batches(batch_rows, [number], columns, use_threads=False):
                    yield from read_rows(path, batch, layout, keys, row)
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                yield Fault(str(row), f"the row group is damaged from here on ({str(error).splitlines()[0]})")


def read_rows(path: Path, batch: pa.RecordBatch, layout: Layout, keys: Keys, first: int) -> Iterator[Pair | Fault]:
    plain = {name: batch.column(name).to_pylist() for name in layout.fields}
    prompts, images = batch.column(layout.prompt).to_pylist(), {name: batch.column(name) for name in layout.images}
    vectors = batch.column(layout.embedding) if layout.embedding else None
    for position in range(batch.num_rows):
        fields = {name: values[position] for name, values in plain.items()}
        embedding = None
        if vectors is not None and vectors[position].is_valid:
            embedding = vectors[position].values.to_numpy(zero_copy_only=False)
        for name, values in images.items():
            key = str(first + position) if len(images) == 1 else f"{first + position}/{name}"
            image = find_image(path, values[position].as_py(), keys)
            if isinstance(image, Fault):
                yield image._replace(key=key)
            elif prompts[position] is None:
                yield Fault(key, "no text")
            else:
                own = fields_of_image(fields, name, len(images))
                yield Pair(key, image, prompts[position], own, embedding, layout.prompt)


def fields_of_image(fields: Mapping[str, object], image: str, num_images: int) -> Mapping[str, object]:
    """The fields of a row. If it has images `jpg_0` and `jpg_1`, the first also gets `model_0` as `model`, and so
    on."""
    stem, mark, number = image.rpartition("_")
    if num_images == 1 or not (stem and number.isdigit()):
        return fields
    end = mark + number
    return fields | {name.removesuffix(end): value for name, value in fields.items() if name.endswith(end)}


def find_image(path: Path, value: object, keys: Keys) -> bytes | Path | Fault:
    """An image of a table: its content, or the path of its file."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, (bytes, str)):
        return Fault("", "no image")
    if isinstance(value, bytes):
        return value
    if not is_safe_relative(value):
        return Fault("", f"the image path {quoted(value)} leaves the folder")
    return (Path(keys.image_root) if keys.image_root else path.parent) / value


# ---------------------------------------------------------------- lists


def read_list(path: Path, keys: Keys, first: int, count: int) -> Iterator[Pair | Fault]:
    """The pairs that some items of a list name; an item may name several images of one prompt."""
    for number, item in enumerate(islice(list_items(path), first, first + count), start=first):
        if isinstance(item, Fault):
            yield item
            continue
        if not isinstance(item, dict):
            yield Fault(str(number), "no object with keys")
            continue
        image_key, prompt_key = find_key(item, IMAGE_KEYS, keys.image), find_key(item, PROMPT_KEYS, keys.prompt)
        named = item.get(image_key)
        for value in named if isinstance(named, list) else [named]:
            image = find_image(path, value, keys)
            key = value if isinstance(value, str) else str(number)
            if isinstance(image, Fault):
                available = f" (keys: {list_keys(item)})" if image_key is None else ""
                yield image._replace(key=key, reason=image.reason + available)
            elif item.get(prompt_key) is None:
                yield Fault(key, f"no text (keys: {list_keys(item)})")
            else:
                yield Pair(key, image, item[prompt_key], item, None, prompt_key)


def list_form(path: Path) -> str | TableForm | None:
    """`json`, `jsonl` or the form of a table, by a file's beginning and suffix; None for other files."""
    suffix = next((end.lower() for end in reversed(path.suffixes) if end.lower() != ".gz"), "")
    with open_text(path) as stream:
        lines = first_lines(stream)
    begin = "".join(lines).lstrip()[:1]
    if begin == "[":
        return "json"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if begin == "{":
        try:
            return "jsonl" if isinstance(json.loads(lines[0]), dict) else None
        except (ValueError, RecursionError):
            return None
    return recognise_table(lines, [*IMAGE_KEYS, *PROMPT_KEYS], {".csv": ",", ".tsv": "\t"}.get(suffix, ""))


def list_items(path: Path) -> Iterator[object]:
    """The items of a list one by one, usually dicts; a Fault for a line that cannot be read."""
    form, number = list_form(path), 0
    try:
        with open_text(path) as stream:
            if form == "json":
                items = json_items(stream)
            else:
                items = json_lines(stream) if form == "jsonl" else table_rows(path, stream, form)
            for item in items:
                yield item
                number += 1
    except (UnicodeDecodeError, *CUT_OFF) as error:
        yield Fault(f"item {number}", f"the file is damaged or cut off here ({error})")


def json_lines(stream: TextIO) -> Iterator[object]:
    for number, line in enumerate(stream, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError):
            yield Fault(f"line {number}", "broken JSON")


def table_rows(path: Path, stream: TextIO, form: TableForm) -> Iterator[dict | Fault]:
    """The rows of a CSV or TSV; an unclosed quote gives one Fault and ends the table."""
    rows = csv_rows(stream, form.separator, quoted=form.is_quoted)
    header = [name.strip() for name in next(rows, [])]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path} has the column {twice[0]!r} twice; rename one of them")
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            lines = f"line {first}" if rows.line_num <= first else f"lines {first} to {rows.line_num}"
            yield Fault(lines, f"broken quoting ({error})")
            continue
        if row is None:
            return
        if row and len(row) != len(header):
            yield Fault(f"line {rows.line_num}", "wrong number of columns")
        elif row:
            yield dict(zip(header, row, strict=True))


def json_items(stream: TextIO) -> Iterator[object]:
    """The items of a JSON list, without loading the whole list."""
    decoder, text = json.JSONDecoder(), stream.read(READ_CHARACTERS).lstrip()
    position, number, size = 1, 0, READ_CHARACTERS  # after the bracket
    while True:
        position = SEPARATORS.match(text, position).end()
        if text.startswith("]", position):
            return
        try:
            item, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            more = stream.read(size)
            if not more:
                yield Fault(f"item {number}", f"the list is broken or cut off here ({error})")
                return
            text, position = text[position:] + more, 0
            size *= 2  # so that a long item is not parsed again for every megabyte
            continue
        yield item
        position, number, size = end, number + 1, READ_CHARACTERS


def count_items(path: Path) -> int:
    return sum(1 for _ in list_items(path))

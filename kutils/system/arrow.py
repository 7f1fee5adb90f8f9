"""Writes and memory-maps Arrow files: a table, and JSON facts about it in the metadata of its schema."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from kutils.system import checksums, paths

METADATA_KEY = b"kutils"  # the schema's metadata key of the JSON object
SEAL_KEY = b"seal"  # the schema's metadata key of the checksum


def with_facts(schema: pa.Schema, facts: dict) -> pa.Schema:
    """A schema that carries `facts`, a JSON object."""
    return schema.with_metadata({METADATA_KEY: json.dumps(facts)})


def facts_of(table: pa.Table) -> dict:
    """The JSON object that a table carries; empty if it carries none.

    Raises: ValueError if it is damaged.
    """
    return json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))


def map_table(path: Path) -> pa.Table:
    """Map an Arrow file: columns are read from the disk when they are used, and processes share their pages.

    Raises: OSError if it is missing; ValueError if it is damaged (its checksum is compared) or another kind of file.
    """
    checksums.check_arrow(path)  # Arrow itself may end the process where a bit of the layout has flipped
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_batches(
    path: Path,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    left_out: Sequence[str] = (),
    most_batches: int = 1,
) -> None:
    """Write an Arrow file with a checksum, atomically, one batch after the other; an existing file is replaced.

    Args:
        left_out: columns of texts, bytes or lists that the checksum does not cover, since their rows have their own;
            names that the schema lacks are ignored.
        most_batches: upper bound on the number of batches; only needed if columns are left out.
    """
    left_out = [name for name in left_out if name in schema.names]
    blank = checksums.BLANK + checksums.SPAN * max(0, len(left_out) * most_batches - 1)
    sealed = schema.with_metadata({**(schema.metadata or {}), SEAL_KEY: blank})
    with paths.atomic_path(path) as temporary:
        with pa.ipc.new_file(temporary, sealed) as writer:
            for batch in batches:
                writer.write_batch(batch)
        checksums.seal_arrow(temporary, spans_of(temporary, left_out))


def spans_of(path: Path, columns: Sequence[str]) -> list[tuple[int, int]]:
    """First byte and end of the values of some columns of an Arrow file, in each of its batches."""
    content = pa.memory_map(str(path)).read_buffer()
    table = pa.ipc.open_file(content).read_all()
    values = [chunk.buffers()[-1] for column in columns for chunk in table[column].chunks]  # behind the offsets
    firsts = [(part.address - content.address, part.size) for part in values if part is not None and part.size]
    return [(first, first + size) for first, size in firsts]


def map_once(
    path: Path,
    fingerprint: dict,
    make: Callable[[], pa.RecordBatchReader],
    left_out: Sequence[str] = (),
    most_batches: int = 1,
) -> pa.Table:
    """Map an Arrow file; make it first if it is missing, damaged, or has another fingerprint.

    Processes that start together make it once. If it cannot be written, each process keeps the table in memory.

    Args:
        fingerprint: identifies what the table is made from; the table carries it as the fact `fingerprint`.
        make: returns the table's batches, whose schema carries that fact; called again if writing them fails.
        left_out, most_batches: as for `write_batches`.
    """
    if (table := map_matching(path, fingerprint)) is not None:
        return table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()  # released by the `with` below
    except OSError as error:
        print(f"warning: {path.parent} cannot be written ({error}); every process keeps its own", flush=True)
        return make().read_all()
    with lock:
        if (table := map_matching(path, fingerprint)) is not None:  # made by another process meanwhile
            return table
        reader = make()
        try:
            write_batches(path, reader.schema, reader, left_out=left_out, most_batches=most_batches)
        except OSError as error:  # a full disk
            print(f"warning: {path} cannot be written ({error}); every process keeps its own", flush=True)
    return map_matching(path, fingerprint) or make().read_all()


def map_matching(path: Path, fingerprint: dict) -> pa.Table | None:
    """The mapped table; None if the file is missing, damaged, or has another fingerprint."""
    try:
        table = map_table(path)
        return table if facts_of(table).get("fingerprint") == fingerprint else None
    except (OSError, ValueError):
        return None

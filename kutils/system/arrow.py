"""Writes and memory-maps Arrow files: a table, and JSON facts about it in the metadata of its schema."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from kutils.system import checksums, paths

METADATA_KEY = b"kutils"  # of the JSON object
SEAL_KEY = b"seal"  # of the checksum


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
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], *, left_out: str | None = None
) -> None:
    """Write an Arrow file with a checksum, atomically, batch by batch as they come; replaced if it is there.

    Args:
        left_out: a column of texts or bytes that has checksums of its own, in a single batch.
    """
    sealed = schema.with_metadata({**(schema.metadata or {}), SEAL_KEY: checksums.BLANK})
    with paths.atomic_path(path) as temporary:
        with pa.ipc.new_file(temporary, sealed) as writer:
            for batch in batches:
                writer.write_batch(batch)
        checksums.seal_arrow(temporary, (0, 0) if left_out is None else span_of(temporary, left_out))


def span_of(path: Path, column: str) -> tuple[int, int]:
    """First byte and end of the values of a column of an Arrow file with a single batch."""
    content = pa.memory_map(str(path)).read_buffer()
    values = pa.ipc.open_file(content).read_all()[column].chunk(0).buffers()[2]
    return (
        (0, 0) if values is None else (values.address - content.address, values.address - content.address + values.size)
    )


def map_once(path: Path, fingerprint: dict, make: Callable[[], pa.RecordBatchReader]) -> pa.Table:
    """Map an Arrow file; make it first where it is missing, damaged, or of another fingerprint.

    Processes that start together make it once. Where it cannot be written, each process keeps the table in memory.

    Args:
        fingerprint: identifies what the table is made from; the table carries it as the fact `fingerprint`.
        make: returns the table's batches, whose schema carries that fact; called again if writing them fails.
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
            write_batches(path, reader.schema, reader)
        except OSError as error:  # a full disk
            print(f"warning: {path} cannot be written ({error}); every process keeps its own", flush=True)
    return map_matching(path, fingerprint) or make().read_all()


def map_matching(path: Path, fingerprint: dict) -> pa.Table | None:
    """The mapped table; None if the file is missing, damaged, or of another fingerprint."""
    try:
        table = map_table(path)
        return table if facts_of(table).get("fingerprint") == fingerprint else None
    except (OSError, ValueError):
        return None

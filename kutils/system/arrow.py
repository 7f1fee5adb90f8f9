"""Writes and memory-maps Arrow files: a table, and JSON facts about it in the metadata of its schema."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from kutils.system import paths

METADATA_KEY = b"kutils"  # of the JSON object


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

    Raises: OSError if it is missing; ValueError if it is damaged or another kind of file.
    """
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file, atomically, batch by batch as they come; replaced if it is there."""
    with paths.atomic_path(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


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

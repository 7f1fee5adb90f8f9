"""Writes Arrow files with a JSON head once, by whichever process comes first, and memory-maps them for all."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from kutils.system import paths


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


def read_index(path: Path, wanted: dict) -> pa.Table | None:
    """The mapped table, or None if it is not there, of other files, or damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return table if facts_of(table)["fingerprint"] == wanted else None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None


def facts_of(table: pa.Table) -> dict:
    return json.loads((table.schema.metadata or {})[b"kutils"])

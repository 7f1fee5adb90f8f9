"""Makes shards with a subset of other shards' rows: hard links of unchanged shards, new files for the others."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data import shards
from kutils.system import arrow, paths
from kutils.system.tables import hash_prompts


def link_rows(files: Sequence[tuple[Path, int]], keep: np.ndarray | None, folder: Path) -> list[int]:
    """Fill a folder with the kept rows of shards; returns the rows of each shard there.

    Existing files are kept, which continues an interrupted call.

    Args:
        files: shards and their numbers of rows.
        keep: bool [rows of all]; None: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, start = [], 0
    for source, num_rows in files:
        own = np.ones(num_rows, bool) if keep is None else keep[start : start + num_rows]
        start += num_rows
        if not own.any():
            continue
        target = shards.shard_path(folder, len(rows))
        rows.append(int(own.sum()))
        if target.is_file():
            continue
        if own.all():
            link(source, target)
        else:
            table = arrow.map_table(source)
            checksums = table["crc32"].to_numpy()[own] if "crc32" in table.column_names else None
            images = table["image"].chunk(0).filter(pa.array(own))
            shards.write_images(target, images, arrow.facts_of(table), checksums)
    return rows


def link(source: Path, target: Path) -> None:
    """Make a hard link of a file; a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        with paths.atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def write_record(folder: Path, rows: Sequence[int], images_sha256: str, encoding: dict) -> None:
    """Write the record that marks a folder of linked or imported shards as complete.

    Args:
        encoding: size, format and quality of the images; empty if they were kept unchanged.
    """
    sizes = [shards.shard_path(folder, number).stat().st_size for number in range(len(rows))]
    record = {"version": shards.VERSION, "rows": sum(rows), "images_sha256": images_sha256, **encoding}
    paths.save_record(shards.record_path(folder), record | {"shard_rows": list(rows), "shard_bytes": sizes})


def take_shards(tsv_path: Path, keep: np.ndarray, target_path: Path, images: pa.ChunkedArray) -> None:
    """Make shards for a table that has a subset of another table's rows; existing ones are replaced.

    Args:
        tsv_path: the other table, whose shards are complete.
        keep: bool [rows of the other table], the subset.
    """
    source, target = shards.shards_folder(tsv_path), shards.shards_folder(target_path)
    record = paths.read_record(shards.record_path(source))
    lengths = np.diff([*shards.shard_starts(record), record["rows"]]).tolist()
    files = [(shards.shard_path(source, number), rows) for number, rows in enumerate(lengths)]
    shutil.rmtree(target, ignore_errors=True)
    with paths.atomic_folder(target) as folder:
        rows = link_rows(files, keep, folder)
        encoding = {key: record[key] for key in ("size", "format", "quality") if key in record}
        write_record(folder, rows, hash_prompts(images), encoding)

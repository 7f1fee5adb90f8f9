"""Imports one part of a source: checks its pairs, cleans their prompts, packs or writes their images."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data import shards
from kutils.data.pair_formats import Part
from kutils.data.pair_job import Counts, Job
from kutils.data.pair_outcome import Outcome, one_line
from kutils.data.pairs import (
    Fault,
)
from kutils.system import paths
from kutils.system.chunks import ChunkFiles
from kutils.system.constants import EMBEDDING_DIM

MOST_SHARD_BYTES = 1 << 27  # 128 MB: a shard is held in memory until it is written
ROWS = pa.schema(
    {
        "image": pa.string(),
        "prompt": pa.string(),
        "fold": pa.int8(),
        "generator": pa.string(),
        "seed": pa.string(),  # up to 2**64
        "source": pa.string(),
        "key": pa.string(),
        "width": pa.int32(),  # of the source's image
        "height": pa.int32(),
        "embedding": pa.list_(pa.float32(), EMBEDDING_DIM),  # null: to be encoded
    }
)


# ---------------------------------------------------------------- finished parts


def part_folder(chunks: ChunkFiles, number: int) -> Path:
    return chunks.folder / f"{number:06d}"


def faults_path(chunks: ChunkFiles, number: int) -> Path:
    return part_folder(chunks, number) / "faults.tsv"


def read_counts(chunks: ChunkFiles, number: int) -> Counts:
    return Counts(**json.loads(bytes(chunks.load(number)["counts"])))


def leading_parts(chunks: ChunkFiles, limit: int) -> list[int] | None:
    """Numbers of the first parts that together hold `limit` pairs (0: all parts); None while one of them is missing."""
    missing, pairs = set(chunks.missing()), 0
    for number in range(chunks.count):
        if number in missing:
            return None
        pairs += read_counts(chunks, number).pairs if limit else 0
        if 0 < limit <= pairs:
            return list(range(number + 1))
    return list(range(chunks.count))


def import_part(number: int, part: Part, job: Job, chunks: ChunkFiles) -> None:
    """Import a part into a folder of its own among the chunks; does nothing if earlier parts hold enough pairs."""
    if job.limit and leading_parts(chunks, job.limit) is not None:
        return
    target = part_folder(chunks, number)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before the part was complete
    with paths.atomic_folder(target) as folder:
        counts = write_part(number, part, job, folder)
    chunks.save(number, counts=np.frombuffer(json.dumps(asdict(counts)).encode(), np.uint8), pairs=counts.pairs)


# ---------------------------------------------------------------- the work


def write_part(number: int, part: Part, job: Job, folder: Path) -> Counts:
    """Write `rows.arrow`, `faults.tsv`, and the images as shards or files."""
    counts, outcome = Counts(), Outcome(part, job)
    with Rows(number, job, folder, counts) as rows, (folder / "faults.tsv").open("w", encoding="utf-8") as faults:
        for item in outcome.examine_all(counts):
            if isinstance(item, Fault):
                kind = re.split(r" \(|: ", item.reason, maxsplit=1)[0]
                counts.faults[kind] = counts.faults.get(kind, 0) + 1
                faults.write("\t".join(map(one_line, (part.name, *item))) + "\n")
            else:
                rows.add(*item)
    return counts


class Rows:
    """Writes the rows of a part, one shard at a time."""

    def __init__(self, number: int, job: Job, folder: Path, counts: Counts):
        self.number, self.job, self.folder, self.counts = number, job, folder, counts
        self.rows, self.images, self.size = [], [], 0

    def __enter__(self) -> "Rows":
        self.stack = contextlib.ExitStack()
        self.writer = self.stack.enter_context(pa.ipc.new_file(self.folder / "rows.arrow", ROWS))
        return self

    def __exit__(self, kind, *_) -> None:
        with self.stack:
            if kind is None:
                self.flush()
        if kind is None:
            sync(self.folder / "rows.arrow")

    def add(self, row: dict, image: bytes, suffix: str) -> None:
        position = self.counts.pairs
        self.counts.pairs += 1
        self.rows.append(row | {"image": self.job.image_name(self.number, position, suffix)})
        self.size += len(image)
        if self.job.packed:
            self.images.append(image)
        else:
            path = self.folder / "images" / self.job.file_name(position, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            self.images.append(path)
        if len(self.rows) == shards.ROWS_PER_SHARD or self.size >= MOST_SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        self.writer.write_batch(pa.RecordBatch.from_pylist(self.rows, ROWS))
        if self.job.packed:
            path = self.folder / f"{len(self.counts.shard_rows):05d}.arrow"
            encoding = asdict(self.job.encoding) if self.job.encoding else {}
            shards.write_images(path, self.images, {"version": shards.VERSION, **encoding})
            self.counts.shard_rows.append(len(self.rows))
        else:
            for path in self.images:
                sync(path)
        self.rows, self.images, self.size = [], [], 0


def sync(path: Path) -> None:
    """Flush a file's content to the disk (fsync) before it is recorded as finished."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

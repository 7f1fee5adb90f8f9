"""Builds the files of an imported data set from its finished parts, and renames all of them into place."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from kutils.data import shards
from kutils.data.pair_embeddings import part_batches
from kutils.data.pair_formats import Part
from kutils.data.pair_job import Counts, Job
from kutils.data.pair_parts import faults_path, part_folder, read_counts
from kutils.data.shard_links import link, link_rows, write_record
from kutils.prompts.encoder import encoder_name
from kutils.system import paths
from kutils.system.chunks import ChunkFiles
from kutils.system.embedding_files import copy_rows, record_embeddings
from kutils.system.tables import add_lines, encode_rows

TABLE = ["image", "prompt", "fold"]
PAIRS = pa.schema(
    [(name, pa.string()) for name in ("image", "generator", "seed", "source", "file", "key")]
    + [(name, pa.int32()) for name in ("width", "height")]
)  # of <name>.pairs.parquet
# in the order in which they are renamed into place; the record comes last
SUFFIXES = (".shards", "_images", ".npy", ".npy.json", ".pairs.parquet", ".faults.tsv", ".tsv", ".import.json")
OUTDATED = (".clean.npz", ".folds.json")  # removed if a data set is replaced
GROUP_ROWS = 65_536  # rows of a Parquet row group


@dataclass(frozen=True)
class Result:
    """The parts of an import, and the data set made from them."""

    output: Path  # without a suffix, as in `input/sd44m`
    parts: list[Part]
    job: Job
    chunks: ChunkFiles
    work: dict  # everything that determines the result
    numbers: list[int] = field(default_factory=list)  # of the finished parts, in order
    keep: np.ndarray | None = None  # bool [rows of these parts]; None: all are kept

    @property
    def work_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.work, sort_keys=True).encode()).hexdigest()

    def path(self, suffix: str) -> Path:
        return self.output.with_name(self.output.name + suffix)

    def built(self, suffix: str) -> Path:
        return self.chunks.folder / "final" / (self.output.name + suffix)

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The kept rows with the numbers of their parts."""
        start = 0
        for number in self.numbers:
            for batch in part_batches(self.chunks, number):
                own = batch if self.keep is None else batch.filter(pa.array(self.keep[start : start + len(batch)]))
                start += len(batch)
                yield number, own


def sum_counts(chunks: ChunkFiles, numbers: Iterable[int]) -> Counts:
    total = Counts()
    for number in numbers:
        total.add(read_counts(chunks, number))
    return total


def build(result: Result, with_embeddings: bool, facts: dict) -> None:
    """Build all files of the data set among the chunks; continues an interrupted call.

    Args:
        with_embeddings: whether `all.npy` exists.
        facts: further entries of the record.
    """
    result.built("").parent.mkdir(exist_ok=True)
    num_rows, prompts_hash, images_hash = write_tables(result)
    if with_embeddings:
        keep_embeddings(result, num_rows)
        record = {"encoder": encoder_name(None), "rows": num_rows, "prompts_sha256": prompts_hash}
        record_embeddings(result.built(".npy"), record)
    if result.job.packed:
        files = [
            (shards.shard_path(part_folder(result.chunks, number), place), rows)
            for number in result.numbers
            for place, rows in enumerate(read_counts(result.chunks, number).shard_rows)
        ]
        rows = link_rows(files, result.keep, result.built(".shards"))
        encoding = asdict(result.job.encoding) if result.job.encoding else {}
        write_record(result.built(".shards"), rows, images_hash, encoding)
    else:
        move_images(result)
    write_faults(result)
    counts = asdict(sum_counts(result.chunks, result.numbers))
    counts |= {"pairs": num_rows, "left_out": counts["pairs"] - num_rows}  # by --dedup, or beyond --limit
    counts.pop("shard_rows")
    record = {"work": result.work_digest} | facts | counts
    record |= {"files": [suffix for suffix in SUFFIXES[:-1] if result.built(suffix).exists()]}
    paths.save_record(result.built(".import.json"), record)


def write_tables(result: Result) -> tuple[int, str, str]:
    """Write the TSV and the Parquet file of metadata; returns the number of rows, and hashes of prompts and images."""
    num_rows, prompts, images = 0, hashlib.sha256(), hashlib.sha256()
    with contextlib.ExitStack() as stack:
        tsv = stack.enter_context(paths.atomic_path(result.built(".tsv"))).open("wb")
        stack.enter_context(tsv)
        path = stack.enter_context(paths.atomic_path(result.built(".pairs.parquet")))
        writer = stack.enter_context(parquet.ParquetWriter(path, PAIRS, compression="zstd", write_page_checksum=True))
        tsv.write(("\t".join(TABLE) + "\n").encode())
        pending: list[pa.RecordBatch] = []
        for number, batch in result.batches():
            tsv.write(encode_rows(batch.select(TABLE)))
            add_lines(prompts, batch.column("prompt"))
            add_lines(images, batch.column("image"))
            num_rows += len(batch)
            file = pa.array([result.parts[number].name] * len(batch))
            columns = [file if name == "file" else batch.column(name) for name in PAIRS.names]
            pending.append(pa.record_batch(columns, schema=PAIRS))
            if sum(map(len, pending)) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(pending), GROUP_ROWS)
                pending = []
        writer.write_table(pa.Table.from_batches(pending, PAIRS))
    return num_rows, prompts.hexdigest(), images.hexdigest()


def keep_embeddings(result: Result, num_rows: int) -> None:
    """Write the embeddings of the kept rows, from those of all rows."""
    source, target = result.chunks.folder / "all.npy", result.built(".npy")
    if target.is_file():
        return
    if result.keep is None:
        link(source, target)
    else:
        copy_rows(np.load(source, mmap_mode="r"), np.flatnonzero(result.keep), target)


def move_images(result: Result) -> None:
    """Delete the images of rows that are not kept, and move the others, part by part."""
    if result.keep is not None:
        start = 0
        for number in result.numbers:
            for batch in part_batches(result.chunks, number):
                keep = result.keep[start : start + len(batch)]
                start += len(batch)
                for name in batch.column("image").filter(pa.array(~keep)).to_pylist():
                    file = Path(name).relative_to(f"{result.job.name}_images/{number:05d}")
                    (part_folder(result.chunks, number) / "images" / file).unlink(missing_ok=True)
    for number in result.numbers:
        source, target = part_folder(result.chunks, number) / "images", result.built("_images") / f"{number:05d}"
        if source.is_dir():
            target.parent.mkdir(exist_ok=True)
            source.replace(target)


def write_faults(result: Result) -> None:
    with paths.atomic_path(result.built(".faults.tsv")) as temporary, temporary.open("wb") as stream:
        stream.write(b"file\tkey\treason\n")
        for number in result.numbers:
            with faults_path(result.chunks, number).open("rb") as own:
                shutil.copyfileobj(own, stream)


def is_built(result: Result) -> bool:
    return result.built(".import.json").is_file()


def publish(result: Result) -> None:
    """Rename the built files over existing ones, the record last; continues an interrupted call."""
    own = paths.read_record(result.built(".import.json"))["files"]
    for suffix in OUTDATED:
        result.path(suffix).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        built = result.built(suffix)
        if built.exists() or suffix not in own:  # else it has been renamed already
            remove(result.path(suffix))
        if built.exists():
            built.replace(result.path(suffix))
    result.chunks.remove()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Imports one part of a source: its pairs checked, their prompts cleaned, their images packed or written."""

import contextlib
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data import pair_images, shards
from kutils.data.pair_formats import LISTS, Part, read_part
from kutils.data.pairs import (
    GENERATOR_KEYS,
    MOST_BYTES,
    SEED_KEYS,
    SOURCE_KEYS,
    Condition,
    Fault,
    Keys,
    Pair,
    find_key,
    text_of,
)
from kutils.data.shards import Encoding
from kutils.data.transforms import ImageError
from kutils.prompts.cleaning import (
    CLIP_TOKENS,
    MAX_CHARACTERS,
    Cleaner,
    CleaningSettings,
    SourceEntry,
    count_case,
    excerpt,
    load_token_counter,
)
from kutils.prompts.syntax import CONTROL
from kutils.system import paths, processes
from kutils.system.chunks import ChunkFiles
from kutils.system.embedding_files import EMBEDDING_DIM

IMAGES_PER_FOLDER = 1000  # a folder with millions of files is slow to list
MOST_SHARD_BYTES = 1 << 27  # 128 MB: rows of a shard are in memory together while it is written
SURROGATES = re.compile("[\ud800-\udfff]")  # of bytes that were not UTF-8
FILE_SUFFIXES = ("tar", "gz", "tgz", "parquet", "zip", "jsonl", "ndjson", "json", "csv", "tsv")
COUNTED_PAIRS = 64  # between two reports of progress
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


@dataclass(frozen=True)
class Job:
    """How pairs become rows, the same for all parts of an import."""

    name: str  # of the data set
    keys: Keys
    where: tuple[Condition, ...]
    packed: bool  # into shards; else each image is a file
    encoding: Encoding | None  # None: images are kept as they are
    verify: bool  # decode images that are kept as they are
    settings: CleaningSettings | None  # None: prompts are taken as they are
    tokenizer: str  # folder of CLIP's; empty: no limit in tokens
    limit: int  # pairs; 0: no limit
    with_embeddings: bool  # take those of the source
    generator: str  # of all pairs; empty: as each says
    source: str
    fold_key: str  # field with folds; empty: none are assigned yet

    def image_name(self, number: int, row: int, suffix: str) -> str:
        """Path of an image below `input/`: row `row` of part `number`."""
        return f"{self.name}_images/{number:05d}/{self.file_name(row, suffix)}"

    def file_name(self, row: int, suffix: str) -> str:
        return f"{row // IMAGES_PER_FOLDER:03d}/{row % IMAGES_PER_FOLDER:03d}{suffix}"


@dataclass
class Counts:
    """What came of the pairs of a part, or of several."""

    read: int = 0
    unwanted: int = 0  # by --where
    pairs: int = 0
    faults: dict[str, int] = field(default_factory=dict)  # kind -> number
    dropped: dict[str, dict] = field(default_factory=dict)  # as in the report of `cleaning`
    changed: dict[str, dict] = field(default_factory=dict)
    shard_rows: list[int] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        for name in ("read", "unwanted", "pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults = dict(Counter(self.faults) + Counter(other.faults))
        for cases, others in ((self.dropped, other.dropped), (self.changed, other.changed)):
            for reason, case in others.items():
                for example in case["examples"]:
                    count_case(cases, reason, example)
                cases[reason]["count"] += case["count"] - len(case["examples"])


# ---------------------------------------------------------------- finished parts


def part_folder(chunks: ChunkFiles, number: int) -> Path:
    return chunks.folder / f"{number:06d}"


def faults_path(chunks: ChunkFiles, number: int) -> Path:
    return part_folder(chunks, number) / "faults.tsv"


def read_counts(chunks: ChunkFiles, number: int) -> Counts:
    return Counts(**json.loads(bytes(chunks.load(number)["counts"])))


def leading_parts(chunks: ChunkFiles, limit: int) -> list[int] | None:
    """Numbers of the first parts that hold `limit` pairs together (0: all); None as long as one of them is missing."""
    missing, pairs = set(chunks.missing()), 0
    for number in range(chunks.count):
        if number in missing:
            return None
        pairs += read_counts(chunks, number).pairs if limit else 0
        if 0 < limit <= pairs:
            return list(range(number + 1))
    return list(range(chunks.count))


def import_part(number: int, part: Part, job: Job, chunks: ChunkFiles) -> None:
    """Import a part into a folder of its own among the chunks; nothing to do where those before it are enough."""
    if job.limit and leading_parts(chunks, job.limit) is not None:
        return
    target = part_folder(chunks, number)
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before it said that it is finished
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


def one_line(text: str) -> str:
    """A text as a value of a table."""
    return CONTROL.sub(" ", excerpt(text))


class Outcome:
    """Decides of each pair of a part whether it becomes a row."""

    def __init__(self, part: Part, job: Job):
        self.part, self.job, self.seen = part, job, set()
        self.cleaner = Cleaner(job.settings) if job.settings else None
        self.count_tokens = load_tokenizer(job.tokenizer) if job.tokenizer else None

    def examine_all(self, counts: Counts) -> Iterator[Fault | tuple[dict, bytes, str]]:
        """Rows with their images and suffixes, and faults; ends with the job's limit."""
        for counts.read, item in enumerate(read_part(self.part, self.job.keys), start=1):
            if isinstance(item, Pair):
                item = self.examine(item, counts)
            if item is None:
                counts.unwanted += 1
            else:
                yield item
            if not counts.read % COUNTED_PAIRS:
                processes.count(COUNTED_PAIRS)
            if 0 < self.job.limit <= counts.pairs:
                break
        processes.count(counts.read % COUNTED_PAIRS)

    def examine(self, pair: Pair, counts: Counts) -> Fault | tuple[dict, bytes, str] | None:
        """A row, its image and suffix; a fault; None for a pair that is not wanted."""
        if not all(condition.holds(pair.fields) for condition in self.job.where):
            return None
        key = hash(pair.key)
        if key in self.seen:
            return Fault(pair.key, "a key that was there before")
        self.seen.add(key)
        if not isinstance(pair.prompt, str):
            return Fault(pair.key, f"no text, but {type(pair.prompt).__name__}")
        prompt, reason = self.clean(pair, counts)
        if reason:
            return Fault(pair.key, f"prompt: {reason}")
        row = {"prompt": prompt, "key": one_line(pair.key), "fold": -1, "embedding": None}
        row["generator"] = self.job.generator or one_line(text_of(pair.fields, GENERATOR_KEYS))
        row["source"] = self.job.source or one_line(text_of(pair.fields, SOURCE_KEYS)) or self.default_source
        row["seed"] = one_line(text_of(pair.fields, SEED_KEYS))
        if self.job.fold_key:
            text = str(pair.fields.get(find_key(pair.fields, (), self.job.fold_key)))
            if not re.fullmatch(r"-1|[0-9]", text):
                return Fault(pair.key, f"fold is {text!r}, not 0 to 9 or -1")
            row["fold"] = int(text)
        if self.job.with_embeddings and pair.embedding is not None:
            embedding = pair.embedding.reshape(-1)
            if len(embedding) != EMBEDDING_DIM:
                return Fault(pair.key, f"embedding of another length ({len(embedding)}, not {EMBEDDING_DIM})")
            embedding = embedding.astype(np.float32)
            length = np.sqrt(embedding @ embedding)
            if not 0 < length < np.inf:  # NaN compares false
                return Fault(pair.key, "embedding is not finite, or all zero")
            if " ".join(pair.prompt.split()) == prompt:  # else it is of another text
                row["embedding"] = embedding / length
        try:
            content = pair.image if isinstance(pair.image, bytes) else read_image(pair.image)
            image, suffix, *sides = pair_images.prepare(content, self.job.encoding, self.job.verify)
        except ImageError as error:
            return Fault(pair.key, str(error))
        except OSError as error:
            return Fault(pair.key, f"image: {error.strerror or error}")
        return row | dict(zip(("width", "height"), sides, strict=True)), image, suffix

    def clean(self, pair: Pair, counts: Counts) -> tuple[str, str]:
        """A pair's prompt as it is kept, and why it is not."""
        if self.cleaner is None:
            text = " ".join(CONTROL.sub(" ", SURROGATES.sub("", pair.prompt)).split())
            flaw, kinds = ("" if text else "empty"), []
            flaw = flaw or ("too many characters" if len(text) > MAX_CHARACTERS else "")
        else:
            text, kinds, flaw = self.cleaner.examine(SourceEntry(0, pair.prompt))
        if not flaw and self.count_tokens and self.count_tokens([text])[0] > CLIP_TOKENS:
            flaw = "too many tokens"
        if flaw:
            count_case(counts.dropped, flaw, {"place": f"{self.part.name}:{pair.key}", "prompt": excerpt(pair.prompt)})
        for kind in () if flaw else kinds:
            count_case(counts.changed, kind, {"before": excerpt(pair.prompt), "after": excerpt(text)})
        return text, flaw

    @functools.cached_property
    def default_source(self) -> str:
        """The name of the file without its number, or of the folder."""
        path = self.part.path.resolve()
        path = path.parent if self.part.form == "list" and path.name in LISTS else path
        name = path.name if path.is_dir() else re.sub(rf"(\.({'|'.join(FILE_SUFFIXES)}))+$", "", path.name)
        return one_line(re.sub(r"([-_]?\d+(-of-\d+)?)+$", "", name) or path.parent.name or name)


def read_image(path: Path) -> bytes:
    if path.stat().st_size > MOST_BYTES:
        raise ImageError(f"image has too many bytes ({path.stat().st_size:,})")
    return path.read_bytes()


@functools.lru_cache(1)
def load_tokenizer(folder: str):
    return load_token_counter(folder)


class Rows:
    """Writes the rows of a part, as many at a time as a shard has."""

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
    """See that a file's content is on the disk before it is said to be finished."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

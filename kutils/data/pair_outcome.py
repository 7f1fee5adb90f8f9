"""Turns each pair into a row or a fault: applies --where, cleans its prompt, checks and encodes its image."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kutils.data import pair_images
from kutils.data.pair_formats import LISTS, Part, read_part
from kutils.data.pair_job import Counts, Job
from kutils.data.pairs import (
    GENERATOR_KEYS,
    MOST_BYTES,
    SEED_KEYS,
    SOURCE_KEYS,
    Fault,
    Pair,
    find_key,
    text_of,
)
from kutils.data.transforms import ImageError
from kutils.prompts.cleaning import (
    CLIP_TOKENS,
    MAX_CHARACTERS,
    Cleaner,
    SourceEntry,
    count_case,
    excerpt,
    load_token_counter,
)
from kutils.prompts.syntax import CONTROL
from kutils.system import processes
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.output import quoted

SURROGATES = re.compile("[\ud800-\udfff]")  # stand for bytes that were not UTF-8
FILE_SUFFIXES = ("tar", "gz", "tgz", "parquet", "zip", "jsonl", "ndjson", "json", "csv", "tsv")
UNIT_ROUNDING = 1e-6  # rounding error in the length of float32 unit rows
COUNTED_PAIRS = 64  # pairs between two reports of progress


def one_line(text: str) -> str:
    """A text as a value of a table."""
    return CONTROL.sub(" ", excerpt(text))


class Outcome:
    """Turns each pair of a part into a row or a fault."""

    def __init__(self, part: Part, job: Job):
        self.part, self.job, self.seen = part, job, set()
        self.cleaner = Cleaner(job.settings) if job.settings else None
        self.count_tokens = load_tokenizer(job.tokenizer) if job.tokenizer else None

    def examine_all(self, counts: Counts) -> Iterator[Fault | tuple[dict, bytes, str]]:
        """Rows with their images and suffixes, and faults; stops at the job's limit."""
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
                return Fault(pair.key, f"fold is {quoted(text)}, not 0 to 9 or -1")
            row["fold"] = int(text)
        if self.job.with_embeddings and pair.embedding is not None:
            embedding = pair.embedding.reshape(-1)
            if len(embedding) != EMBEDDING_DIM:
                return Fault(pair.key, f"embedding of another length ({len(embedding)}, not {EMBEDDING_DIM})")
            embedding = embedding.astype(np.float32)
            length = np.sqrt(embedding @ embedding)
            if not 0 < length < np.inf:  # NaN compares false
                return Fault(pair.key, "embedding is not finite, or all zero")
            if " ".join(pair.prompt.split()) == prompt:  # else the embedding is of another text
                is_unit = abs(length - 1) < UNIT_ROUNDING  # as in an export: kept bit for bit
                row["embedding"] = embedding if is_unit else embedding / length
        try:
            content = pair.image if isinstance(pair.image, bytes) else read_image(pair.image)
            image, suffix, *sides = pair_images.prepare(content, self.job.encoding, self.job.verify)
        except ImageError as error:
            return Fault(pair.key, str(error))
        except OSError as error:
            return Fault(pair.key, f"image: {error.strerror or error}")
        return row | dict(zip(("width", "height"), sides, strict=True)), image, suffix

    def clean(self, pair: Pair, counts: Counts) -> tuple[str, str]:
        """A pair's cleaned prompt, and the reason to reject it, or an empty text."""
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

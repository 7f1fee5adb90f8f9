"""Plans an import of pairs: forms of the sources, disk space needed, and what an earlier call has done already."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from kutils.data import pair_results
from kutils.data.pair_formats import Part, find_parts, read_part
from kutils.data.pair_job import Counts, Job
from kutils.data.pair_outcome import Outcome
from kutils.data.pair_results import Result
from kutils.data.pairs import Fault, Pair
from kutils.system import paths
from kutils.system.chunks import ChunkFiles
from kutils.system.constants import EMBEDDING_DIM

VERSION = 1  # of the unfinished work: that of another version is discarded
PROBED_PARTS, PROBED_PAIRS = 4, 16  # parts, and first pairs of each, that are read to estimate sizes and find fields
ROW_BYTES = 3 * 4 * EMBEDDING_DIM + 600  # at most three copies of the embedding at a time, and texts
FILE_BYTES = 2048  # disk overhead of a file, on average
LATER_TEXTS = ("caption", "description", "recaption")  # fields that often hold captions by a model that sees the image


def format_bytes(size: float) -> str:
    return tqdm.format_sizeof(size, suffix="B")


@dataclass(frozen=True)
class Probe:
    """Estimates from the first pairs of some parts."""

    pair_bytes: float  # of an image as it will be kept
    wanted: float  # share of pairs that --where keeps
    embedding_lengths: Counter  # dimensions of the source's embeddings; 0 if a pair has none
    fields: list[str]
    prompt_keys: list[str]  # fields or files from which prompts are read
    faults: list[str]


def probe(parts: Sequence[Part], job: Job) -> Probe:
    """Read the first pairs of some parts; nothing is written."""
    sizes, lengths, fields, prompt_keys, faults, seen = [], Counter(), {}, {}, [], 0
    for part in parts[:: max(1, len(parts) // PROBED_PARTS)]:
        outcome = Outcome(part, job)
        for item in islice(read_part(part, job.keys), PROBED_PAIRS):
            seen += 1
            if isinstance(item, Pair):
                fields |= dict.fromkeys(item.fields)
                prompt_keys[item.prompt_key] = None
                lengths[0 if item.embedding is None else item.embedding.size] += 1
                item = outcome.examine(item, Counts())
            if isinstance(item, Fault):
                faults.append(f"{part.name}, {item.key}: {item.reason}")
            elif item is not None:
                sizes.append(len(item[1]))
    wanted = (len(sizes) + len(faults) + 1) / (seen + 1)
    return Probe(sum(sizes) / max(1, len(sizes)), wanted, lengths, list(fields), list(prompt_keys), faults)


def check_disk(result: Result, sample: Probe) -> str:
    """A line with the space needed and free; OSError if it is not enough."""
    chunks, job, total = result.chunks, result.job, range(len(result.parts))
    missing = chunks.missing() if chunks.folder.is_dir() else total
    pairs = sample.wanted * sum(result.parts[number].pairs for number in missing)
    pairs = min(pairs, job.limit or pairs)
    needed = pairs * (sample.pair_bytes + ROW_BYTES + (0 if job.packed else FILE_BYTES))
    advice = "give --pack 448 or a smaller size, less sources, or --limit"
    free = paths.check_room(result.output.parent, needed, advice)
    return f"about {format_bytes(needed)} will be written, {format_bytes(free)} are free"


def describe_import(parts: Sequence[Part], sample: Probe, job: Job) -> str:
    """What was recognised, as lines to print."""
    forms = ", ".join(dict.fromkeys(part.form for part in parts))
    pairs, size = (sum(getattr(part, name) for part in parts) for name in ("pairs", "size"))
    files = len({part.path for part in parts})
    lines = [f"{forms}: {files:,} files or folders, about {pairs:,} pairs, {format_bytes(size)}"]
    lengths = [str(length) for length in sample.embedding_lengths if length]
    if lengths and not job.with_embeddings:
        lines.append(f"the source's embeddings ({', '.join(lengths)} numbers) are not used: all prompts are encoded")
    line = f"prompts from {', '.join(map(repr, sample.prompt_keys)) or 'nowhere'}"
    lines.append(f"{line}; fields for --where: {', '.join(map(str, sample.fields)) or 'none'}")
    if any(word in str(name).lower() for name in sample.prompt_keys for word in LATER_TEXTS):
        lines.append(
            "note: captions that were written afterwards, by a person or a model, are another target than the prompt "
            "that an image was made from; where there are both, name the prompt by --prompt-key"
        )
    return "\n".join(lines)


def make_plan(
    sources: Sequence[str], output: Path, job: Job, form: str, embeddings: str, dedup: float, overwrite: bool
) -> tuple[Result, str]:
    """The next step of the import: `work`, `publish` (files are built and only need renaming), or `done`."""
    parts = find_parts(sources, form, job.keys)
    sample = probe(parts, job)
    common = sample.embedding_lengths.most_common(1)
    with_embeddings = embeddings == "auto" and bool(common) and common[0][0] == EMBEDDING_DIM
    job = dataclasses.replace(job, with_embeddings=with_embeddings)
    files = [[*part[2:], part.form, part.path.stat().st_mtime_ns] for part in parts]
    settings = dataclasses.asdict(job) | {"embeddings": embeddings, "dedup": dedup}
    work = {"version": VERSION, "parts": files, "settings": settings}
    result = Result(output, parts, job, ChunkFiles(output, work, len(parts)), work)
    if check_import_output(result, overwrite):
        return result, "done"
    print(describe_import(parts, sample, job), flush=True)
    if pair_results.is_built(result):
        return result, "publish"
    print(check_disk(result, sample), flush=True)
    result.chunks.open()
    for leftover in result.chunks.folder.glob(".*.partial"):  # left by a killed run
        shutil.rmtree(leftover)
    return result, "work"


def check_import_output(result: Result, overwrite: bool) -> bool:
    """Whether the data set exists as asked for; ValueError if another one of this name does."""
    existing = [path for suffix in pair_results.SUFFIXES if (path := result.path(suffix)).exists()]
    record = paths.read_record(result.path(".import.json"))
    if pair_results.is_built(result) or not existing:  # or an interrupted call had begun to rename files
        return False
    if record is None:
        raise ValueError(f"{existing[0]} exists and was not imported; choose another name")
    is_whole = all(result.path(suffix).exists() for suffix in record["files"])
    if record["work"] == result.work_digest and is_whole and not overwrite:
        return True
    if not overwrite:
        what = "was imported from other files or with other settings" if is_whole else "is not whole any more"
        raise ValueError(f"{result.output} {what}; choose another name, or give --overwrite to replace it")
    return False

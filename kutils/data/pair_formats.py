"""Recognises the forms in which pairs of image and prompt are downloaded, and reads them part by part."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

from kutils.data import pair_folders, pair_tables, pair_tars
from kutils.data.pairs import Fault, Keys, Pair

FORMS = {
    "webdataset": "tar files of samples: KEY.jpg|png|webp, KEY.txt or KEY.json, KEY.embs.npy",
    "parquet": "Parquet with images inside, one or several a row, or with their paths",
    "diffusiondb": "part folders or zip files of images with a JSON file, as DiffusionDB's",
    "list": "JSON, JSON lines, CSV or TSV that name image files, as metadata.jsonl in a folder of images",
    "texts": "images in folders or zip files, each with a text file of its stem",
    "embedded": "images that carry their prompt: A1111, ComfyUI, InvokeAI, NovelAI, Fooocus",
}
LISTS = tuple(f"metadata.{suffix}" for suffix in ("jsonl", "csv", "tsv", "json"))
PART_PAIRS = 8192  # into which long lists and folders are split; a tar is always one part
SAMPLED_TARS, TAR_SAMPLES = 8, 64  # tars and samples in each from which the number of all pairs is estimated
SAMPLED_IMAGES = 64  # images from which the size of all images in a folder is estimated
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")


class Part(NamedTuple):
    """One piece of work: a source file, or some of its row groups, items or images."""

    form: str  # a key of FORMS
    path: Path
    name: str  # of the file in reports: relative to the source
    first: int  # row group, item or image
    count: int
    pairs: int  # expected
    size: int  # bytes


def read_part(part: Part, keys: Keys) -> Iterator[Pair | Fault]:
    """The pairs of a part in order, and a Fault for everything in it that is no pair."""
    if part.form == "webdataset":
        return pair_tars.read_tar(part.path, keys)
    if part.form == "diffusiondb":
        return pair_folders.read_diffusiondb(part.path, keys)
    readers = {
        "parquet": pair_tables.read_parquet,
        "list": pair_tables.read_list,
        "texts": pair_folders.read_texts,
        "embedded": pair_folders.read_embedded,
    }
    return readers[part.form](part.path, keys, part.first, part.count)


# ---------------------------------------------------------------- which files


def expand(source: str) -> list[Path]:
    """The files or folders of a source: a path, or a pattern with `{000..123}`, `{a,b}`, `*`, `?` or `[...]`.

    Raises: ValueError if there is none.
    """
    if Path(source).exists():
        return [Path(source)]
    paths = []
    for name in expand_braces(source):
        is_pattern = any(mark in name for mark in "*?[")
        matches = sorted(glob(name, recursive=True)) if is_pattern else [name]  # noqa: PTH207 (it may begin anywhere)
        if not matches or not Path(matches[0]).exists():
            raise ValueError(f"{name} is not there" + (f" (of {source})" if name != source else ""))
        paths += map(Path, matches)
    return paths


def expand_braces(pattern: str) -> list[str]:
    """`x{00..02}` to x00, x01, x02 and `x{a,b}` to xa, xb, as a shell does; one pair of braces after the other."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(limits[1]), int(limits[2])
        step = 1 if first <= last else -1
        choices = [f"{number:0{len(limits[1])}d}" for number in range(first, last + step, step)]
    else:
        choices = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def find_parts(sources: Sequence[str], form: str, keys: Keys) -> list[Part]:
    """The parts of all sources, in their order and that of the names in a folder.

    Args:
        form: a key of FORMS; empty: recognised for each source.
    Raises: ValueError for a source that is not there, or in which nothing is recognised.
    """
    parts = []
    for path in itertools.chain.from_iterable(map(expand, sources)):
        files = list(files_of(path, form))
        if not files:
            what = f"nothing of the form {form}" if form else "no pairs of a known form"
            known = "".join(f"\n  {name}: {text}" for name, text in FORMS.items())
            raise ValueError(f"{path} holds {what}; --format takes:{known}")
        for kind, file in files:
            name = str(file.relative_to(path)) if file != path else path.name
            parts += split(kind, file, name, keys)
    return estimate_tars(parts)


def files_of(path: Path, form: str) -> Iterator[tuple[str, Path]]:
    """Form and path of each file or folder of pairs in a source; if a folder has several forms, the first in FORMS."""
    if not path.is_dir():
        if kind := form or recognise_file(path):
            yield kind, path
        return
    by_form: dict[str | None, list[Path]] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = Path(folder) / name
            kind = pair_folders.recognise(file) if name.lower().endswith(".zip") else kind_by_name(name)
            if kind != "list" or form == "list" or name in LISTS:
                by_form.setdefault(kind, []).append(file)
        if any(map(pair_folders.is_image, names)):
            by_form.setdefault(pair_folders.recognise(Path(folder)), []).append(Path(folder))
    if form in ("texts", "embedded") or "texts" in by_form:  # with no text at all, every image is a fault
        by_form[form or "texts"] = sorted(by_form.pop("texts", []) + by_form.pop("embedded", []))
    for kind in (form,) if form else FORMS:
        if by_form.get(kind):
            yield from ((kind, file) for file in by_form[kind])
            return


def kind_by_name(name: str) -> str | None:
    """The form of a file in a folder by its suffix."""
    name = name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    if name.endswith(".parquet") and not name.startswith("metadata"):  # metadata files beside tars describe them
        return "parquet"
    return "list" if name.endswith((".jsonl", ".ndjson", ".json", ".csv", ".tsv")) else None


def recognise_file(path: Path) -> str | None:
    """The form of a file by its content."""
    with path.open("rb") as stream:
        head = stream.read(pair_tars.BLOCK)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:2] == b"PK":
        return pair_folders.recognise(path)
    if head.startswith(IMAGE_STARTS):
        return None
    try:
        with pair_tars.open_tar(path) as stream:
            begin = stream.read(pair_tars.BLOCK)
    except (OSError, EOFError):
        return None
    if pair_tars.is_tar(begin):
        return "webdataset"
    return "list" if pair_tables.list_form(path) else None


# ---------------------------------------------------------------- parts


def split(form: str, path: Path, name: str, keys: Keys) -> list[Part]:
    """The parts of one file or folder; ValueError if it is not of this form."""
    size = path.stat().st_size if path.is_file() else 0
    if form == "webdataset":
        return [Part(form, path, name, 0, 0, 0, size)]
    if form == "parquet":
        return split_row_groups(path, name, keys)
    if form == "list":
        if not pair_tables.list_form(path):
            raise ValueError(f"{path} is no list: neither JSON, JSON lines, CSV nor TSV")
        count = pair_tables.count_items(path)
    else:
        files = pair_folders.Files(path)
        images = list(filter(pair_folders.is_image, files.names()))
        count, some = len(images), images[:SAMPLED_IMAGES]
        size = size or sum(map(files.size, some)) * count // max(1, len(some))
    step = max(1, count) if form == "diffusiondb" else PART_PAIRS
    lengths = {first: min(step, count - first) for first in range(0, count, step)}
    return [Part(form, path, name, first, length, length, size * length // count) for first, length in lengths.items()]


def split_row_groups(path: Path, name: str, keys: Keys) -> list[Part]:
    """Parts of consecutive row groups, each with at least PART_PAIRS rows, except the last part."""
    groups, schema = pair_tables.row_groups(path)
    layout = pair_tables.find_layout(path, schema, keys)
    parts, first, rows, size = [], 0, 0, 0
    for number, (group_rows, group_size) in enumerate(groups):
        rows, size = rows + group_rows, size + group_size
        if rows >= PART_PAIRS or number == len(groups) - 1:
            pairs = rows * len(layout.images)
            parts.append(Part("parquet", path, name, first, number + 1 - first, pairs, size))
            first, rows, size = number + 1, 0, 0
    return parts


def estimate_tars(parts: Sequence[Part]) -> list[Part]:
    """The parts with the number of pairs in tars estimated from the first samples of some tars."""
    tars = [part for part in parts if part.form == "webdataset"]
    counted = [count_first_samples(part.path) for part in tars[:: max(1, len(tars) // SAMPLED_TARS)]]
    samples, size = (sum(numbers) for numbers in zip(*counted, strict=True)) if counted else (0, 0)
    return [
        part._replace(pairs=round(part.size * samples / max(size, 1))) if part.form == "webdataset" else part
        for part in parts
    ]


def count_first_samples(path: Path) -> tuple[int, int]:
    """Number of images among a tar's first samples, and the bytes that these samples take."""
    images = size = 0
    with contextlib.suppress(*pair_tars.DAMAGES), pair_tars.open_tar(path) as stream:
        for name, _ in pair_tars.read_members(stream, lambda name: False):
            images, size = images + pair_folders.is_image(name), stream.tell()
            if images == TAR_SAMPLES:
                return images, size
    return images, path.stat().st_size  # these are all

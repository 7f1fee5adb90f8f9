"""Finds rows that cannot be trained on (unreadable images, empty prompts, one image with two prompts), and moves them.

The good rows of `<name>.tsv` become the data set `<name>.checked`, the bad ones go to `<name>.quarantine.tsv`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data import image_files
from kutils.data.datasets import last_values
from kutils.data.pair_facts import facts_path
from kutils.data.shard_links import link, take_shards
from kutils.data.shards import have_no_files, open_shards
from kutils.prompts.clean_marks import read_clean_mark, write_clean_mark
from kutils.system import embedding_files, paths
from kutils.system.embedding_files import map_embeddings
from kutils.system.tables import folds_hash, hash_prompts, holds, read_table, unusable, write_table

ADDED_COLUMNS = ("line", "reason")  # in the quarantine table


class PooledRows:
    """The rows of several data sets, concatenated, each with the reason why it is bad, if it is.

    Args:
        tsv_paths: the data sets, all in one folder; image paths are relative to it.
    Raises: ValueError for a table that cannot be read, without rows, in another folder, or with a column that the
        quarantine adds; for shards without image files that are not whole.
    """

    def __init__(self, tsv_paths: Sequence[Path]):
        self.paths, self.root = list(tsv_paths), tsv_paths[0].parent
        for path in self.paths:
            if path.parent.resolve() != self.root.resolve():
                raise ValueError(
                    f"{path} is not in {self.root}: data sets that are trained on together lie in one folder"
                )
        self.tables = [read_table(path, ["image", "prompt", "fold"]) for path in self.paths]
        for path, table in zip(self.paths, self.tables, strict=True):
            if not table.num_rows:
                raise ValueError(f"{path} has a header and no rows")
            if taken := [name for name in ADDED_COLUMNS if name in table.column_names]:
                raise ValueError(f"{path} has a column {taken[0]!r}, which the quarantine adds; rename it")
        self.starts = np.cumsum([0, *(table.num_rows for table in self.tables)])  # int64 [sets + 1]
        self.images = self.column("image")
        self.shards = [
            open_shards(path, table["image"]) if have_no_files(path) else None
            for path, table in zip(self.paths, self.tables, strict=True)
        ]
        self.folds = np.concatenate([table["fold"].to_numpy() for table in self.tables])
        self.prompt_codes = codes_of(self.column("prompt"))
        self.bad = np.zeros(len(self), np.int32)  # number of the reason; 0: no reason so far
        self.reasons = {"": 0}  # text -> number

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        """A column over all data sets, [rows]."""
        return pa.chunked_array([chunk for table in self.tables for chunk in table[name].chunks])

    def line_of(self, row: int) -> tuple[Path, int]:
        """The table that a row is from, and its line there."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.paths[number], int(row - self.starts[number]) + 2

    def read_image(self, row: int) -> bytes:
        """The content of a row's image file, or of its image in a shard if there are no files; OSError if
        unreadable."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        if shards := self.shards[number]:
            return shards.read(row - int(self.starts[number]))
        return (self.root / self.images[row].as_py()).read_bytes()

    def good(self) -> np.ndarray:
        """int64 [good], ascending: the rows without a reason so far."""
        return np.flatnonzero(self.bad == 0)

    def mark_bad(self, rows: np.ndarray, reason: str) -> None:
        """Give rows (int64 [n]) a reason; a row that has one keeps it."""
        self.bad[rows[self.bad[rows] == 0]] = self.reasons.setdefault(reason, len(self.reasons))


def codes_of(texts: pa.ChunkedArray) -> np.ndarray:
    """int32 [n]: the same number for the same text."""
    return texts.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()


@dataclass(frozen=True)
class ImageFindings:
    """Results of decoding the images of all data sets."""

    examined: np.ndarray  # int64, ascending: rows whose images were read
    decoded: np.ndarray  # int64, ascending: rows whose images decode
    facts: np.ndarray  # image_files.FACTS of `decoded`
    same_path: np.ndarray  # bool [rows]: another row has the same image path and the same prompt
    same_content: np.ndarray  # bool [rows]: another row has a copy of the image and the same prompt


def find_bad_rows(rows: PooledRows, images: int, num_workers: int, progress: bool) -> ImageFindings:
    """Mark all rows that cannot be trained on, each with the first reason found.

    Args:
        images: number of images to decode, drawn at random; 0: all.
    """
    for table, start in zip(rows.tables, rows.starts, strict=False):
        for column, is_bad, advice in unusable(table):
            rows.mark_bad(start + np.flatnonzero(is_bad.to_numpy()), f"{column} cannot be used: {advice}")
    named = rows.good()
    same_path = np.zeros(len(rows), bool)
    path_codes = codes_of(rows.images.take(pa.array(named)))
    same_path[named] = mark_shared_images(rows, named, path_codes, "the same image path")
    examined = rows.good()
    if 0 < images < len(examined):
        examined = np.sort(np.random.default_rng(0).choice(examined, images, replace=False))
    scan = image_files.scan(rows.read_image, examined, num_workers, progress)
    numbers = np.array([rows.reasons.setdefault(text, len(rows.reasons)) for text in scan.texts], np.int32)
    rows.bad[examined] = numbers[scan.facts["reason"]]
    decoded, facts = examined[scan.decoded], scan.facts[scan.decoded]
    same_content = np.zeros(len(rows), bool)
    content_codes = image_files.content_codes(facts)
    same_content[decoded] = mark_shared_images(rows, decoded, content_codes, "an image of the same content")
    return ImageFindings(examined, decoded, facts, same_path, same_content & ~same_path)


def mark_shared_images(rows: PooledRows, chosen: np.ndarray, image_codes: np.ndarray, what: str) -> np.ndarray:
    """Mark rows whose image also belongs to another prompt, since either prompt may be wrong.

    Args:
        chosen: int64 [n], the rows to compare.
        image_codes: int [n], the same number for the same image.
        what: what such rows share; the reason begins with it.
    Returns: bool [n], rows that share their image with rows of the same prompt only.
    """
    codes = rows.prompt_codes[chosen]
    last = last_values(image_codes, chosen)
    differs = rows.prompt_codes[last] != codes
    other = np.full(image_codes.max(initial=-1) + 1, -1, np.int64)  # per image a row of another prompt than its last
    other[image_codes[differs]] = chosen[differs]
    is_bad = other[image_codes] >= 0
    partners = np.where(differs, last, other[image_codes])
    for row, partner in zip(chosen[is_bad, None], partners[is_bad], strict=True):  # each row as an array of one
        path, line = rows.line_of(partner)
        rows.mark_bad(row, f"{what} as line {line} of {path.name}, which has another prompt")
    return (np.bincount(image_codes)[image_codes] > 1) & ~is_bad


def in_two_folds(rows: PooledRows) -> np.ndarray:
    """bool [rows]: the row's prompt is in two folds, perhaps of two data sets; rows without a fold are ignored."""
    assigned = np.flatnonzero(rows.folds >= 0)
    codes = rows.prompt_codes[assigned]
    differs = last_values(codes, rows.folds[assigned]) != rows.folds[assigned]
    is_torn = np.zeros(rows.prompt_codes.max() + 1, bool)
    is_torn[codes[differs]] = True
    return is_torn[rows.prompt_codes]


def by_dataset(rows: PooledRows, findings: ImageFindings) -> Iterator[tuple[slice, int, np.ndarray]]:
    """For each data set its rows, the number of images examined, and the FACTS of those that decode."""
    for start, end in zip(rows.starts, rows.starts[1:], strict=False):
        examined = np.searchsorted(findings.examined, [start, end])
        first, last = np.searchsorted(findings.decoded, [start, end])
        yield slice(int(start), int(end)), int(examined[1] - examined[0]), findings.facts[first:last]


def set_apart(path: Path, table: pa.Table, bad: np.ndarray, reasons: list[str], with_embeddings: bool) -> str:
    """Write `<name>.quarantine.tsv` and the data set `<name>.checked`; nothing if no row is bad.

    The quarantine has the table's columns, the line and the reason. `<name>.checked` has the good rows with their
    embeddings and marks of clean rows, and shards if there are no image files. Its table is written last, so that it
    only exists once all of it does. If it exists with the same rows, it stays as it is; with other rows it is replaced.
    `<name>` itself is never changed.

    Args:
        bad: int32 [rows], number of the reason; 0: the row is good.
        reasons: texts by number.
        with_embeddings: copy the embeddings, because they fit the table.
    Returns: what was done, as a sentence.
    Raises: OSError on a full disk.
    """
    quarantine, checked = path.with_suffix(".quarantine.tsv"), path.with_suffix(".checked.tsv")
    rows, good = np.flatnonzero(bad), np.flatnonzero(bad == 0)
    if not len(rows):
        names = [file.name for file in (quarantine, checked) if file.is_file()]
        note = f"; {' and '.join(names)} {'is' if len(names) == 1 else 'are'} of an earlier check" if names else ""
        return f"{path}: no bad rows, so that nothing is set apart{note}"
    lines, texts = pa.array(rows + 2), pa.array(reasons).take(pa.array(bad[rows]))
    bad_rows = table.take(pa.array(rows))
    for name, values in zip(ADDED_COLUMNS, (lines, texts), strict=True):
        bad_rows = bad_rows.append_column(name, values)
    write_table(quarantine, bad_rows)
    if not len(good):
        return f"{path}: all rows are bad, and in {quarantine}"
    good_rows = table.take(pa.array(good))
    if checked.is_file() and holds(checked, good_rows.select(["image", "prompt"])):  # its folds may have changed since
        return f"{path}: {len(rows):,} bad rows in {quarantine}; {checked} has the others already, and stays as it is"
    for suffix in (".tsv", ".npy", ".npy.json", ".clean.npz", ".folds.json", ".pairs.parquet"):
        checked.with_suffix(suffix).unlink(missing_ok=True)
    if have_no_files(path):
        take_shards(path, bad == 0, checked, good_rows["image"])
    if facts_path(path).is_file():  # its rows are identified by their images
        link(facts_path(path), facts_path(checked))
    if with_embeddings:
        copy_embeddings(path, checked, good, good_rows["prompt"], len(bad))
    clean = read_clean_mark(path, len(bad), hash_of(table))
    if clean is not None:
        write_clean_mark(checked, clean[good], hash_of(good_rows))
    write_table(checked, good_rows)
    result = f"{path}: {len(rows):,} bad rows in {quarantine}, the other {len(good):,} are the data set {checked.stem}"
    return result if with_embeddings else f"{result}, not embedded yet: python input/gen_prompt_embedding.py {checked}"


def hash_of(table: pa.Table) -> str:
    """`folds_hash` of a table's columns."""
    return folds_hash(table["prompt"], table["fold"].to_numpy())


def copy_embeddings(path: Path, checked: Path, good: np.ndarray, prompts: pa.ChunkedArray, num_rows: int) -> None:
    """Write the embeddings of the good rows beside their table, with a record if the originals have one.

    Args:
        good: int64, rows of the table at `path`, which has `num_rows`.
        prompts: of these rows.
    """
    npy_path = checked.with_suffix(".npy")
    embedding_files.copy_rows(map_embeddings(path.with_suffix(".npy"), num_rows), good, npy_path)
    record = paths.read_record(path.with_suffix(".npy.json"))
    if record is not None:
        facts = {"rows": len(good), "prompts_sha256": hash_prompts(prompts)}
        embedding_files.record_embeddings(npy_path, record | facts)

"""Finds rows that cannot be trained on: unreadable images, empty prompts, one image with two prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data import image_files
from kutils.data.datasets import last_values
from kutils.data.quarantine import ADDED_COLUMNS
from kutils.system.tables import DataError, read_table, unusable


class Rows:
    """Rows of several data sets, one after the other, and what is wrong with each.

    Args:
        tsv_paths: of the data sets, all in one folder; image paths are relative to it.
    Raises: TableError for a table that cannot be read; DataError for one without rows, with a column that the
        quarantine adds, or in another folder.
    """

    def __init__(self, tsv_paths: Sequence[Path]):
        self.paths, self.root = list(tsv_paths), tsv_paths[0].parent
        for path in self.paths:
            if path.parent.resolve() != self.root.resolve():
                raise DataError(
                    f"{path} is not in {self.root}: data sets that are trained on together lie in one folder"
                )
        self.tables = [read_table(path, ["image", "prompt", "fold"]) for path in self.paths]
        for path, table in zip(self.paths, self.tables, strict=True):
            if not table.num_rows:
                raise DataError(f"{path} has a header and no rows")
            if taken := [name for name in ADDED_COLUMNS if name in table.column_names]:
                raise DataError(f"{path} has a column {taken[0]!r}, which the quarantine adds; rename it")
        self.starts = np.cumsum([0, *(table.num_rows for table in self.tables)])
        self.images = self.column("image")
        self.folds = np.concatenate([table["fold"].to_numpy() for table in self.tables])
        self.prompt_codes = codes_of(self.column("prompt"))
        self.bad = np.zeros(len(self), np.int32)  # number of the reason; 0: none so far
        self.reasons = {"": 0}  # text -> number

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for table in self.tables for chunk in table[name].chunks])

    def origin(self, row: int) -> tuple[int, int]:
        """Which data set a row is of, and its line in that table."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, int(row - self.starts[number]) + 2

    def read_image(self, row: int) -> bytes:
        """Content of a row's image file; OSError if it cannot be read."""
        return (self.root / self.images[row].as_py()).read_bytes()

    def good(self) -> np.ndarray:
        """int64, the rows that nothing was found against so far."""
        return np.flatnonzero(self.bad == 0)

    def set_bad(self, rows: np.ndarray, reason: str) -> None:
        """Note why rows are bad; what was noted before stays."""
        self.bad[rows[self.bad[rows] == 0]] = self.reasons.setdefault(reason, len(self.reasons))


def codes_of(texts: pa.ChunkedArray) -> np.ndarray:
    """int32 [n]: the same number for the same text."""
    return texts.cast(pa.large_string()).combine_chunks().dictionary_encode().indices.to_numpy()


@dataclass(frozen=True)
class Found:
    """What was found beside the bad rows, over all data sets."""

    looked_at: np.ndarray  # int64, ascending: rows whose images were looked at
    decoded: np.ndarray  # int64, ascending: those that decode
    facts: np.ndarray  # image_facts.FACTS of `decoded`
    same_path: np.ndarray  # bool [rows]: another row has the same image path, and the same prompt
    same_content: np.ndarray  # bool [rows]: or another file of the same content


def find_bad_rows(rows: Rows, images: int, num_workers: int, progress: bool) -> Found:
    """Note in `rows` what is wrong with each; the first reason stays.

    Args:
        images: to decode, drawn at random; 0: all.
        num_workers: decoding processes.
        progress: show a bar.
    """
    for table, start in zip(rows.tables, rows.starts, strict=False):
        for column, found, advice in unusable(table):
            rows.set_bad(start + np.flatnonzero(found.to_numpy()), f"{column} cannot be used: {advice}")
    named = rows.good()
    same_path = np.zeros(len(rows), bool)
    same_path[named] = compare(rows, named, codes_of(rows.images.take(pa.array(named))), "the same image path")
    looked_at = rows.good()
    if 0 < images < len(looked_at):
        looked_at = np.sort(np.random.default_rng(0).choice(looked_at, images, replace=False))
    scan = image_files.scan(rows.read_image, looked_at, num_workers, progress)
    numbers = np.array([rows.reasons.setdefault(text, len(rows.reasons)) for text in scan.texts], np.int32)
    rows.bad[looked_at] = numbers[scan.facts["reason"]]
    decoded, facts = looked_at[scan.decoded], scan.facts[scan.decoded]
    same_content = np.zeros(len(rows), bool)
    same_content[decoded] = compare(rows, decoded, image_files.same_content(facts), "an image of the same content")
    return Found(looked_at, decoded, facts, same_path, same_content & ~same_path)


def compare(rows: Rows, chosen: np.ndarray, keys: np.ndarray, what: str) -> np.ndarray:
    """Note the rows that share their image with a row of another prompt: which of them is right cannot be told.

    Args:
        chosen: int64 [n], the rows to compare.
        keys: int [n], the same number for the same image.
        what: they share, for the reason.
    Returns: bool [n], rows that share their image with rows of the same prompt only.
    """
    codes = rows.prompt_codes[chosen]
    last = last_values(keys, chosen)
    differs = rows.prompt_codes[last] != codes
    other = np.full(keys.max(initial=-1) + 1, -1, np.int64)  # per image, a row whose prompt is not the last row's
    other[keys[differs]] = chosen[differs]
    torn = other[keys] >= 0
    partners = np.where(differs, last, other[keys])
    for row, partner in zip(chosen[torn, None], partners[torn], strict=True):  # each row as an array of one
        number, line = rows.origin(partner)
        rows.set_bad(row, f"{what} as line {line} of {rows.paths[number].name}, which has another prompt")
    return (np.bincount(keys)[keys] > 1) & ~torn


def torn_prompts(rows: Rows) -> np.ndarray:
    """bool [rows]: the row's prompt is in two folds, wherever; rows without a fold do not count."""
    assigned = np.flatnonzero(rows.folds >= 0)
    codes = rows.prompt_codes[assigned]
    differs = last_values(codes, rows.folds[assigned]) != rows.folds[assigned]
    torn = np.zeros(rows.prompt_codes.max() + 1, bool)
    torn[codes[differs]] = True
    return torn[rows.prompt_codes]


def split(rows: Rows, found: Found) -> Iterator[tuple[slice, int, np.ndarray]]:
    """For each data set its rows, the number of images looked at, and the facts about those that decode."""
    for start, end in zip(rows.starts, rows.starts[1:], strict=False):
        looked_at = np.searchsorted(found.looked_at, [start, end])
        first, last = np.searchsorted(found.decoded, [start, end])
        yield slice(int(start), int(end)), int(looked_at[1] - looked_at[0]), found.facts[first:last]

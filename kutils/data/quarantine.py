"""Separates the bad rows of a data set from the good ones, which become the data set `<name>.checked`."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from kutils.data.datasets import read_clean_mark
from kutils.system import embedding_files, paths
from kutils.system.embedding_files import map_embeddings
from kutils.system.tables import folds_hash, hash_prompts, holds, write_table

ADDED_COLUMNS = ("line", "reason")


def set_apart(path: Path, table: pa.Table, bad: np.ndarray, reasons: list[str], with_embeddings: bool) -> str:
    """Write `<name>.quarantine.tsv` and the data set `<name>.checked`; nothing where no row is bad.

    The quarantine has the table's columns, the line and the reason. The data set has the table, the embeddings, and the
    marks of clean rows where there are some; its table comes last, so that it is not there before it is whole. One of
    an earlier check stays as it is if it has the same rows, and is replaced else; the data set itself is not changed.

    Args:
        path: of the TSV.
        table: what it holds.
        bad: int32 [rows], number of the reason; 0: the row is good.
        reasons: texts.
        with_embeddings: those of the data set fit, and are copied.
    Returns: what was done, for a person.
    Raises: OSError on a full disk.
    """
    quarantine, checked = path.with_suffix(".quarantine.tsv"), path.with_suffix(".checked.tsv")
    rows, good = np.flatnonzero(bad), np.flatnonzero(bad == 0)
    if not len(rows):
        former = [found.name for found in (quarantine, checked) if found.is_file()]
        told = f"; {' and '.join(former)} {'is' if len(former) == 1 else 'are'} of an earlier check" if former else ""
        return f"{path}: no bad rows, so that nothing is set apart{told}"
    added = dict(zip(ADDED_COLUMNS, (rows + 2, pa.array(reasons).take(pa.array(bad[rows]))), strict=True))
    write_table(quarantine, columns(table.take(pa.array(rows))) | added)
    if not len(good):
        return f"{path}: all rows are bad, and in {quarantine}"
    kept = table.take(pa.array(good))
    if checked.is_file() and holds(checked, kept.select(["image", "prompt"])):  # its folds may be others by now
        return f"{path}: {len(rows):,} bad rows in {quarantine}; {checked} has the others already, and stays as it is"
    mark = read_clean_mark(
        path.with_suffix(".clean.npz"), len(bad), folds_hash(table["prompt"], table["fold"].to_numpy())
    )
    for suffix in (".tsv", ".npy", ".npy.json", ".clean.npz", ".folds.json"):
        checked.with_suffix(suffix).unlink(missing_ok=True)
    if with_embeddings:
        embedding_files.copy_rows(map_embeddings(path.with_suffix(".npy"), len(bad)), good, checked.with_suffix(".npy"))
        record = paths.read_record(path.with_suffix(".npy.json"))
        if record is not None:
            facts = {"rows": len(good), "prompts_sha256": hash_prompts(kept["prompt"])}
            paths.write_json(checked.with_suffix(".npy.json"), record | facts)
    if mark is not None:
        with paths.atomic_path(checked.with_suffix(".clean.npz")) as temporary:
            kept_hash = folds_hash(kept["prompt"], kept["fold"].to_numpy())
            np.savez(temporary, clean=mark[good], folds_hash=np.array(kept_hash))
    write_table(checked, columns(kept))
    told = f"{path}: {len(rows):,} bad rows in {quarantine}, the other {len(good):,} are the data set {checked.stem}"
    return told if with_embeddings else f"{told}, not embedded yet: python input/gen_prompt_embedding.py {checked}"


def columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))

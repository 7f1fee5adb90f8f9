"""Writes and reads the mark of clean rows, `<name>.clean.npz`: rows without a similar prompt in another fold."""

from pathlib import Path

import numpy as np

from kutils.system import checksums, paths


def clean_mark_path(tsv_path: Path) -> Path:
    """The file with the mark of a data set."""
    return tsv_path.with_suffix(".clean.npz")


def write_clean_mark(tsv_path: Path, clean: np.ndarray, folds_hash: str) -> None:
    """Write the mark beside a table, atomically.

    Args:
        clean: bool [rows].
        folds_hash: hash of the fold assignment that the mark belongs to.
    """
    with paths.atomic_path(clean_mark_path(tsv_path)) as temporary:
        np.savez(temporary, clean=clean, folds_hash=np.array(folds_hash))


def read_clean_mark(tsv_path: Path, num_rows: int, folds_hash: str) -> np.ndarray | None:
    """Read the mark beside a table: bool [num_rows].

    Returns: None if there is no mark, if it is damaged, or if it belongs to another assignment of folds.
    """
    path = clean_mark_path(tsv_path)
    if not path.is_file():
        return None
    try:
        saved = checksums.read_arrays(path, ("clean", "folds_hash"))
    except ValueError as error:
        print(f"warning: {error}; scores of clean rows are left out. kutils folds {tsv_path} --keep writes it again")
        return None
    clean, saved_hash = saved["clean"], str(saved["folds_hash"])
    return clean if saved_hash == folds_hash and clean.shape == (num_rows,) else None

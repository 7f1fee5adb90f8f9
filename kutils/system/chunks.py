"""Saves finished chunks of long work, so that a killed run and several ranks continue where others stopped."""

import glob
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from kutils.system import checksums, paths


class ChunkFiles:
    """One .npz file per finished chunk, in a hidden folder beside the result.

    A file is renamed into place when it is complete, so the folder's files tell every machine which chunks are done.
    (In one shared memory map, two machines on a network disk would overwrite each other's pages.) The folder's name
    holds a hash of the work, so other work never uses these chunks.

    Args:
        path: the result that the chunks are for.
        work: everything that the chunks depend on, as a JSON object.
    """

    def __init__(self, path: Path, work: dict, count: int):
        digest = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        self.path, self.count = path, count
        self.folder = path.with_name(f".{path.name}.{digest[:16]}.partial")

    def open(self) -> None:
        """Make the folder, or continue with an existing one.

        Removes chunks of other work for this result, and damaged chunks, which are then made again.
        """
        for other in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.partial"):
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("[0-9]*.npz"):
            try:
                checksums.check_zip(path)
            except checksums.Damaged as error:
                print(f"{error}; it is made again", flush=True)
                path.unlink()

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not finished."""
        finished = {path.name for path in self.folder.iterdir()}
        return [number for number in range(self.count) if f"{number:06d}.npz" not in finished]

    def save(self, number: int, **arrays: np.ndarray | int) -> None:
        """Write a finished chunk; it is on the disk (fsync) when this returns."""
        with paths.atomic_path(self.folder / f"{number:06d}.npz") as temporary:
            np.savez(temporary, **arrays)

    def load(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk; ValueError if it is damaged."""
        return checksums.read_arrays(self.folder / f"{number:06d}.npz")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

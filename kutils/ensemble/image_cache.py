"""Decodes the images of a folder once per input size, however many models read them."""

import itertools
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kutils.data import datasets, transforms
from kutils.system import loaders

MOST_OF_DISK = 0.5  # share of the free space that a cache may take


def find_images(folder: Path | str, *, same_name_is_error: bool = True) -> list[Path]:
    """Files in a folder (not below) with an extension that Pillow reads, sorted by name without extension.

    Args:
        same_name_is_error: raise an error for two files that differ only in their extension; else take the first one
            with a warning.
    Raises: ValueError if the folder is missing, or for two files of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of images at {folder}")
    known = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    images.sort(key=lambda path: (path.stem, path.name))
    for first, second in itertools.pairwise(images):
        if first.stem == second.stem:
            same = f"{first} and {second.name} have the same id {first.stem!r}"
            if same_name_is_error:
                raise ValueError(f"{same}; rename or remove one of them")
            warnings.warn(f"{same}; the first is taken", stacklevel=2)
    return [next(files) for _, files in itertools.groupby(images, key=lambda path: path.stem)]


class SquareImages(torch.utils.data.Dataset):
    """position -> one image resized to the square; an unreadable image is black and listed in `bad`."""

    def __init__(self, images: Sequence[Path], input_size: int):
        self.images, self.input_size = images, input_size

    def __getitem__(self, position: int) -> dict:
        """Keys: image uint8 [3, S, S], row (the position), bad (list of position and reason)."""
        try:
            image = transforms.resize_square(transforms.decode_rgb(self.images[position]), self.input_size)
            return {"image": image, "row": position, "bad": []}
        except transforms.ImageError as error:
            black = torch.zeros(3, self.input_size, self.input_size, dtype=torch.uint8)
            return {"image": black, "row": position, "bad": [(position, str(error))]}


class PixelCache:
    """All images at one input size. Decoded images are cached in an unnamed temporary file, up to a budget.

    The system keeps the file in memory while there is room (page cache), and frees it when the process ends. Images
    beyond the budget are decoded again on each use.

    Args:
        input_size: side of the square, px.
        budget_bytes: most bytes of the file; 0: no cache.
        folder: for the file (default: the system's folder of temporary files); half of its free space is left.
    """

    def __init__(
        self,
        images: Sequence[Path],
        input_size: int,
        *,
        budget_bytes: float = 0,
        folder: Path | str | None = None,
        num_workers: int = 0,
    ):
        self.images, self.input_size, self.num_workers = images, input_size, num_workers
        self.bad: dict[int, str] = {}  # position -> reason of the unreadable images met so far
        self.stored = np.zeros(len(images), bool)
        free = MOST_OF_DISK * shutil.disk_usage(folder or tempfile.gettempdir()).free if budget_bytes else 0
        self.capacity = min(len(images), int(min(budget_bytes, free) // (3 * input_size**2)))
        try:
            self.pixels = self.open_file(folder) if self.capacity else None
        except OSError as error:
            print(f"decoded images are not kept ({error.strerror}): each model decodes them again", flush=True)
            self.capacity = 0

    def open_file(self, folder: Path | str | None) -> np.ndarray:
        """uint8 [capacity, 3, S, S] in a file without a name; OSError if the disk does not hold it."""
        shape = (self.capacity, 3, self.input_size, self.input_size)
        with tempfile.TemporaryFile(dir=folder) as file:  # the memory map keeps it after the handle is closed
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))  # else a full disk would cause a SIGBUS later
            return np.memmap(file, np.uint8, "r+", shape=shape)

    @property
    def num_bytes(self) -> int:
        return self.capacity * 3 * self.input_size**2

    def batches(self, positions: Sequence[int], batch_size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The images at some positions, cached ones first.

        Yields: positions int [B], pixels uint8 [B, 3, S, S]; black for an unreadable image, which is added to `bad`.
        """
        positions = np.asarray(positions, np.int64)
        known, unknown = positions[self.stored[positions]], positions[~self.stored[positions]]
        num_workers = min(self.num_workers, os.cpu_count() or 1, len(unknown) // batch_size)
        try:
            loaders.check_shared_memory(num_workers, batch_size * 3 * self.input_size**2, 2)
        except ValueError as error:
            print(f"warning: images are decoded in this process: {error}", flush=True)
            num_workers = 0
        loader = DataLoader(
            SquareImages(self.images, self.input_size),
            sampler=unknown.tolist(),
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=loaders.WORKER_SECONDS if num_workers else 0,
            collate_fn=datasets.collate,
            worker_init_fn=loaders.start_worker,
            generator=torch.Generator(),  # else the loader would draw its seed from the global generator
        )
        decoded = loaders.batches(loader)  # its processes are forked here, before threads of the models run
        for start in range(0, len(known), batch_size):
            chosen = known[start : start + batch_size]
            yield chosen, torch.from_numpy(self.pixels[chosen])
        for batch in decoded:
            chosen, bad = batch["row"].numpy(), dict(batch["bad"])
            self.bad = {position: reason for position, reason in self.bad.items() if position not in chosen} | bad
            cached = (chosen < self.capacity) & ~np.isin(chosen, list(bad))  # a mount may fail once
            if cached.any():
                self.pixels[chosen[cached]] = batch["image"].numpy()[cached]
                self.stored[chosen[cached]] = True
            yield chosen, batch["image"]

"""Joins the data sets of a recipe (images, prompts, folds, mapped embeddings), and samples each epoch.

A data set is `input/<name>.tsv`, `input/<name>.npy` (float32 [rows, 384], unit rows, same order) and the images that
the TSV names, relative to `input/`, or `input/<name>.shards/`, to which they were packed.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kutils.data import transforms
from kutils.data.index import DatasetIndex, open_index
from kutils.data.shards import ROWS_PER_SHARD, Shards, open_shards
from kutils.system import paths
from kutils.system.embedding_files import EMBEDDING_DIM, map_embeddings

BLOCK = 65_536  # rows of embeddings that are copied at a time
WINDOW_BLOCKS = 32  # shards that an epoch mixes: 65,536 rows, 3 GB of images in the system's memory at 448 px


@dataclass(frozen=True)
class PromptImages:
    """Several data sets as one list of rows; row numbers run over all of them in the order given.

    Everything that grows with the rows is memory-mapped, and shared by all ranks and workers of a machine.
    """

    names: tuple[str, ...]
    root: Path  # image paths are relative to it
    index: DatasetIndex
    clean: np.ndarray | None  # bool [n]: no similar prompt in another fold; None where a set lacks that mark
    embeddings: tuple[np.ndarray, ...]  # one float32 [rows, 384] memory map per data set
    starts: np.ndarray  # int64 [sets + 1]: first row of each set, and the number of rows
    shards: tuple[Shards | None, ...]  # of each set, where its images are packed

    @property
    def images(self) -> pa.ChunkedArray:  # string [n]
        return self.index.images

    @property
    def prompts(self) -> pa.ChunkedArray:  # string [n]
        return self.index.prompts

    @property
    def prompt_codes(self) -> np.ndarray:  # int32 [n], the same number for the same prompt
        return self.index.prompt_codes

    @property
    def folds(self) -> np.ndarray:  # int8 [n]
        return self.index.folds

    @property
    def folds_hashes(self) -> dict[str, str]:  # of every data set's assignment of prompts to folds
        return self.index.folds_hashes

    def __reduce__(self):  # a worker that is not forked maps the files itself
        return load_datasets, (self.names, False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image_path(self, row: int) -> Path:
        return self.root / self.images[row].as_py()

    def read_image(self, row: int) -> bytes:
        """Content of a row's image file, or what it was packed to; OSError if it cannot be read."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        shards = self.shards[number]
        return self.image_path(row).read_bytes() if shards is None else shards.read(row - int(self.starts[number]))

    def decode_image(self, row: int) -> Tensor:
        """uint8 [3, H, W]; ImageError (naming the image file, packed or not) if it cannot be read."""
        return transforms.decode_rgb(self.image_path(row), partial(self.read_image, row))

    @property
    def block_rows(self) -> int:
        """Rows that lie together on the disk; 0 where images are files, and any order costs the same."""
        return ROWS_PER_SHARD if any(self.shards) else 0

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which data set each row is of (its number in `names`), and which row of that set it is; both int64."""
        number = np.searchsorted(self.starts, rows, side="right") - 1
        return number, rows - self.starts[number]

    def rows_of(self, names: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The inverse of `origin`: rows int64 [n], from the name of each one's data set and its row there."""
        distinct, codes = np.unique(names, return_inverse=True)
        return self.starts[[self.names.index(name) for name in distinct]][codes] + local

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Prompt embeddings of the given rows: float32 [len(rows), 384], a copy."""
        result = np.empty((len(rows), EMBEDDING_DIM), np.float32)
        number, local = self.origin(np.asarray(rows))
        for index in np.unique(number):
            result[number == index] = self.embeddings[index][local[number == index]]
        return result

    def training_mean(self, fold: int) -> np.ndarray:
        """Mean prompt embedding of all rows outside of the fold, scaled to length 1: float32 [384]."""
        total = np.delete(self.index.fold_sums, fold, axis=0).sum(axis=0)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def mean_prompt_baseline(self, fold: int) -> float | None:
        """Mean cosine of the fold's embeddings with the mean training embedding: the score without looking.

        None where all rows, or none, are of this fold.
        """
        if self.index.fold_counts[fold] in (0, self.index.fold_counts.sum()):
            return None
        return float(self.index.fold_sums[fold] @ self.training_mean(fold) / self.index.fold_counts[fold])

    def hash_targets(self, rows: np.ndarray) -> str:
        """Hex SHA-256 of the rows' prompt embeddings, in order: what predictions were compared with."""
        digest = hashlib.sha256()
        for start in range(0, len(rows), BLOCK):
            digest.update(self.targets(rows[start : start + BLOCK]))
        return digest.hexdigest()

    def training_rows(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.folds != fold).astype(np.int32)

    def validation_rows(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.folds == fold).astype(np.int32)


def load_datasets(names: Sequence[str], need_folds: bool = True) -> PromptImages:
    """Open and check the named data sets of `input/`; images are not looked at.

    Args:
        names: data sets, in the order that row numbers follow.
        need_folds: refuse rows without a fold (-1).
    Raises: ValueError for a missing file or column, an empty prompt, an absolute image path or one with
        `..`, a fold outside 0-9, a prompt in two folds, embeddings of another number of rows or dimension, with NaN or
        not of unit length; shards that are not finished or of other images.
    """
    root = paths.input_dir()
    if missing := paths.missing_datasets(names):
        raise ValueError(missing)
    index = open_index(root, names)
    pa.default_memory_pool().release_unused()  # 2 GB in the process that has built the index of five million rows
    starts = np.cumsum([0, *index.num_rows])
    if need_folds:
        check_assigned_folds(root, names, index, starts)
    marks = [
        read_clean_mark(root / f"{name}.clean.npz", num_rows, index.folds_hashes[name])
        for name, num_rows in zip(names, index.num_rows, strict=True)
    ]
    return PromptImages(
        names=tuple(names),
        root=root,
        index=index,
        clean=None if any(mark is None for mark in marks) else np.concatenate(marks),
        embeddings=tuple(
            map_embeddings(root / f"{name}.npy", num_rows) for name, num_rows in zip(names, index.num_rows, strict=True)
        ),
        starts=starts,
        shards=tuple(
            open_shards(root / f"{name}.tsv", index.images.slice(start, end - start))
            for name, start, end in zip(names, starts, starts[1:], strict=False)
        ),
    )


def check_assigned_folds(root: Path, names: Sequence[str], index: DatasetIndex, starts: np.ndarray) -> None:
    """Raise ValueError for a row without a fold, or for a prompt in two, as when data sets are folded one by one."""
    without = np.flatnonzero(index.folds < 0)
    if len(without):
        number = np.searchsorted(starts, without[0], side="right") - 1
        path = root / f"{names[number]}.tsv"
        raise ValueError(
            f"{path}, line {without[0] - starts[number] + 2}: fold is -1; assign folds first: python -m "
            f"kutils folds {path}"
        )
    last = last_values(index.prompt_codes, index.folds)
    torn = np.flatnonzero(last != index.folds)
    if len(torn):
        prompt, files = index.prompts[torn[0]].as_py(), " ".join(f"input/{name}.tsv" for name in names)
        folds = sorted({int(index.folds[torn[0]]), int(last[torn[0]])})
        raise ValueError(
            f"{len(np.unique(index.prompt_codes[torn])):,} prompts are in two folds, the first is {prompt!r} (folds "
            f"{folds[0]} and {folds[1]}): validation would know them from training. Assign folds to all data sets in "
            f"one call: kutils folds {files}"
        )


def last_values(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of n rows the value of its group's last row, [n]: where that differs, the group has several values."""
    last = np.empty(groups.max(initial=-1) + 1, values.dtype)
    last[groups] = values
    return last[groups]


def read_clean_mark(path: Path, num_rows: int, expected_hash: str) -> np.ndarray | None:
    """bool [num_rows] written with the folds, or None where there is none or it belongs to another assignment."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:
            clean, saved_hash = saved["clean"], str(saved["folds_hash"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged: it counts as none
        return None
    return clean if saved_hash == expected_hash and clean.shape == (num_rows,) else None


class EpochSampler:
    """One image per prompt per epoch, drawn anew from (seed, epoch): the same on every rank and for any number of them.

    A prompt counts once over all data sets. The last, incomplete global batch of an epoch is left out. It is the batch
    sampler of a loader that lasts for all epochs: `set_epoch` says what the loader's next pass deals.

    Args:
        data: the data sets.
        rows: int, the training rows.
        seed: of the recipe.
        global_batch_size, local_batch_size, rank, world_size: how the epoch's rows are dealt; an optimiser update takes
            global_batch_size / (world_size * local_batch_size) forward passes on every rank.
        block_rows: rows that lie together on the disk. The rows of WINDOW_BLOCKS random blocks are then shuffled among
            each other, and such windows follow each other, so that the disk is read nearly in sequence. 0: all rows
            are shuffled, as they are where one window holds them all.
    """

    def __init__(self, data, rows, seed, *, global_batch_size, local_batch_size, rank=0, world_size=1, block_rows=0):
        self.seed, self.rank, self.world_size, self.block_rows = seed, rank, world_size, block_rows
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.set_epoch(0)
        codes = data.prompt_codes[rows]
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        self.grouped_rows = np.asarray(rows, np.int32)[order]  # images of one prompt side by side
        del order  # int64: every rank holds what is here, and 4.5 million rows of it are 36 MB
        starts = np.flatnonzero(np.diff(codes, prepend=np.int32(-1))).astype(np.int32)
        self.group_starts = np.append(starts, np.int32(len(codes)))  # [number of prompts + 1]
        self.num_prompts = len(starts)
        self.steps_per_epoch = self.num_prompts // global_batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_prompts} training prompts do not fill one global batch of {global_batch_size}; "
                "set a smaller global_batch_size"
            )

    @property
    def group_sizes(self) -> np.ndarray:  # int32 [number of prompts]: images of each
        return np.diff(self.group_starts)

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """int32 [number of prompts]: the epoch's rows in the order in which they are trained on."""
        random = np.random.default_rng([self.seed, epoch])
        chosen = np.empty(self.num_prompts, np.int32)
        for start in range(0, self.num_prompts, BLOCK):  # the numbers of one call for all, without its 24 MB
            bounds = self.group_starts[start : start + BLOCK + 1]
            chosen[start : start + BLOCK] = self.grouped_rows[bounds[:-1] + random.integers(0, np.diff(bounds))]
        random.shuffle(chosen)
        if self.block_rows:
            blocks = chosen // self.block_rows
            windows = random.permutation(int(blocks.max()) + 1) // WINDOW_BLOCKS
            chosen = chosen[np.argsort(windows[blocks], kind="stable")]
        return chosen

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Let the next pass deal an epoch's batches, from the given update of it on."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches(self.epoch, self.first_step)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Local batches of (epoch, row) for this rank, from the given update of the epoch on."""
        rows = self.epoch_rows(epoch)
        stride = self.world_size * self.local_batch_size
        for step in range(first_step, self.steps_per_epoch):
            for start in range(0, self.global_batch_size, stride):
                begin = step * self.global_batch_size + start + self.rank * self.local_batch_size
                yield [(epoch, int(row)) for row in rows[begin : begin + self.local_batch_size]]


class TrainingImages(torch.utils.data.Dataset):
    """(epoch, row) -> one training example; an image that cannot be read is replaced and named, not fatal.

    The replacement is another image of the same prompt or, where there is none, of another prompt; it depends on seed,
    epoch and row alone.
    """

    def __init__(self, data: PromptImages, rows: np.ndarray, recipe):
        self.data, self.rows, self.recipe = data, rows, recipe

    def __getitem__(self, index: tuple[int, int]) -> dict:
        """Keys: image uint8 [3, S, S], jitter float32 [8] (0 without augmentation), target float32 [384], row, bad."""
        epoch, row = index
        bad = []
        for candidate in self.candidates(epoch, row):
            try:
                image = self.data.decode_image(candidate)
                break
            except transforms.ImageError as error:
                bad.append((candidate, str(error)))
        else:
            raise ValueError(f"none of {len(bad)} images could be read; the first: {bad[0][1]}")
        key = (self.recipe.seed, epoch, candidate)
        if self.recipe.augment:
            image, jitter = transforms.random_crop_and_jitter(image, self.recipe.input_size, key)
        else:
            image, jitter = transforms.resize_square(image, self.recipe.input_size), torch.zeros(8)
        target = torch.from_numpy(self.data.targets(np.array([candidate]))[0])
        return {"image": image, "jitter": jitter, "target": target, "row": candidate, "bad": bad}

    def candidates(self, epoch: int, row: int) -> Iterator[int]:
        """The row itself, the other images of its prompt, then 20 rows at random."""
        yield row
        codes = self.data.prompt_codes
        same = self.rows[codes[self.rows] == codes[row]]  # a scan, only ever needed for a broken image
        yield from (int(other) for other in same if other != row)
        yield from (int(other) for other in np.random.default_rng([self.recipe.seed, epoch, row]).choice(self.rows, 20))


class ValidationImages(torch.utils.data.Dataset):
    """position -> one row's image, resized to the square, and its target; a broken image raises ImageError."""

    def __init__(self, data: PromptImages, rows: np.ndarray, input_size: int):
        self.data, self.rows, self.input_size = data, rows, input_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        row = int(self.rows[position])
        image = transforms.resize_square(self.data.decode_image(row), self.input_size)
        return {"image": image, "target": torch.from_numpy(self.data.targets(np.array([row]))[0]), "row": row}


def collate(examples: list[dict]) -> dict:
    """Stack tensors, make rows an int64 tensor, join the lists of bad images."""
    batch: dict = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "row" else [item for value in values for item in value]
    return batch

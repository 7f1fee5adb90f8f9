"""Joins the data sets of a recipe (images, prompts, folds, mapped embeddings), and makes their examples for training.

A data set is `input/<name>.tsv`, `input/<name>.npy` (float32 [rows, 384], unit rows, same order) and the images that
the TSV names, relative to `input/`. `input/<name>.shards/` holds packed copies of the images, if there are any.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from kutils.data import augmentation, transforms
from kutils.data.index import DatasetIndex, open_index
from kutils.data.shards import ROWS_PER_SHARD, Shards, open_shards
from kutils.prompts.clean_marks import read_clean_mark
from kutils.system import paths
from kutils.system.embedding_files import EMBEDDING_DIM, map_embeddings
from kutils.system.output import quoted

COPIED_ROWS = 65_536  # embeddings in memory at a time while they are hashed: 100 MB
SUBSTITUTES = 20  # images of other prompts to try in place of an unreadable one


@dataclass(frozen=True)
class PromptImages:
    """Several data sets as one list of rows, numbered over all of them in the order given.

    Everything that grows with the number of rows is memory-mapped, and shared by all ranks and workers of a machine.
    """

    names: tuple[str, ...]
    root: Path  # image paths are relative to it
    index: DatasetIndex
    clean: np.ndarray | None  # bool [n]: no similar prompt in another fold; None if a set has no such mark
    embeddings: tuple[np.ndarray, ...]  # one float32 [rows, 384] memory map per data set
    starts: np.ndarray  # int64 [sets + 1]: first row of each set, and the number of rows
    shards: tuple[Shards | None, ...]  # of each set; None if its images are files

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

    @property
    def content_hashes(self) -> dict[str, dict[str, str]]:
        """For every data set, in order: hashes of its folds, of its rows in order, and of its embeddings."""
        index = self.index
        kinds = {"folds": index.folds_hashes, "rows": index.rows_hashes, "embeddings": index.targets_hashes}
        return {name: {kind: hashes[name] for kind, hashes in kinds.items()} for name in self.names}

    def __reduce__(self):  # a worker that is not forked maps the files itself
        return load_datasets, (self.names, False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image_path(self, row: int) -> Path:
        """The path of a row's image file, which may be gone if the images are packed."""
        return self.root / self.images[row].as_py()

    def packed_image(self, row: int) -> Callable[[], bytes] | None:
        """A function that reads a row's packed image, and raises OSError if it can't; None if images are files."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        shards = self.shards[number]
        return None if shards is None else partial(shards.read, row - int(self.starts[number]))

    def read_image(self, row: int) -> bytes:
        """The content of a row's image, packed or a file; OSError if it cannot be read."""
        read = self.packed_image(row) or self.image_path(row).read_bytes
        return read()

    def decode_image(self, row: int) -> Tensor:
        """A row's image, uint8 [3, H, W]; ImageError, which names the image file, if it cannot be read."""
        return transforms.decode_rgb(self.image_path(row), self.packed_image(row))

    def picture(self, row: int) -> Path | Image.Image:
        """A row's image for a figure: the path of its file, or the decoded image if it is packed and has no file."""
        path = self.image_path(row)
        return path if path.is_file() or not self.packed_image(row) else to_pil_image(self.decode_image(row))

    @property
    def block_rows(self) -> int:
        """Number of rows per shard; 0 if images are files, which can be read in any order."""
        return ROWS_PER_SHARD if any(self.shards) else 0

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The data set of each row (its number in `names`) and the row within that set, both int64 [n]."""
        number = np.searchsorted(self.starts, rows, side="right") - 1
        return number, rows - self.starts[number]

    def rows_of(self, names: np.ndarray, local: np.ndarray) -> np.ndarray:
        """The inverse of `origin`: rows, int64 [n], from the names of their data sets and the rows within these."""
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
        """The score of a model that ignores images: mean cosine of the fold's embeddings with the training mean.

        None if all rows, or none, are of this fold.
        """
        if self.index.fold_counts[fold] in (0, self.index.fold_counts.sum()):
            return None
        return float(self.index.fold_sums[fold] @ self.training_mean(fold) / self.index.fold_counts[fold])

    def hash_targets(self, rows: np.ndarray) -> str:
        """Hex SHA-256 of the rows' prompt embeddings, in order: identifies the targets of predictions."""
        digest = hashlib.sha256()
        for start in range(0, len(rows), COPIED_ROWS):
            digest.update(self.targets(rows[start : start + COPIED_ROWS]))
        return digest.hexdigest()

    def training_rows(self, fold: int) -> np.ndarray:
        """int32, ascending: all rows outside of the fold."""
        return np.flatnonzero(self.folds != fold).astype(np.int32)

    def validation_rows(self, fold: int) -> np.ndarray:
        """int32, ascending: the rows of the fold."""
        return np.flatnonzero(self.folds == fold).astype(np.int32)


def load_datasets(names: Sequence[str], need_folds: bool = True) -> PromptImages:
    """Open and check the named data sets of `input/`; images are not read.

    Args:
        names: data sets, in the order that row numbers follow.
    Raises: ValueError for a missing file or column, an empty prompt, an absolute image path or one with `..`, a fold
        outside 0-9, a prompt in two folds, embeddings of other prompts, of another shape, with NaN or not of unit
        length; shards that are not finished or of other images.
    """
    root = paths.input_dir()
    if missing := paths.missing_datasets(names):
        raise ValueError(missing)
    index = open_index(root, names)
    pa.default_memory_pool().release_unused()  # 2 GB after building the index of five million rows
    starts = np.cumsum([0, *index.num_rows])
    if need_folds:
        check_assigned_folds(root, names, index, starts)
    tsv_paths = [root / f"{name}.tsv" for name in names]
    clean, embeddings, shards = [], [], []
    for name, path, start, num_rows in zip(names, tsv_paths, starts, index.num_rows, strict=False):
        clean.append(read_clean_mark(path, num_rows, index.folds_hashes[name]))
        embeddings.append(map_embeddings(path.with_suffix(".npy"), num_rows))
        shards.append(open_shards(path, index.images.slice(start, num_rows)))
    return PromptImages(
        names=tuple(names),
        root=root,
        index=index,
        clean=None if any(mark is None for mark in clean) else np.concatenate(clean),
        embeddings=tuple(embeddings),
        starts=starts,
        shards=tuple(shards),
    )


def check_assigned_folds(root: Path, names: Sequence[str], index: DatasetIndex, starts: np.ndarray) -> None:
    """Raise ValueError for a row without a fold, or a prompt in two folds, as if folds were assigned to each set
    alone."""
    without = np.flatnonzero(index.folds < 0)
    if len(without):
        number = np.searchsorted(starts, without[0], side="right") - 1
        path = root / f"{names[number]}.tsv"
        raise ValueError(
            f"{path}, line {without[0] - starts[number] + 2}: fold is -1; assign folds first: kutils folds {path}"
        )
    last = last_values(index.prompt_codes, index.folds)
    torn = np.flatnonzero(last != index.folds)
    if len(torn):
        prompt, files = index.prompts[torn[0]].as_py(), " ".join(f"input/{name}.tsv" for name in names)
        folds = sorted({int(index.folds[torn[0]]), int(last[torn[0]])})
        raise ValueError(
            f"{len(np.unique(index.prompt_codes[torn])):,} prompts are in two folds, the first is {quoted(prompt)} "
            f"(folds {folds[0]} and {folds[1]}): validation would know them from training. Assign folds to "
            f"all data sets in one call: kutils folds {files}"
        )


def last_values(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of n rows the value of its group's last row, [n]: if a row's value differs, its group has several.

    Args:
        groups: int [n], each row's group.
        values: [n], each row's value.
    """
    last = np.empty(groups.max(initial=-1) + 1, values.dtype)
    last[groups] = values
    return last[groups]


class TrainingImages(torch.utils.data.Dataset):
    """(epoch, row) -> one training example; an unreadable image is replaced by another one and reported.

    The substitute is another image of the same prompt or, if there is none, of another prompt. It depends only on seed,
    epoch and row.

    Args:
        rows: int32, the training rows.
        recipe: its `seed`, `augment` and `input_size` are used.
    """

    def __init__(self, data: PromptImages, rows: np.ndarray, recipe):
        self.data, self.rows, self.recipe = data, rows, recipe

    def __getitem__(self, index: tuple[int, int]) -> dict:
        """One example as a dictionary.

        Returns: image uint8 [3, S, S]; jitter float32 [8] (0 unless augmented as published); target float32 [384];
            row of the image that was read; bad, a list of (row, message) of images that could not be read.
        Raises: ValueError if none of the substitutes can be read either.
        """
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
        image, jitter = augmentation.augment(image, self.recipe, key)
        target = torch.from_numpy(self.data.targets(np.array([candidate]))[0])
        return {"image": image, "jitter": jitter, "target": target, "row": candidate, "bad": bad}

    def candidates(self, epoch: int, row: int) -> Iterator[int]:
        """The row itself, the other images of its prompt, then SUBSTITUTES rows at random."""
        yield row
        codes = self.data.prompt_codes
        same = self.rows[codes[self.rows] == codes[row]]  # a scan of all rows, only needed for a broken image
        yield from (int(other) for other in same if other != row)
        random = np.random.default_rng([self.recipe.seed, epoch, row])
        yield from (int(other) for other in random.choice(self.rows, SUBSTITUTES))


class ValidationImages(torch.utils.data.Dataset):
    """position -> one row's image, resized to a square of `input_size` px, and its target, for each of the given rows.

    A broken image raises ImageError.
    """

    def __init__(self, data: PromptImages, rows: np.ndarray, input_size: int):
        self.data, self.rows, self.input_size = data, rows, input_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        """One example: image uint8 [3, S, S], target float32 [384], row."""
        row = int(self.rows[position])
        image = transforms.resize_square(self.data.decode_image(row), self.input_size)
        return {"image": image, "target": torch.from_numpy(self.data.targets(np.array([row]))[0]), "row": row}


def collate(examples: list[dict]) -> dict:
    """Make a batch of examples: tensors are stacked, rows become an int64 tensor, lists of bad images are joined."""
    batch: dict = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if isinstance(values[0], Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.tensor(values) if key == "row" else [item for value in values for item in value]
    return batch

"""Data sets of a recipe, concatenated: rows of image, prompt and fold, mapped embeddings, and what an epoch draws.

A data set is `input/<name>.tsv`, `input/<name>.npy` (float32 [rows, 384], unit rows, same order) and the images that
the TSV names, relative to `input/`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from kutils import paths, transforms
from kutils.config import EMBEDDING_DIM
from kutils.tables import folds_hash, read_table

UNIT_TOLERANCE = 1e-3  # of an embedding's length; float16 storage would still pass


class DataError(ValueError):
    """A data set that cannot be trained on; the message names file and row and says what to do."""


@dataclass(frozen=True)
class PromptImages:
    """Several data sets as one list of rows; row numbers run over all of them in the order given."""

    names: tuple[str, ...]
    root: Path  # image paths are relative to it
    images: pa.ChunkedArray  # string [n]
    prompts: pa.ChunkedArray  # string [n]
    folds: np.ndarray  # int8 [n]
    clean: (
        np.ndarray | None
    )  # bool [n]: no similar prompt in another fold; None where a set was folded without that mark
    embeddings: tuple[np.ndarray, ...]  # one float32 [rows, 384] memory map per data set
    starts: np.ndarray  # int64 [sets + 1]: first row of each set, and the number of rows
    folds_hashes: dict[str, str] = field(default_factory=dict)  # of every data set's assignment of prompts to folds

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image_path(self, row: int) -> Path:
        return self.root / self.images[row].as_py()

    def origin(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which data set each row is of (its number in `names`), and which row of that set it is; both int64."""
        number = np.searchsorted(self.starts, rows, side="right") - 1
        return number, rows - self.starts[number]

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Prompt embeddings of the given rows: float32 [len(rows), 384], a copy."""
        result = np.empty((len(rows), EMBEDDING_DIM), np.float32)
        number, local = self.origin(np.asarray(rows))
        for index in np.unique(number):
            result[number == index] = self.embeddings[index][local[number == index]]
        return result

    def mean_embedding(self, rows: np.ndarray) -> np.ndarray:
        """Mean of the given rows' prompt embeddings, scaled to length 1: float32 [384]."""
        blocks = np.array_split(rows, 1 + len(rows) // 65536)
        total = sum(self.targets(block).sum(axis=0, dtype=np.float64) for block in blocks)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def training_rows(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.folds != fold)

    def validation_rows(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.folds == fold)


def hash_targets(targets: np.ndarray) -> str:
    """Hex SHA-256 of prompt embeddings [n, 384] in row order: what predictions were compared with."""
    return hashlib.sha256(np.ascontiguousarray(targets)).hexdigest()


def load_datasets(names: Sequence[str], need_folds: bool = True) -> PromptImages:
    """Open and check the named data sets of `input/`; images are not looked at.

    Args:
        names: data sets, in the order that row numbers follow.
        need_folds: refuse rows without a fold (-1).
    Raises: DataError or TableError for a missing file or column, an empty prompt, an absolute image path or one with
        `..`, a fold outside 0-9, a prompt in two folds, embeddings of another number of rows or dimension, with NaN or
        not of unit length.
    """
    root = paths.input_dir()
    if missing := paths.missing_datasets(names):
        raise DataError(missing)
    tables, embeddings, hashes, clean = [], [], {}, []
    for name in names:
        table = read_table(root / f"{name}.tsv", ["image", "prompt", "fold"])
        check_rows(root / f"{name}.tsv", table, need_folds)
        tables.append(table.select(["image", "prompt", "fold"]))
        embeddings.append(open_embeddings(root / f"{name}.npy", table.num_rows))
        hashes[name] = folds_hash(table["prompt"], table["fold"].to_numpy())
        clean.append(read_clean_mark(root / f"{name}.clean.npz", table.num_rows, hashes[name]))
    whole = pa.concat_tables(tables).combine_chunks()
    if need_folds:
        check_one_fold_per_prompt(whole, names)
    return PromptImages(
        names=tuple(names),
        root=root,
        images=whole["image"],
        prompts=whole["prompt"],
        folds=whole["fold"].to_numpy(),
        clean=None if any(mark is None for mark in clean) else np.concatenate(clean),
        embeddings=tuple(embeddings),
        starts=np.cumsum([0] + [table.num_rows for table in tables]),
        folds_hashes=hashes,
    )


def check_rows(path: Path, table: pa.Table, need_folds: bool) -> None:
    """Raise DataError for the first row that training could not use."""
    if table.num_rows == 0:
        raise DataError(f"{path} has a header and no rows")
    unsafe = r"^[/~]|^[A-Za-z]:|\\|(^|/)\.\.(/|$)|^\s*$"
    for column, bad, advice in (
        ("prompt", pc.equal(pc.utf8_trim_whitespace(table["prompt"]), ""), "remove the row or give it a prompt"),
        ("image", pc.match_substring_regex(table["image"], unsafe), "image paths are relative to input/, without .."),
        ("fold", pc.less(table["fold"], 0), f"assign folds first: python -m kutils.grouping folds {path}"),
    ):
        row = pc.index(bad, True).as_py()
        if row >= 0 and (column != "fold" or need_folds):
            raise DataError(f"{path}, line {row + 2}: {column} is {table[column][row].as_py()!r}; {advice}")


def check_one_fold_per_prompt(table: pa.Table, names: Sequence[str]) -> None:
    """Raise DataError if a prompt is in two folds, as happens when data sets are folded one by one."""
    folds = table.group_by("prompt").aggregate([("fold", "min"), ("fold", "max")])
    torn = folds.filter(pc.not_equal(folds["fold_min"], folds["fold_max"]))
    if torn.num_rows:
        files = " ".join(f"input/{name}.tsv" for name in names)
        raise DataError(
            f"{torn.num_rows:,} prompts are in two folds, the first is {torn['prompt'][0].as_py()!r} (folds "
            f"{torn['fold_min'][0]} and {torn['fold_max'][0]}): validation would know them from training. Assign folds "
            f"to all data sets in one call: python -m kutils.grouping folds {files}"
        )


def open_embeddings(path: Path, num_rows: int) -> np.ndarray:
    """Memory-map float32 [num_rows, 384] unit rows; DataError (naming file and row) for anything else."""
    redo = f"make it again: python input/gen_prompt_embedding.py {path.with_suffix('.tsv')} --overwrite"
    try:
        embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {redo}") from error
    if embeddings.shape != (num_rows, EMBEDDING_DIM) or embeddings.dtype != np.float32:
        found = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise DataError(f"{path} is {found}, its TSV needs float32 [{num_rows}, {EMBEDDING_DIM}]; {redo}")
    for start in range(0, num_rows, 65536):
        block = np.asarray(embeddings[start : start + 65536])
        lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
        bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN compares false
        if len(bad):
            raise DataError(
                f"{path}, row {start + bad[0]} (line {start + bad[0] + 2} of the TSV) has length {lengths[bad[0]]}, "
                f"not 1; {redo}"
            )
    return embeddings


def read_clean_mark(path: Path, num_rows: int, expected_hash: str) -> np.ndarray | None:
    """bool [num_rows] written with the folds, or None where there is none or it belongs to another assignment."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as saved:
        clean, saved_hash = saved["clean"], str(saved["folds_hash"])
    return clean if saved_hash == expected_hash and clean.shape == (num_rows,) else None


class EpochSampler:
    """One image per prompt per epoch, drawn anew from (seed, epoch): the same on every rank and for any number of them.

    A prompt counts once over all data sets. The last, incomplete global batch of an epoch is left out.

    Args:
        data: the data sets.
        rows: int64, the training rows.
        seed: of the recipe.
        global_batch_size, local_batch_size, rank, world_size: how the epoch's rows are dealt; an optimiser update takes
            global_batch_size / (world_size * local_batch_size) forward passes on every rank.
    """

    def __init__(self, data, rows, seed, *, global_batch_size, local_batch_size, rank=0, world_size=1):
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        codes = pc.dictionary_encode(data.prompts.combine_chunks().take(pa.array(rows))).indices.to_numpy()
        order = np.argsort(codes, kind="stable")
        self.grouped_rows = np.asarray(rows)[order]  # images of one prompt side by side
        self.group_starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        self.group_sizes = np.diff(self.group_starts, append=len(codes))
        self.steps_per_epoch = len(self.group_sizes) // global_batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(self.group_sizes)} training prompts do not fill one global batch of {global_batch_size}; "
                "set a smaller global_batch_size"
            )

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """int64 [number of prompts]: the epoch's rows in the order in which they are trained on."""
        random = np.random.default_rng([self.seed, epoch])
        chosen = self.grouped_rows[self.group_starts + random.integers(0, self.group_sizes)]
        return random.permutation(chosen)

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
                image = transforms.decode_rgb(self.data.image_path(candidate))
                break
            except transforms.ImageError as error:
                bad.append((candidate, str(error)))
        else:
            raise DataError(f"none of {len(bad)} images could be read; the first: {bad[0][1]}")
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
        prompt = self.data.prompts[row]
        same = pc.equal(self.data.prompts, prompt).to_numpy()  # a scan, only ever needed for a broken image
        yield from (int(other) for other in self.rows[same[self.rows]] if other != row)
        yield from (int(other) for other in np.random.default_rng([self.recipe.seed, epoch, row]).choice(self.rows, 20))


class ValidationImages(torch.utils.data.Dataset):
    """position -> one validation example, resized to the square; an image that cannot be read raises ImageError."""

    def __init__(self, data: PromptImages, rows: np.ndarray, input_size: int):
        self.data, self.rows, self.input_size = data, rows, input_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        row = int(self.rows[position])
        image = transforms.resize_square(transforms.decode_rgb(self.data.image_path(row)), self.input_size)
        return {"image": image, "row": row}


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

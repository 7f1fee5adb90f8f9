"""Writes and reads the predictions of a fold's rows, which the ensemble is fitted on."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kutils.data.datasets import PromptImages
from kutils.system import checksums, paths
from kutils.system.ranks import Ranks

BLOCK = 4096  # rows per rank that are gathered at a time
NAMES = ("dataset", "row", "embeddings", "targets_hash", "fold", "folds_hash")  # arrays in every file
LENGTHS = "lengths"  # one more array, which files of earlier versions lack


@contextmanager
def gathered(ranks: Ranks, local: Tensor, total: int, folder: Path) -> Iterator[np.ndarray | None]:
    """Gather rows of which each rank has every world_size-th, in order, on the main rank; None on the others.

    They are in a temporary file in `folder`, deleted after the block: half a million rows would take 0.8 GB of memory.

    Args:
        local: [n, D] on the rank's device; n may differ by one between ranks. Every rank must call this.
        total: rows over all ranks.
        folder: on the main rank's machine, with room for them.
    Yields: float32 [total, D], each row exactly once.
    """
    with tempfile.TemporaryFile(dir=folder) if ranks.is_main else nullcontext() as file:
        rows = None
        if ranks.is_main:
            # a full disk is an OSError here; in a sparse file it would be a SIGBUS later
            os.posix_fallocate(file.fileno(), 0, 4 * total * local.shape[1])
            rows = np.memmap(file, np.float32, "r+", shape=(total, local.shape[1]))
        stride = BLOCK * ranks.world_size
        for number in range(-(-total // stride)):
            first = number * stride
            block = ranks.gather_interleaved(
                local[number * BLOCK : (number + 1) * BLOCK].float(), min(stride, total - first)
            )
            if rows is not None:
                rows[first : first + len(block)] = block
        yield rows


def save_predictions(
    path: Path,
    data: PromptImages,
    rows: np.ndarray,
    local: Tensor,
    lengths: Tensor,
    ranks: Ranks,
    **facts: str | int,
) -> None:
    """Write an .npz of `dataset`, `row`, `lengths` [n], `embeddings` [n, 384], `targets_hash`, `folds_hash` and facts.

    Args:
        path: an existing file is replaced. All ranks call this; the main one writes.
        rows: int [n], row numbers over all data sets; `local` holds this rank's share, as in `gathered`.
        local: float32 [n / world_size, 384] predictions, unit rows.
        lengths: float32 [n / world_size], norms of the predictions before scaling to length 1.
        facts: fold (to which the rows belong), prefix, checkpoint.
    """
    if ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
    with gathered(ranks, torch.cat([local, lengths[:, None]], dim=1), len(rows), path.parent) as gathered_rows:
        if not ranks.is_main:
            return
        number, row = data.origin(rows)
        with paths.atomic_path(path) as temporary:
            np.savez(
                temporary,
                dataset=np.array(data.names)[number],
                row=row,
                embeddings=gathered_rows[:, :-1],
                lengths=gathered_rows[:, -1],
                targets_hash=data.hash_targets(rows),
                folds_hash=json.dumps(data.folds_hashes, sort_keys=True),
                **facts,
            )


class PredictionsError(ValueError):
    """Out-of-fold predictions that are missing or damaged; the message names the file and says what to do."""


def predictions_path(run_folder: Path, fold: int) -> Path:
    """The file of a run's out-of-fold predictions: of the fold that it was validated on."""
    return run_folder / f"fold{fold}_predictions.npz"


def read_predictions(run_folder: Path, fold: int, *, names: Sequence[str] = NAMES, config: str = "") -> dict:
    """Read a run's out-of-fold predictions: arrays, and single values as Python scalars.

    The result has `lengths`, norms of the predictions before scaling to length 1, if the file has them.

    Args:
        names: the arrays of NAMES to read; the embeddings take longest.
        config: the run's recipe file, for the error message; default: the one in its folder.
    Raises: PredictionsError if the file is not there or damaged, with the command that makes it.
    """
    path = predictions_path(run_folder, fold)
    advice = f"train it: kutils train --config {config or run_folder / 'config.yaml'} --fold {fold}"
    if not path.is_file():
        raise PredictionsError(f"{path} is not there; {advice}")
    try:
        arrays = checksums.read_arrays(path, names, optional=[LENGTHS])
    except (OSError, ValueError) as error:
        raise PredictionsError(f"{path} cannot be read ({error}); {advice}") from error
    if not all(np.isfinite(arrays[name]).all() for name in {"embeddings"} & set(arrays)):
        raise PredictionsError(f"{path} holds predictions that are not finite; {advice}")
    return {name: value if value.ndim else value.item() for name, value in arrays.items()}

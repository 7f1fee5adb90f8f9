"""Sets up the data loaders of training and evaluation, and limits unreadable images."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from kutils.data import datasets
from kutils.data.datasets import PromptImages
from kutils.data.sampler import EpochSampler
from kutils.runs.recipes import Recipe
from kutils.system import loaders, paths
from kutils.system.ranks import Ranks
from kutils.training.meter import Meter

# batches that a worker prefetches: of 32 images of 384 px, 8 workers hold 227 MB. A device as fast as the loader that
# pauses now and then waits 7.7 % of the time; 7.4 % with 4, 5.5 % with 8
PREFETCHED = 2
MOST_BAD_IMAGES = 0.001  # share of unreadable training images that stops a run, once 1,000 images have been seen


def split_rows(data: PromptImages, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and validation rows of a fold; ValueError if one of them is empty."""
    training, validation = data.training_rows(fold), data.validation_rows(fold)
    if not len(validation) or not len(training):
        have = sorted({int(value) for value in np.unique(data.folds)})
        raise ValueError(f"fold {fold} leaves nothing to train or to validate on; the data holds folds {have}")
    return training, validation


def batch_split(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Local batch size and number of accumulated batches; ValueError if the global batch is not their multiple."""
    local = min(recipe.max_local_batch_size, recipe.global_batch_size // world_size)
    if local == 0 or recipe.global_batch_size % (world_size * local):
        raise ValueError(
            f"global_batch_size={recipe.global_batch_size} is no multiple of {world_size} ranks x "
            f"max_local_batch_size={recipe.max_local_batch_size}; change one of them"
        )
    if recipe.head_width and local == 1:
        raise ValueError(
            f"head_width={recipe.head_width} has a BatchNorm, which needs two images or more at a time, and "
            f"global_batch_size={recipe.global_batch_size} on {world_size} ranks leaves one; use fewer ranks"
        )
    return local, recipe.global_batch_size // (world_size * local)


def describe_sam(recipe: Recipe, local_batch_size: int) -> str:
    """A note for the run's first lines if SAM's result depends on the local batch size; else empty."""
    if recipe.sam_rho == 0 or recipe.sam_gradient == "averaged":
        return ""
    return (
        f"\nSAM perturbs by the gradient of each {local_batch_size} images (sam_gradient=local): another "
        "max_local_batch_size or number of ranks trains otherwise"
    )


def training_loader(
    data: PromptImages, rows: np.ndarray, sampler: EpochSampler, recipe: Recipe, ranks: Ranks
) -> DataLoader:
    """The loader of this rank's local batches, in the sampler's order. Its workers live as long as the loader."""
    images = datasets.TrainingImages(data, rows, recipe)
    image_bytes = 3 * recipe.input_size**2 + 4 * (datasets.EMBEDDING_DIM + 8)  # pixels, target, colour jitter
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    loaders.check_shared_memory(recipe.num_workers, sampler.local_batch_size * image_bytes, PREFETCHED, local_ranks)
    keep = recipe.num_workers > 0
    return DataLoader(images, batch_sampler=sampler, persistent_workers=keep, **loader_options(recipe, ranks))


def validation_loader(data: PromptImages, rows: np.ndarray, recipe: Recipe, ranks: Ranks) -> DataLoader:
    """Rows rank, rank + world_size, ... of those given, in batches.

    Its workers end with each pass. Starting 8 takes 0.5 s, and epochs of the large recipes take 5 minutes and more; if
    kept, the 64 workers of 8 ranks would hold 36 to 73 MB each during training.
    """
    return DataLoader(
        datasets.ValidationImages(data, rows, recipe.input_size),
        sampler=range(ranks.rank, len(rows), ranks.world_size),
        batch_size=recipe.max_local_batch_size,
        **loader_options(recipe, ranks),
    )


def loader_options(recipe: Recipe, ranks: Ranks) -> dict:
    return {
        "num_workers": recipe.num_workers,
        "collate_fn": datasets.collate,
        "pin_memory": ranks.device.type == "cuda",
        "prefetch_factor": PREFETCHED if recipe.num_workers else None,
        "timeout": loaders.WORKER_SECONDS if recipe.num_workers else 0,
        "worker_init_fn": loaders.start_worker,
        "generator": torch.Generator(),  # else the loader would draw its seed from drop path's generator
    }


def updates(loader: DataLoader, epoch: int, step: int, accumulation: int, meter: Meter) -> Iterator[list[dict]]:
    """Yield the local batches of each remaining update of an epoch.

    Args:
        loader: of `training_loader`.
        step: updates done so far, over all epochs.
        accumulation: local batches per update.
        meter: it is reset, and measures the time spent waiting for batches.
    """
    sampler = loader.batch_sampler
    sampler.set_epoch(epoch, first_step=step - epoch * sampler.steps_per_epoch)
    batches = loaders.batches(loader)
    meter.reset()
    for _ in range(step, (epoch + 1) * sampler.steps_per_epoch):
        with meter.waiting():
            local_batches = list(itertools.islice(batches, accumulation))
        yield local_batches


def check_bad_images(
    bad: list[tuple[int, str]], seen: int, folder: Path, data: PromptImages, ranks: Ranks, *, new: int
) -> None:
    """Warn of unreadable training images, and list them in the run folder.

    Args:
        bad: row and reason for each time that an image could not be read, over the whole run.
        seen: number of training images, over the whole run.
        new: how many of `bad` are new since the last warning.
    Raises: ValueError above 0.1 % of at least 1,000 images.
    """
    if not new:
        return
    path = folder / "unreadable_images.tsv"
    if ranks.is_main:
        lines = [f"{row}\t{data.images[row].as_py()}\t{reason}\n" for row, reason in sorted(set(bad))]
        with paths.atomic_path(path) as temporary:
            temporary.write_text("row\timage\treason\n" + "".join(lines), encoding="utf-8")
        print(
            f"warning: {len(bad):,} of {seen:,} training images could not be read, and others took their place; "
            f"they are listed in {path}",
            flush=True,
        )
    if seen >= 1000 and len(bad) > MOST_BAD_IMAGES * seen:
        raise ValueError(
            f"{len(bad)} of {seen} training images could not be read, more than {MOST_BAD_IMAGES:.1%}; they are listed "
            f"in {path}. Make them anew, and the same command goes on; or remove their rows and start over with "
            "resume=never"
        )

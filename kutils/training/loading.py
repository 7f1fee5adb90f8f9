"""Sets up the data loader of training, and counts unreadable images."""

from pathlib import Path

import torch

from kutils.data import datasets
from kutils.runs.recipes import Recipe
from kutils.system import children, paths
from kutils.system.ranks import Ranks

# batches that a worker is ahead: of 32 images of 384 px, 8 workers hold 227 MB. A device as fast as the loader that
# pauses now and then waits 7.7 % of the time; 7.4 % with 4, 5.5 % with 8
PREFETCHED = 2
MOST_BAD_IMAGES = 0.001  # share of unreadable training images that stops a run, once 1,000 images have been seen


def batch_split(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Local batch size and number of accumulated batches; ValueError if they do not make up the global batch."""
    local = min(recipe.max_local_batch_size, recipe.global_batch_size // world_size)
    if local == 0 or recipe.global_batch_size % (world_size * local):
        raise ValueError(
            f"global_batch_size={recipe.global_batch_size} is no multiple of {world_size} ranks x "
            f"max_local_batch_size={recipe.max_local_batch_size}; change one of them"
        )
    return local, recipe.global_batch_size // (world_size * local)


def loader_options(recipe: Recipe, ranks: Ranks) -> dict:
    return {
        "num_workers": recipe.num_workers,
        "collate_fn": datasets.collate,
        "pin_memory": ranks.device.type == "cuda",
        "prefetch_factor": PREFETCHED if recipe.num_workers else None,
        "worker_init_fn": start_worker,
        "generator": torch.Generator(),  # a loader draws a seed when it starts; drop path's generator must not notice
    }


def start_worker(number: int) -> None:
    """Let a data loader's process end with its rank, however that ends; it would notice after five seconds itself."""
    children.end_with_parent()


def check_bad_images(bad: list[tuple[int, str]], seen: int, folder: Path, data, ranks: Ranks) -> None:
    """List unreadable training images in the run folder; ValueError above 0.1 % of at least 1,000 images."""
    if not bad:
        return
    path = folder / "unreadable_images.tsv"
    if ranks.is_main:
        lines = [f"{row}\t{data.images[row].as_py()}\t{reason}\n" for row, reason in sorted(set(bad))]
        with paths.atomic_path(path) as temporary:
            temporary.write_text("row\timage\treason\n" + "".join(lines), encoding="utf-8")
    if seen >= 1000 and len(bad) > MOST_BAD_IMAGES * seen:
        raise ValueError(
            f"{len(bad)} of {seen} training images could not be read, more than {MOST_BAD_IMAGES:.1%}; they are listed "
            f"in {path}. Make them anew or remove their rows, and start again"
        )

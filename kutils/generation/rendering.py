"""Makes data sets by the built-in renderer, in several processes; makes the set `shapes` ready for training."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kutils.generation import shapes
from kutils.generation.image_sets import RECORD, ImageSet, image_seed
from kutils.system import locks, paths, processes
from kutils.system.progress import progress_bar

CHUNK_PROMPTS = 32  # prompts per job of a process
JPEG_QUALITY = 92
SUFFIX = ".jpg"


def render_images(jobs: Sequence[tuple[str, int, Path]], size: int) -> None:
    """Render and save the missing images of (prompt, number, path)."""
    for prompt, number, path in jobs:
        if not path.is_file():
            with paths.atomic_path(path) as temporary:
                shapes.render(prompt, image_seed(prompt, number), size).save(temporary, quality=JPEG_QUALITY)
        processes.count(1)


def render_dataset(image_set: ImageSet, *, size: int = 128, num_workers: int = 0, overwrite: bool = False) -> Path:
    """Make the missing images of a set by the built-in renderer, and write its table.

    The same call continues after a kill; a complete data set is not changed, folds included.

    Args:
        image_set: its prompts must each name at least one object that `kutils.generation.shapes` knows.
        num_workers: processes; 0: one per core.
    Returns: path of the table, its rows in the order of the prompts.
    Raises: ValueError for a data set that was made from something else, or naming the first prompt that cannot be
        drawn, before any image is made.
    """
    if size < 1:
        raise ValueError(f"size={size}: it must be at least 1")
    for prompt in image_set.prompts:
        shapes.parse(prompt)
    with locks.held([image_set.tsv_path]):
        return render_missing(image_set, size, num_workers, overwrite)


def render_missing(image_set: ImageSet, size: int, num_workers: int, overwrite: bool) -> Path:
    """The work of `render_dataset`, called while its lock is held."""
    record = image_set.record(backend="shapes", size=size)
    image_set.check_record(record)
    paths.save_record(image_set.folder / RECORD, record)
    missing = image_set.missing()
    step = CHUNK_PROMPTS * image_set.images_per_prompt
    jobs = [
        ([(*image_set.prompt(image), image_set.path(image)) for image in missing[start : start + step]], size)
        for start in range(0, len(missing), step)
    ]
    if jobs:
        with progress_bar(len(missing), "image", "rendering") as bar:
            workers = min(num_workers or os.cpu_count() or 1, len(jobs))
            for _ in processes.run_jobs(render_images, jobs, workers, advance=bar.update):
                pass
    if image_set.update_table(np.array([], np.int64), overwrite=overwrite) or len(missing):
        counts = f"{len(image_set):,} images of {len(image_set.prompts):,} prompts, {len(missing):,} of them new"
        print(f"{image_set.tsv_path}: {counts}")
    else:
        print(f"{image_set.tsv_path} is complete ({len(image_set):,} images)")
    return image_set.tsv_path


def make_shapes_dataset(
    name: str = "shapes", *, num_prompts: int = 4000, images_per_prompt: int = 2, size: int = 128, seed: int = 0
) -> Path:
    """Make the built-in data set, ready for training: prompts, images, embeddings and folds below `input/`.

    Existing files are kept, so that the same call continues an interrupted one.

    Returns: path of the table.
    Raises: ValueError if a data set of this name was made with other settings.
    """
    from kutils.data import preparation
    from kutils.prompts import folds  # these import PyTorch, which rendering does not need

    if not paths.is_safe_relative(name) or "/" in name:
        raise ValueError(f"{name!r} cannot name a data set below {paths.input_dir()}")
    prompts = shapes.generate_prompts(num_prompts, seed)
    tsv_path = render_dataset(ImageSet(paths.input_dir() / name, prompts, images_per_prompt, SUFFIX), size=size)
    print(folds.format_leakage(preparation.prepare_datasets([name])))
    return tsv_path

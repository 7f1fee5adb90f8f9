"""What work on data sets costs: the benchmark's sections on it."""

import os
import shutil
import time
from pathlib import Path

import numpy as np

from kutils import benchmark, image_facts, paths, shapes

IMAGE_SIZE = 512  # px
NUM_PICTURES = 32  # that differ; the others are links to them, decoded one by one all the same


def check_images(images: int = 2000, repeats: int = 3) -> list[benchmark.Entry]:
    """The check of a data set's images by two processes, and by one, over WebP files of 512 px.

    Args:
        images: files.
        repeats: of both, by turns.
    """
    folder = paths.working_dir() / "benchmark" / "check_images"
    shutil.rmtree(folder, ignore_errors=True)
    files = make_pictures(folder, images)
    two, one = [], []
    for _ in range(repeats):
        for times, num_workers in ((two, 2), (one, 1)):
            began = time.monotonic()
            found = image_facts.scan(files.__getitem__, np.arange(images), num_workers)
            times.append(time.monotonic() - began)
            assert found.decoded.all()
    shutil.rmtree(folder)
    return [benchmark.entry("check_images", "s", two, one)]


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Rendered pictures in WebP, and links to them."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.webp" for number in range(count)]
    for prompt, path in zip(shapes.generate_prompts(min(count, NUM_PICTURES)), files, strict=False):
        shapes.render(prompt, seed=0, size=IMAGE_SIZE).save(path, quality=90)
    for number in range(NUM_PICTURES, count):
        os.link(files[number % NUM_PICTURES], files[number])
    return files

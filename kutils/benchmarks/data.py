"""Measures checking and packing of images."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import DataLoader

from kutils.benchmarks import measuring
from kutils.data import datasets, image_files, shards, transforms
from kutils.data.index import open_index
from kutils.data.sampler import EpochSampler
from kutils.generation import shapes
from kutils.runs import launch, recipes
from kutils.system import paths
from kutils.system.embedding_files import EMBEDDING_DIM, map_embeddings
from kutils.system.tables import hash_prompts, write_table

IMAGE_SIZE = 512  # px, of images that are checked
TRAINING_SIZE, PACKED_SIZE = 768, 448  # px, of images as a diffusion model makes them, and as they are packed
NUM_PICTURES = 32  # different pictures; the others are copies, each read and decoded


def measure_check(images: int = 2000, repeats: int = 3) -> list[measuring.Entry]:
    """The check of a data set's images by two processes, and by one, over WebP files of 512 px."""
    folder = paths.working_dir() / "benchmark" / "check_images"
    shutil.rmtree(folder, ignore_errors=True)
    files = make_pictures(folder, images, IMAGE_SIZE)
    two, one = [], []
    for _ in range(repeats):
        for times, num_workers in ((two, 2), (one, 1)):
            began = time.monotonic()
            scanned = image_files.scan(lambda row: files[row].read_bytes(), np.arange(images), num_workers)
            times.append(time.monotonic() - began)
            assert scanned.decoded.all()
    shutil.rmtree(folder)
    return [measuring.make_entry("check_images", "s", two, one)]


def measure_shards(images: int = 2000, repeats: int = 3) -> list[measuring.Entry]:
    """An epoch of one image per prompt through the loader of training: from shards, WebP files of 768 px, an import.

    None is in memory before. Shards hold fewer pixels: most of what is saved is their decoding. The import packs the
    same files; its shards are compared with those of `kutils shards`.

    Args:
        images: rows of the data set.
    """
    folder = paths.working_dir() / "benchmark" / "packed_shards"
    shutil.rmtree(folder, ignore_errors=True)
    pictures = make_pictures(folder / "pictures", images, TRAINING_SIZE)
    names = [str(path.relative_to(folder)) for path in pictures]
    for name in ("packed", "files"):
        write_table(folder / f"{name}.tsv", {"image": names, "prompt": names, "fold": np.ones(images, np.int8)})
    # as commands: processes that are not forked would run a script, which the notebook can be, once more
    launch.run_module("kutils", "shards", str(folder / "packed.tsv"), "--size", str(PACKED_SIZE))
    options = ["--output", str(folder / "imported"), "--embeddings", "later", "--raw-prompts", "--format", "list"]
    launch.run_module("kutils", "import", str(folder / "files.tsv"), *options, "--pack", str(PACKED_SIZE))
    times = {"packed": [], "files": [], "imported": []}
    for name in times:
        np.save(folder / f"{name}.npy", np.eye(1, EMBEDDING_DIM, dtype=np.float32).repeat(images, axis=0))
    os.sync()  # what is not on the disk yet cannot be forgotten
    for _ in range(repeats):
        for name, seconds in times.items():
            data = open_dataset(folder, name, images)
            measuring.forget_files(folder)
            began = time.monotonic()
            load_epoch(data)
            seconds.append(time.monotonic() - began)
    shutil.rmtree(folder)
    return [
        measuring.make_entry("packed_shards", "s", times["packed"], times["files"]),
        measuring.make_entry("imported_shards", "s", times["imported"], times["packed"]),
    ]


def make_sets(folder: Path, pictures: Sequence[Image.Image], rows: int, packed_size: int) -> None:
    """Two data sets of the same images, `files` in WebP and `packed` in one shard: few pictures, over and over.

    Args:
        rows: of each, as many as one shard holds at most.
        packed_size: px, of the images in the shard.
    """
    assert rows <= shards.ROWS_PER_SHARD
    shutil.rmtree(folder, ignore_errors=True)
    names = [f"pictures/{number:06d}.webp" for number in range(rows)]
    (folder / "pictures").mkdir(parents=True)
    encoding, encoded = shards.Encoding(packed_size, "webp", shards.QUALITY), []
    for name, picture in zip(names, pictures, strict=False):
        picture.save(folder / name, quality=shards.QUALITY)
        encoded.append(encoding.encode(transforms.decode_rgb(folder / name)))
    for number in range(len(encoded), rows):
        os.link(folder / names[number % len(encoded)], folder / names[number])
    for name in ("packed", "files"):
        write_table(folder / f"{name}.tsv", {"image": names, "prompt": names, "fold": np.ones(rows, np.int8)})
        np.save(folder / f"{name}.npy", np.eye(1, EMBEDDING_DIM, dtype=np.float32).repeat(rows, axis=0))
    packed = shards.shards_folder(folder / "packed.tsv")
    path, facts = shards.shard_path(packed, 0), shards.shard_facts(folder, names, encoding)
    shards.write_images(path, [encoded[number % len(encoded)] for number in range(rows)], facts)
    record = {"version": shards.VERSION, "rows": rows, "images_sha256": hash_prompts(pa.chunked_array([names]))}
    paths.write_json(shards.record_path(packed), record | asdict(encoding) | {"shard_bytes": [path.stat().st_size]})


def open_dataset(folder: Path, name: str, rows: int) -> datasets.PromptImages:
    """A data set that is not below `input/`."""
    index = open_index(folder, [name])
    embeddings = (map_embeddings(folder / f"{name}.npy", rows),)
    packed = (shards.open_shards(folder / f"{name}.tsv", index.images),)
    return datasets.PromptImages((name,), folder, index, None, embeddings, np.array([0, rows]), packed)


def load_epoch(data: datasets.PromptImages) -> None:
    """Load all batches of an epoch with two workers, as training of a large recipe does."""
    recipe, rows = recipes.load_recipe(recipes.find_recipe("convnext_large", 1)), data.training_rows(0)
    sampler = EpochSampler(
        data, rows, recipe.seed, global_batch_size=32, local_batch_size=32, block_rows=data.block_rows
    )
    loader = DataLoader(
        datasets.TrainingImages(data, rows, recipe),
        batch_sampler=sampler.batches(epoch=0),
        num_workers=2,
        collate_fn=datasets.collate,
        multiprocessing_context="fork",  # as training does on Linux
    )
    assert not [bad for batch in loader for bad in batch["bad"]]


def make_pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Rendered pictures in WebP, and copies of them."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.webp" for number in range(count)]
    for prompt, path in zip(shapes.generate_prompts(min(count, NUM_PICTURES)), files, strict=False):
        shapes.render(prompt, seed=0, size=size).save(path, quality=90)
    for number in range(NUM_PICTURES, count):
        shutil.copyfile(files[number % NUM_PICTURES], files[number])
    return files

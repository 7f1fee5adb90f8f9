"""Measures how five million rows are opened, compared with pandas and NumPy, each time in a process of its own."""

import csv
import itertools
import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kutils.benchmarks import measuring
from kutils.benchmarks.measuring import make_entry, peak_megabytes, private_megabytes
from kutils.data import datasets, validation_check
from kutils.data.sampler import EpochSampler
from kutils.models import networks
from kutils.runs import recipes
from kutils.system import paths, tables
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks
from kutils.training import losses, network_input, optimizers

MADE_SETS = {  # rows and images per prompt, as published: 5,059,104 rows of 3,378,588 prompts
    "cc3m": (748_781, 3),
    "lexica": (201_303, 3),
    "diffusiondb": (978_105, 3),
    "cc3m_part2": (1_166_852, 1),
    "diffusiondb_part2": (1_371_480, 1),
    "mscoco": (592_583, 3),
}
ROW_BYTES = 4 * EMBEDDING_DIM + 300  # of embedding, table and index
LEAST_ROWS = 1000
SPARE_BYTES = 3 * 10**9  # of the disk, left to others
BLOCK = 16_384  # rows of embeddings written together
PICTURE = "picture.jpg"  # what every made row shows
NUM_WORKERS, NUM_BATCHES = 2, 24  # of the loader that is measured


# ---------------------------------------------------------------- the data


def choose_sizes(rows: int, free_bytes: int) -> dict[str, int]:
    """Rows of each made set: all for 0, else about so many in the published shares, and no more than fit the disk."""
    total = sum(count for count, _ in MADE_SETS.values())
    wanted = min(rows or total, total)
    fitting = max(0, free_bytes - SPARE_BYTES) // ROW_BYTES
    if fitting < wanted:
        print(
            f"{wanted:,} rows do not fit: {free_bytes / 1e9:.1f} GB of disk are free; {fitting:,} are made", flush=True
        )
    count = min(wanted, fitting)
    if count < LEAST_ROWS:
        raise ValueError(f"{count:,} rows are too few for six data sets; {LEAST_ROWS:,} are the least")
    return {name: count * published // total for name, (published, _) in MADE_SETS.items()}


def make_datasets(root: Path, num_rows: dict[str, int]) -> None:
    """Write tables and embeddings of the made sets; kept as they are where the folder holds them already.

    Prompts have about 60 characters and differ; the images of one follow each other. All rows show one picture.
    """
    record = root / "made.json"
    if record.is_file() and json.loads(record.read_text()) == num_rows:
        return
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (96, 96, 3), np.uint8)).resize((768, 768)).save(root / PICTURE)
    block = random.standard_normal((BLOCK, EMBEDDING_DIM)).astype(np.float32)
    block /= np.linalg.norm(block, axis=1, keepdims=True)
    words = ["a painting of", "harbour", "at dawn", "castle", "oil on canvas", "highly detailed", "two dogs", "green"]
    phrases = [", ".join(random.permutation(words)[: 3 + number % 4]) for number in range(997)]
    with progress_bar(sum(num_rows.values()), "row", "making data sets") as bar:
        for name, count in num_rows.items():
            write_dataset(root, name, count, phrases, block, random)
            bar.update(count)
    paths.write_json(record, num_rows)


def write_dataset(root: Path, name: str, count: int, phrases: list[str], block: np.ndarray, random) -> None:
    """Write one made set: a table of `count` rows and its embeddings, the block over and over."""
    images_per_prompt = MADE_SETS[name][1]
    num_prompts = count // images_per_prompt
    codes = np.minimum(np.arange(count) // images_per_prompt, num_prompts - 1)
    folds = random.integers(0, 10, num_prompts)[codes]
    images = [f"{name}_images/{row // 10_000:04d}/{row:08d}.webp" for row in range(count)]
    prompts = [f"{phrases[code % len(phrases)]}, {name} {code:07d}" for code in codes]
    tables.write_table(root / f"{name}.tsv", {"image": images, "prompt": prompts, "fold": folds})
    with paths.atomic_path(root / f"{name}.npy") as temporary:
        rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (count, EMBEDDING_DIM))
        for start in range(0, count, BLOCK):
            rows[start : start + BLOCK] = block[: count - start]


# ---------------------------------------------------------------- what a child does


class OnePicture(datasets.PromptImages):
    """Data sets whose every image is looked up and one picture read instead: five million files are not made."""

    def image_path(self, row: int) -> Path:
        super().image_path(row)
        return self.root / PICTURE


def measure_rank(*names: str) -> dict[str, float]:
    """Open data sets and deal batches as rank 0 of 8 in training does; MB beyond what the imports cost.

    Returns: `seconds` of opening; private memory once `opened`, with the `sampler`, within an `epoch`, and at the
        `peak` until then; `worker`: all that the largest loader worker shares with nobody, decoding included;
        `first_step`: seconds until a tiny network is updated for the first time.
    """
    recipe = recipes.load_recipe(recipes.find_recipe("convnext_large", 2))
    tiny = replace(recipe, backbone="test_convnext", pretrained=False, head="pooled", drop_path_rate=0.0)
    network = networks.build_model(tiny, pretrained=False)
    before = private_megabytes()
    with peak_megabytes() as peak:
        began = time.monotonic()
        data = datasets.load_datasets(names)
        result = {"seconds": time.monotonic() - began, "opened": private_megabytes() - before}
        rows, pictures = data.training_rows(0), OnePicture(**vars(data))
        training_images = datasets.TrainingImages(pictures, rows, recipe)
        sampler = EpochSampler(
            data,
            rows,
            recipe.seed,
            global_batch_size=recipe.global_batch_size,
            local_batch_size=recipe.global_batch_size // 8,
            world_size=8,
        )
        result["sampler"] = private_megabytes() - before
        batches = sampler.batches(epoch=0)
        next(batches)
        result["epoch"] = private_megabytes() - before
    paths.write_json(
        *validation_check.checked_record(data, data.validation_rows(0))
    )  # as if an earlier run had seen all, which takes 16 minutes
    validation_check.check_validation_images(
        pictures, data.validation_rows(0), NUM_WORKERS, Ranks(0, 1, torch.device("cpu"))
    )
    loader = DataLoader(
        training_images,
        batch_sampler=itertools.islice(batches, NUM_BATCHES),
        num_workers=NUM_WORKERS,
        collate_fn=datasets.collate,
        multiprocessing_context="fork",  # as training does on Linux
    )
    optimizer, loaded = optimizers.build_optimizer(network, tiny), iter(loader)
    batch = next(loaded)
    images = network_input.normalize(batch["image"], recipe.mean, recipe.std)
    losses.cosine_embedding_loss(network(images), batch["target"]).backward()
    optimizer.step()
    result["first_step"] = time.monotonic() - began
    workers = [private_megabytes(child.pid) for _ in loaded for child in multiprocessing.active_children()]
    return result | {"peak": peak[0] - before, "worker": max(workers)}


def measure_plain(*names: str) -> dict[str, float]:
    """The plain way: pandas parses every table, NumPy reads all embeddings; keys as for a rank, as far as they go."""
    root, before = paths.input_dir(), private_megabytes()
    with peak_megabytes() as peak:
        began = time.monotonic()
        parsed = [pd.read_table(root / f"{name}.tsv", quoting=csv.QUOTE_NONE) for name in names]
        table = pd.concat(parsed, ignore_index=True)
        embeddings = np.concatenate([np.load(root / f"{name}.npy") for name in names])
        seconds = time.monotonic() - began
        del parsed
    assert len(table) == len(embeddings)
    return {"seconds": seconds, "opened": private_megabytes() - before, "peak": peak[0] - before}


# ---------------------------------------------------------------- the section


def measure_opening(rows: int = 0, repeats: int = 3, keep_data: bool = False) -> list[measuring.Entry]:
    """Open six data sets of the published sizes, deal an epoch and load batches, beside pandas and NumPy.

    Every opening waits for the disk, in a process of its own. Data sets are made below `working/benchmark/input/`
    (9 GB) and removed at the end.

    Args:
        rows: of all sets together; 0: 5,059,104.
        keep_data: leave the data sets for the next time.
    Raises: ValueError where the disk holds next to nothing; CommandFailed where a child fails.
    """
    folder = paths.working_dir() / "benchmark"
    root, working = folder / "input", folder / "index"
    root.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in root.glob("*"))
    num_rows = choose_sizes(rows, shutil.disk_usage(root).free + held)
    make_datasets(root, num_rows)
    first, again, plain = [], [], []
    for _ in range(repeats):
        shutil.rmtree(working, ignore_errors=True)
        first.append(measure_anew(measure_rank, root, working, num_rows))
    for _ in range(repeats):
        again.append(measure_anew(measure_rank, root, working, num_rows))
    if enough_memory(sum(num_rows.values())):
        plain = [measure_anew(measure_plain, root, working, num_rows) for _ in range(repeats)]
    shutil.rmtree(working)
    if not keep_data:
        shutil.rmtree(root)
    seconds, memory = [run["seconds"] for run in plain], [run["opened"] for run in plain]
    return [
        make_entry("open_5m_rows", "s", [run["seconds"] for run in again], seconds),
        make_entry("open_5m_rows_first", "s", [run["seconds"] for run in first], seconds),
        make_entry("open_5m_rows_rank", "MB", [run["epoch"] for run in again], memory),
        make_entry("open_5m_rows_rank_peak", "MB", [run["peak"] for run in again], [run["peak"] for run in plain]),
        make_entry("open_5m_rows_rank_first", "MB", [run["epoch"] for run in first], memory),
        make_entry(
            "open_5m_rows_rank_first_peak", "MB", [run["peak"] for run in first], [run["peak"] for run in plain]
        ),
        make_entry("open_5m_rows_worker", "MB", [run["worker"] for run in again]),
        make_entry("first_step_5m_rows", "s", [run["first_step"] for run in again]),
    ]


def enough_memory(num_rows: int) -> bool:
    """Whether the plain way, which holds all embeddings twice for a moment, would not drive others out of memory."""
    needed = num_rows * (2 * 4 * EMBEDDING_DIM + 600)
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    if needed > available:
        print(f"the plain way is left out: it needs {needed / 1e9:.0f} GB, {available / 1e9:.0f} are there", flush=True)
    return needed <= available


def measure_anew(function: Callable[..., dict], root: Path, working: Path, names: Sequence[str]) -> dict[str, float]:
    """Run one measurement in a process of its own that finds no file in memory."""
    for folder in (root, working):
        measuring.forget_files(folder)
    return measuring.in_child(function, *names, KUTILS_INPUT=str(root), KUTILS_WORKING=str(working))

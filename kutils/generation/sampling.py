"""Samples the missing images of a data set on all ranks, and saves them in the background."""

import collections
import importlib.metadata
import io
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from kutils.generation import diffusion
from kutils.generation.diffusion import Sampler
from kutils.generation.image_sets import RECORD, ImageSet
from kutils.generation.settings import DiffusionSettings
from kutils.system import locks, paths
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks
from kutils.system.tables import write_table

WAITING_BATCHES = 4  # most batches waiting to be saved: a slow disk must not fill the memory
MOST_FAILED = 50  # if so many first images of a rank all fail, the pipeline does not work
FAILED = "failed.tsv"  # in the folder of images: list of images that could not be made
PACKAGES = ("diffusers", "transformers", "torch", "pillow")


@dataclass
class RankResult:
    """Counts and failures of one rank."""

    outcomes: collections.Counter = field(default_factory=collections.Counter)  # of `diffusion.Sample`
    failed: list[tuple[int, str]] = field(default_factory=list)  # image, reason


def sample_dataset(image_set: ImageSet, settings: DiffusionSettings, ranks: Ranks, *, overwrite: bool = False) -> Path:
    """Make the missing images of a set by a diffusion model, on all ranks, and write its table; every rank calls it.

    The same call again, after a kill or the failure of a rank, makes missing images and retries failed ones. An image
    depends on its prompt, its number, the model and the settings; batch size and device change only its rounding.

    Returns: path of the table, its rows in the order of the prompts.
    Raises: ValueError for a data set that was made with other settings, or an unusable pipeline; OSError on a full
        disk.
    """
    dtype = str(diffusion.pick_dtype(settings.dtype, ranks.device)).removeprefix("torch.")
    record = image_set.record(backend="diffusers", **settings.record(dtype))

    def find_missing() -> np.ndarray | None:
        if not ranks.is_main:  # only the main rank looks: faster ranks may already make some
            return None
        image_set.check_record(record)
        missing = image_set.missing()
        if len(missing):
            diffusion.locate(settings)  # downloaded once, not by every rank
        return missing

    with locks.held([image_set.tsv_path], ranks):
        missing = on_every_rank(ranks, find_missing)[0]
        results, began = [RankResult()], time.monotonic()
        if len(missing):
            sampler, began = load_sampler(image_set, settings, ranks, record), time.monotonic()
            share = missing[ranks.rank :: ranks.world_size]
            results = on_every_rank(ranks, lambda: sample_images(image_set, share, sampler, ranks, len(missing)))
        if ranks.is_main:
            write_results(image_set, results, len(missing), time.monotonic() - began, overwrite)
        return image_set.tsv_path


def on_every_rank(ranks: Ranks, work: Callable) -> list:
    """Call `work()` on every rank; returns the results of all, in the order of the ranks.

    If a rank fails, it waits until the others have finished their part; then all end: this rank with its error, rank 0
    with an error that names the failed ranks, the others silently.
    """
    result = error = None
    try:
        result = work()
    except Exception as caught:
        error = caught
        if ranks.world_size > 1:
            print(f"rank {ranks.rank} failed and waits for the others: {error}", file=sys.stderr, flush=True)
    outcomes = ranks.gather_objects((result, error is None))
    failed = [str(rank) for rank, (_, succeeded) in enumerate(outcomes) if not succeeded]
    if failed:
        ranks.barrier()  # torchrun ends all ranks as soon as one ends with an error
        if ranks.is_main and error is None:
            error = ValueError(f"rank {', '.join(failed)} failed; images are kept, and the same command makes the rest")
        raise error or SystemExit(1)
    return [result for result, _ in outcomes]


def load_sampler(image_set: ImageSet, settings: DiffusionSettings, ranks: Ranks, record: dict) -> Sampler:
    """Load the pipeline on every rank, check that weights are equal on all ranks and in the record, and write the
    record."""
    pipelines = []

    def load() -> str:
        pipelines.append(diffusion.load_pipeline(settings, ranks.device))
        return diffusion.weights_sha256(pipelines[0])

    hashes = on_every_rank(ranks, load)

    def write_record() -> None:
        if not ranks.is_main:
            return
        if len(set(hashes)) > 1:
            raise ValueError(f"the ranks have loaded different weights of {settings.model}; give a --revision")
        compared = record | {"weights_sha256": hashes[0]}
        image_set.check_record(compared)
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        first_versions = image_set.previous_record().get("started_with", versions)
        changes = [
            f"{name} {first_versions.get(name)} (now {version})"
            for name, version in versions.items()
            if first_versions.get(name) != version
        ]
        if changes:
            print(f"warning: this set was started with {', '.join(changes)}; pixels may differ", flush=True)
        model = {name: getattr(settings, name) for name in ("model", "revision", "variant")}
        paths.save_record(image_set.folder / RECORD, compared | model | {"started_with": first_versions})

    on_every_rank(ranks, write_record)
    return Sampler(pipelines[0], settings)


def sample_images(image_set: ImageSet, images: np.ndarray, sampler: Sampler, ranks: Ranks, total: int) -> RankResult:
    """Make this rank's images, and save each batch while the next one is made.

    Args:
        total: images of all ranks; the progress bar assumes that all are as fast as rank 0.
    Raises: ValueError if the first MOST_FAILED images all fail; OSError on a full disk.
    """
    result, pending, step = RankResult(), collections.deque(), sampler.settings.batch_size
    threads = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(total, "image", "generating", disable=not ranks.is_main) as bar,
    ):
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            samples = sampler(*zip(*(image_set.prompt(image) for image in batch), strict=True))
            for image, sample in zip(batch, samples, strict=True):
                result.outcomes[sample.outcome] += 1
                if sample.pixels is None:
                    result.failed.append((int(image), sample.reason))
                else:
                    pending.append(pool.submit(save_image, sample.pixels, image_set.path(image), sampler.settings))
            if len(result.failed) == result.outcomes.total() >= MOST_FAILED:
                raise ValueError(
                    f"all of the first {len(result.failed)} images failed ({result.failed[-1][1]}); is this pipeline "
                    "whole, and does it work in another --dtype, or with --upcast-attention?"
                )
            while pending and (pending[0].done() or len(pending) > WAITING_BATCHES * step):
                pending.popleft().result()
            bar.update(min(len(batch) * ranks.world_size, total - bar.n))
        while pending:
            pending.popleft().result()
    return result


def save_image(pixels: np.ndarray, path: Path, settings: DiffusionSettings) -> None:
    """Resize uint8 [S, S, 3] to the size to save, with antialiasing, and write it as WebP, atomically."""
    image = Image.fromarray(pixels)
    if settings.save_size != settings.size:
        image = image.resize((settings.save_size, settings.save_size), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=settings.lossless, quality=settings.quality)
    with paths.atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def write_results(
    image_set: ImageSet, results: list[RankResult], num_missing: int, seconds: float, overwrite: bool
) -> None:
    """Write the list of failed images and the table, and print a summary; on rank 0."""
    failed = sorted(item for result in results for item in result.failed)
    outcomes = sum((result.outcomes for result in results), collections.Counter())
    failed_path = image_set.folder / FAILED
    if failed:
        rows = [image // image_set.images_per_prompt for image, _ in failed]
        columns = {
            "prompt_row": rows,
            "number": [image_set.prompt(image)[1] for image, _ in failed],
            "reason": [reason for _, reason in failed],
            "prompt": [image_set.prompts[row] for row in rows],
        }
        write_table(failed_path, columns)
        print(f"warning: {len(failed):,} images failed and are left out; {failed_path} lists them", flush=True)
    else:
        failed_path.unlink(missing_ok=True)
    is_new = image_set.update_table(np.array([image for image, _ in failed], np.int64), overwrite=overwrite)
    if not num_missing and not is_new:
        print(f"{image_set.tsv_path} is complete ({len(image_set):,} images)", flush=True)
        return
    new = num_missing - len(failed)
    line = f"{len(image_set) - len(failed):,} images of {len(image_set.prompts):,} prompts, {new:,} of them new"
    for outcome in ("float32", "another seed"):
        if outcomes[outcome]:
            line += f", {outcomes[outcome]:,} in a second attempt ({outcome})"
    if new:
        line += f"; {new / seconds:.3g} images/s"
    print(f"{image_set.tsv_path}: {line}", flush=True)

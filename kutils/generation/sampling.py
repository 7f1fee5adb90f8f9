"""Samples the missing images of a data set on all ranks, and saves them meanwhile."""

import collections
import importlib.metadata
import io
import json
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
from kutils.generation.diffusion import DiffusionError, Sampler
from kutils.generation.image_sets import RECORD, DiffusionSettings, ImageSet
from kutils.system import paths
from kutils.system.progress import progress_bar
from kutils.system.ranks import Ranks
from kutils.system.tables import write_table

WAITING_BATCHES = 4  # made and not yet saved, at most: a slow disk must not fill the memory
MOST_FAILED = 50  # images of a rank, all failed and none made: a pipeline that will not make one
FAILED = "failed.tsv"  # in the folder of images: those that could not be made
PACKAGES = ("diffusers", "transformers", "torch", "pillow")


@dataclass
class Made:
    """What a rank has done."""

    outcomes: collections.Counter = field(default_factory=collections.Counter)  # of diffusion.Sample
    failed: list[tuple[int, str]] = field(default_factory=list)  # image, reason


def generate_images(image_set: ImageSet, settings: DiffusionSettings, ranks: Ranks, *, overwrite: bool = False) -> Path:
    """Make the images of a set that are missing, on all ranks, and write its table; called by every rank.

    Run again after a kill, or after a rank that failed, it makes what is missing, and tries again what failed. An image
    depends on its prompt, its number, the model and the settings; another batch size or device changes rounding.

    Args:
        overwrite: as in `ImageSet.update_table`.
    Returns: path of the table, its rows in the order of the prompts.
    Raises: GenerateError, DiffusionError; OSError on a full disk.
    """
    dtype = str(diffusion.pick_dtype(settings.dtype, ranks.device)).removeprefix("torch.")
    record = image_set.record(backend="diffusers", **settings.record(dtype))

    def look() -> np.ndarray | None:
        if not ranks.is_main:  # a moment later it would see other images, for those who are fast make some
            return None
        image_set.check_made_alike(record)
        missing = image_set.missing()
        if len(missing):
            diffusion.locate(settings)  # downloaded once, not by every rank
        return missing

    missing = on_every_rank(ranks, look)[0]
    made, began = [Made()], time.monotonic()
    if len(missing):
        sampler, began = start(image_set, settings, ranks, record), time.monotonic()
        share = missing[ranks.rank :: ranks.world_size]
        made = on_every_rank(ranks, lambda: make_images(image_set, share, sampler, ranks, len(missing)))
    if ranks.is_main:
        finish(image_set, made, len(missing), time.monotonic() - began, overwrite)
    return image_set.tsv_path


def on_every_rank(ranks: Ranks, work: Callable) -> list:
    """What `work()` returns on every rank, in their order.

    A rank that fails waits until the others have done their part. Then all end: it with its error, the others without
    a word; rank 0 names those that failed.
    """
    result = error = None
    try:
        result = work()
    except Exception as caught:
        error = caught
        if ranks.world_size > 1:
            print(f"rank {ranks.rank} failed and waits for the others: {error}", file=sys.stderr, flush=True)
    outcomes = ranks.gather_objects((result, error is None))
    failed = [str(rank) for rank, (_, fine) in enumerate(outcomes) if not fine]
    if failed:
        ranks.barrier()  # torchrun ends all ranks as soon as one ends with an error
        if ranks.is_main and error is None:
            message = f"rank {', '.join(failed)} failed; what is made is kept, and the same command makes the rest"
            raise ValueError(message)
        raise error or SystemExit(1)
    return [result for result, _ in outcomes]


def start(image_set: ImageSet, settings: DiffusionSettings, ranks: Ranks, record: dict) -> Sampler:
    """Load the pipeline on every rank, and write the record once it is known to be the same on all, and as before."""

    pipelines = []

    def load() -> str:
        pipelines.append(diffusion.load_pipeline(settings, ranks.device))
        return diffusion.weights_sha256(pipelines[0])

    hashes = on_every_rank(ranks, load)

    def write_record() -> None:
        if not ranks.is_main:
            return
        if len(set(hashes)) > 1:
            raise DiffusionError(f"the ranks have loaded different weights of {settings.model}; give a --revision")
        compared = record | {"weights_sha256": hashes[0]}
        image_set.check_made_alike(compared)
        now = {name: importlib.metadata.version(name) for name in PACKAGES}
        former = image_set.former_record().get("started_with", now)
        changed = [f"{name} {former.get(name)} (now {now[name]})" for name in now if former.get(name) != now[name]]
        if changed:
            print(f"warning: this set was started with {', '.join(changed)}; pixels may differ", flush=True)
        model = {name: getattr(settings, name) for name in ("model", "revision", "variant")}
        paths.write_json(image_set.folder / RECORD, compared | model | {"started_with": former})

    on_every_rank(ranks, write_record)
    return Sampler(pipelines[0], settings)


def make_images(image_set: ImageSet, images: np.ndarray, sampler: Sampler, ranks: Ranks, total: int) -> Made:
    """Make and save this rank's share; `total` is that of all ranks, whose progress is taken to be like this one's.

    Raises: DiffusionError if the first MOST_FAILED images all fail; OSError on a full disk.
    """
    made, waiting, step = Made(), collections.deque(), sampler.settings.batch_size
    threads = max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(total, "image", "generating", disable=not ranks.is_main) as bar,
    ):
        for begin in range(0, len(images), step):
            chunk = images[begin : begin + step]
            samples = sampler(*zip(*(image_set.prompt(image) for image in chunk), strict=True))
            for image, sample in zip(chunk, samples, strict=True):
                made.outcomes[sample.outcome] += 1
                if sample.outcome:
                    note(image_set, int(image), sample, ranks.rank)
                if sample.pixels is None:
                    made.failed.append((int(image), sample.reason))
                else:
                    waiting.append(pool.submit(save_image, sample.pixels, image_set.path(image), sampler.settings))
            if len(made.failed) == made.outcomes.total() >= MOST_FAILED:
                raise DiffusionError(
                    f"all of the first {len(made.failed)} images failed ({made.failed[-1][1]}); is this pipeline "
                    "whole, and does it work in another --dtype, or with --upcast-attention?"
                )
            while waiting and (waiting[0].done() or len(waiting) > WAITING_BATCHES * step):
                waiting.popleft().result()
            bar.update(min(len(chunk) * ranks.world_size, total - bar.n))
        while waiting:
            waiting.popleft().result()
    return made


def note(image_set: ImageSet, image: int, sample: diffusion.Sample, rank: int) -> None:
    """Append an image that was not good at once to `irregular_<rank>.jsonl` in the folder of images.

    A run that tries again what failed appends too: the last line of an image is the one that holds.
    """
    prompt, number = image_set.prompt(image)
    facts = {"image": image_set.name(image), "outcome": sample.outcome, "reason": sample.reason, "seed": sample.seed}
    path = image_set.folder / f"irregular_{rank}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(facts | {"prompt": prompt, "number": number}) + "\n")


def save_image(pixels: np.ndarray, path: Path, settings: DiffusionSettings) -> None:
    """Resize uint8 [S, S, 3] to the size to save, with antialiasing, and write it as WebP, whole or not at all."""
    image = Image.fromarray(pixels)
    if settings.save_size != settings.size:
        image = image.resize((settings.save_size, settings.save_size), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=settings.lossless, quality=settings.quality)
    with paths.atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def finish(image_set: ImageSet, made: list[Made], num_missing: int, seconds: float, overwrite: bool) -> None:
    """Write the list of failed images and the table, and say what was made; on rank 0."""
    failed = sorted(item for part in made for item in part.failed)
    outcomes = sum((part.outcomes for part in made), collections.Counter())
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
    told = f"{len(image_set) - len(failed):,} images of {len(image_set.prompts):,} prompts, {new:,} of them new"
    for outcome in ("float32", "another seed"):
        if outcomes[outcome]:
            told += f", {outcomes[outcome]:,} in a second attempt ({outcome})"
    if new:
        told += f"; {new / seconds:.3g} images/s"
    print(f"{image_set.tsv_path}: {told}", flush=True)

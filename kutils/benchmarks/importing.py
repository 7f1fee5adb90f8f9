"""Measures the import of downloaded pairs, compared with webdataset's loop over tars and with packing by Pillow."""

import dataclasses
import functools
import io
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kutils.benchmarks import measuring
from kutils.benchmarks.measuring import make_entry
from kutils.data import pair_export, pair_job, pair_parts
from kutils.data.pair_formats import find_parts
from kutils.data.pair_tars import read_tar
from kutils.data.pairs import Keys
from kutils.data.shards import QUALITY
from kutils.generation import shapes
from kutils.system import paths, processes
from kutils.system.chunks import ChunkFiles
from kutils.system.constants import EMBEDDING_DIM

KEPT_SIZE, SIZE, PACKED_SIZE = 64, 512, 448  # px
KEPT_PER_TAR, PACKED_PER_TAR = 5000, 50  # pairs; a part that is packed is long work
NUM_PICTURES = 32  # different pictures; the others are copies


def make_tars(folder: Path, pairs: int, size: int, pairs_per_tar: int) -> list[str]:
    """Tars of the 12th place's form: lossless WebP, prompt, float16 embedding and a few facts of each pair."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts, contents = shapes.generate_prompts(NUM_PICTURES), []
    for prompt in prompts:
        stream = io.BytesIO()
        shapes.render(prompt, seed=0, size=size).save(stream, "webp", lossless=True, method=0)
        contents.append(stream.getvalue())
    row = np.full(EMBEDDING_DIM, EMBEDDING_DIM**-0.5, np.float16)

    def rows(first: int) -> Iterator[dict]:
        for number in range(first, min(first + pairs_per_tar, pairs)):
            image = {"bytes": contents[number % NUM_PICTURES], "path": f"{number:09d}.webp"}
            known = {"fold": -1, "generator": "shapes", "seed": str(number), "source": ""}
            yield {"image": image, "prompt": f"{prompts[number % NUM_PICTURES]}, {number}", "embedding": row} | known

    files = [folder / f"{first // pairs_per_tar:06d}.tar" for first in range(0, pairs, pairs_per_tar)]
    for number, path in enumerate(files):
        pair_export.write_tar(path, rows(number * pairs_per_tar))
    return list(map(str, files))


def parse_all(tars: Sequence[str]) -> int:
    """The plain way to read: webdataset's own loop, which splits tars into samples, and no more."""
    import webdataset  # of the extra `dev`

    return sum(1 for _ in webdataset.WebDataset(list(tars), shardshuffle=False, empty_check=False))


def pack_by_pillow(tars: Sequence[str], folder: Path) -> int:
    """The plain way to pack: open, resize, save, in Pillow's own settings for the same quality."""
    folder.mkdir()
    count = 0
    for pair in (item for path in tars for item in read_tar(Path(path), Keys())):
        with Image.open(io.BytesIO(pair.image)) as picture:
            small = picture.convert("RGB").resize((PACKED_SIZE, PACKED_SIZE), Image.Resampling.BICUBIC)
        small.save(folder / f"{pair.key}.webp", quality=QUALITY)
        count += 1
    return count


class Import:
    """Imports of the same tars into one folder, each begun anew."""

    def __init__(self, tars: Sequence[str], folder: Path, pack: str):
        args = pair_job.make_parser().parse_args([*tars, "--output", str(folder / "imported"), "--pack", pack])
        self.job = dataclasses.replace(pair_job.make_job(args), with_embeddings=True)
        self.parts, self.folder = find_parts(tars, "webdataset", Keys()), folder

    def rate(self, num_workers: int) -> float:
        """Pairs per second, from when the first are done until the last is: starting a process takes seconds."""
        chunks = ChunkFiles(self.folder / "imported", {}, len(self.parts))
        chunks.open()
        jobs = [(number, part, self.job, chunks) for number, part in enumerate(self.parts)]
        counts = [(time.monotonic(), 0)] if not num_workers else []

        def note(count: int) -> None:
            if count:
                counts.append((time.monotonic(), count))

        one_thread = functools.partial(torch.set_num_threads, 1)
        for _ in processes.run_jobs(pair_parts.import_part, jobs, num_workers, advance=note, prepare=one_thread):
            pass
        chunks.remove()
        return sum(count for _, count in counts[1:]) / (counts[-1][0] - counts[0][0])


def measure_import(pairs: int = 2000, repeats: int = 3) -> list[measuring.Entry]:
    """Pairs per second: bytes kept, beside webdataset's loop; packed, beside Pillow's loop; and by two processes.

    Args:
        pairs: that are packed; of small ones (64 px) that are kept, five times as many.
    """
    folder, entries = paths.working_dir() / "benchmark" / "import", []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small = make_tars(folder / "small", 5 * pairs, KEPT_SIZE, KEPT_PER_TAR)
        kept = Import(small, folder, "keep")
        plain = functools.partial(pairs_per_second, parse_all, small)
        times = measuring.alternate(repeats, lambda: kept.rate(0), plain)
        entries.append(make_entry("import_keep", "pairs/s", *times, more=True))
        tars = make_tars(folder / "large", pairs, SIZE, PACKED_PER_TAR)
        packed = Import(tars, folder, str(PACKED_SIZE))
        plain = functools.partial(timed_packing, tars, folder / "plain")
        times = measuring.alternate(repeats, lambda: packed.rate(0), plain)
        entries.append(make_entry("import_pack", "pairs/s", *times, more=True))
        times = measuring.alternate(repeats, lambda: packed.rate(2), lambda: packed.rate(1))
        entries.append(make_entry("import_pack_2_processes", "pairs/s", *times, more=True))
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
    return entries


def pairs_per_second(function, *arguments) -> float:
    """Pairs per second of a function that returns their number."""
    began = time.monotonic()
    return function(*arguments) / (time.monotonic() - began)


def timed_packing(tars: Sequence[str], folder: Path) -> float:
    rate = pairs_per_second(pack_by_pillow, tars, folder)
    shutil.rmtree(folder)
    return rate

"""Measures how fast image files become network input on one core, compared with the published pipeline."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kutils.benchmarks import measuring, published
from kutils.data import transforms
from kutils.system import paths
from kutils.training import network_input

IMAGE_SIZE, INPUT_SIZE = 512, 384  # px, of the files and of the network's input
NUM_PICTURES = 24
BATCH_SIZE = 8  # images that the device's part works on together
FALL_OFF = 1.57  # of amplitude with frequency: 46 KB in WebP and 87 in JPEG; 24 of image generators have 48 and 92
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
FORMATS = {
    "webp": {"quality": 90},
    "jpeg": {"quality": 95},
    "png": {},
}  # as kutils.generation.generate writes WebP; Pillow's PNG
IMAGE_NAMES = {".png", ".jpg", ".jpeg", ".webp"}


def measure_loading(pictures: str = "", repeats: int = 5) -> list[measuring.Entry]:
    """Images per second and core from files of 512 px to inputs of 384 px, with training's augmentation and without.

    `host` is the part that data loaders do (read, decode, crop, resize), beside all of the published pipeline, which
    they do there; `all` has what the device does, too, on the same core.

    Args:
        pictures: folder of images to take, resized to 512 px; empty: made ones.
    """
    ways = [("", training_host, published.training_transform), ("_plain", plain_host, published.plain_transform)]
    entries = []
    for name in FORMATS:
        with picture_files(name, pictures) as files, one_thread():
            for part, host, make_transform in ways:
                transform = make_transform(INPUT_SIZE, MEAN, STD)
                theirs = partial(published.load_image, transform=transform)
                entries += measure(f"loader_{name}{part}", files, host, theirs, repeats)
    return entries


def measure(
    name: str, files: Sequence[Path], host: Callable, load_image: Callable, repeats: int
) -> list[measuring.Entry]:
    """`<name>_host` and `<name>_all` over the files, beside `load_image` of the published pipeline."""
    for path in files:  # in memory for all that follow
        path.read_bytes()

    def ours_host() -> float:
        return pace(len(files), lambda: [host(path, number) for number, path in enumerate(files)])

    def ours_all() -> float:
        return pace(len(files), lambda: [device_part(batch) for batch in host_batches(files, host)])

    def theirs() -> float:
        return pace(len(files), lambda: [load_image(path) for path in files])

    hosts, everything, references = measuring.alternate(repeats, ours_host, ours_all, theirs)
    return [
        measuring.make_entry(f"{name}_host", "images/s", hosts, references, more=True),
        measuring.make_entry(f"{name}_all", "images/s", everything, references, more=True),
    ]


def pace(count: int, work: Callable) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def training_host(path: Path, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    return transforms.random_crop_and_jitter(transforms.decode_rgb(path), INPUT_SIZE, (71, 0, number))


def plain_host(path: Path, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    return transforms.resize_square(transforms.decode_rgb(path), INPUT_SIZE), None


def host_batches(files: Sequence[Path], host: Callable) -> Iterator[list]:
    for start in range(0, len(files), BATCH_SIZE):
        yield [host(path, start + offset) for offset, path in enumerate(files[start : start + BATCH_SIZE])]


def device_part(batch: list) -> torch.Tensor:
    images = torch.stack([image for image, _ in batch])
    jitter = None if batch[0][1] is None else torch.stack([drawn for _, drawn in batch])
    return network_input.normalize(images, MEAN, STD, jitter)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- pictures


def random_pictures(count: int, size: int = IMAGE_SIZE) -> list[Image.Image]:
    """Random pictures whose detail falls off with its frequency as in photographs (1/f), edges added.

    They take as many bytes in WebP and JPEG as pictures of image generators do, so that decoding takes as long.
    """
    random = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    frequency[0, 0] = 1.0
    rows, columns = np.mgrid[:size, :size]
    pictures = []
    for _ in range(count):
        spectrum = np.fft.rfft2(random.standard_normal((3, size, size))) / frequency**FALL_OFF
        field = np.fft.irfft2(spectrum, s=(size, size))
        field = field[0] + 0.3 * field  # colours of a picture go together
        field = 128 + 50 * field / field.std()
        for _ in range(6):
            normal = random.standard_normal(2)
            beyond = normal[0] * (rows - size * random.random()) + normal[1] * (columns - size * random.random()) > 0
            field += np.where(beyond, random.normal(0, 12, (3, 1, 1)), 0)
        pictures.append(Image.fromarray(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return pictures


def read_pictures(folder: Path) -> list[Image.Image]:
    """Up to NUM_PICTURES images of a folder, evenly spread over their names, as squares of 512 px."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_NAMES)
    if not files:
        raise ValueError(f"no images in {folder} ({', '.join(sorted(IMAGE_NAMES))})")
    chosen = files[:: max(1, len(files) // NUM_PICTURES)][:NUM_PICTURES]
    square = (IMAGE_SIZE, IMAGE_SIZE)
    return [Image.open(path).convert("RGB").resize(square, Image.Resampling.LANCZOS) for path in chosen]


@contextmanager
def picture_files(format: str, pictures: str = "") -> Iterator[list[Path]]:
    """Files of a format inside the block, removed after it.

    Args:
        pictures: folder of images to take; empty: made ones.
    """
    folder = paths.working_dir() / "benchmark" / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    images = read_pictures(Path(pictures)) if pictures else random_pictures(NUM_PICTURES)
    files = [folder / f"{number:03d}.{format}" for number in range(len(images))]
    for path, image in zip(files, images, strict=True):
        image.save(path, **FORMATS[format])
    try:
        yield files
    finally:
        shutil.rmtree(folder)

"""Examines image files in parallel: format, size, whether each decodes, is blank, or equals another."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader

from kutils.data import transforms
from kutils.system import loaders
from kutils.system.progress import progress_bar

CHUNK_IMAGES = 64  # decoded by a worker before it reports
BLANK_DEVIATION = 2.0  # of 255: an image is blank if each channel has a smaller standard deviation
MOST_KINDS = 20  # sizes, formats or modes listed in a summary; the rest is counted together
FACTS = np.dtype(  # 56 bytes per image: 280 MB for five million
    [
        ("digest", "V16"),  # BLAKE2b of the file
        ("bytes", np.int64),
        ("width", np.int32),
        ("height", np.int32),
        ("format", "S10"),  # Pillow's name; empty if Pillow does not open an image that decodes
        ("mode", "S6"),
        ("sixteen_bit", np.bool_),
        ("animated", np.bool_),
        ("alpha", np.bool_),
        ("blank", np.bool_),
        ("reason", np.int32),  # number of the reason why the image does not decode; 0: it decodes
    ]
)


@dataclass(frozen=True)
class Scan:
    """Facts about the images of some rows."""

    rows: np.ndarray  # int64 [n], in the order given
    facts: np.ndarray  # FACTS [n]; if an image does not decode, all but `reason` are 0
    texts: list[str]  # reasons, each once; the first is empty, the others begin with "image"

    @property
    def decoded(self) -> np.ndarray:  # bool [n]
        return self.facts["reason"] == 0

    def unreadable(self) -> Iterator[tuple[int, str]]:
        """The row and the reason of every image that does not decode."""
        for position in np.flatnonzero(~self.decoded):
            yield int(self.rows[position]), self.texts[self.facts["reason"][position]]


def image_facts(read: Callable[[], bytes]) -> tuple[np.ndarray, str]:
    """Read and decode one image.

    Args:
        read: returns the content of the file, or raises OSError.
    Returns: FACTS [], and a text that says why the image does not decode, empty if it does.
    """
    facts = np.zeros((), FACTS)
    try:
        data = read()
        image = transforms.decode_bytes(data, "image")
    except OSError as error:
        return facts, f"image: {error.strerror or error}"
    except transforms.ImageError as error:
        return facts, str(error)
    facts["digest"] = np.void(hashlib.blake2b(data, digest_size=16).digest())
    facts["bytes"], facts["height"], facts["width"] = len(data), *image.shape[1:]
    # an image of 768 px takes 0.3 ms this way; all its pixels would take 8 ms, and decoding takes 7
    every = max(1, min(image.shape[1:]) // 128)
    deviation = image[:, ::every, ::every].float().std(dim=(1, 2), correction=0)
    facts["blank"] = bool((deviation < BLANK_DEVIATION).all())
    with suppress(Exception), Image.open(io.BytesIO(data)) as picture:  # reads the header; Pillow may refuse
        facts["format"], facts["mode"] = picture.format, picture.mode
        facts["alpha"] = picture.has_transparency_data
        facts["animated"] = getattr(picture, "is_animated", False)
        facts["sixteen_bit"] = picture.mode.startswith("I;16") or (picture.format == "PNG" and data[24] == 16)  # IHDR
    return facts, ""


class ImageFacts(torch.utils.data.Dataset):
    """position -> the result of `image_facts` for the image of that row."""

    def __init__(self, read: Callable[[int], bytes], rows: np.ndarray):
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[np.ndarray, str]:
        return image_facts(partial(self.read, int(self.rows[position])))


def collate_facts(results: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    """FACTS [n] and the reasons of n images, as a worker sends them."""
    facts, reasons = zip(*results, strict=True)
    return np.stack(facts), list(reasons)


def scan(read: Callable[[int], bytes], rows: np.ndarray, num_workers: int = 0, progress: bool = False) -> Scan:
    """Decode the images of the given rows in several processes.

    Args:
        read: row -> the content of its image file; raises OSError.
        rows: int64 [n].
        num_workers: number of processes; 0: this one.
    Raises: ValueError if a process was ended, as happens without enough memory.
    """
    loader = DataLoader(
        ImageFacts(read, rows),
        batch_size=CHUNK_IMAGES,
        num_workers=(num_processes := min(num_workers, -(-len(rows) // CHUNK_IMAGES))),
        timeout=loaders.WORKER_SECONDS if num_processes else 0,
        collate_fn=collate_facts,
        worker_init_fn=loaders.start_worker,
        generator=torch.Generator(),  # else the loader would draw its seed from the generator of drop path
    )
    facts, codes, start = np.zeros(len(rows), FACTS), {"": 0}, 0
    with progress_bar(len(rows), "image", "decoding images", disable=not progress) as bar:
        for part, reasons in loaders.batches(loader):
            part["reason"] = [codes.setdefault(reason, len(codes)) for reason in reasons]
            facts[start : start + len(part)] = part
            start += len(part)
            bar.update(len(part))
    return Scan(rows, facts, list(codes))


def summarize_facts(facts: np.ndarray, input_size: int) -> dict:
    """Count sizes, formats and oddities of decoded images.

    Args:
        facts: FACTS [n] of images that decode.
        input_size: px; images with a shorter side are counted.
    Returns: counts of `sizes` ("width x height"), `formats` and `modes`, the most frequent first; `bytes` (total,
        smallest, median, largest); counts `blank`, `animated`, `sixteen_bit`, `alpha` and `too_small`.
    """
    sizes, counts = np.unique(facts[["width", "height"]], return_counts=True)
    result = {"sizes": most_frequent([f"{width} x {height}" for width, height in sizes.tolist()], counts)}
    for key in ("format", "mode"):
        names, counts = np.unique(facts[key], return_counts=True)
        result[f"{key}s"] = most_frequent([name.decode() or "unknown" for name in names.tolist()], counts)
    size = facts["bytes"]
    result["bytes"] = {"total": int(size.sum())}
    if len(size):
        result["bytes"] |= {"smallest": int(size.min()), "median": int(np.median(size)), "largest": int(size.max())}
    result |= {key: int(facts[key].sum()) for key in ("blank", "animated", "sixteen_bit", "alpha")}
    return result | {"too_small": int((np.minimum(facts["width"], facts["height"]) < input_size).sum())}


def most_frequent(names: list[str], counts: np.ndarray) -> dict[str, int]:
    """name -> count, the most frequent first; all beyond MOST_KINDS are counted as `others`."""
    order = np.argsort(-counts, kind="stable")
    result = {names[number]: int(counts[number]) for number in order[:MOST_KINDS]}
    return result | ({"others": int(counts[order[MOST_KINDS:]].sum())} if len(order) > MOST_KINDS else {})


def content_codes(facts: np.ndarray) -> np.ndarray:
    """int64 [n], the same number for files of the same content."""
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(facts), [None, pa.py_buffer(np.ascontiguousarray(facts["digest"]))]
    )
    return digests.dictionary_encode().indices.to_numpy().astype(np.int64)

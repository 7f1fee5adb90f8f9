"""Packs the images of a data set at training size into few large files, `input/<name>.shards/`.

`kutils shards input/<name>.tsv --size 448` writes them, and so does `kutils import --pack 448`. Training on `<name>`
then reads them in place of the image files. Table, embeddings and folds stay as they are. A shard is a memory-mapped
Arrow file. Row i is in shard i // ROWS_PER_SHARD, unless the record gives the number of rows of each shard.
"""

import argparse
import bisect
import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import v2

from kutils.data import transforms
from kutils.system import arrow, locks, paths, processes
from kutils.system.progress import progress_bar
from kutils.system.tables import check_rows, hash_prompts, read_table

VERSION = 1  # of the files' layout; shards of another version are packed anew
ROWS_PER_SHARD = 2048  # 90 MB of WebP at 448 px
MOST_OPEN = 128  # shards that a process keeps mapped, each with a file descriptor; a window of an epoch needs 32 to 96
IMAGE_FORMATS = ("webp", "jpeg", "png")
QUALITY = 90


@dataclass(frozen=True)
class Encoding:
    """Size and format of packed images.

    Args:
        size: px, of the shorter side; smaller images keep their size.
        format: webp, jpeg or png (lossless).
        quality: 1 to 100; None for png.
    Raises: ValueError for a value outside these.
    """

    size: int
    format: str
    quality: int | None

    def __post_init__(self):
        if self.size < 1 or self.format not in IMAGE_FORMATS:
            raise ValueError(f"size {self.size}, format {self.format!r}: give 1 or more, and one of {IMAGE_FORMATS}")
        allowed = (None,) if self.format == "png" else range(1, 101)
        if self.quality not in allowed:
            wanted = "leave --quality out, png loses nothing" if self.format == "png" else "give 1 to 100"
            raise ValueError(f"quality {self.quality} of {self.format}: {wanted}")

    def encode(self, image: Tensor, **options) -> bytes:
        """Encode an image; the aspect ratio is kept, so that training can still crop.

        Args:
            image: uint8 [3, H, W].
            options: more options of Pillow's writer.
        Returns: the content of an image file.
        """
        if min(image.shape[1:]) > self.size:
            image = F.resize(image, [self.size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        buffer, quality = io.BytesIO(), {} if self.quality is None else {"quality": self.quality}
        F.to_pil_image(image).save(buffer, self.format, **quality, **options)
        return buffer.getvalue()


# ---------------------------------------------------------------- reading


class Shards:
    """Reads the packed images of one data set by row.

    Args:
        starts: first row of each shard.
    """

    def __init__(self, folder: Path, starts: Sequence[int]):
        self.folder, self.starts = folder, list(starts)
        self.mapped = functools.lru_cache(MOST_OPEN)(self.map_shard)

    def __reduce__(self):  # a process that is not forked maps the files again
        return Shards, (self.folder, self.starts)

    def map_shard(self, number: int) -> tuple[pa.Array, np.ndarray | None]:
        """The images of one shard, memory-mapped, and their checksums, which shards of earlier versions lack."""
        table = arrow.map_table(shard_path(self.folder, number))
        images = table["image"].chunk(0)
        images.validate(full=True)  # an offset beyond the end would crash the process
        return images, table["crc32"].to_numpy() if "crc32" in table.column_names else None

    def read(self, row: int) -> bytes:
        """The content of the image file of a row; OSError if the shard cannot be read, or the image is damaged."""
        number = bisect.bisect_right(self.starts, row) - 1
        position = row - self.starts[number]
        try:
            images, checksums = self.mapped(number)
            content = images[position].as_py()
        except (ValueError, IndexError) as error:
            raise OSError(f"{shard_path(self.folder, number)} is damaged ({error}); pack it again") from error
        if checksums is not None and zlib.crc32(content) != checksums[position]:
            raise OSError(f"{shard_path(self.folder, number)} is damaged in image {position}; pack it again")
        return content


def open_shards(tsv_path: Path, images: pa.ChunkedArray) -> Shards | None:
    """Open the shards beside a table.

    Args:
        images: string [rows], its image paths.
    Returns: None if the data set is not packed.
    Raises: ValueError for shards that are unfinished, incomplete, or of other rows.
    """
    folder = shards_folder(tsv_path)
    if not folder.is_dir():
        return None
    advice = f"kutils shards {tsv_path} makes what is missing; delete the folder to read image files"
    record = paths.read_record(record_path(folder))
    if record is None:
        raise ValueError(f"{folder} is not finished: {advice}")
    advice = "import it again with --overwrite" if "shard_rows" in record else advice
    expected = {"version": VERSION, "rows": len(images), "images_sha256": hash_prompts(images)}
    if any(record.get(key) != value for key, value in expected.items()):
        raise ValueError(f"{folder} holds other images than {tsv_path} names, or in another order: {advice}")
    for number, size in enumerate(record["shard_bytes"]):
        path = shard_path(folder, number)
        if not path.is_file() or path.stat().st_size != size:  # reading beyond the end of a map crashes the process
            raise ValueError(f"{path} is not there or not whole: {advice}")
    return Shards(folder, shard_starts(record))


def shard_starts(record: dict) -> list[int]:
    """First row of each shard. Imported shards differ in size, since no shard spans two parts of the source."""
    if "shard_rows" in record:
        return np.cumsum([0, *record["shard_rows"]])[:-1].tolist()
    return list(range(0, record["rows"], ROWS_PER_SHARD))


def have_no_files(tsv_path: Path) -> bool:
    """Whether a table's images exist only in shards, as after an import."""
    return "shard_rows" in (paths.read_record(record_path(shards_folder(tsv_path))) or {})


def shards_folder(tsv_path: Path) -> Path:
    """The folder for the packed images of a table."""
    return tsv_path.with_suffix(".shards")


def record_path(folder: Path) -> Path:
    """The file that says what a folder of shards holds; it is written last."""
    return folder / "record.json"


def shard_path(folder: Path, number: int) -> Path:
    """The file of one shard."""
    return folder / f"{number:05d}.arrow"


# ---------------------------------------------------------------- writing


def pack(tsv_path: Path | str, encoding: Encoding, *, num_workers: int | None = None, progress: bool = True) -> Path:
    """Write `<name>.shards/`, each shard atomically, and the record last.

    A second call, after a kill or after images have changed, writes the shards that are missing or out of date. Until
    all are written, training refuses the data set.

    Args:
        tsv_path: of the data set; it needs no embeddings or folds.
        num_workers: processes that encode; None: one per core.
    Returns: the folder.
    Raises: ValueError for a table or image that cannot be used, or existing shards of another encoding; OSError on a
        full disk.
    """
    tsv_path = Path(tsv_path)
    table = read_table(tsv_path, ["image", "prompt"])
    check_rows(tsv_path, table)
    folder, images = shards_folder(tsv_path), table["image"]
    if have_no_files(tsv_path):
        raise ValueError(f"{folder} was imported without image files; to pack otherwise, import with another --pack")
    written, jobs = [], []
    for number, start in enumerate(range(0, len(images), ROWS_PER_SHARD)):
        names = images.slice(start, ROWS_PER_SHARD).to_pylist()
        written.append(shard_path(folder, number))
        if not is_packed(written[-1], names, encoding):
            jobs.append((written[-1], names, encoding))
    if jobs:
        record_path(folder).unlink(missing_ok=True)
    with progress_bar(len(images), "image", f"packing {tsv_path.name}", disable=not progress) as bar:
        bar.update(len(images) - sum(len(names) for _, names, _ in jobs))
        workers = min(num_workers or os.cpu_count() or 1, len(jobs) or 1)
        one_thread = functools.partial(torch.set_num_threads, 1)
        for done in processes.run_jobs(write_shard, jobs, workers, prepare=one_thread):
            bar.update(done)
    for path in set(folder.glob("*.arrow")) - set(written):  # left from a longer table
        path.unlink()
    record = {"version": VERSION, "rows": len(images), "images_sha256": hash_prompts(images), **asdict(encoding)}
    paths.save_record(record_path(folder), record | {"shard_bytes": [path.stat().st_size for path in written]})
    return folder


def write_shard(path: Path, names: Sequence[str], encoding: Encoding) -> int:
    """Encode the images of one shard.

    Args:
        names: paths of the image files, relative to `input/`.
    Returns: the number of images.
    Raises: ValueError for an image that cannot be read.
    """
    root = path.parent.parent
    try:
        facts = shard_facts(root, names, encoding)
        encoded = [encoding.encode(transforms.decode_rgb(root / name)) for name in names]
    except (transforms.ImageError, FileNotFoundError) as error:
        tsv_path = path.parent.with_suffix(".tsv")
        raise ValueError(f"{error}; kutils check {tsv_path} finds all such images") from error
    write_images(path, encoded, facts)
    return len(names)


def write_images(
    path: Path, encoded: Sequence[bytes] | pa.Array, facts: dict, checksums: np.ndarray | None = None
) -> None:
    """Write one shard, atomically.

    Args:
        checksums: uint32, CRC-32 of each content; None: made here.
    """
    images = pa.array(encoded, pa.large_binary())
    if checksums is None:
        checksums = np.array([zlib.crc32(image.as_buffer()) for image in images], np.uint32)
    columns = {"image": images, "crc32": pa.array(checksums, pa.uint32())}
    schema = arrow.with_facts(pa.schema({name: column.type for name, column in columns.items()}), facts)
    # each image has its own checksum, since a process may read few images of a shard of 90 MB
    arrow.write_batches(path, schema, [pa.record_batch(list(columns.values()), schema=schema)], left_out=["image"])


def shard_facts(root: Path, names: Sequence[str], encoding: Encoding) -> dict:
    """The facts that identify a shard's content: its encoding, and the names, sizes and times of the image files.

    Raises: FileNotFoundError for a missing image.
    """
    status = [(name, stat.st_size, stat.st_mtime_ns) for name in names for stat in [(root / name).stat()]]
    digest = hashlib.sha256(json.dumps(status).encode()).hexdigest()
    return {"version": VERSION, **asdict(encoding), "files": digest}


def is_packed(path: Path, names: Sequence[str], encoding: Encoding) -> bool:
    """Whether a shard exists and is up to date with its image files; ValueError if it has another encoding."""
    try:
        facts = arrow.facts_of(arrow.map_table(path))
        expected = shard_facts(path.parent.parent, names, encoding)
    except (OSError, ValueError):  # no shard, or a missing image, for which packing raises the error
        return False
    if not facts:  # written by something else
        return False
    differing = [
        f"{key} {facts.get(key)}, not {value}" for key, value in asdict(encoding).items() if facts.get(key) != value
    ]
    if differing:
        raise ValueError(f"{path.parent} is packed with {', '.join(differing)}; delete it to pack anew")
    return facts == expected


def main(argv: Sequence[str] | None = None) -> int:
    """`kutils shards`."""
    parser = argparse.ArgumentParser(
        prog="kutils shards",
        description="Encode the images of data sets again at training size, into few large files. Training on NAME "
        "reads them in place of the image files as soon as NAME.shards is complete; delete that folder to undo it.",
        epilog="The same command continues after a stop. Validation reads the same images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="NAME.tsv", help="data sets")
    size = "shorter side, px; smaller images keep their size. More than the recipe's input_size leaves crops sharp"
    parser.add_argument("--size", type=int, default=448, help=size)
    parser.add_argument("--format", choices=IMAGE_FORMATS, default="webp", help="png loses nothing")
    quality = f"1 to 100 (default: {QUALITY}; png has none)"
    parser.add_argument("--quality", type=int, default=argparse.SUPPRESS, help=quality)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="encoding processes")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    encoding = Encoding(args.size, args.format, getattr(args, "quality", None if args.format == "png" else QUALITY))
    for path in args.files:
        with locks.held([path]):
            folder = pack(path, encoding, num_workers=args.workers)
        size = sum(shard.stat().st_size for shard in folder.glob("*.arrow"))
        print(f"{folder}: {size / 1e6:,.1f} MB; training on {path.stem} reads them now")
    return 0

"""Decodes the validation images before a run's first step, since every row must be scored."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from kutils.data import image_files
from kutils.data.datasets import PromptImages
from kutils.data.index import cache_path, fingerprint
from kutils.data.shards import record_path, shards_folder
from kutils.system import paths
from kutils.system.ranks import Ranks

MOST_LISTED = 10  # bad rows, or unreadable images, in a message
SAMPLE = 256  # images to decode if an earlier run could decode all; takes a second


def check_validation_images(data: PromptImages, rows: np.ndarray, num_workers: int, ranks: Ranks) -> None:
    """Decode the images of all rows, shared among ranks and workers; only a sample if an earlier run decoded all.

    A file below `working/cache/` records that all could be decoded. It becomes invalid when a table, embeddings or
    shards of the data change. (505,015 rows of 768 px take two processes 16 minutes.)

    Args:
        rows: int, the validation rows.
    Raises: ValueError on every rank, listing the first ten images that cannot be read.
    """
    path, facts = checked_record(data, rows)
    is_known = ranks.gather_objects(paths.read_record(path) == facts)[0]
    own_rows = rows[ranks.rank :: ranks.world_size]
    if is_known:  # a sample still notices a missing folder or a disk that is not mounted
        count = min(len(own_rows), -(-SAMPLE // ranks.world_size))
        own_rows = np.random.default_rng().choice(own_rows, count, replace=False)
    scan = image_files.scan(data.read_image, own_rows, num_workers)
    own = [f"{data.image_path(row)}{reason.removeprefix('image')}" for row, reason in scan.unreadable()]
    gathered = ranks.gather_objects((own, len(own_rows)))
    messages = [message for own, _ in gathered for message in own]
    if messages:
        forget_checked(data, rows)
        num_examined = sum(count for _, count in gathered)
        listed, files = "\n  ".join(messages[:MOST_LISTED]), " ".join(f"input/{name}.tsv" for name in data.names)
        raise ValueError(
            f"{len(messages)} of {num_examined} validation images cannot be read, and every row must be scored; "
            f"make them anew, or set their rows apart: kutils check {files}\n  {listed}"
        )
    if ranks.is_main and not is_known:
        with contextlib.suppress(OSError):  # if it cannot be written, the next run decodes all
            paths.save_record(path, facts)


def checked_record(data: PromptImages, rows: np.ndarray) -> tuple[Path, dict]:
    """The file that records that the images of these rows could be decoded, and the facts that make it valid."""
    digest = hashlib.sha256(np.ascontiguousarray(rows, np.int64)).hexdigest()
    packed = [record_path(shards_folder(data.root / f"{name}.tsv")) for name in data.names]
    status = [[item.st_size, item.st_mtime_ns] for path in packed if path.is_file() for item in [path.stat()]]
    facts = fingerprint(data.root, data.names) | {"shards": status, "rows_sha256": digest}
    return cache_path(data.root, data.names, f".{digest[:8]}.checked.json"), facts


def forget_checked(data: PromptImages, rows: np.ndarray) -> None:
    """Delete the record, so that the next run decodes all images again."""
    with contextlib.suppress(OSError):
        checked_record(data, rows)[0].unlink(missing_ok=True)

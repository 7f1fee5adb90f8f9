"""Detects damaged files by the checksums inside .npz and .pth files and our Arrow and JSON files.

Files of earlier versions, which have no checksum, are accepted.
"""

import hashlib
import json
import mmap
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

JSON_KEY = "checksum"  # of a JSON object: hex SHA-256 of its other keys
MARK = b"kutils-blocks:"  # precedes the checksum of an Arrow file, which stands in its first message and in its footer
FORMER_MARK = b"kutils-sha256:"  # precedes the checksum in files of earlier versions: one hash of the whole file
SPAN = f" {0:016d} {0:016d}".encode()  # first byte and end of a part that the checksum does not cover
BLANK = MARK + b"0" * 64 + SPAN  # room for the digest and one span; files with many batches have more spans
SEAL = re.compile(rb"kutils-(?:blocks|sha256):[0-9a-f]{64}(?: \d{16} \d{16})+")
ARROW_MAGIC = b"ARROW1"
BLOCK = 1 << 26  # bytes that a thread takes at a time: 64 MB
THREADS = 4


class Damaged(ValueError):
    """A file that is not as it was written; the message names it."""


# ---------------------------------------------------------------- zip files: .npz, .pth


def check_zip(path: Path) -> None:
    """Compare every member of a zip file with its checksum, which NumPy and torch write but torch does not check.

    A file of 13 GB in the page cache takes 4 s on one core.

    Raises: Damaged naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    if bad is not None:
        raise Damaged(f"{path} is damaged: the checksum of {bad} does not fit")


def read_arrays(path: Path, names: Sequence[str] | None = None, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays of an .npz file; NumPy checks their checksums while reading.

    Args:
        names: arrays to read; None: all.
        optional: more arrays, read if the file has them.
    Raises: OSError if it cannot be opened; Damaged if it is damaged, no .npz file, or lacks one of `names`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            wanted = arrays.files if names is None else [*names, *(name for name in optional if name in arrays.files)]
            return {name: arrays[name] for name in wanted}
    except Exception as error:  # NumPy and zipfile raise errors of many kinds, also about pickles
        if isinstance(error, OSError) and error.errno:
            raise
        reason = "it is no .npz file" if "pickle" in str(error) else str(error) or type(error).__name__
        raise Damaged(f"{path} is damaged ({reason})") from error


# ---------------------------------------------------------------- JSON


def with_checksum(content: dict) -> dict:
    """A copy of a JSON object with its checksum as one more key."""
    content = json.loads(json.dumps(content))  # as it will be read: keys as texts
    return content | {JSON_KEY: hash_json(content)}


def without_checksum(content: object, path: Path) -> dict:
    """Check and remove the checksum of a JSON object that was read; Damaged if it is wrong, or if this is no object."""
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object")
    if JSON_KEY in content and content.pop(JSON_KEY) != hash_json(content):
        raise Damaged(f"{path} is damaged, or was edited by hand: its checksum does not fit")
    return content


def hash_json(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- Arrow


def seal_arrow(path: Path, left_out: Sequence[tuple[int, int]] = ()) -> None:
    """Write an Arrow file's checksum into its schema's metadata, over the placeholder: BLANK, and a SPAN for each
    further span.

    Args:
        left_out: first byte and end of each span that the checksum does not cover.
    """
    with path.open("r+b") as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            places = find_marks(content)
            length = len(SEAL.match(content, places[0])[0])
            spans = [*left_out, *[(0, 0)] * ((length - len(BLANK)) // len(SPAN) + 1 - len(left_out))]
            digest = hash_blocks(content, [*((place, place + length) for place in places), *spans])
            seal = MARK + digest.encode() + b"".join(f" {first:016d} {end:016d}".encode() for first, end in spans)
        assert len(seal) == length, f"{path} has no room for {len(left_out)} spans"
        for place in places:
            stream.seek(place)
            stream.write(seal)


def check_arrow(path: Path) -> None:
    """Compare an Arrow file with the checksum in it.

    A file of 14 GB takes 7.5 s of CPU time in several threads; a file of an earlier version, with one hash, takes 12.7
    s in one thread.

    Raises: OSError if it cannot be opened; Damaged if the checksum does not fit, or if it is no Arrow file.
    """
    with path.open("rb") as stream:
        if stream.seek(0, 2) < 2 * len(ARROW_MAGIC):
            raise Damaged(f"{path} is damaged: it is too short")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            places = find_marks(content)
            seals = [SEAL.match(content, place) for place in places]
            is_arrow = content[: len(ARROW_MAGIC)] == ARROW_MAGIC == content[-len(ARROW_MAGIC) :]
            fits = not places or (len(places) == 2 and all(seals) and are_seals_of(content, seals))
    if not (is_arrow and fits):
        raise Damaged(f"{path} is damaged: {'its checksum does not fit' if is_arrow else 'it is no whole Arrow file'}")


def are_seals_of(content: mmap.mmap, seals: Sequence[re.Match]) -> bool:
    """Whether the checksums in a file's head and footer are equal, and match its content."""
    hash_rest = hash_blocks if seals[0][0].startswith(MARK) else hash_at_once
    digest, *ends = seals[0][0][len(MARK) :].decode().split(" ")
    spans = list(zip(map(int, ends[::2]), map(int, ends[1::2]), strict=True))
    holes = [*(seal.span() for seal in seals), *spans]
    return seals[0][0] == seals[1][0] and digest == hash_rest(content, holes)


def find_marks(content: mmap.mmap) -> list[int]:
    """Positions of MARK in an Arrow file; only its first message and its footer are searched."""
    head_end = 16 + int.from_bytes(content[12:16], "little")
    footer_start = len(content) - 10 - int.from_bytes(content[-10:-6], "little")
    spans = ((0, min(head_end, len(content))), (max(footer_start, 0), len(content)))
    found = (content.find(mark, first, end) for first, end in spans for mark in (MARK, FORMER_MARK))
    return sorted({place for place in found if place >= 0})


def rest_of(content: mmap.mmap, holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """First byte and end of each part of a file outside the holes, which are the checksums and the uncovered spans."""
    parts, start = [], 0
    for first, end in [*sorted(holes), (len(content), len(content))]:
        parts.append((start, min(max(start, first), len(content))))
        start = max(start, end)
    return parts


def hash_blocks(content: mmap.mmap, holes: Sequence[tuple[int, int]]) -> str:
    """Hex SHA-256 of the positions and CRC-32 of the blocks of a file, without the holes."""
    blocks = [
        (start, min(start + BLOCK, end)) for first, end in rest_of(content, holes) for start in range(first, end, BLOCK)
    ]

    def checksum(block: tuple[int, int]) -> int:
        with memoryview(content) as view, view[block[0] : block[1]] as part:
            return zlib.crc32(part)

    if len(blocks) < 2 * THREADS:
        sums = list(map(checksum, blocks))
    else:
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(checksum, blocks))
    return hashlib.sha256(json.dumps([blocks, sums]).encode()).hexdigest()


def hash_at_once(content: mmap.mmap, holes: Sequence[tuple[int, int]]) -> str:
    """Hex SHA-256 of a file without the holes."""
    digest = hashlib.sha256()
    with memoryview(content) as view:
        for first, end in rest_of(content, holes):
            with view[first:end] as part:
                digest.update(part)
    return digest.hexdigest()

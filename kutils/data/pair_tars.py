"""Reads pairs from webdataset's tars: files of one key follow each other, as `0001.jpg`, `0001.txt`, `0001.json`.

`tarfile` and `webdataset` take 0.2 ms for the four files of a small pair, as long as all other work on it; reading the
headers here takes 0.01 ms.
"""

import functools
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kutils.data.pairs import EMBEDDING_KEYS, IMAGE_SUFFIXES, MOST_BYTES, PROMPT_KEYS, Fault, Keys, Pair, find_key

BLOCK = 512  # bytes of a tar's block
READ_BYTES = 1 << 20
REGULAR, PAX, LONG_NAME = b"0\x007", b"x", b"L"  # types of members
WITHOUT_CONTENT = b"123456Kg"  # links, devices and folders; the content of K and g is not about a file
TEXTS = ("txt", "prompt", "prompt.txt", "text", "caption", "caption.txt")
READ_SUFFIXES = IMAGE_SUFFIXES | {"txt", "prompt", "text", "caption", "json", "npy"}


class TarError(ValueError):
    """A truncated or damaged tar."""


DAMAGES = (TarError, EOFError, zlib.error, gzip.BadGzipFile)


def open_tar(path: Path) -> BinaryIO:
    """Open a tar, gzipped or not, for sequential reading."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    # no buffer around gzip's: it would lose the data before a truncation
    return gzip.open(path, "rb") if zipped else path.open("rb", READ_BYTES)


def is_tar(header: bytes) -> bool:
    """Whether a file begins like a tar: its first block names a file and has a correct checksum."""
    return len(header) == BLOCK and header[0] > 0 and has_right_sum(header)


def has_right_sum(header: bytes) -> bool:
    try:
        expected = int(header[148:156].strip(b" \x00"), 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * ord(" ") == expected


def read_members(stream: BinaryIO, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of every file in a tar, in order; the content is None if it is not wanted or too large.

    Raises: TarError if the tar is truncated or damaged.
    """
    long_name = long_size = None
    while True:
        header = stream.read(BLOCK)
        if len(header) < BLOCK:
            raise TarError("it ends without its end mark")
        if not header[0]:
            if header.count(0) == BLOCK:
                return
            raise TarError("a file has no name")
        if header[257:262] != b"ustar" and not has_right_sum(header):
            raise TarError("what should be the head of a file is none")
        kind, size = header[156:157], read_size(header[124:136])
        if kind in (PAX, LONG_NAME):
            content = read_content(stream, size)
            if kind == LONG_NAME:
                long_name = content.rstrip(b"\x00")
            else:
                records = read_pax(content)
                long_name, long_size = records.get(b"path", long_name), records.get(b"size", long_size)
            continue
        name = long_name or join_name(header)
        size = size if long_size is None else int(long_size)
        long_name = long_size = None
        if kind not in REGULAR:
            if kind not in WITHOUT_CONTENT or kind in b"Kg":
                skip(stream, size)
            continue
        text = name.decode(errors="backslashreplace")
        if size <= MOST_BYTES and is_wanted(text):
            yield text, read_content(stream, size)
        else:
            skip(stream, size)
            yield text, None


def read_size(number: bytes) -> int:
    if number[0] & 0x80:  # of 8 GB and more
        return int.from_bytes(number[1:], "big")
    try:
        return int(number.strip(b" \x00") or b"0", 8)
    except ValueError as error:
        raise TarError("the size of a file is no number") from error


def join_name(header: bytes) -> bytes:
    name = header[:100].split(b"\x00", 1)[0]
    prefix = header[345:500].split(b"\x00", 1)[0] if header[257:263] == b"ustar\x00" else b""
    return prefix + b"/" + name if prefix else name


def read_pax(content: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE` of an extended header."""
    records = {}
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) or int(length) > len(content):
            raise TarError("an extended header is damaged")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        records[key] = value
        content = content[int(length) :]
    return records


def read_content(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size or len(stream.read(-size % BLOCK)) < -size % BLOCK:
        raise TarError("it is cut off within a file")
    return content


def skip(stream: BinaryIO, size: int) -> None:
    left = size + -size % BLOCK
    while left:
        count = len(stream.read(min(left, READ_BYTES)))
        if not count:
            raise TarError("it is cut off within a file")
        left -= count


# ---------------------------------------------------------------- pairs


def read_tar(path: Path, keys: Keys) -> Iterator[Pair | Fault]:
    """The pairs of one tar, in order; if it is truncated, the incomplete sample is a fault."""
    asked = tuple(f".{name}" for name in (keys.prompt, keys.image, keys.embedding) if name)

    def is_wanted(name: str) -> bool:
        return suffix_of(name) in READ_SUFFIXES or name.endswith(asked)

    key, files = None, []
    try:
        with open_tar(path) as stream:
            for name, content in read_members(stream, is_wanted):
                folder, slash, base = name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if not stem or (stem.startswith("__") and stem.endswith("__")):  # hidden files, webdataset's own
                    continue
                if folder + slash + stem != key:
                    if key is not None:
                        yield from split_sample(key, files, keys)
                    key, files = folder + slash + stem, []
                files.append((extension.lower(), content))
        if key is not None:
            yield from split_sample(key, files, keys)
    except DAMAGES as error:
        yield Fault(key or "", f"the tar is cut off or damaged here: {error}")


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].lower()


def split_sample(key: str, files: list[tuple[str, bytes | None]], keys: Keys) -> Iterator[Pair | Fault]:
    """The pair of one key, or several if names continue with dots, as in `a.1.jpg`, `a.1.txt`, `a.2.jpg`."""
    names = [name for name, _ in files]
    images = [name for name in names if suffix_of(name) in IMAGE_SUFFIXES]
    if keys.image:
        images = [name for name in images if name == keys.image] or [n for n in images if suffix_of(n) == keys.image]
    stems = [name.rpartition(".")[0] for name in images]
    if not images:
        yield Fault(key, f"no image (its files: {', '.join(names)})")
    elif len(set(names)) < len(names):
        yield Fault(key, f"a file is there twice (its files: {', '.join(names)})")
    elif len(images) == 1:
        own = {name.removeprefix(f"{stems[0]}."): content for name, content in files}
        yield read_sample(key, own, images[0].removeprefix(f"{stems[0]}."), keys)
    elif len(set(stems)) == len(images) and all(stems):
        for stem, image in zip(stems, images, strict=True):
            start = f"{stem}."
            own = {name.removeprefix(start): content for name, content in files if name.startswith(start)}
            yield read_sample(f"{key}.{stem}", own, image.removeprefix(start), keys)
    else:
        yield Fault(key, f"{len(images)} images under one key ({', '.join(images)})")


def read_sample(key: str, files: dict[str, bytes | None], image: str, keys: Keys) -> Pair | Fault:
    """The pair in files with one image, or a fault."""
    if files[image] is None:
        return Fault(key, f"{image} has more than {MOST_BYTES:,} bytes")
    fields, embedding = {}, None
    embedding_keys = (keys.embedding,) if keys.embedding else EMBEDDING_KEYS
    for name, content in files.items():
        if name.endswith("json") and content is not None:
            try:
                value = json.loads(content)
            except (ValueError, RecursionError):
                return Fault(key, f"broken JSON in {name}")
            fields |= value if isinstance(value, dict) else {}
        elif name == keys.embedding or (name.endswith(".npy") and name[:-4] in embedding_keys):
            try:
                embedding = read_npy(content)
            except ValueError as error:
                return Fault(key, f"{name}: {error}")
    text = (
        keys.prompt if keys.prompt in files else None if keys.prompt else next((n for n in TEXTS if n in files), None)
    )
    if text is not None and files[text] is not None:
        prompt = files[text].decode("utf-8-sig", errors="replace")
    else:
        text = find_key(fields, PROMPT_KEYS, keys.prompt)
        prompt = fields.get(text)
    if prompt is None:
        available = f"its files: {', '.join(files)}" + (f"; keys of its JSON: {', '.join(fields)}" if fields else "")
        return Fault(key, f"no text ({available})")
    return Pair(key, files[image], prompt, fields, embedding, text)


def read_npy(content: bytes | None) -> np.ndarray:
    """The numbers of an .npy file as a flat array; ValueError for other content."""
    if content is None or content[:6] != b"\x93NUMPY":
        raise ValueError("no NumPy file")
    length = 10 + int.from_bytes(content[8:10], "little") if content[6] == 1 else -1
    dtype = read_npy_header(content[:length]) if length > 0 else None
    if dtype is None or dtype.kind != "f":
        raise ValueError("no NumPy file of floating-point numbers")
    try:
        return np.frombuffer(content, dtype, offset=length)
    except ValueError as error:
        raise ValueError("the NumPy file is cut off") from error


@functools.lru_cache(64)
def read_npy_header(header: bytes) -> np.dtype:
    """The dtype in an .npy file's header; cached, since all files of a source have the same header."""
    stream = io.BytesIO(header)
    try:
        np.lib.format.read_magic(stream)
        return np.lib.format.read_array_header_1_0(stream)[2]
    except ValueError as error:
        raise ValueError("the head of the NumPy file is damaged") from error

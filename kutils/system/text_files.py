"""Opens text files, compressed or not, in any Unicode encoding; names the format of files that are no text."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, TextIO

from kutils.system.output import quoted

SAMPLE_BYTES = 1 << 16  # of a file's beginning, by which its format is recognised
MOST_CHARACTERS = 1 << 26  # limit of a CSV cell: an unclosed quote must not fill the memory
# what reading a damaged compressed file raises
CUT_OFF = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile)
UNREADABLE = {  # first bytes -> what the file is
    b"PK": "a zip file",
    b"\x1f\x8b": "a gzip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7-Zip file",
    b"Rar!": "a RAR file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"%PDF": "a PDF",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image",
    b"\x80\x04": "a pickle",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file: git lfs pull fetches it",
    b"<!doctype html": "a web page, perhaps one that asks to log in before the download",
    b"<html": "a web page, perhaps one that asks to log in before the download",
}
ENCODINGS = {  # byte-order mark -> encoding; the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def describe_binary(head: bytes) -> str:
    """The kind of a file with this beginning, such as `a zip file`; empty if it may hold text."""
    for begin, what in UNREADABLE.items():
        if head.startswith(begin) or (begin.startswith(b"<") and head[:256].strip().lower().startswith(begin)):
            return what
    if head[257:262] == b"ustar":
        return "a tar file"
    return f"no text (it begins with {head[:12]!r})" if encoding_of(head) == "utf-8-sig" and b"\0" in head else ""


def encoding_of(head: bytes) -> str:
    """The encoding of a text with this beginning: by its byte-order mark, or by the positions of zero bytes; else
    UTF-8."""
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    zeros = [head[place::4].count(0) / (len(head) // 4 + 1) for place in range(4)]  # of Latin letters
    for encoding, signs in (("utf-32-le", "xy00"), ("utf-32-be", "00yx"), ("utf-16-le", "x0x0"), ("utf-16-be", "0x0x")):
        if all(sign == "y" or (share > 0.4) == (sign == "0") for share, sign in zip(zeros, signs, strict=True)):
            return encoding
    return "utf-8-sig"


def describe_file(path: Path) -> str:
    """The kind of a file that is no UTF-8 text with line feeds, such as `a zip file`; empty if it is one."""
    with path.open("rb") as stream:
        head = stream.read(SAMPLE_BYTES)
    if what := describe_binary(head):
        return what
    if (encoding := encoding_of(head)) != "utf-8-sig":
        return f"text in {encoding.upper()}; save it as UTF-8"
    return "text with carriage returns alone as line ends; save it with line feeds" if is_old_mac(head) else ""


def is_old_mac(head: bytes) -> bool:
    return b"\r" in head and b"\n" not in head


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file, decompressing gzip, bzip2, xz, or a zip file with one file.

    Raises: ValueError for a zip file with several files; one of CUT_OFF for a damaged one.
    """
    with path.open("rb") as stream:
        head = stream.read(8)
    for begin, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ", lzma)):
        if head.startswith(begin):
            return module.open(path, "rb")
    if not head.startswith(b"PK\x03\x04"):
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    if len(names) != 1:
        what = "an Excel workbook; save it as CSV" if "[Content_Types].xml" in names else "a zip file; unpack it first"
        raise ValueError(f"{path} is {what} (it holds {', '.join(map(quoted, names[:3]))}{', ...' * (len(names) > 3)})")
    return archive.open(names[0])


def open_text(path: Path) -> TextIO:
    """Open a text, compressed or not, in UTF-8, UTF-16 or UTF-32, with or without byte-order mark.

    Lines end with a line feed, a carriage return, or both, and keep their line ends. Bytes that are not UTF-8 become
    lone surrogates.

    Raises: ValueError for a file that holds no text, saying what it is.
    """
    opened = io.BufferedReader(open_unpacked(path), SAMPLE_BYTES)
    head = opened.peek(SAMPLE_BYTES)
    if what := describe_binary(head):
        opened.close()
        raise ValueError(f"{path} is {what}, which is not read here")
    encoding = encoding_of(head)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(opened, encoding=encoding, errors=errors, newline="")


def csv_rows(stream: TextIO, separator: str = ",", *, quoted: bool = True):
    """Python's CSV reader with cells of up to MOST_CHARACTERS (its default limit is 131,072)."""
    csv.field_size_limit(MOST_CHARACTERS)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(stream, strict=True, delimiter=separator, quoting=quoting)

"""Checks each row and text of a memory-mapped file by its own checksum when it is first read.

A checksum of the whole file would have to read all of it before the first answer.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import torch

from kutils.system.checksums import Damaged
from kutils.system.embedding_files import EMBEDDING_DIM

COLUMNS = 4  # of numbers that a row's bytes are multiplied with
# odd, and as random as a hash: a file must have the same sums with any version of NumPy, whose generators may change
RANDOM = hashlib.shake_256(b"kutils rows").digest(4 * EMBEDDING_DIM * COLUMNS + 8 * COLUMNS)
BYTE_FACTORS = torch.from_numpy(np.frombuffer(RANDOM[: -8 * COLUMNS], np.int8).reshape(-1, COLUMNS) | 1)
FACTORS = torch.from_numpy(np.frombuffer(RANDOM[-8 * COLUMNS :], "<i8") | 1)


def row_sums(rows: np.ndarray) -> np.ndarray:
    """A checksum of each row: its bytes, each times a number of its own, added up modulo 2 ** 64.

    A change of one byte always shows, and another one but for 1 in 2 ** 32, as with CRC-32, at a quarter of its time.

    Args:
        rows: [n, D] of any dtype, at most 1,536 bytes each.
    Returns: int64 [n].
    """
    content = torch.from_numpy(np.ascontiguousarray(rows).view(np.int8))
    return (torch._int_mm(content, BYTE_FACTORS[: content.shape[1]]).long() * FACTORS).sum(dim=1).numpy()


def text_sums(texts: Iterable[pa.LargeStringScalar]) -> np.ndarray:
    """CRC-32 of each text in UTF-8: uint32 [n]."""
    return np.array([zlib.crc32(text.as_buffer()) for text in texts], np.uint32)


def check_texts(texts: Iterable[pa.LargeStringScalar], sums: np.ndarray, source: str) -> None:
    """Raise Damaged, which names the source, if a text has another checksum than `sums` (uint32 [n]) says."""
    if not np.array_equal(text_sums(texts), sums):
        raise Damaged(f"{source} is damaged: the checksum of a prompt does not fit; remove it, and make it again")


class CheckedRows:
    """Rows that are read where they are indexed, and compared with their checksums the first time.

    Args:
        rows: [n, D], or what gives such rows for an index, and has a length.
        sums: int64 [n], as `row_sums` gives them; None: the rows are taken as they are.
        describe: what to say of a damaged row, by its number.
    """

    def __init__(self, rows, sums: np.ndarray | None = None, describe: Callable[[int], str] = str):
        self.rows, self.sums, self.describe = rows, sums, describe
        self.unread = np.full(len(rows), sums is not None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: np.ndarray | slice) -> np.ndarray:
        """Some rows, mapped where they are; Damaged for one that is not as it was written."""
        rows, unread = self.rows[some], self.unread[some]
        if unread.any():
            sums = row_sums(rows if unread.all() else rows[unread])
            bad = np.flatnonzero(sums != self.sums[some][unread])
            if len(bad):
                raise Damaged(self.describe(int(np.arange(len(self))[some][unread][bad[0]])))
            self.unread[some] = False
        return rows

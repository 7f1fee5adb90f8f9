"""Finds the file content that ends the process which decodes it; from then on nothing decodes that content.

A process that is looked at alone notes what it is about to decode. What it has noted when it ends, twice, is fatal.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

DIGEST_BYTES = 16
known: set[bytes] = set()  # digests of fatal contents; a process that is started later gets them
note = None  # shared memory of DIGEST_BYTES, in a process that is looked at; zeros: it decodes nothing


def make_note():
    """Shared memory for a process to note what it decodes."""
    return multiprocessing.RawArray("B", DIGEST_BYTES)


@contextmanager
def decoding(content: bytes) -> Iterator[bool]:
    """Note inside the block that a content is being decoded; gives False where it is fatal, and must not be."""
    if note is None and not known:
        yield True
        return
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    if digest in known:
        yield False
        return
    if note is not None:
        note[:] = digest
    try:
        yield True
    finally:  # whatever ends the process from here on, it is not this content
        if note is not None:
            note[:] = bytes(DIGEST_BYTES)


def read_and_clear(memory) -> bytes:
    """What a process had noted when it was ended; empty if it was decoding nothing."""
    digest = bytes(memory)
    memory[:] = bytes(DIGEST_BYTES)
    return digest if any(digest) else b""

"""Finds file content that crashes the process which decodes it, so that no process decodes it again.

A process that runs alone writes a hash of what it is about to decode to shared memory. Content is fatal if two
processes end while they decode it.
"""

import hashlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager

DIGEST_BYTES = 16
known: set[bytes] = set()  # digests of fatal contents; passed to processes that start later
note = None  # in a monitored process, shared memory of DIGEST_BYTES; zeros: it decodes nothing


def make_note():
    """Shared memory in which a process notes the content that it decodes."""
    return multiprocessing.RawArray("B", DIGEST_BYTES)


@contextmanager
def decoding(content: bytes) -> Iterator[bool]:
    """Note that the block decodes this content; yields False if the content is fatal and must not be decoded."""
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
    finally:  # if the process ends after this, the content is not the reason
        if note is not None:
            note[:] = bytes(DIGEST_BYTES)


def read_and_clear(memory) -> bytes:
    """The digest that a process was decoding when it ended; empty if it was decoding nothing."""
    digest = bytes(memory)
    memory[:] = bytes(DIGEST_BYTES)
    return digest if any(digest) else b""

"""Keeps two processes from working on one run folder or table at once; the second one's error names the first."""

import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from kutils.system.paths import remove_leftovers

if TYPE_CHECKING:  # it loads torch
    from kutils.system.ranks import Ranks

PATIENCE_SECONDS = 2  # a process that was killed may take a moment to end


@contextmanager
def held(paths: Sequence[Path], ranks: "Ranks | None" = None) -> Iterator[None]:
    """Hold the locks of some files or folders inside the block; the end of the process, even by a kill, releases them.

    A lock is the hidden file `.NAME.lock` beside NAME, which exists as long as the lock is held.

    Args:
        ranks: all call this, and the main one holds the locks; None: this process alone.
    Raises: ValueError, on every rank, naming the process that holds one of the locks.
    """
    with ExitStack() as stack:
        problem = ""
        if ranks is None or ranks.is_main:
            try:
                for path in sorted(set(paths)):
                    stack.enter_context(locked(path))
            except ValueError as error:
                problem = str(error)
        if problem := problem if ranks is None else ranks.gather_objects(problem)[0]:
            raise ValueError(problem)
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold one lock; continue without it if the folder cannot be written or its file system has no locks."""
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        stream = open_lock(path, lock_path)
    except OSError:  # the error is reported when a result is written
        yield
        return
    with stream:
        os.register_at_fork(after_in_child=stream.close)  # else a worker that outlives this process would hold it
        stream.truncate(0)
        command = " ".join(shlex.join(sys.orig_argv).split())[:200]
        stream.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%H:%M:%S')} ({command})")
        stream.flush()
        remove_leftovers(path.parent)
        try:
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def open_lock(path: Path, lock_path: Path) -> TextIO:
    """Open and lock a file; ValueError naming the holder after PATIENCE_SECONDS, OSError where there are no locks."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        stream = lock_path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if lock_path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                    return stream
            stream.close()  # the holder has just removed the file
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read() or "another process"
            stream.close()
            if time.monotonic() > deadline:
                raise ValueError(f"{path} is in use by {holder}; wait until it has ended, or stop it") from None
            time.sleep(0.1)
        except OSError:
            stream.close()
            raise

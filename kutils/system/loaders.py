"""Guards torch's data loaders: room in shared memory before they start, and one clear error where a process is lost."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from kutils.system.errors import first_line

WORKER_SECONDS = 300  # that a loader waits for a batch: what a process could not send is lost without an error
SHARED_MEMORY = Path("/dev/shm")  # where processes leave their batches; a container has 64 MB of it by default
ADVICE = "give the container more (docker run --shm-size=8g), or load in the training process: num_workers=0"


def check_shared_memory(num_workers: int, batch_bytes: int, batches_ahead: int, processes: int = 1) -> None:
    """Raise ValueError if the batches that loaders hold ready do not fit into /dev/shm.

    Args:
        num_workers: processes of a loader.
        batch_bytes: of a batch.
        batches_ahead: that each of its processes prepares.
        processes: on this machine, each with such a loader.
    """
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    needed = processes * (num_workers * batches_ahead + 1) * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"{SHARED_MEMORY} has {free / 1e6:,.1f} MB free, and the batches of {processes} x {num_workers} loader "
            f"processes take {needed / 1e6:,.1f} MB; {ADVICE}"
        )


def batches(loader: DataLoader | Iterable) -> Iterator:
    """Start a loader's processes, if it has any; gives its batches, and raises ValueError where a process is lost."""
    return guarded(iter(loader), getattr(loader, "num_workers", 0))


def guarded(started: Iterator, num_workers: int) -> Iterator:
    try:
        yield from started
    except (RuntimeError, ConnectionError, EOFError) as error:
        if message := describe_loss(error, num_workers):
            raise ValueError(message) from error
        raise


def describe_loss(error: Exception, num_workers: int | None = None) -> str:
    """What to say where an error is of a loader's process; else empty.

    torch raises it from a signal handler, wherever the main process then is.
    """
    if "DataLoader timed out" in str(error):
        reason = "sent nothing in time"
    elif "unable to allocate shared memory" in str(error):
        reason = "found no room for a batch"
    elif "DataLoader worker (pid" in str(error) or isinstance(error, (ConnectionError, EOFError)):
        reason = "was ended, maybe for lack of memory"
    else:
        return ""
    fewer = f"fewer processes than {num_workers}" if num_workers else "fewer processes"
    return (
        f"a process that loads images {reason} ({first_line(error)}). If {SHARED_MEMORY} is full, {ADVICE}; "
        f"else give {fewer}"
    )

"""Guards torch's data loaders: room in shared memory before they start, and finds the file that ends a process."""

import contextlib
import functools
import itertools
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from kutils.system import children, fatal
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


def start_worker(number: int, known: Set[bytes] = frozenset()) -> None:
    """Let a loader's process end with the main one, however that ends; it would notice after five seconds itself.

    Args:
        known: digests of fatal contents; a process that is not forked has to be told.
    """
    children.end_with_parent()
    fatal.known.update(known)


def batches(loader: DataLoader | Iterable) -> Iterator:
    """Start a loader's processes, if it has any; gives its batches.

    Where a process is lost, the examples that were under way are loaded one by one, to find the file that does it: the
    data set then meets that file as one that cannot be decoded.

    Raises: ValueError where processes are lost, and by no file.
    """
    started = iter(loader)
    if not getattr(loader, "num_workers", 0):
        return guarded(started)
    raise_only_while_waiting()
    return recovered(loader, started)


def guarded(started: Iterator) -> Iterator:
    try:
        yield from started
    except (RuntimeError, ConnectionError, EOFError) as error:
        if message := describe_loss(error):
            raise ValueError(message) from error
        raise


def recovered(loader: DataLoader, started: Iterator) -> Iterator:
    given = without_finding = 0
    while True:
        try:
            batch = wait_for_next(started)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not (message := describe_loss(error, loader.num_workers)):
                raise
            loader._iterator = started = None  # of a loader that keeps its processes: their next pass starts others
            num_known = len(fatal.known)
            if was_ended(error):
                print("warning: a process that loads images was ended; looking for an image that does it", flush=True)
                find_fatal(loader, Rest(loader.batch_sampler, given))
                loader.worker_init_fn = functools.partial(start_worker, known=fatal.known)
            without_finding += len(fatal.known) == num_known
            if without_finding > 1 or not was_ended(error):
                raise ValueError(message) from error
            started = iter(copy_of(loader, Rest(loader.batch_sampler, given)))
            continue
        given += 1
        yield batch


class Rest:
    """The batches of a sampler without the first ones."""

    def __init__(self, sampler: Iterable, given: int):
        self.sampler, self.given = sampler, given

    def __iter__(self) -> Iterator:
        return itertools.islice(iter(self.sampler), self.given, None)


def copy_of(loader: DataLoader, sampler: Iterable) -> DataLoader:
    """A loader as another one, of other batches."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator", "prefetch_factor")
    options = {name: getattr(loader, name) for name in (*names, "multiprocessing_context")}
    return DataLoader(loader.dataset, batch_sampler=sampler, **options)


class Attempts(Dataset):
    """Loads an example as another data set does, notes what it decodes, and gives nothing."""

    def __init__(self, dataset: Dataset, note):
        self.dataset, self.note = dataset, note

    def __getitem__(self, position) -> int:
        fatal.note = self.note
        with contextlib.suppress(Exception):  # it is raised when the example is loaded again
            self.dataset[position]
        return 0


def find_fatal(loader: DataLoader, rest: Rest) -> None:
    """Load the examples that a loader had under way in one process, one by one; those that end it become known."""
    ahead = loader.num_workers * loader.prefetch_factor
    positions = [position for batch in itertools.islice(rest, ahead) for position in batch]
    note, suspected, options = fatal.make_note(), b"", {"num_workers": 1, "prefetch_factor": 1}
    options |= {"timeout": loader.timeout, "generator": torch.Generator()}
    options |= {"multiprocessing_context": loader.multiprocessing_context}
    while positions:
        options["worker_init_fn"] = functools.partial(start_worker, known=fatal.known)
        started = iter(DataLoader(Attempts(loader.dataset, note), None, sampler=positions, **options))
        try:
            while True:
                wait_for_next(started)
                positions = positions[1:]
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            digest = fatal.read_and_clear(note)
            if not digest or not was_ended(error):
                return
            if digest == suspected:  # twice: the system has not ended it by chance, for lack of memory
                fatal.known.add(digest)
            suspected = digest


# ---------------------------------------------------------------- when a process is lost

waiting = False  # for a batch


def wait_for_next(started: Iterator):
    """The next batch; the only place where a process that was lost raises."""
    global waiting
    handler, waiting = signal.getsignal(signal.SIGCHLD), True
    try:
        if hasattr(handler, "of_torch"):
            handler.of_torch(signal.SIGCHLD, None)  # of one that was lost since the last batch
        return next(started)
    finally:
        waiting = False


def raise_only_while_waiting() -> None:
    """Let torch's handler of SIGCHLD raise while a batch is waited for; else it would wherever the process then is."""
    of_torch = signal.getsignal(signal.SIGCHLD)
    if (
        not callable(of_torch)
        or hasattr(of_torch, "of_torch")
        or threading.current_thread() is not threading.main_thread()
    ):
        return

    def handler(number: int, frame) -> None:
        if waiting:
            of_torch(number, frame)

    handler.of_torch = of_torch
    signal.signal(signal.SIGCHLD, handler)


def was_ended(error: Exception) -> bool:
    """Whether an error is of a loader's process that was ended."""
    return "DataLoader worker (pid" in str(error) or isinstance(error, (ConnectionError, EOFError))


def describe_loss(error: Exception, num_workers: int | None = None) -> str:
    """What to say where an error is of a loader's process; else empty."""
    if "DataLoader timed out" in str(error):
        reason = "sent nothing in time"
    elif "unable to allocate shared memory" in str(error):
        reason = "found no room for a batch"
    elif was_ended(error):
        reason = "was ended, maybe for lack of memory"
    else:
        return ""
    fewer = f"fewer processes than {num_workers}" if num_workers else "fewer processes"
    return (
        f"a process that loads images {reason} ({first_line(error)}). If {SHARED_MEMORY} is full, {ADVICE}; "
        f"else give {fewer}"
    )

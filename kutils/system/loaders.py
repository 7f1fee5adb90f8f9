"""Guards torch's data loaders: checks shared memory before they start, and finds files that crash a worker."""

import contextlib
import functools
import itertools
import shutil
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from kutils.system import children, fatal
from kutils.system.errors import first_line

WORKER_SECONDS = 300  # timeout of a batch: a batch that a worker could not send is lost without an error
SHARED_MEMORY = Path("/dev/shm")  # workers put batches here; containers have 64 MB by default
ADVICE = "give the container more (docker run --shm-size=8g), or load in the training process: num_workers=0"


def check_shared_memory(num_workers: int, batch_bytes: int, batches_ahead: int, processes: int = 1) -> None:
    """Raise ValueError if the batches that loaders hold ready do not fit into /dev/shm.

    Args:
        num_workers: of each loader.
        batch_bytes: size of a batch.
        batches_ahead: batches that each worker prefetches.
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
    """Let a loader's worker end at once when the main process ends, even by a kill; by itself it takes five seconds.

    Args:
        known: digests of fatal contents, for a worker that is not forked.
    """
    children.end_with_parent()
    fatal.known.update(known)


def batches(loader: DataLoader | Iterable) -> Iterator:
    """Start a loader's workers, if it has any, and yield its batches.

    If a worker crashes, the examples in progress are loaded one by one to find the file that crashes it; the data set
    then treats that file as one that cannot be decoded.

    Raises: ValueError if workers crash and no file is the reason.
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
            loader._iterator = started = None  # with persistent_workers: the next epoch starts new workers
            traceback.clear_frames(error.__traceback__)  # they hold it: torch would find its worker in the search
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
    """A loader with the options of another one, and other batches."""
    names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator", "prefetch_factor")
    options = {name: getattr(loader, name) for name in (*names, "multiprocessing_context")}
    return DataLoader(loader.dataset, batch_sampler=sampler, **options)


class Attempts(Dataset):
    """Loads the examples of another data set, notes the content that is being decoded, and returns no data."""

    def __init__(self, dataset: Dataset, note):
        self.dataset, self.note = dataset, note

    def __getitem__(self, position) -> int:
        fatal.note = self.note
        with contextlib.suppress(Exception):  # raised again when the example is loaded for training
            self.dataset[position]
        return 0


def find_fatal(loader: DataLoader, rest: Rest) -> None:
    """Load the examples that were in progress one by one in one worker; content that crashes it is added to
    `fatal.known`."""
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
            if digest == suspected:  # twice: not a kill by chance, as for lack of memory
                fatal.known.add(digest)
            suspected = digest


# ---------------------------------------------------------------- when a process is lost

waiting = False  # whether this process waits for a batch


def wait_for_next(started: Iterator):
    """The next batch; only here does a crashed worker raise an error."""
    global waiting
    handler, waiting = signal.getsignal(signal.SIGCHLD), True
    try:
        if hasattr(handler, "of_torch"):
            handler.of_torch(signal.SIGCHLD, None)  # for a worker that crashed since the last batch
        return next(started)
    finally:
        waiting = False


def raise_only_while_waiting() -> None:
    """Let torch's handler of SIGCHLD raise only while a batch is waited for, not at any point of the program."""
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
    """Whether an error says that a loader's worker has died."""
    return "DataLoader worker (pid" in str(error) or isinstance(error, (ConnectionError, EOFError))


def describe_loss(error: Exception, num_workers: int | None = None) -> str:
    """A message for the user if an error is about a loader's worker; else empty."""
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

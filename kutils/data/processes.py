"""Runs the work on a data set in processes, which end with this one and report what they have done."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from kutils.system import children
from kutils.system.tables import DataError

LOOK_SECONDS = 0.5  # between two looks at what the processes have done
counted = None  # in a process of `run`: what all have done together


def start_worker(shared) -> None:
    global counted
    counted = shared
    children.end_with_parent()  # else it would wait for work for ever
    torch.set_num_threads(1)


def count(number: int) -> None:
    """Say in a process that so many more images are done."""
    if counted is not None:
        with counted.get_lock():
            counted.value += number


def run(
    function: Callable, jobs: Iterable[tuple], num_workers: int, advance: Callable[[int], object] = lambda _: None
) -> Iterator:
    """Call a function with each job's arguments, in processes; yields its results as they come.

    Args:
        num_workers: processes.
        advance: is called with the numbers that the function has reported by `count`.
    Raises: what the function raises; DataError where a process was ended.
    """
    # not fork: a notebook's process may hold threads of PyTorch
    context = multiprocessing.get_context("spawn")
    shared, seen = context.Value("q", 0), 0
    with ProcessPoolExecutor(num_workers, context, start_worker, (shared,)) as pool:
        try:
            pending = {pool.submit(function, *job) for job in jobs}
            while pending:
                done, pending = wait(pending, LOOK_SECONDS, FIRST_COMPLETED)
                now = shared.value
                advance(now - seen)
                seen = now
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise DataError(f"a process was ended, maybe for lack of memory; give fewer --workers ({error})") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

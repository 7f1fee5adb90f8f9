"""Runs jobs in processes that end with this one, and counts what they have done so far."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from kutils.system import children

LOOK_SECONDS = 0.5  # between two looks at what the processes have done
counter = None  # in a process of `run_jobs`: what all of them have done together
report: Callable[[int], object] | None = None  # where jobs run in this process: takes what one has just done


def start_job_process(shared, prepare: Callable[[], object] | None) -> None:
    global counter
    counter = shared
    children.end_with_parent()  # else it would wait for work for ever
    if prepare:
        prepare()


def count(number: int) -> None:
    """Add what a job has just done to what all have done; nothing happens outside of `run_jobs`."""
    if report is not None:
        report(number)
    if counter is not None:
        with counter.get_lock():
            counter.value += number


def run_jobs(
    function: Callable,
    jobs: Iterable[tuple],
    num_workers: int,
    *,
    advance: Callable[[int], object] = lambda number: None,
    prepare: Callable[[], object] | None = None,
) -> Iterator:
    """Call a function with each job's arguments, in processes; yields its results as they come.

    Args:
        num_workers: processes; 0: this one.
        advance: is called with the numbers that the function has given to `count` since the last call.
        prepare: is called first in each process.
    Raises: what the function raises; ValueError where a process was ended.
    """
    global report
    if not num_workers:
        report = advance
        try:
            yield from (function(*job) for job in jobs)
        finally:
            report = None
        return
    # not fork: a notebook's process may hold threads of PyTorch
    context = multiprocessing.get_context("spawn")
    shared, seen = context.Value("q", 0), 0
    with ProcessPoolExecutor(num_workers, context, start_job_process, (shared, prepare)) as pool:
        try:
            pending = {pool.submit(function, *job) for job in jobs}
            while pending:
                done, pending = wait(pending, LOOK_SECONDS, FIRST_COMPLETED)
                now = shared.value
                advance(now - seen)
                seen = now
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process was ended, maybe for lack of memory; give fewer --workers ({error})"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

"""Runs jobs in a pool of processes that end with this one, and counts their progress."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from kutils.system import children, fatal

LOOK_SECONDS = 0.5  # between two readings of the processes' progress
in_job = False  # whether this process runs a job of a pool
counter = None  # in a process of `run_jobs`: the shared count of all processes
report: Callable[[int], object] | None = None  # if jobs run in this process: called with each new count


def start_job_process(shared, prepare: Callable[[], object] | None, known: set[bytes], note) -> None:
    global counter
    counter = shared
    fatal.known, fatal.note = known, note
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends its processes
    children.interrupt_once()
    interrupt = signal.getsignal(signal.SIGTERM)

    def terminate(number: int, frame) -> None:
        if not in_job:  # where Python or the pool would show an exception
            os._exit(128 + number)
        interrupt(number, frame)

    signal.signal(signal.SIGTERM, terminate)
    children.end_with_parent()  # else it would wait for jobs for ever
    if not multiprocessing.parent_process().is_alive():  # it was killed before that
        os._exit(1)
    if prepare:
        prepare()


def run_job(function: Callable, *job):
    """Call the function; SIGTERM ends this process, else the pool would give it the next job.

    The job first removes its temporary files; the pool may send the signal again, which does not interrupt that.
    """
    global in_job
    in_job = True
    try:
        return function(*job)
    except children.Interrupted as ended:
        ended.__traceback__ = None  # frees the job's frames: `with` blocks interrupted while they ended end now
        os._exit(128 + ended.number)
    finally:
        in_job = False


def count(number: int) -> None:
    """Add a job's progress to the shared count; without effect outside of `run_jobs`."""
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
    """Call a function with each job's arguments, in processes; yields the results in order of completion.

    If a process crashes, its jobs run again one by one to find the file that crashes it; the function then treats that
    file as one that cannot be decoded. An interrupt ends the processes.

    Args:
        function: it may be called again with a job that was interrupted.
        num_workers: processes; 0: this one.
        advance: called with the sum of what the function has passed to `count` since the last call.
        prepare: is called first in each process.
    Raises: what the function raises; ValueError if processes crash and no file is the reason.
    """
    global report
    if not num_workers:
        report = advance
        try:
            yield from (function(*job) for job in jobs)
        finally:
            report = None
        return
    left, without_finding = dict(enumerate(jobs)), 0
    while left:
        try:
            yield from run_in_pool(function, left, num_workers, advance, prepare)
        except BrokenProcessPool as error:
            print(f"warning: a process was ended ({error}); its jobs run again, one by one", flush=True)
            num_known = len(fatal.known)
            for number in list(islice(left, num_workers)):  # jobs are begun in their order
                yield from run_alone(function, number, left, advance, prepare)
            without_finding += len(fatal.known) == num_known
            if without_finding > 1:
                raise lost_process(error) from error


def run_alone(function: Callable, number: int, left: dict[int, tuple], advance, prepare) -> Iterator:
    """Run one job in a process of its own, again after each fatal file that it meets; yields its result."""
    note, suspected = fatal.make_note(), b""
    while number in left:
        try:
            yield from run_in_pool(function, left, 1, advance, prepare, note, [number])
        except BrokenProcessPool as error:
            digest = fatal.read_and_clear(note)
            if not digest:
                raise lost_process(error) from error
            if digest == suspected:  # twice: the system has not ended it by chance, for lack of memory
                fatal.known.add(digest)
            suspected = digest


def lost_process(error: BrokenProcessPool) -> ValueError:
    return ValueError(f"a process was ended, maybe for lack of memory; give fewer --workers ({error})")


def run_in_pool(
    function: Callable, left: dict[int, tuple], num_workers: int, advance, prepare, note=None, numbers=None
) -> Iterator:
    """Run the remaining jobs, or those with given numbers, and remove finished ones; yields results."""
    # not fork: a notebook's process may hold threads of PyTorch
    context = multiprocessing.get_context("spawn")
    shared, seen, others = context.Value("q", 0), 0, set(multiprocessing.active_children())
    options = (shared, prepare, fatal.known, note)
    with ProcessPoolExecutor(num_workers, context, start_job_process, options) as pool:
        try:
            # starts the processes, which inherit this: Python would show a traceback at Ctrl-C until they ignore it
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending = {pool.submit(run_job, function, *left[number]): number for number in numbers or left}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            while pending:
                done, _ = wait(pending, LOOK_SECONDS, FIRST_COMPLETED)
                now = shared.value
                advance(now - seen)
                seen = now
                for future in done:
                    result = future.result()
                    del left[pending.pop(future)]
                    yield result
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted: what they have begun leaves no files
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            raise

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import spawn
from pathlib import Path

import pytest
from fixtures.forked_python import REAL_PYTHON

from kutils.system import paths, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks the process that runs the tests")


def run_in_a_job_process(function, *job) -> int:
    """Run a job as a process of the pool does; returns its exit code."""

    def run():
        processes.start_job_process(None, None, set(), None)
        processes.run_job(function, *job)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode


def send_terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_twice_leaves_no_temporary_file(tmp_path):
    """The pool sends SIGTERM to all its processes as soon as one has ended."""

    unlink = Path.unlink

    def interrupted_unlink(path, missing_ok=False):
        send_terminate()
        unlink(path, missing_ok)

    def write(path):
        Path.unlink = interrupted_unlink  # in this process alone
        with paths.atomic_path(path) as temporary:
            temporary.write_text("half")
            send_terminate()

    assert run_in_a_job_process(write, tmp_path / "image.txt") == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_signal_between_a_block_and_its_end_leaves_no_temporary_file(tmp_path):
    class Interrupted:
        """A context manager whose end is interrupted before it reaches that of `atomic_path`."""

        def __init__(self, path):
            self.manager = paths.atomic_path(path)

        def __enter__(self):
            return self.manager.__enter__()

        def __exit__(self, *error):
            send_terminate()
            return self.manager.__exit__(*error)

    def write(path):
        with Interrupted(path) as temporary:
            temporary.write_text("half")

    assert run_in_a_job_process(write, tmp_path / "image.txt") == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_signal_that_python_drops_comes_again(tmp_path, capfd):
    """Exceptions while an object is deleted are dropped."""

    class Held:
        def __del__(self):
            send_terminate()
            time.sleep(0.01)

    def write(path):
        with paths.atomic_path(path) as temporary:
            temporary.write_text("half")
            held = Held()
            del held
            time.sleep(20)

    assert run_in_a_job_process(write, tmp_path / "image.txt") == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_a_signal_between_jobs_ends_a_process_at_once(capfd):
    """While Python or the pool runs its own code, an exception would be shown."""

    class Held:
        def __del__(self):
            send_terminate()
            time.sleep(20)

    assert run_in_a_job_process(Held) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_an_interrupt_of_a_process_that_python_still_starts_says_nothing(tmp_path, capfd):
    """A terminal sends Ctrl-C to all processes; these get it before they run any line of ours."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -INT $$\nexec '{REAL_PYTHON}' \"$@\"\n")
    python.chmod(0o700)
    spawn.set_executable(str(python))
    assert sorted(processes.run_jobs(abs, [(-1,), (-2,)], 2)) == [1, 2]
    said = capfd.readouterr()
    assert said.out == said.err == ""

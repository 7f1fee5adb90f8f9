"""Two processes at once: the second one is told who works there, and a killed one holds nothing."""

import os
import subprocess

import pytest
from fixtures.forked_python import REAL_PYTHON

from kutils.system import locks

HOLD = """
import sys, time
from pathlib import Path
from kutils.system import locks
with locks.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `table.tsv`."""
    command = [REAL_PYTHON, "-c", HOLD, str(tmp_path / "table.tsv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it_and_a_kill_ends_the_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0)
    said = rf"table\.tsv is in use by process {holder.pid} on .* since .*python.*; wait until it has ended"
    with pytest.raises(ValueError, match=said), locks.held([tmp_path / "table.tsv", tmp_path / "a.tsv"]):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".table.tsv.lock"]  # that of a.tsv is given back
    holder.kill()
    holder.wait()
    with locks.held([tmp_path / "table.tsv"]):
        assert f"process {os.getpid()} on" in (tmp_path / ".table.tsv.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_keep_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0)
    read, write = os.pipe()
    with locks.locked(tmp_path / "run"):
        if not (child := os.fork()):
            os.read(read, 1)
            os._exit(0)
    with locks.locked(tmp_path / "run"):  # though the child lives
        os.write(write, b"x")
    os.waitpid(child, 0)


def test_where_nothing_can_be_written_work_goes_on_without_a_lock(tmp_path):
    (tmp_path / "file").touch()
    with locks.held([tmp_path / "file" / "table.tsv"]):
        pass

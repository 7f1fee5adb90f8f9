"""A loader whose processes are lost, or that has too little shared memory, is an error that says what to do."""

import os
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from fixtures.forked_python import REAL_PYTHON
from torch.utils.data import DataLoader

from kutils.system import loaders

Usage = namedtuple("Usage", "free")


def test_all_batches_come():
    loaded = loaders.batches(DataLoader(torch.arange(8), batch_size=4))
    assert [batch.tolist() for batch in loaded] == [[0, 1, 2, 3], [4, 5, 6, 7]]


LOST = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from kutils import __main__
from kutils.system import loaders

class Numbers:
    def __len__(self):
        return 8

    def __getitem__(self, number):
        if number == 5:
            {what}
        return number

class Command:
    def main(arguments):
        for batch in loaders.batches(DataLoader(Numbers(), batch_size=2, num_workers=1, timeout={timeout})):
            pass

__main__.importlib.import_module = lambda name: Command
sys.exit(__main__.run("check", []))
"""


@pytest.mark.parametrize(
    ("what", "timeout", "said"),
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)", 60, "was ended, maybe for lack of memory", marks=pytest.mark.slow
        ),
        ("time.sleep(600)", 1, "sent nothing in time (DataLoader timed out after 1 seconds)"),
    ],
)
def test_a_lost_process_is_one_line(what, timeout, said):
    script = LOST.format(what=what, timeout=timeout)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("error: a process that loads images " + said), done.stderr
    assert "num_workers=0" in done.stderr and done.stderr.count("\n") == 1


def test_the_room_is_what_the_batches_take(monkeypatch):
    """2 ranks x (3 processes x 2 batches + 1 under way) x 1,000 bytes."""
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda path: Usage(14_000))
    loaders.check_shared_memory(3, 1000, 2, processes=2)
    monkeypatch.setattr(loaders.shutil, "disk_usage", lambda path: Usage(13_999))
    loaders.check_shared_memory(0, 1000, 2, processes=2)
    with pytest.raises(ValueError, match=r"/dev/shm has 0\.0 MB free, and the batches of 2 x 3 loader .*--shm-size=8g"):
        loaders.check_shared_memory(3, 1000, 2, processes=2)


SMALL = """
mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"
"""
LOAD = """
import torch
from torch.utils.data import DataLoader
from kutils.system import loaders
for batch in loaders.batches(DataLoader(torch.zeros(64, 10_000), batch_size=8, num_workers=2, timeout=5)):
    pass
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid(), reason="mounts a small /dev/shm")
def test_a_small_shared_memory_is_an_error_and_no_wait(tmp_path):
    command = ["unshare", "-m", "sh", "-c", SMALL, "sh", REAL_PYTHON, "-c", LOAD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 1 and "If /dev/shm is full, give the container more" in done.stderr

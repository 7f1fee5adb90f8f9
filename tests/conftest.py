"""A small data set and a small recipe that many tests start from. Everything is on the CPU and without network."""

import os

from fixtures.datasets import TINY, make_dataset, use_folders
from fixtures.forked_python import PYTHON
from fixtures.ranks import Ranks

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch processes side by side would spin away each other's time
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
import signal
import sys
from multiprocessing import spawn

import pytest
import torch

from kutils.runs.recipes import Recipe

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a script's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny_recipe():
    """Make a Recipe of the smallest network; keyword arguments change keys."""
    return lambda **changes: Recipe(**{**TINY, **changes})


@pytest.fixture(autouse=True)
def no_traces(tmp_path_factory, monkeypatch):
    """Nothing that a test works out lands in the repository's `working/`."""
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path_factory.mktemp("working")))


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    """What a test starts, or what it tests, starts at once: `sys.executable` is a Python that is forked."""
    before = spawn.get_executable()
    monkeypatch.setattr(sys, "executable", PYTHON)
    spawn.set_executable(PYTHON)
    yield
    spawn.set_executable(before)


@pytest.fixture
def start_ranks(tmp_path_factory):
    """Start `python -m MODULE` or a script, as one process or as ranks; what still runs at the end is killed."""
    started = []

    def start_one(target, *arguments, num_ranks: int = 1, cwd=None) -> Ranks:
        started.append(Ranks(target, arguments, num_ranks, tmp_path_factory.mktemp("output"), cwd))
        return started[-1]

    yield start_one
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with the data set `toy`: 80 images of 40 prompts."""
    root = tmp_path_factory.mktemp("toy")
    make_dataset(root)
    return root


@pytest.fixture
def workspace(toy, tmp_path, monkeypatch):
    """A folder with `input/`, a copy of `toy`, and `working/`, which kutils uses."""
    use_folders(monkeypatch, tmp_path)
    shutil.copytree(toy, tmp_path / "input")
    (tmp_path / "working").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `input/` and `working/`, where first_fold0, second_fold0 and first_fold1 have been trained."""
    from fixtures.finished_runs import train_three

    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        train_three(root)
    return root


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):
    """A copy of `trained`, which kutils uses."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    use_folders(monkeypatch, tmp_path)
    return tmp_path

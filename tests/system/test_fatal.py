"""A file that ends the process which decodes it is found, and all others are decoded as if it could not be read."""

import itertools
import time

import pytest
import torch
from fixtures import ending
from fixtures.ensembles import save_images
from torch.utils.data import DataLoader, Dataset, Subset

from kutils.data import transforms
from kutils.data.checking import check_datasets
from kutils.data.datasets import load_datasets
from kutils.ensemble import image_cache
from kutils.models import checkpoints
from kutils.system import fatal, loaders, processes
from kutils.system.paths import is_running
from kutils.training.train import main as train

ENDS = "ends the process that decodes it"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(fatal, "known", set())


class Contents(Dataset):
    """Lengths of contents; number 3 is fatal, and so is 10."""

    def __len__(self):
        return 16

    def __getitem__(self, number):
        return ending.decode({3: ending.FATAL[0], 10: ending.FATAL[1]}.get(number, bytes(number + 1)))


EXPECTED = [-1 if number in (3, 10) else number + 1 for number in range(16)]


def test_a_loader_finds_each_and_its_next_pass_loses_nothing(capfd):
    loader = DataLoader(Contents(), 2, num_workers=2, persistent_workers=True, timeout=300)
    assert torch.cat(list(loaders.batches(loader))).tolist() == EXPECTED
    said = capfd.readouterr().out
    # a search may begin while its loader's other process ends by the second file: it finds nothing, and comes again
    assert said.count("a process that loads images was ended; looking for an image that does it") in (2, 3)
    assert torch.cat(list(loaders.batches(loader))).tolist() == EXPECTED
    assert "was ended" not in capfd.readouterr().out and len(fatal.known) == 2


@pytest.mark.slow
def test_processes_that_are_not_forked_find_it_too():
    few = Subset(Contents(), [3, 4])
    loader = DataLoader(few, 2, num_workers=1, timeout=300, multiprocessing_context="spawn")
    assert torch.cat(list(loaders.batches(loader))).tolist() == [-1, 5]


def test_a_process_that_is_lost_raises_nowhere_but_where_a_batch_is_waited_for():
    """The consumer works on while a process ends; torch's own handler would raise in its midst."""
    loader = DataLoader(Contents(), 1, num_workers=1, prefetch_factor=2, timeout=300)
    came = []
    for batch in loaders.batches(loader):
        total = sum(number % 7 for number in range(300_000))  # long enough for the process to end meanwhile
        came.append((int(batch), total))
    assert [number for number, _ in came] == EXPECTED and len({total for _, total in came}) == 1


def test_a_connection_that_was_reset_does_not_hide_the_file(monkeypatch, capfd):
    """A batch of a process that has just died can fail before torch has seen its end."""
    real, calls = loaders.wait_for_next, itertools.count()

    def wait(started):
        if next(calls) == 2:  # by now number 3 has been asked for
            (worker,) = started._workers
            deadline = time.monotonic() + 300
            while is_running(worker.pid) and time.monotonic() < deadline:
                time.sleep(0.01)
            raise ConnectionResetError
        return real(started)

    monkeypatch.setattr(loaders, "wait_for_next", wait)
    loader = DataLoader(Contents(), 1, num_workers=1, prefetch_factor=2, timeout=300)
    assert torch.cat(list(loaders.batches(loader))).tolist() == EXPECTED
    assert capfd.readouterr().out.count("looking for an image that does it") == len(fatal.known) == 2


class Once(Dataset):
    """Ends its process while it decodes number 2, in the first attempt alone, as the system may for lack of memory."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return ending.end_once(self.path) if number == 2 else number


def test_a_process_that_was_ended_by_chance_accuses_no_file(tmp_path):
    loader = DataLoader(Once(tmp_path / "seen"), 1, num_workers=1, timeout=300)
    assert torch.cat(list(loaders.batches(loader))).tolist() == [0, 1, 7, 3] and not fatal.known


def test_jobs_find_each_and_go_on(capfd):
    jobs = [[b"a", b"bb"], [ending.FATAL[0], b"ccc"], [b"d"], [b"ee", ending.FATAL[1], ending.FATAL[0]], [b"f"]]
    done = sorted(processes.run_jobs(ending.decode_all, [(job,) for job in jobs], 2))
    assert done == [[-1, 3], [1], [1], [1, 2], [2, -1, -1]]
    assert "a process was ended" in capfd.readouterr().out


def test_jobs_that_end_by_chance_run_again_and_others_are_an_error(tmp_path):
    assert list(processes.run_jobs(ending.end_once, [(tmp_path / "seen",)], 1)) == [7] and not fatal.known
    with pytest.raises(ValueError, match="a process was ended, maybe for lack of memory; give fewer --workers"):
        list(processes.run_jobs(ending.end_always, [(1,), (2,)], 1))


# ---------------------------------------------------------------- what users start


def test_the_check_sets_it_apart(workspace, monkeypatch):
    data = load_datasets(["toy"], need_folds=False)
    ending.end_at(monkeypatch, data.read_image(5))
    (checked,) = check_datasets([workspace / "input" / "toy.tsv"], num_workers=2, progress=False)
    assert [checked.reasons[code] for code in checked.bad if code] == [f"image {ENDS}"] and checked.bad[5]


def test_a_prediction_takes_it_for_unreadable(monkeypatch, tmp_path):
    save_images(tmp_path / "images")
    images = image_cache.find_images(tmp_path / "images")
    plain = {}
    for chosen, pixels in image_cache.PixelCache(images, 24).batches(range(len(images)), 2):
        plain |= dict(zip(chosen.tolist(), pixels, strict=True))
    ending.end_at(monkeypatch, images[4].read_bytes())
    cache, came = image_cache.PixelCache(images, 24, num_workers=2), {}
    for chosen, pixels in cache.batches(range(len(images)), 2):
        came |= dict(zip(chosen.tolist(), pixels, strict=True))
    assert cache.bad[4] == f"{images[4]} {ENDS}" and not came.pop(4).any()
    assert all(torch.equal(came[position], plain[position]) for position in came) and len(came) == len(images) - 1


@pytest.mark.slow
def test_training_goes_on_as_with_an_image_that_cannot_be_read(workspace, tiny_recipe, monkeypatch):
    data = load_datasets(["toy"])
    row = int(data.training_rows(0)[3])
    content, path = data.read_image(row), workspace / "tiny.yaml"
    path.write_text(tiny_recipe(num_workers=2, checkpoint_every_steps=1).to_yaml())

    def weights(prefix):
        assert train(["--config", str(path), "--fold", "0", f"prefix={prefix}"]) == 0
        listed = (workspace / "working" / "runs" / f"{prefix}_fold0" / "unreadable_images.tsv").read_text()
        assert listed.count(f"\n{row}\t") == 1
        return listed, checkpoints.read(next((workspace / "working").glob(f"models/*/{prefix}_fold0_epoch*.pth")))[
            "model"
        ]

    with monkeypatch.context() as patch:
        ending.end_at(patch, content)
        listed, lost = weights("lost")
    assert ENDS in listed
    monkeypatch.setattr(fatal, "known", set())
    whole = transforms.decode_content

    def unreadable(data, name, kind):
        if data == content:
            raise transforms.ImageError(f"{name} cannot be read")
        return whole(data, name, kind)

    monkeypatch.setattr(transforms, "decode_content", unreadable)
    _, expected = weights("unreadable")
    assert all(torch.equal(lost[name], expected[name]) for name in expected)

"""Images of a folder: found, decoded once, kept within a budget, and gone with the process."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kutils.data import transforms
from kutils.ensemble import image_cache


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, one after the other."""
    whole, seen = transforms.decode_rgb, []
    monkeypatch.setattr(transforms, "decode_rgb", lambda path: seen.append(path) or whole(path))
    return seen


def in_order(cache, positions, batch_size=5):
    """Pixels of all batches, by position."""
    found = {}
    for chosen, batch in cache.batches(positions, batch_size):
        assert len(chosen) <= batch_size and batch.dtype == torch.uint8
        found |= {int(position): row.clone() for position, row in zip(chosen, batch, strict=True)}
    return found


def test_images_are_found_whatever_their_extension(images):
    assert [path.name for path in images] == [
        "a.JPG", "b.png", "c.jpeg", "d.webp", "e.gif", "f.gif", "g.png", "h.png", "i.tiff", "j.bmp",
        "k.dotted.name.png", "l.webp", "m.png", "n.jpg",
    ]  # fmt: skip


def test_two_files_of_one_name_are_refused_or_the_first_is_taken(tmp_path, images):
    (tmp_path / "images" / "c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.jpeg and c\.png have the same id 'c'"):
        image_cache.find_images(tmp_path / "images")
    with pytest.warns(UserWarning, match=r"c\.jpeg and c\.png have the same id 'c'; the first is taken"):
        assert image_cache.find_images(tmp_path / "images", same_name_is_error=False) == images
    with pytest.raises(ValueError, match="no folder of images"):
        image_cache.find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_image_is_decoded_once(images, decoded, num_workers):
    cache = image_cache.PixelCache(images, 24, budget_bytes=1e9, num_workers=num_workers)
    assert cache.num_bytes == 14 * 3 * 24 * 24
    first = in_order(cache, range(14))
    assert sorted(first) == list(range(14)) and sorted(cache.bad) == [12, 13]
    for position in range(12):
        expected = transforms.resize_square(transforms.decode_rgb(images[position]), 24)
        torch.testing.assert_close(first[position], expected, rtol=0, atol=0)
    assert not first[12].any()
    del decoded[:]
    again = in_order(cache, range(14), batch_size=4)
    assert sorted(cache.bad) == [12, 13]
    assert num_workers or decoded == images[12:]  # what could not be read is tried again
    for position in range(14):
        torch.testing.assert_close(again[position], first[position], rtol=0, atol=0)


def test_what_the_budget_does_not_hold_is_decoded_again(images, decoded):
    cache = image_cache.PixelCache(images, 10, budget_bytes=5.9 * 300)
    assert cache.capacity == 5
    first = in_order(cache, range(14))
    assert len(decoded) == 14
    second = in_order(cache, range(14))
    assert decoded[14:] == images[5:] and all((first[number] == second[number]).all() for number in range(14))
    nothing = image_cache.PixelCache(images, 10)
    assert nothing.num_bytes == 0 and len(in_order(nothing, range(3))) == 3


def test_a_pass_that_was_cut_is_gone_on_with(images, decoded):
    cache = image_cache.PixelCache(images, 10, budget_bytes=1e9)
    batches = cache.batches(range(14), 4)
    next(batches)
    del batches
    assert len(in_order(cache, range(14))) == 14
    assert len(decoded) == 14


def test_a_file_that_can_be_read_the_second_time_is_good(images, monkeypatch):
    whole, calls = transforms.decode_rgb, []

    def failing_once(path):
        calls.append(path)
        if len(calls) == 1:
            raise transforms.ImageError("the mount is away")
        return whole(path)

    monkeypatch.setattr(transforms, "decode_rgb", failing_once)
    cache = image_cache.PixelCache(images[:3], 10, budget_bytes=1e9)
    assert not in_order(cache, range(3))[0].any() and cache.bad == {0: "the mount is away"}
    assert in_order(cache, range(3))[0].any() and cache.bad == {} and len(calls) == 4


def test_half_of_a_small_disk_is_left(images, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * 300))
    assert image_cache.PixelCache(images, 10, budget_bytes=1e9).capacity == 2


def test_nothing_is_left_on_the_disk_however_the_process_ends(tmp_path, images):
    program = f"""
import os, signal
from kutils.ensemble import image_cache
images = image_cache.find_images({str(tmp_path / "images")!r})
cache = image_cache.PixelCache(images, 64, budget_bytes=1e9, folder={str(tmp_path)!r})
for _ in cache.batches(range(14), 5): pass
print(sum(cache.pixels[0].ravel()[:9]) > 0, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9 and done.stdout == "True\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "images"]


def test_a_full_disk_keeps_nothing_and_loses_nothing(images, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = image_cache.PixelCache(images, 10, budget_bytes=1e9)
    assert cache.num_bytes == 0 and len(in_order(cache, range(14))) == 14
    assert "No space left on device" in capsys.readouterr().out

"""A data set by a diffusion model: complete after a kill, the same on any ranks, and nothing bad in it."""

import errno
import json
import re
import signal
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from fixtures import tiny_diffusion
from PIL import Image

import kutils.__main__
from kutils.data import checking, datasets, preparation
from kutils.generation import diffusion, generate, rendering, sampling
from kutils.generation.diffusion import Sampler
from kutils.generation.image_sets import ImageSet, image_seed
from kutils.generation.settings import DiffusionSettings
from kutils.system import paths
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table

PROMPTS = ['a "red" cat', "two dogs", "a cat, in the rain", "x"]
FAST = {"size": 64, "save_size": 32, "steps": 3, "device": "cpu", "batch_size": 3, "lossless": True}
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_diffusion.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(tmp_path, model):
    """Make the data set `name` of PROMPTS, two images each; keyword arguments change settings."""

    def make(name="set", prompts=PROMPTS, overwrite=False, **changes):
        settings = DiffusionSettings(**({"model": str(model)} | FAST | changes))
        image_set = ImageSet(
            tmp_path / "input" / name, prompts, 2, ".webp", {"source": pa.array(["me"] * len(prompts))}
        )
        return sampling.sample_dataset(image_set, settings, ALONE, overwrite=overwrite)

    return make


@pytest.fixture
def arguments(tmp_path, model):
    """The command line for PROMPTS, or others; written to a prompts file first."""

    def arguments(prompts=PROMPTS, name="set", model=model, **changes):
        write_table(tmp_path / "p.tsv", {"prompt": prompts, "source": ["me"] * len(prompts)})
        listed = [str(tmp_path / "p.tsv"), "--backend", "diffusers", "--output", str(tmp_path / "input" / name)]
        listed += ["--images-per-prompt", "2", "--model", str(model)]
        for key, value in (FAST | changes).items():
            listed += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return listed

    return arguments


def files_of(folder):
    """Content and time of every image below a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.webp")}


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path), int) for path in sorted(folder.rglob("*.webp"))}


def assert_alike(first: dict, second: dict) -> None:
    """The same images, but for the rounding of batches of another size."""
    assert first.keys() == second.keys() and first
    assert max(np.abs(first[name] - second[name]).max() for name in first) <= 2


def stand_in_for(monkeypatch, is_bad):
    """A pipeline whose images of some (prompt, seed) are black; returns the list of (prompt, seed) it is asked for."""
    asked, sample = [], Sampler.sample

    def stand_in(self, prompts, seeds):
        asked.extend(zip(prompts, seeds, strict=True))
        made = sample(self, prompts, seeds)
        bad = [is_bad(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return [(pixels, "black" if black else "") for (pixels, _), black in zip(made, bad, strict=True)]

    monkeypatch.setattr(Sampler, "sample", stand_in)
    return asked


# ---------------------------------------------------------------- what is made


def test_the_data_set_is_in_the_format_of_the_recipes(make, tmp_path, model):
    path = make()
    table = read_table(path, ["image", "prompt", "fold", "source"])
    assert table["prompt"].to_pylist() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert table["fold"].to_pylist() == [-1] * 8 and table["source"].to_pylist() == ["me"] * 8
    assert table["image"][3].as_py() == "set_images/00000/0000001_1.webp"

    # lossless: exactly what the pipeline gave, made smaller by a filter written out here
    settings = DiffusionSettings(**(FAST | {"model": str(model)}))
    (sample,) = Sampler(diffusion.load_pipeline(settings, ALONE.device), settings)(["two dogs"], [1])
    saved = np.asarray(Image.open(tmp_path / "input" / table["image"][3].as_py()))
    assert saved.shape == (32, 32, 3)
    distances = (np.arange(64) + 0.5) / 2 - 0.5 - np.arange(32)[:, None]
    weights = np.where(np.abs(distances) < 3, np.sinc(distances) * np.sinc(distances / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    narrow = np.einsum("xj,ijc->ixc", weights, sample.pixels.astype(float)).round().clip(0, 255)  # 8 bits in between
    expected = np.einsum("yi,ixc->yxc", weights, narrow).round().clip(0, 255)
    assert np.abs(saved - expected).max() <= 1

    record = json.loads((tmp_path / "input" / "set_images" / "generation.json").read_text())
    assert record["model"] == str(model) and record["dtype"] == "float32" and record["steps"] == 3
    assert record["started_with"]["diffusers"] and len(record["weights_sha256"]) == 64


def test_lossless_keeps_pixels_and_quality_costs_bytes(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=2)
    for name, changes in {
        "exact": {"lossless": True},
        "fine": {"lossless": False, "quality": 95},
        "coarse": {"lossless": False, "quality": 10},
    }.items():
        settings = DiffusionSettings(**(FAST | {"save_size": 64} | changes))
        sampling.save_image(pixels, tmp_path / f"{name}.webp", settings)
    found = {path.stem: np.asarray(Image.open(path), int) for path in tmp_path.glob("*.webp")}
    assert np.array_equal(found["exact"], pixels)
    errors = [np.abs(found[name] - pixels).mean() for name in ("fine", "coarse")]
    assert 0 < errors[0] < errors[1] < 30


def test_images_depend_on_prompt_and_number_alone(make, tmp_path):
    make("a")
    make("b", prompts=PROMPTS[::-1], batch_size=1)
    first, second = pixels_of(tmp_path / "input" / "a_images"), pixels_of(tmp_path / "input" / "b_images")
    moved = {f"{3 - int(name[:7]):07d}{name[7:]}": pixels for name, pixels in second.items()}
    assert_alike(first, moved)
    assert np.abs(first["0000000_0.webp"] - first["0000000_1.webp"]).mean() > 10


def test_the_whole_path_to_training(workspace, make, tmp_path):
    assert tmp_path / "input" == paths.input_dir()
    prompts = [f"{animal} {place}" for animal in ("a cat", "two dogs", "an owl") for place in "abcdefg"]
    make("drawn", prompts=prompts)
    report = preparation.prepare_datasets(["drawn"], threshold=0.95, num_folds=3)
    data = datasets.load_datasets(["drawn"])
    assert report["prompts"] == 21 and len(data) == 42 and set(data.folds.tolist()) == {0, 1, 2}
    (checked,) = checking.check_datasets([tmp_path / "input" / "drawn.tsv"], num_workers=1, progress=False)
    assert checked.is_in_order and checked.report["images"]["decoded"] == 42
    table = read_table(tmp_path / "input" / "drawn.tsv", ["source"])
    assert table["source"].to_pylist() == ["me"] * 42  # folds rewrite the table, and leave other columns
    folded = (tmp_path / "input" / "drawn.tsv").read_bytes()
    make("drawn", prompts=prompts)
    assert (tmp_path / "input" / "drawn.tsv").read_bytes() == folded


# ---------------------------------------------------------------- again, and otherwise


def test_what_is_missing_is_made_again_and_the_rest_is_kept(make, tmp_path, monkeypatch, capsys):
    path, folder = make(), tmp_path / "input" / "set_images"
    before, table = files_of(folder), path.read_bytes()
    for name in ("0000001_1.webp", "0000003_0.webp"):
        (folder / "00000" / name).unlink()
    asked = stand_in_for(monkeypatch, lambda prompt, seed: False)
    make(batch_size=1)
    assert asked == [("two dogs", image_seed("two dogs", 1)), ("x", image_seed("x", 0))]
    after = files_of(folder)
    assert after.keys() == before.keys() and path.read_bytes() == table
    assert {name for name in after if after[name] != before[name]} == {"0000001_1.webp", "0000003_0.webp"}
    capsys.readouterr()
    monkeypatch.setattr(diffusion, "load_pipeline", None)  # nothing is left to make
    make()
    assert "is complete (8 images)" in capsys.readouterr().out


def test_a_data_set_made_otherwise_is_not_touched(make, tmp_path):
    make()
    before = files_of(tmp_path / "input")
    for changes, said in (
        ({"steps": 4}, r"set.tsv was made with steps 3 \(now 4\)"),
        ({"guidance": 2.0}, r"guidance 7.5 \(now 2.0\)"),
        ({"dtype": "bfloat16"}, r"dtype float32 \(now bfloat16\)"),
        ({"prompts": PROMPTS[:2]}, "num_prompts 4"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**changes)
    with pytest.raises(ValueError, match=r"backend diffusers \(now shapes\)"):
        rendering.render_dataset(ImageSet(tmp_path / "input" / "set", ["a cat"], 3, ".jpg"))
    (tmp_path / "input" / "set_images" / "00000" / "0000000_0.webp").unlink()
    other = tiny_diffusion.save(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was made with weights_sha256 \w{64} \(now \w{64}\)"):
        make(model=str(other))
    same = tiny_diffusion.save(tmp_path / "same")
    make(model=str(same), attention_slicing=True, batch_size=8)  # another name, another speed
    after = files_of(tmp_path / "input")
    del before["0000000_0.webp"], after["0000000_0.webp"]
    assert before == after


def test_another_version_of_the_library_is_told(make, tmp_path, capsys):
    make()
    path = tmp_path / "input" / "set_images" / "generation.json"
    record = paths.read_json(path)
    record["started_with"]["diffusers"] = "0.1"
    paths.save_record(path, record)
    (tmp_path / "input" / "set_images" / "00000" / "0000000_0.webp").unlink()
    make()
    assert "warning: this set was started with diffusers 0.1 (now " in capsys.readouterr().out
    assert json.loads(path.read_text())["started_with"]["diffusers"] == "0.1"


def test_images_that_come_later_do_not_cost_folds(make, tmp_path, monkeypatch):
    stand_in_for(monkeypatch, lambda prompt, seed: prompt == "x")
    path = make()
    assert read_table(path, ["image"]).num_rows == 6
    table = read_table(path, ["image", "prompt", "source"])
    write_table(path, {name: table[name] for name in table.column_names} | {"fold": [0, 0, 1, 1, 2, 2]})
    folded = path.read_bytes()
    make()  # fails again: the table is still of the images that are there
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"6 rows, and 8 images are there; it stays as it is. --overwrite"):
        make()
    assert path.read_bytes() == folded
    make(overwrite=True)
    assert path.with_name("set.tsv.bak").read_bytes() == folded
    assert read_table(path, ["fold"])["fold"].to_pylist() == [-1] * 8


# ---------------------------------------------------------------- bad images


def test_bad_images_are_made_again_or_listed(make, tmp_path, monkeypatch, capsys):
    unlucky = image_seed("two dogs", 1)
    stand_in_for(monkeypatch, lambda prompt, seed: prompt == 'a "red" cat' or seed == unlucky)
    table = read_table(make(), ["image", "prompt"])
    folder = tmp_path / "input" / "set_images"
    assert table["prompt"].to_pylist() == [prompt for prompt in PROMPTS[1:] for _ in range(2)]
    assert not (folder / "00000" / "0000000_0.webp").exists()
    failed = read_table(folder / "failed.tsv", ["prompt_row", "number", "reason", "prompt"])
    assert failed["prompt_row"].to_pylist() == ["0", "0"] and failed["number"].to_pylist() == ["0", "1"]
    assert failed["prompt"].to_pylist() == [PROMPTS[0]] * 2 and "black" in failed["reason"][0].as_py()
    said = capsys.readouterr().out
    assert "2 images failed and are left out" in said and "failed.tsv lists them" in said
    assert "6 images of 4 prompts, 6 of them new, 1 in a second attempt (another seed)" in said

    monkeypatch.undo()
    assert read_table(make(), ["image"]).num_rows == 8  # tried again, by a model that is whole by now
    assert not (folder / "failed.tsv").exists()


def test_a_model_that_makes_nothing_is_stopped(make, tmp_path, monkeypatch):
    black = tiny_diffusion.save(tmp_path / "black", tiny_diffusion.blacken)
    with pytest.raises(ValueError, match="set_images holds no image of these prompts"):
        make(model=str(black))
    assert read_table(tmp_path / "input" / "set_images" / "failed.tsv", ["reason"]).num_rows == 8
    monkeypatch.setattr(sampling, "MOST_FAILED", 6)
    with pytest.raises(ValueError, match=r"all of the first 6 images failed \(black .*--upcast-attention"):
        make(model=str(black))


# ---------------------------------------------------------------- the command, cut and on several ranks


def test_errors_are_one_line(arguments, tmp_path, monkeypatch, capsys):
    for changes, message in (
        ({"size": 60}, "error: --size 60: give a multiple of 8"),
        ({"model": "nobody/nothing"}, "error: --model nobody/nothing: it is no folder here"),
    ):
        assert kutils.__main__.run("generate", arguments(**changes)) == 1
        error = capsys.readouterr().err
        assert error.startswith(message) and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[generate\]'"):
        generate.main(arguments())
    assert not list(tmp_path.glob("input/*"))  # the folder is there for a lock
    with pytest.raises(SystemExit):
        generate.main([*arguments(), "--workers", "2"])
    assert "--workers is not for --backend diffusers" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="only --backend diffusers makes images on several ranks"):
        generate.main([str(tmp_path / "p.tsv"), "--output", str(tmp_path / "shapes")])


def test_a_full_disk_costs_no_image(arguments, make, tmp_path, monkeypatch, capsys):
    saved, atomic_path = [], paths.atomic_path

    def full(path):
        if len(saved) == 3 and str(path).endswith(".webp"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved.extend([path] * str(path).endswith(".webp"))
        return atomic_path(path)

    monkeypatch.setattr(paths, "atomic_path", full)
    assert kutils.__main__.run("generate", arguments()) == 1
    assert re.search(r"error: .*No space left on device.*; make room, and the same command", capsys.readouterr().err)
    folder = tmp_path / "input" / "set_images"
    kept = files_of(folder)
    assert len(kept) == 3 and not list(folder.rglob(".*")) and not (tmp_path / "input" / "set.tsv").exists()
    monkeypatch.undo()
    generate.main(arguments())
    make("whole")
    assert kept.items() <= files_of(folder).items()
    assert_alike(pixels_of(folder), pixels_of(tmp_path / "input" / "whole_images"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_run_that_was_cut_goes_on(arguments, start_ranks, tmp_path, number):
    prompts = [f"prompt {row}" for row in range(150)]
    command = arguments(prompts)
    folder = tmp_path / "input" / "set_images"
    child = start_ranks("kutils", "generate", *command)
    deadline = time.monotonic() + 300
    while len(list(folder.rglob("0*.webp"))) < 10:
        assert child.running and time.monotonic() < deadline, child.stderr
        time.sleep(0.02)
    if number == signal.SIGKILL:
        child.kill()
    else:
        child.processes[0].send_signal(number)
    code = child.wait()
    kept = files_of(folder)
    assert 10 <= len([name for name in kept if ".partial" not in name]) < 300
    if number == signal.SIGTERM:
        assert code == 143 and "error: stopped by a signal; start the same command again" in child.stderr
        assert "Traceback" not in child.stderr and not [name for name in kept if ".partial" in name]
    whole = {name: content for name, content in kept.items() if ".partial" not in name}
    for name in whole:
        Image.open(folder / "00000" / name).load()  # whole
    generate.main([*command[:7], "--table-only"])  # those after it say how images are made
    assert read_table(tmp_path / "input" / "set.tsv", ["image"]).num_rows == len(whole)
    generate.main(command)
    table = read_table(tmp_path / "input" / "set.tsv", ["image"])
    assert table.num_rows == 300 and whole.items() <= files_of(folder).items()


RANK_1_FAILS = """
import os, sys
from kutils.__main__ import run
from kutils.generation import diffusion

call = diffusion.Sampler.__call__
done = []

def fails_later(self, prompts, numbers):
    if os.environ["RANK"] == "1" and done:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    done.append(prompts)
    return call(self, prompts, numbers)

diffusion.Sampler.__call__ = fails_later
sys.exit(run("generate", sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_share_the_work_and_one_that_fails_loses_nothing(arguments, make, start_ranks, tmp_path):
    prompts = [f"prompt {row}" for row in range(9)]  # 18 images: 9 each, in batches of 3
    (tmp_path / "fails.py").write_text(RANK_1_FAILS)
    done = start_ranks(tmp_path / "fails.py", *arguments(prompts), num_ranks=2)
    assert done.wait() != 0
    assert "error: rank 1 failed; images are kept, and the same command makes the rest" in done.stderr
    assert "illegal memory access" in done.stderr
    folder = tmp_path / "input" / "set_images"
    first_half = {f"{image // 2:07d}_{image % 2}.webp" for image in range(0, 18, 2)}
    assert set(files_of(folder)) == first_half | {"0000000_1.webp", "0000001_1.webp", "0000002_1.webp"}
    assert not (tmp_path / "input" / "set.tsv").exists()
    kept = files_of(folder)

    said = start_ranks("kutils", "generate", *arguments(prompts), num_ranks=2).run()
    assert said.count("18 images of 9 prompts, 6 of them new") == 1  # rank 0 alone speaks
    assert kept.items() <= files_of(folder).items()
    make("alone", prompts=prompts, batch_size=1)
    assert_alike(pixels_of(folder), pixels_of(tmp_path / "input" / "alone_images"))
    assert read_table(tmp_path / "input" / "set.tsv", ["image"]).num_rows == 18

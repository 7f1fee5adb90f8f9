"""Inputs are found by what they hold, and what is missing is said with the tree of what is there."""

import json
import os
import sys
import tempfile

import pytest
import torch
from fixtures.datasets import make_dataset

from kutils.data import datasets
from kutils.kaggle import mounts
from kutils.runs import launch


def competition(folder, header="imgId_eId,val"):
    (folder / "images").mkdir(parents=True)
    (folder / "sample_submission.csv").write_text(f"{header}\nx_0,0.1\n")
    return folder / "images"


@pytest.mark.parametrize("place", [".", "sdip", "competitions/sdip", "a/b/c"])
def test_the_competition_is_found_wherever_it_is_mounted(tmp_path, place):
    (tmp_path / "datasets" / "me" / "images").mkdir(parents=True)
    competition(tmp_path / "another-competition", header="id,label")
    expected = competition(tmp_path / place)
    assert mounts.find_images_folder(tmp_path) == expected


def test_no_competition_shows_the_tree_and_two_ask_which(tmp_path):
    (tmp_path / "datasets" / "me").mkdir(parents=True)
    for number in range(20):
        (tmp_path / "datasets" / "me" / f"{number:02d}.png").touch()
    with pytest.raises(ValueError) as caught:
        mounts.find_images_folder(tmp_path)
    lines = str(caught.value).splitlines()
    assert (
        lines[1:5] == [f"{tmp_path}/", "  datasets/", "    me/", "      00.png"]
        and lines[-1] == "      ... and 12 more"
    )
    first, second = competition(tmp_path / "a"), competition(tmp_path / "b")
    with pytest.raises(ValueError, match=f"{first}, {second}"):
        mounts.find_images_folder(tmp_path)


# ---------------------------------------------------------------- training


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """Inputs and working/ of a Kaggle notebook, with a temporary folder of their own; what it sets is undone."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KUTILS_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path / "working"))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("input", "working", "temporary"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_data_sets_of_several_inputs_become_one_folder(kaggle):
    owner = kaggle / "input" / "datasets" / "me"
    make_dataset(owner / "toy-tables" / "part", "toy", num_prompts=20)
    (owner / "toy-tables" / "part" / "toy_images").rename(kaggle / "toy_images")
    (owner / "toy-images").mkdir()
    (kaggle / "toy_images").rename(owner / "toy-images" / "toy_images")  # a data set of images alone
    make_dataset(kaggle / "input" / "other-flat", "other", num_prompts=20)
    folder = mounts.link_datasets(["toy", "other", "absent"], kaggle / "input")
    os.environ["KUTILS_INPUT"] = str(folder)
    data = datasets.load_datasets(["toy", "other"])
    assert len(data) == 80 and all(data.image_path(row).is_file() for row in (0, 79))
    assert mounts.link_datasets(["toy"], kaggle / "input") == folder  # again
    make_dataset(kaggle / "input" / "copy", "toy", num_prompts=20)
    with pytest.raises(ValueError, match=r"toy.tsv is there several times") as caught:
        mounts.link_datasets(["toy"], kaggle / "input")
    assert str(kaggle / "input" / "copy" / "toy.tsv") in str(caught.value)


def test_two_sets_whose_folders_have_one_name_are_refused(kaggle):
    for name in ("toy", "other"):
        make_dataset(kaggle / "input" / name, name, num_prompts=20)
        (kaggle / "input" / name / f"{name}_images").rename(kaggle / "input" / name / "images")
    with pytest.raises(ValueError, match="have the same name: rename one") as caught:
        mounts.link_datasets(["toy", "other"], kaggle / "input")
    assert str(kaggle / "input" / "toy" / "images") in str(caught.value)


def test_what_is_mounted_in_both_forms_is_found_once(kaggle):
    expected = competition(kaggle / "input" / "competitions" / "sdip")
    (kaggle / "input" / "sdip").symlink_to(kaggle / "input" / "competitions" / "sdip")
    assert mounts.find_images_folder(kaggle / "input").samefile(expected)
    make_dataset(kaggle / "input" / "datasets" / "me" / "toy", "toy", num_prompts=20)
    (kaggle / "input" / "toy").symlink_to(kaggle / "input" / "datasets" / "me" / "toy")
    assert (mounts.link_datasets(["toy"], kaggle / "input") / "toy.tsv").is_file()


def test_pretrained_weights_are_found_by_their_name(kaggle, tiny_recipe):
    recipe = tiny_recipe(pretrained=True)
    (kaggle / "r.yaml").write_text(recipe.to_yaml())
    run = launch.Run(kaggle / "r.yaml", recipe, 0, ("epochs=2",))
    assert mounts.with_pretrained(run, kaggle / "input") is run  # none is there: the error comes where they are loaded
    for place in ("flat", "datasets/me/weights"):
        folder = kaggle / "input" / place
        folder.mkdir(parents=True)
        (folder / "test_convnext.safetensors").write_bytes(place.encode())
        found = mounts.with_pretrained(run, kaggle / "input")
        (folder / "test_convnext.safetensors").unlink()
        assert found.recipe.pretrained == str(kaggle / "temporary" / "kutils-pretrained")  # wherever it is mounted
        assert found.overrides == ("epochs=2", f"pretrained={found.recipe.pretrained}")
    random = launch.Run(kaggle / "r.yaml", tiny_recipe(pretrained=False), 0, ())
    assert mounts.with_pretrained(random, kaggle / "input") is random


def previous_output(root, run, step, checkpoint=b"weights"):
    """What a previous version of a training notebook left, `step` updates in."""
    folder = root / "runs" / run.folder.name
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("x")
    (folder / "resume.pt").write_bytes(str(step).encode())
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"epoch": 1, "step": n}) + "\n" for n in (5, step)))
    models = root / "models" / run.recipe.save_dir
    models.mkdir(parents=True)
    for name in ("tiny_fold0_best_cossim.pth", "tiny_fold1_best_cossim.pth"):
        (models / name).write_bytes(checkpoint)
    return folder


def test_the_previous_version_that_came_farthest_is_copied_once(kaggle, tiny_recipe, capsys):
    run = launch.Run(kaggle / "r.yaml", tiny_recipe(), 0, ())
    root = kaggle / "input"
    previous_output(root / "kernel-v1", run, 10)
    latest = previous_output(root / "notebooks" / "me" / "kernel", run, 20, b"the latest")
    for path in [latest, *latest.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)  # inputs are read-only
    mounts.bring_run(run, root)
    assert (run.folder / "resume.pt").read_bytes() == b"20" and str(latest) in capsys.readouterr().out
    (run.folder / "resume.pt").write_bytes(b"21")  # the copy is not read-only
    (run.folder / "logs" / "new").write_text("")
    assert run.recipe.checkpoint_path(0).read_bytes() == b"the latest" and not run.recipe.checkpoint_path(1).exists()
    mounts.bring_run(run, root)
    assert (run.folder / "resume.pt").read_bytes() == b"21"  # what is there stays
    assert not list(kaggle.rglob("*.partial"))


def test_the_stage_before_is_found_by_its_name(kaggle, tiny_recipe):
    recipe = tiny_recipe(stage=2, prefix="two", initialize_from="tiny/tiny_fold{fold}_best_cossim.pth")
    run = launch.Run(kaggle / "r.yaml", recipe, 1, ())
    previous_output(kaggle / "input" / "flat", launch.Run(kaggle / "r.yaml", tiny_recipe(), 0, ()), 3, b"stage 1")
    mounts.bring_run(run, kaggle / "input")
    assert recipe.initial_checkpoint(1).read_bytes() == b"stage 1" and not run.folder.exists()


def test_outside_of_kaggle_nothing_is_moved(workspace, tiny_recipe, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    before, run = dict(os.environ), launch.Run(workspace / "r.yaml", tiny_recipe(pretrained=True), 0, ())
    assert mounts.prepare_training(run) is run
    assert dict(os.environ) == before and not list((workspace / "working").iterdir())


def test_the_machine_is_described():
    said = mounts.describe_machine()
    assert f"torch {torch.__version__.split('+')[0]}" in said and "GB of memory" in said and "commit " in said

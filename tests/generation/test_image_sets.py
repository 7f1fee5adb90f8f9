"""What is known of a data set before its images are made: seeds, names, what is missing, and the table's rules."""

import os
import time

import numpy as np
import pyarrow as pa
import pytest

from kutils.generation.image_sets import ImageSet, image_seed, read_prompts
from kutils.system.tables import read_table, write_table


def test_seeds_are_what_they_were():
    # printf "0\ta red apple" | sha256sum, its first 63 bits: the pictures of the demo depend on it
    assert image_seed("a red apple", 0) == 6306634311379651740
    seeds = {image_seed("x", number, attempt) for number in range(5) for attempt in range(3)}
    assert len(seeds) == 15


def test_names_and_what_is_missing(tmp_path):
    prompts = [f"prompt {row}" for row in range(2001)]
    image_set = ImageSet(tmp_path / "many", prompts, 3, ".webp")
    assert image_set.name(3 * 1999 + 2) == "many_images/00001/0001999_2.webp"
    assert image_set.prompt(3 * 1999 + 2) == ("prompt 1999", 2)
    there = [0, 1, 5, 3 * 1000, 3 * 2000 + 2]
    for image in there:
        image_set.path(image).parent.mkdir(parents=True, exist_ok=True)
        image_set.path(image).touch()
    folder = tmp_path / "many_images" / "00000"
    for stranger in ("0000001_3.webp", "0002001_0.webp", "0000002_0.jpg", "notes.txt"):  # of no image of this set
        (folder / stranger).touch()
    old, young = folder / ".0000002_0.1234abcd.partial.webp", folder / ".0000002_1.1234abcd.partial.webp"
    for leftover in (old, young):
        leftover.touch()
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    assert image_set.missing().tolist() == [image for image in range(6003) if image not in there]
    assert not old.exists() and young.exists()  # the young one may be of an image that is being written


def test_the_table_follows_the_images_and_keeps_what_it_would_lose(tmp_path):
    image_set = ImageSet(tmp_path / "set", ["a", 'b "c"'], 2, ".webp", {"source": pa.array(["me", "you"])})
    assert image_set.update_table(np.array([1]))
    table = read_table(image_set.tsv_path, ["image", "prompt", "fold", "source"])
    assert table["image"].to_pylist() == [
        f"set_images/00000/{name}.webp" for name in ("0000000_0", "0000001_0", "0000001_1")
    ]
    assert table["prompt"].to_pylist() == ["a", 'b "c"', 'b "c"'] and table["source"].to_pylist() == [
        "me",
        "you",
        "you",
    ]
    assert image_set.update_table(np.array([], np.int64))  # nothing of anybody's was in it
    assert not image_set.update_table(np.array([], np.int64))
    whole = read_table(image_set.tsv_path, ["image"])
    columns = {name: whole[name] for name in whole.column_names} | {"fold": [0, 0, 1, 1]}
    write_table(image_set.tsv_path, columns)
    folded = image_set.tsv_path.read_bytes()
    assert not image_set.update_table(np.array([], np.int64))
    with pytest.raises(ValueError, match=r"4 rows, and 3 images are there; .* --overwrite"):
        image_set.update_table(np.array([2]))
    assert image_set.tsv_path.read_bytes() == folded
    assert image_set.update_table(np.array([2]), overwrite=True)
    assert (tmp_path / "set.tsv.bak").read_bytes() == folded
    assert read_table(image_set.tsv_path, ["fold"])["fold"].to_pylist() == [-1] * 3
    with pytest.raises(ValueError, match="no image of these prompts"):
        image_set.update_table(np.arange(4))


def test_prompts_come_with_their_sources_and_folds(tmp_path):
    path = tmp_path / "p.tsv"
    write_table(path, {"prompt": ["b", 'a "b', "b"], "source": ["x", "y", "z"], "fold": [3, 1, 3]})
    prompts, columns = read_prompts(path)
    assert prompts == ["b", 'a "b']
    assert {name: values.to_pylist() for name, values in columns.items()} == {"source": ["x", "y"], "fold": [3, 1]}
    write_table(path, {"prompt": ["b", "a"]})
    assert read_prompts(path) == (["b", "a"], {})
    path.write_text("prompt\tsource\nb\tx\n \ty\n")
    with pytest.raises(ValueError, match=r"p.tsv, line 3: the prompt is empty"):
        read_prompts(path)
    with pytest.raises(ValueError, match="is not there"):
        read_prompts(tmp_path / "none.tsv")


def test_folds_that_the_prompts_have_by_now_come_into_the_table(tmp_path):
    rows, folds = {"source": pa.array(["me", "you"])}, {"fold": pa.array([4, 0], pa.int8())}
    none = np.array([], np.int64)
    assert ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", rows).update_table(none)
    later = ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", rows | folds)
    assert later.update_table(none) and not later.update_table(none, overwrite=True)
    assert read_table(later.tsv_path, ["fold"])["fold"].to_pylist() == [4, 4, 0, 0]
    assert not later.tsv_path.with_name("set.tsv.bak").exists()


@pytest.mark.parametrize(
    "edit", [{"fold": [1, 1, 0, 0]}, {"prompt": ["a", "a", "c", "c"]}, {"source": ["my"] * 4}, {"mine": [1, 2, 3, 4]}]
)
def test_edits_of_a_table_are_kept(tmp_path, edit):
    image_set = ImageSet(tmp_path / "set", ["a", "b"], 2, ".webp", {"source": pa.array(["me", "you"])})
    none = np.array([], np.int64)
    image_set.update_table(none)
    made = image_set.tsv_path.read_bytes()
    table = read_table(image_set.tsv_path, [])
    write_table(image_set.tsv_path, {name: table[name] for name in table.column_names} | edit)
    edited = image_set.tsv_path.read_bytes()
    with pytest.raises(ValueError, match=r"4 rows, and 3 images are there; .* with the folds of the prompts"):
        image_set.update_table(np.array([0]))
    if "prompt" in edit:
        with pytest.raises(ValueError, match="--overwrite"):
            image_set.update_table(none)
    else:
        assert not image_set.update_table(none)
    assert image_set.tsv_path.read_bytes() == edited
    assert image_set.update_table(none, overwrite=True)
    assert image_set.tsv_path.read_bytes() == made and (tmp_path / "set.tsv.bak").read_bytes() == edited


def test_a_damaged_record_and_a_leftover_that_vanishes(tmp_path, monkeypatch):
    image_set = ImageSet(tmp_path / "set", ["a"], 1, ".webp")
    image_set.path(0).parent.mkdir(parents=True)
    image_set.path(0).touch()
    for content in ('{"steps": 2', "3"):
        (image_set.folder / "generation.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation.json is damaged.*restore it, or choose another"):
            image_set.check_record({})
    leftover = image_set.path(0).with_name(".0000000_0.12345678.partial.webp")
    leftover.touch()

    def renamed_meanwhile(path):
        path.unlink()
        return True

    monkeypatch.setattr("kutils.generation.image_sets.paths.is_left_over", renamed_meanwhile)
    assert not len(image_set.missing()) and not leftover.exists()

"""Finished runs, found by name."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from fixtures.datasets import TINY
from fixtures.finished_runs import RESULT

from kutils.runs import finished, folders
from kutils.runs.recipes import Recipe
from kutils.system import paths


def finish(name: str, when: int, root: Path | None = None) -> Path:
    """A run folder with a result of the given time."""
    folder = (root or paths.working_dir() / "runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "result.json").write_text(json.dumps({"prefix": name}))
    os.utime(folder / "result.json", (when, when))
    return folder


def test_finished_runs_are_found_in_order_and_by_name(tmp_path):
    late, early = finish("vit_fold0", 200), finish("convnext_fold0", 100)
    (paths.working_dir() / "runs" / "cut_fold0").mkdir()
    elsewhere = finish("mine_fold1", 50, tmp_path)
    assert folders.find_finished() == [early, late]
    assert folders.find_finished(["vit_fold0", "*_fold0"]) == [late, early]
    assert folders.find_finished([str(elsewhere)]) == [elsewhere]
    with pytest.raises(ValueError, match=r"no finished run 'vit_fld0' in .*; did you mean 'vit_fold0'"):
        folders.find_finished(["vit_fld0"])
    with pytest.raises(ValueError, match="no finished run 'cut_fold0'"):
        folders.find_finished(["cut_fold0"])


def test_a_folder_in_place_of_a_result_is_no_finished_run(tmp_path):
    (paths.working_dir() / "runs" / "vit_fold0" / "result.json").mkdir(parents=True)
    (paths.working_dir() / "runs" / "vit_fold0" / "config.yaml").touch()
    assert folders.find_finished() == []
    (tmp_path / "metrics.jsonl").write_bytes(b"\x82\xff\n")
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl is damaged"):
        folders.read_metrics(tmp_path / "metrics.jsonl")


def test_a_run_whose_name_holds_brackets_is_found_by_it():
    marked, other = finish("vit[1]_fold0", 100), finish("vit1_fold0", 200)
    assert folders.find_finished(["vit[1]_fold0"]) == [marked]
    assert folders.find_finished(["vit[12]_fold0"]) == [other]


@pytest.mark.parametrize(
    "content", [b"", b"prefix: [", b"\xff\xfe", b"\0", b"a: 2023-13-45", b"[" * 5000, b"prefix: x\n"]
)
def test_a_damaged_configuration_is_one_line_that_says_what_to_do(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.yaml.*put it back, or start over") as caught:
        folders.check_same_configuration(tmp_path, Recipe(**TINY))
    assert "\n" not in str(caught.value)


def test_a_damaged_result_is_named():
    path = finish("vit_fold0", 100) / "result.json"
    path.write_text("")
    with pytest.raises(ValueError, match=rf"{path} is damaged .*put it back"):
        finished.read_result(path.parent)
    (path.parent / "config.yaml").unlink()  # nothing tells what it was
    assert folders.find_finished() == []


def test_a_result_is_read_as_it_was_written_and_one_that_lacks_a_value_is_named(tmp_path):
    RESULT.write(tmp_path)
    assert finished.read_result(tmp_path) == RESULT
    path = tmp_path / "result.json"
    content = paths.read_json(path)
    paths.save_record(path, content | {"of a later version": 1})
    assert finished.read_result(tmp_path) == RESULT
    del content["updates"]
    path.write_text(json.dumps(content))  # as it was written before there were checksums
    with pytest.raises(ValueError, match=rf"{path} lacks updates"):
        finished.read_result(tmp_path)
    assert "cosine 0.5000 (epoch 1 of 2); mean-prompt baseline 0.2500" in RESULT.summary()
    clean = dataclasses.replace(RESULT, cosine_similarity_clean=0.4)
    assert clean.gain == 0.25 and "0.4000 on rows without a similar training prompt" in clean.summary()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:90], lambda content: content[:60] + b"\0" * 9, lambda _: b""]
)
def test_a_damaged_configuration_is_one_line_that_names_it(tmp_path, tiny_recipe, damage):
    recipe = tiny_recipe()
    path = tmp_path / "config.yaml"
    path.write_text(recipe.to_yaml())
    folders.check_same_configuration(tmp_path, recipe)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"config\.yaml.*; put it back, or start over with resume=never$") as caught:
        folders.check_same_configuration(tmp_path, recipe)
    assert "\n" not in str(caught.value)

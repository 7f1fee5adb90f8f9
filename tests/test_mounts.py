"""Inputs are found by what they hold, and what is missing is said with the tree of what is there."""

import json

import pytest

from kutils import ensemble, mounts


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
    with pytest.raises(mounts.MountError) as caught:
        mounts.find_images_folder(tmp_path)
    lines = str(caught.value).splitlines()
    assert (
        lines[1:5] == [f"{tmp_path}/", "  datasets/", "    me/", "      00.png"]
        and lines[-1] == "      ... and 12 more"
    )
    first, second = competition(tmp_path / "a"), competition(tmp_path / "b")
    with pytest.raises(mounts.MountError, match=f"{first}, {second}"):
        mounts.find_images_folder(tmp_path)


def test_weights_are_looked_for_in_the_inputs_on_kaggle_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path / "working"))
    monkeypatch.setenv("KUTILS_INPUT", str(tmp_path / "input"))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert mounts.weight_folders() == [tmp_path / "working" / "models"]
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert mounts.weight_folders() == [tmp_path / "working" / "models", tmp_path / "input"]
    assert mounts.weight_folders("x") == [mounts.Path("x")]


def test_the_ensemble_is_known_by_its_content(tmp_path):
    folders = [tmp_path / "not-there", tmp_path]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel-metadata.json").write_text('{"id": "x"}')
    with pytest.raises(mounts.MountError, match="no ensemble is fitted") as caught:
        mounts.find_ensemble(folders)
    assert "kernel-metadata.json" in str(caught.value) and "No such file" in str(caught.value)
    file = tmp_path / "a" / "any name.json"
    file.write_text(json.dumps({"kind": ensemble.KIND, "method": "equal"}, indent=2))
    assert mounts.find_ensemble(folders) == file
    (tmp_path / "copy.json").write_bytes(file.read_bytes())
    assert mounts.find_ensemble(folders) == file  # sorted by path; the same content
    (tmp_path / "other.json").write_text(json.dumps({"kind": ensemble.KIND, "method": "family"}))
    with pytest.raises(mounts.MountError, match="several ensembles"):
        mounts.find_ensemble(folders)


def test_a_checkpoint_is_the_one_that_was_fitted(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "m_fold0.pth").write_bytes(b"an earlier training")
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "m_fold0.pth").write_bytes(b"right")
    right = ensemble.Member("m.yaml", 0, "m/m_fold0.pth", ensemble.sha256_of(tmp_path / "z" / "m_fold0.pth"))
    assert mounts.find_checkpoints([right], [tmp_path]) == {right: tmp_path / "z" / "m_fold0.pth"}
    changed = ensemble.Member("m.yaml", 0, "m/m_fold0.pth", "0" * 64)
    absent = ensemble.Member("m.yaml", 1, "m/m_fold1.pth", "0" * 64)
    with pytest.raises(mounts.MountError) as caught:
        mounts.find_checkpoints([right, changed, absent], [tmp_path])
    assert "old/m_fold0.pth" in str(caught.value) and "not what was fitted" in str(caught.value)
    assert "m/m_fold1.pth." in str(caught.value) and "\n  z/\n" in str(caught.value)

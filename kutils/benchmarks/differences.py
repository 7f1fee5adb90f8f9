"""Measures how far pixels and losses are from those of the published pipeline."""

import dataclasses
import io

import numpy as np
import torch
from PIL import Image

from kutils.benchmarks import loader, measuring, published, step
from kutils.data import transforms
from kutils.runs.recipes import Recipe
from kutils.system import devices
from kutils.training import network_input

UPDATES = 20
LEVELS = "levels of 255"


def measure_differences(models: list[str]) -> list[measuring.Entry]:
    """Mean differences of pixels from Pillow's, and the largest of losses over 20 updates from the published step's.

    Args:
        models: of the recipes whose losses are compared, in float32 and without augmentation.
    """
    entries = pixel_differences()
    for model in models:
        entries += loss_differences(model)
    return entries


def pixel_differences() -> list[measuring.Entry]:
    """Of decoding (the largest), of resizing to the square, and of crop and colour jitter with the same draws.

    The last one also with its sign: how much darker the published images are.
    """
    size = loader.INPUT_SIZE
    decoded, resized, augmented, darker = [], [], [], []
    for number, picture in enumerate(loader.random_pictures(8)):
        for name, options in loader.FORMATS.items():
            stream = io.BytesIO()
            picture.save(stream, name, **options)
            image = transforms.decode_bytes(stream.getvalue(), f"picture {number}")
            decoded.append(levels_apart(image, Image.open(stream).convert("RGB")).max())
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        square = transforms.resize_square(image, size)
        resized.append(levels_apart(square, picture.resize((size, size), Image.Resampling.BICUBIC)).mean())
        key = (71, 0, number)
        cropped, jitter = transforms.random_crop_and_jitter(image, size, key)
        ours = 255 * network_input.normalize(cropped[None], (0, 0, 0), (1, 1, 1), jitter[None])[0]
        box, factors, order = transforms.draw_augmentation(image, key)
        theirs = published.augment_as(picture, size, box, factors, order)
        augmented.append(levels_apart(ours, theirs).mean())
        darker.append(float(ours.mean()) - np.asarray(theirs, np.float64).mean())
    return [
        measuring.make_entry("difference_decode", f"{LEVELS}, at most", [float(max(decoded))]),
        measuring.make_entry("difference_resize", LEVELS, [float(np.mean(resized))]),
        measuring.make_entry("difference_augmented", LEVELS, [float(np.mean(augmented))]),
        measuring.make_entry("difference_darker", LEVELS, [float(np.mean(darker))]),
    ]


def levels_apart(ours: torch.Tensor, theirs: Image.Image) -> np.ndarray:
    """[3, H, W] values of 0 to 255 against a Pillow image: float32 [H, W, 3], absolute."""
    return np.abs(ours.permute(1, 2, 0).float().numpy() - np.asarray(theirs, np.float32))


def loss_differences(model: str) -> list[measuring.Entry]:
    """Of the step in float32, plain and with SAM, and of the precision that `amp_dtype: auto` chooses for GPUs."""
    device = devices.pick_device("auto")
    recipe = step.benchmark_recipe(model)
    recipe = dataclasses.replace(recipe, amp_dtype="float32", augment="none", drop_path_rate=0.0)
    rounded = dataclasses.replace(recipe, amp_dtype="bfloat16")
    plain, sharp = (published_losses(recipe, device, rho) for rho in (0.0, step.RHO))
    apart_by_name = {
        f"difference_loss_{model}": np.abs(our_losses(recipe, device, 0.0) - plain),
        f"difference_loss_sam_{model}": np.abs(our_losses(recipe, device, step.RHO) - sharp),
        f"difference_loss_bfloat16_{model}": np.abs(our_losses(rounded, device, 0.0) - plain),
    }
    unit = f"of {plain.mean():.2f}, at most"
    return [measuring.make_entry(name, unit, [float(apart.max())]) for name, apart in apart_by_name.items()]


def random_batches(recipe: Recipe, device: torch.device) -> list[dict]:
    return [step.random_batch(recipe, device, seed) for seed in range(UPDATES)]


def our_losses(recipe: Recipe, device: torch.device, rho: float) -> np.ndarray:
    trainer = step.Ours(recipe, device)
    return np.array([float(trainer.update(batch, rho)) for batch in random_batches(recipe, device)])


def published_losses(recipe: Recipe, device: torch.device, rho: float) -> np.ndarray:
    trainer = step.published_trainer(recipe, device, half=False)
    trainer.rho = rho
    losses = []
    for batch in random_batches(recipe, device):
        losses.append(trainer.update(step.published_input(batch, recipe, device), batch["target"]))
    return np.array(losses)

"""Turns a batch of images into the network's input on the device: colour jitter and normalisation."""

import numpy as np
import torch
from torch import Tensor

from kutils.runs.recipes import Recipe

CONTRAST, SATURATION, HUE = 1, 2, 3  # numbers of the operations, as in torchvision; brightness is 0
CACHED_VALUES = 2**19  # float32 values that a CPU processes at a time: 2 MB
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in the luma of ITU-R 601-2, as in torchvision and Pillow


def to_network_input(batch: dict, recipe: Recipe, device: torch.device) -> Tensor:
    """The batch's uint8 images, augmented and normalised on the device: float32 [B, 3, S, S], channels last."""
    images = batch["image"].to(device, non_blocking=True)
    jitter = batch["jitter"] if recipe.augment == "published" and "jitter" in batch else None
    return normalize(images, recipe.mean, recipe.std, jitter)


def color_jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue in place, for each image by its own factors in its own order.

    Brightness, contrast and saturation each blend an image with another one: black, its mean grey, or its greyscale
    version. So one blend serves all images of a batch, whatever the next operation of each is: up to three blends
    before the hue shift, and up to three after it. This never synchronises with the device.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        jitter: float32 [B, 8] on the CPU, from `random_crop_and_jitter`.
    Returns: `images`; they differ by at most 4e-6 from torchvision's functional operations, image by image.
    """
    factors, order = np.split(jitter.numpy(), 2, axis=1)
    turn = (order == HUE).argmax(axis=1)  # position of the hue in each image's order
    for position in range(3):
        blend(images, np.where(turn > position, order[:, position], HUE).astype(int), factors)
    turn_hue(images, factors[:, HUE])
    for position in range(1, 4):
        blend(images, np.where(turn < position, order[:, position], HUE).astype(int), factors)
    return images


def blend(images: Tensor, operation: np.ndarray, factors: np.ndarray) -> None:
    """Change brightness, contrast or saturation of each image in place; images whose operation is HUE stay as they are.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        operation: int [B], number of each image's operation.
        factors: float32 [B, 4], of all operations.
    """
    if (operation == HUE).all():
        return
    factor = np.where(operation == HUE, 1, factors[np.arange(len(images)), operation])
    if np.isin(operation, (CONTRAST, SATURATION)).any():
        luma = grey(images)
        base = luma.mean(dim=(2, 3), keepdim=True) * like(images, operation == CONTRAST)
        base = base + luma * like(images, operation == SATURATION)
        images.sub_(base).mul_(like(images, factor)).add_(base).clamp_(0, 1)
    else:
        images.mul_(like(images, factor)).clamp_(0, 1)


def like(images: Tensor, values: np.ndarray) -> Tensor:
    """One value per image, float32 [B, 1, 1, 1] on the device of the images, copied without synchronising."""
    return torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True)[:, None, None, None]


def grey(images: Tensor) -> Tensor:
    """The luma of images: float32 [B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def turn_hue(images: Tensor, shift: np.ndarray) -> None:
    """Shift the hue of RGB images in place by `shift` of a full circle (HSV hexcone, Smith 1978).

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        shift: float32 [B], in [-1, 1].
    """
    red, green, blue = images.split(1, dim=1)
    minimum = torch.minimum(torch.minimum(red, green), blue)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - minimum
    scale = chroma.clamp_min(1e-12).reciprocal_()  # a grey pixel's differences are 0
    sextant = torch.where(
        value == red,
        (green - blue).mul_(scale),
        torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)),
    )
    sextant.add_(like(images, 6 * shift)).remainder_(6)  # 0 red, 2 green, 4 blue
    for channel, centre in enumerate((3, 2, 4)):  # within one sextant of it, green or blue is full, red empty
        distance = (sextant - centre).abs_()
        share = distance.sub_(1) if channel == 0 else distance.neg_().add_(2)
        images[:, channel : channel + 1] = share.clamp_(0, 1).mul_(chroma).add_(minimum)


def normalize(images: Tensor, mean, std, jitter: Tensor | None = None) -> Tensor:
    """Make the network's input: apply colour jitter if it is given, and standardise each channel.

    A CPU processes as many images at a time as fit into its caches, which is twice as fast as the whole batch at once;
    a GPU processes the whole batch.

    Args:
        images: uint8 [B, 3, H, W].
        mean: of the three channels, for values in [0, 1].
        std: of the three channels.
        jitter: float32 [B, 8] on the CPU, from `random_crop_and_jitter`.
    Returns: float32 [B, 3, H, W] on the device of the images, channels last.
    """
    result = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
    mean, std = (torch.tensor(values)[:, None, None].to(images.device, non_blocking=True) for values in (mean, std))
    step = len(images) if images.is_cuda else max(1, CACHED_VALUES // images[0].numel())
    for start in range(0, len(images), step):
        part = images[start : start + step].float().div_(255)
        if jitter is not None:
            color_jitter(part, jitter[start : start + step])
        torch.div(part.sub_(mean), std, out=result[start : start + step])
    return result

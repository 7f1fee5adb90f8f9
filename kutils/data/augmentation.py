"""Augments a training image as the recipe's `augment` says: as published, weakly, or not at all."""

from functools import cache, partial

import torch
from torch import Tensor
from torchvision.transforms import v2

from kutils.data import transforms

GREY = 127  # fills erased and empty areas: about 0 after the normalisation


def augment(image: Tensor, recipe, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Bring a decoded image to the recipe's input size, augmented as its `augment` says.

    Args:
        image: uint8 [3, H, W].
        recipe: its `augment` and `input_size` are used.
        key: seed, epoch and row.
    Returns: uint8 [3, S, S]; float32 [8] for `network_input.color_jitter`, zeros unless augmented as published.
    """
    if recipe.augment == "published":
        return transforms.random_crop_and_jitter(image, recipe.input_size, key)
    prepare = transforms.resize_square if recipe.augment == "none" else partial(augment_weakly, key=key)
    return prepare(image, recipe.input_size), torch.zeros(8)


def augment_weakly(image: Tensor, size: int, key: tuple[int, ...]) -> Tensor:
    """Augment an image as `augment: weak` says; the random numbers depend only on `key` (seed, epoch, row).

    Args:
        image: uint8 [3, H, W].
    Returns: uint8 [3, size, size].
    """
    with transforms.drawing_by(key):
        return weak_augmentation(size)(image)


@cache
def weak_augmentation(size: int) -> v2.Compose:
    """Crop 80 to 100 % of the area, two operations of RandAugment at a tenth of its strength, and erase at times.

    There is no flip, as prompts say left and right (3rd-place solution: crop, erasing, weak RandAugment).
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=(0.8, 1.0), ratio=(0.9, 1.1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandAugment(num_ops=2, magnitude=3, interpolation=v2.InterpolationMode.BILINEAR, fill=GREY),
            v2.RandomErasing(p=0.25, scale=(0.02, 0.1), value=GREY),
        ]
    )

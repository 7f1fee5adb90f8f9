"""From an image file to the network's input: decode and crop in uint8 on the host, everything per pixel on the device.

The host decodes, crops and resizes (uint8, one image at a time); colour jitter and normalisation run on the device over
the whole batch, every image with factors of its own.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

# 5th-place solution: half to all of the area, ratios near 1, jitter 0.05 each, no flip (prompts say left and right)
CROP = v2.RandomResizedCrop(size=1, scale=(0.5, 1.0), ratio=(0.9, 1.1))
JITTER = v2.ColorJitter(brightness=0.05, contrast=0.05, saturation=0.05, hue=0.05)
GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision and Pillow weigh it


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


def decode_rgb(path: Path | str, read: Callable[[], bytes] | None = None) -> Tensor:
    """Decode an image file of any mode to RGB.

    Args:
        read: gives its content where that lies elsewhere, or raises OSError; None: the file is read.
    Returns: uint8 [3, H, W].
    Raises: ImageError for a missing, empty, truncated or unknown file.
    """
    try:
        data = read() if read else Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    return decode_bytes(data, path)


def decode_bytes(data: bytes, name: Path | str) -> Tensor:
    """Decode the content of an image file.

    torchvision's decoders take JPEG (grey and CMYK too), PNG and WebP, bit for bit as Pillow's `convert("RGB")`; 16-bit
    and animated files (the first frame), BMP and what else Pillow reads go through Pillow. EXIF orientation is ignored.

    Args:
        name: what a message calls it.
    Returns: uint8 [3, H, W].
    Raises: ImageError if it is empty, truncated or of no known format.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        if image.dtype == torch.uint8 and image.ndim == 3:  # not 16-bit, not animated
            return image
    except RuntimeError:
        pass  # Pillow knows more formats, and says better what is wrong
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if picture.mode.startswith("I"):  # 16-bit grey: Pillow's conversion would clip at 255
                return (
                    torch.from_numpy(np.asarray(picture).astype(np.int32) >> 8)
                    .clamp(0, 255)
                    .to(torch.uint8)
                    .expand(3, -1, -1)
                )
            return F.pil_to_tensor(picture.convert("RGB"))
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image of a known format ({len(data)} bytes)") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, H, W] to [3, size, size], bicubic with antialiasing; the aspect ratio is not kept."""
    return F.resize(image, [size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def random_crop_and_jitter(image: Tensor, size: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Draw one image's augmentation from `key` alone: the same for any number of workers and ranks.

    Args:
        image: uint8 [3, H, W].
        size: side of the output, px.
        key: seed, epoch and row.
    Returns: uint8 [3, size, size], and float32 [8]: the four jitter factors (brightness, contrast, saturation, hue) and
        the order of the four operations. Both are drawn by torchvision's own transforms.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        box = CROP.make_params([image])
        drawn = JITTER.make_params([image])
    cropped = F.resized_crop(
        image, **box, size=[size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
    return cropped, torch.tensor(factors + drawn["fn_idx"].tolist(), dtype=torch.float32)


def color_jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Apply every image's own brightness, contrast, saturation and hue change in its own order.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        jitter: float32 [B, 8] on the CPU, from `random_crop_and_jitter`.
    Returns: float32 [B, 3, H, W] in [0, 1]; torchvision's functional operations, image by image, give the same.
    """
    factors = jitter[:, :4].to(images.device, non_blocking=True)[:, :, None, None, None]
    images = images.clone()
    for position in range(4):
        order = jitter[:, 4 + position]
        for operation, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            chosen = torch.nonzero(
                order == operation
            ).flatten()  # found on the host: no synchronisation with the device
            if len(chosen):
                chosen = chosen.to(images.device, non_blocking=True)
                images[chosen] = adjust(images[chosen], factors[chosen, operation])
    return images


def grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    luma = grey(images)
    return (luma + factor * (images - luma)).clamp(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by `shift` of a full circle (HSV hexcone, Smith 1978)."""
    red, green, blue = images.unbind(dim=1)
    value, minimum = images.amax(dim=1), images.amin(dim=1)
    chroma = value - minimum
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = (sixth[:, None] + 6 * shift) % 6  # [B, 1, H, W]: where on the circle, in sextants
    offsets = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]  # of red, green and blue
    k = (sixth + offsets) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def normalize(images: Tensor, mean, std, jitter: Tensor | None = None) -> Tensor:
    """uint8 [B, 3, H, W] to the network's input: float32, jittered if factors are given, standardised per channel."""
    images = images.float().div(255)
    if jitter is not None:
        images = color_jitter(images, jitter)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std

"""Turns image files into network input: decodes and crops on the host, adjusts colours on the device.

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
CONTRAST, SATURATION, HUE = 1, 2, 3  # numbers of torchvision's operations; brightness is 0
CACHED_VALUES = 2**19  # float32 that are worked on at a time on a CPU: 2 MB
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision and Pillow weigh it
# torchvision 0.29 ends the process where the pixels of a PNG file are damaged; Pillow takes 1.3 times as long
PNG = b"\x89PNG"


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

    torchvision's decoders take JPEG (grey and CMYK too) and WebP, bit for bit as Pillow's `convert("RGB")`. PNG,
    animated files (the first frame), BMP and what else Pillow reads go through Pillow. EXIF orientation is ignored.

    Args:
        name: what a message calls it.
    Returns: uint8 [3, H, W].
    Raises: ImageError if it is empty, truncated or of no known format.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        if not data.startswith(PNG):
            image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            if image.dtype == torch.uint8 and image.ndim == 3:  # not animated
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
    """Draw one image's augmentation from `key` alone, and crop: the same for any number of workers and ranks.

    Args:
        image: uint8 [3, H, W].
        size: side of the output, px.
        key: seed, epoch and row.
    Returns: uint8 [3, size, size], and float32 [8] for `color_jitter`: four factors and the order of the operations.
    """
    box, factors, order = draw_augmentation(image, key)
    cropped = F.resized_crop(
        image, **box, size=[size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    return cropped, torch.tensor(factors + order, dtype=torch.float32)


def draw_augmentation(image: Tensor, key: tuple[int, ...]) -> tuple[dict, list[float], list[int]]:
    """Draw by torchvision's own transforms: the crop's box (top, left, height, width), the jitter factors (brightness,
    contrast, saturation, hue) and the order of these four."""
    generator = torch.default_generator  # torchvision draws from no other; torch.manual_seed takes 0.1 ms
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        box = CROP.make_params([image])
        drawn = JITTER.make_params([image])
    finally:
        generator.set_state(state)
    factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
    return box, factors, drawn["fn_idx"].tolist()


def color_jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Apply every image's own brightness, contrast, saturation and hue change in its own order, in place.

    Brightness, contrast and saturation each blend an image with something simpler of its own (black, its mean grey, its
    greys), so that all images of a batch blend at once, whatever comes first for each: up to three times before their
    hues are turned, and up to three times after. Nothing of it waits for the device.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        jitter: float32 [B, 8] on the CPU, from `random_crop_and_jitter`.
    Returns: `images`; torchvision's functional operations, image by image, give the same within 4e-6.
    """
    factors, order = np.split(jitter.numpy(), 2, axis=1)
    turn = (order == HUE).argmax(axis=1)  # where in its order an image's hue comes
    for position in range(3):
        blend(images, np.where(turn > position, order[:, position], HUE).astype(int), factors)
    turn_hue(images, factors[:, HUE])
    for position in range(1, 4):
        blend(images, np.where(turn < position, order[:, position], HUE).astype(int), factors)
    return images


def blend(images: Tensor, operation: np.ndarray, factors: np.ndarray) -> None:
    """Brightness, contrast or saturation of every image in place; those whose operation is HUE stay as they are.

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        operation: int [B], the number of each image's operation.
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
    """A value per image as float32 [B, 1, 1, 1] on the device of the images; nobody waits for it."""
    return torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True)[:, None, None, None]


def grey(images: Tensor) -> Tensor:
    """float32 [B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def turn_hue(images: Tensor, shift: np.ndarray) -> None:
    """Turn the hue of RGB images in place by `shift` of a full circle (HSV hexcone, Smith 1978).

    Args:
        images: float32 [B, 3, H, W] in [0, 1].
        shift: float32 [B].
    """
    red, green, blue = images.split(1, dim=1)
    minimum = torch.minimum(torch.minimum(red, green), blue)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - minimum
    scale = chroma.clamp_min(1e-12).reciprocal_()  # of a grey pixel the differences are 0
    sextant = torch.where(
        value == red,
        (green - blue).mul_(scale),
        torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)),
    )
    sextant.add_(like(images, 6 * shift)).remainder_(6)  # 0 red, 2 green, 4 blue
    for channel, centre in enumerate((3, 2, 4)):  # a channel is full, or red empty, within one sextant of its centre
        distance = (sextant - centre).abs_()
        share = distance.sub_(1) if channel == 0 else distance.neg_().add_(2)
        images[:, channel : channel + 1] = share.clamp_(0, 1).mul_(chroma).add_(minimum)


def normalize(images: Tensor, mean, std, jitter: Tensor | None = None) -> Tensor:
    """uint8 [B, 3, H, W] to the network's input: jittered if factors are given, standardised per channel.

    Args:
        jitter: float32 [B, 8] on the CPU, from `random_crop_and_jitter`.
    Returns: float32 [B, 3, H, W], channels last. A GPU works on the whole batch at once, a CPU on as many images as its
        caches hold: twice as fast.
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

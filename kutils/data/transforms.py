"""Turns image files into network input: decodes and crops on the host, adjusts colours on the device.

The host decodes, crops and resizes one image at a time, as uint8. Colour jitter and normalisation run on the device
over the whole batch, with factors of its own for each image.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from kutils.system import fatal

# the 5th-place solution's: half to all of the area, ratios near 1, jitter 0.05; no flip, as prompts say left and right
CROP = v2.RandomResizedCrop(size=1, scale=(0.5, 1.0), ratio=(0.9, 1.1))
JITTER = v2.ColorJitter(brightness=0.05, contrast=0.05, saturation=0.05, hue=0.05)
CONTRAST, SATURATION, HUE = 1, 2, 3  # torchvision's numbers of the operations; brightness is 0
CACHED_VALUES = 2**19  # float32 values that a CPU processes at a time: 2 MB
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in the luma of ITU-R 601-2, as in torchvision and Pillow
MOST_PIXELS = 1 << 26  # 67 million, 8192 x 8192: 200 MB when decoded


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


def decode_rgb(path: Path | str, read: Callable[[], bytes] | None = None) -> Tensor:
    """Decode an image file of any mode to RGB.

    Args:
        read: returns the content if it is stored elsewhere, or raises OSError; None: the file is read.
    Returns: uint8 [3, H, W].
    Raises: ImageError for a missing, empty or truncated file, or one of no known format.
    """
    try:
        data = read() if read else Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    return decode_bytes(data, path)


def read_header(content: bytes, name: Path | str, formats: Sequence[str] | None = None) -> tuple[str, int, int]:
    """Format (a name of Pillow), width and height in pixels of an image file; nothing is decoded.

    Pillow opens a WebP file by allocating all its pixels: 1.2 ms for 512 px, and 1 GB for a picture bomb.

    Args:
        name: of the image in messages.
        formats: names of Pillow; None: all that it knows.
    Raises: ImageError for no image of such a format.
    """
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and len(content) >= 30:
        kind = content[12:16]
        if kind == b"VP8X":
            sides = (1 + int.from_bytes(content[start : start + 3], "little") for start in (24, 27))
        elif kind == b"VP8L":
            bits = int.from_bytes(content[21:25], "little")
            sides = (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        else:
            sides = (int.from_bytes(content[start : start + 2], "little") & 0x3FFF for start in (26, 28))
        return "WEBP", *sides
    if content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) >= 24:
        return "PNG", int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if not content:
        raise ImageError(f"{name} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as picture:
            return picture.format, *picture.size
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels ({error})") from error
    except Exception as error:  # UnidentifiedImageError, and what Pillow raises for damaged headers
        raise ImageError(f"{name} is no image of a known format ({len(content):,} bytes)") from error


def check_pixels(name: Path | str, width: int, height: int) -> None:
    """Raise ImageError for an image that would take too much memory: a small file may hold a huge one."""
    if width * height > MOST_PIXELS:
        raise ImageError(f"{name} has too many pixels ({width:,} x {height:,}, at most {MOST_PIXELS:,})")


def decode_bytes(data: bytes, name: Path | str) -> Tensor:
    """Decode the content of an image file.

    torchvision decodes JPEG (grey and CMYK too) and WebP, bit for bit as Pillow's `convert("RGB")`. Pillow decodes PNG,
    the first frame of animated files, BMP and all else that it knows. EXIF orientation is ignored.

    Args:
        data: the content.
        name: of the image in messages.
    Returns: uint8 [3, H, W].
    Raises: ImageError if it is empty, truncated, of no known format or of more than MOST_PIXELS, or if it has ended a
        process before.
    """
    kind, width, height = read_header(data, name)
    check_pixels(name, width, height)
    with fatal.decoding(data) as may_decode:
        if not may_decode:
            raise ImageError(f"{name} ends the process that decodes it")
        return decode_content(data, name, kind)


def decode_content(data: bytes, name: Path | str, kind: str) -> Tensor:
    """Decode a file of a format (a name of Pillow) as `decode_bytes` does, whatever its size."""
    # torchvision ends the process where the pixels of a PNG file are damaged (Pillow takes 1.3 times as long), and
    # decodes all frames of a GIF file; what it refuses, Pillow may know, and its messages are better
    if kind in ("JPEG", "MPO", "WEBP"):
        with suppress(RuntimeError):
            image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            if image.dtype == torch.uint8 and image.ndim == 3:  # not animated
                return image
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
        raise ImageError(f"{name} is no image of a known format ({len(data):,} bytes)") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize uint8 [3, H, W] to [3, size, size], bicubic with antialiasing; the aspect ratio is not kept."""
    return F.resize(image, [size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def random_crop_and_jitter(image: Tensor, size: int, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Crop an image at random, and draw its colour jitter; `key` alone decides, for any number of workers and ranks.

    Args:
        image: uint8 [3, H, W].
        key: seed, epoch and row.
    Returns: uint8 [3, size, size]; float32 [8] for `color_jitter`, four factors and the order of the operations.
    """
    box, factors, order = draw_augmentation(image, key)
    cropped = F.resized_crop(
        image, **box, size=[size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    return cropped, torch.tensor(factors + order, dtype=torch.float32)


def draw_augmentation(image: Tensor, key: tuple[int, ...]) -> tuple[dict, list[float], list[int]]:
    """Let torchvision's transforms draw an augmentation.

    Returns: the crop's box (top, left, height, width); the factors of brightness, contrast, saturation and hue; the
        order of these four operations.
    """
    with drawing_by(key):
        box = CROP.make_params([image])
        drawn = JITTER.make_params([image])
    factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
    return box, factors, drawn["fn_idx"].tolist()


@contextmanager
def drawing_by(key: tuple[int, ...]) -> Iterator[None]:
    """Let `key` alone decide what torchvision draws in the block; torch's generator is put back after it."""
    generator = torch.default_generator  # the only one that torchvision draws from; torch.manual_seed would take 0.1 ms
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        generator.set_state(state)


def color_jitter(images: Tensor, jitter: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue in place, for each image by its own factors in its own order.

    Brightness, contrast and saturation each blend an image with a simpler one: black, its mean grey, or its greys. So
    all images of a batch blend at once, whichever operation is next for each: up to three times before their hues are
    turned, and up to three times after. Nothing waits for the device.

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
    """One value per image, float32 [B, 1, 1, 1] on the device of the images, copied without waiting."""
    return torch.from_numpy(values.astype(np.float32)).to(images.device, non_blocking=True)[:, None, None, None]


def grey(images: Tensor) -> Tensor:
    """The luma of images: float32 [B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA_WEIGHTS[0]).add_(green, alpha=LUMA_WEIGHTS[1]).add_(blue, alpha=LUMA_WEIGHTS[2])


def turn_hue(images: Tensor, shift: np.ndarray) -> None:
    """Turn the hue of RGB images in place by `shift` of a full circle (HSV hexcone, Smith 1978).

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

    A CPU processes as many images at a time as its caches hold, which is twice as fast as the whole batch; a GPU
    processes the whole batch.

    Args:
        images: uint8 [B, 3, H, W].
        mean: of the three channels, for values in [0, 1].
        std: likewise.
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

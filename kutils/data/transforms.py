"""Reads image files, and crops and resizes them on the host: one image at a time, as uint8."""

import io
import zlib
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

# as in the 5th-place solution: half to all of the area, ratios near 1, jitter 0.05; no flip: prompts say left, right
CROP = v2.RandomResizedCrop(size=1, scale=(0.5, 1.0), ratio=(0.9, 1.1))
JITTER = v2.ColorJitter(brightness=0.05, contrast=0.05, saturation=0.05, hue=0.05)
PNG_END = b"IEND\xaeB`\x82"  # a chunk without content, and its checksum
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

    WebP headers are parsed here, since Pillow allocates all pixels: 1.2 ms for 512 px, and 1 GB for a decompression
    bomb.

    Args:
        name: of the image in messages.
        formats: accepted formats (names of Pillow); None: all.
    Raises: ImageError if it is no image of such a format.
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
    the first frame of animated files, BMP and other formats. EXIF orientation is ignored.

    Args:
        data: the content.
        name: of the image in messages.
    Returns: uint8 [3, H, W].
    Raises: ImageError if it is empty, truncated, of no known format or of more than MOST_PIXELS, or if it has crashed a
        process before.
    """
    kind, width, height = read_header(data, name)
    check_pixels(name, width, height)
    with fatal.decoding(data) as may_decode:
        if not may_decode:
            raise ImageError(f"{name} ends the process that decodes it")
        return decode_content(data, name, kind)


def has_right_sums(content: bytes) -> bool:
    """Whether all chunks of a PNG file match their checksums."""
    start = 8
    while start + 12 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        end = start + 8 + length
        expected = int.from_bytes(content[end : end + 4], "big")
        if end + 4 > len(content) or zlib.crc32(content[start + 4 : end]) != expected:
            return False
        if content[start + 4 : start + 8] == b"IEND":
            return True
        start = end + 4
    return False


def decode_content(data: bytes, name: Path | str, kind: str) -> Tensor:
    """Decode a file of a format (a name of Pillow) as `decode_bytes` does, whatever its size."""
    # torchvision crashes on damaged pixels of a PNG file (Pillow takes 1.3 times as long), and
    # decodes all frames of a GIF file; what it refuses, Pillow may know, and its messages are better
    if kind in ("JPEG", "MPO", "WEBP"):
        with suppress(RuntimeError):
            image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            if image.dtype == torch.uint8 and image.ndim == 3:  # not animated
                return image
    if kind == "PNG" and PNG_END in data[-4096:] and not has_right_sums(data):  # Pillow may give other pixels
        raise ImageError(f"{name} cannot be decoded: a checksum in the PNG file is wrong")
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
    """Crop an image at random, and draw its colour jitter; the random numbers depend only on `key`.

    Args:
        image: uint8 [3, H, W].
        key: seed, epoch and row.
    Returns: uint8 [3, size, size]; float32 [8] for `network_input.color_jitter`, four factors and the order of the
        operations.
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
    """Seed torchvision's random numbers by `key` inside the block; torch's generator is restored afterwards."""
    generator = torch.default_generator  # the only one that torchvision draws from; torch.manual_seed would take 0.1 ms
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        generator.set_state(state)

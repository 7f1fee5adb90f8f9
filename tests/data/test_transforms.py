"""Decoding agrees with Pillow, cropping with torchvision."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import v2

from kutils.data import transforms


def gradient(mode: str = "RGB", size=(50, 34)) -> Image.Image:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([x * 5, y * 7, (x + y) * 3], -1).astype(np.uint8)).convert(mode)


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def alpha() -> Image.Image:
    picture = gradient("RGBA")
    picture.putalpha(gradient("L"))
    return picture


FILES = {
    "rgb.png": lambda: encoded(gradient(), "PNG"),
    "grey.png": lambda: encoded(gradient("L"), "PNG"),
    "palette.png": lambda: encoded(gradient("P"), "PNG"),
    "palette_alpha.png": lambda: encoded(gradient("P"), "PNG", transparency=bytes(range(256))),
    "alpha.png": lambda: encoded(alpha(), "PNG"),
    "grey.jpg": lambda: encoded(gradient("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(gradient("CMYK"), "JPEG"),
    "lossy.webp": lambda: encoded(gradient(), "WEBP", quality=80),
    "alpha.webp": lambda: encoded(alpha(), "WEBP", lossless=True),
    "rgb.bmp": lambda: encoded(gradient(), "BMP"),
    "animated.webp": lambda: encoded(gradient(), "WEBP", lossless=True, save_all=True, append_images=[gradient("L")]),
    "animated.gif": lambda: encoded(gradient("P"), "GIF", save_all=True, append_images=[gradient("L")]),
}


@pytest.mark.parametrize("name", FILES)
def test_decoding_is_that_of_pillow(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    image = transforms.decode_rgb(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 34, 50)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits_become_eight(tmp_path):
    values = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "grey16.png")
    image = transforms.decode_rgb(tmp_path / "grey16.png")
    np.testing.assert_array_equal(image.numpy(), np.broadcast_to(values >> 8, (3, 8, 8)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello", r"no image of a known format \(5 bytes\)"),
        (None, "No such file"),
        ("cut", "cannot be decoded"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, said):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(encoded(gradient(), "JPEG")[:-200] if content == "cut" else content)
    with pytest.raises(transforms.ImageError, match=said) as caught:
        transforms.decode_rgb(path)
    assert str(path) in str(caught.value)


def test_a_damaged_png_file_does_not_end_the_process():
    """torchvision's own decoder would: damage between the checksums, and a right checksum of no zlib stream."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    for start in range(60, len(content) - 16, 3001):
        damaged = bytearray(content)
        damaged[start] ^= 0xFF
        with pytest.raises(transforms.ImageError, match="cannot be decoded"):
            transforms.decode_bytes(bytes(damaged), "it")
    chunk = b"IDAT" + b"no zlib stream" * 9
    size, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    forged = content[:33] + size + chunk + checksum + content[-12:]
    with pytest.raises(transforms.ImageError, match="cannot be decoded"):
        transforms.decode_bytes(forged, "it")


def test_zeros_in_a_png_file_never_become_other_pixels():
    """Of 107 places in such a file, Pillow decodes 5 to other pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    whole = transforms.decode_bytes(content, "x.png")
    for start in range(33, len(content) - 64, 16):
        with pytest.raises(transforms.ImageError, match=r"x\.png cannot be decoded"):
            transforms.decode_bytes(content[:start] + bytes(64) + content[start + 64 :], "x.png")
    assert torch.equal(transforms.decode_bytes(content[:-12], "x.png"), whole)  # without its end, all pixels are there


def test_crop_boxes_and_factors_are_torchvisions_for_the_same_random_numbers():
    image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seed = int(np.random.SeedSequence((71, 3, 12)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(seed)
    crop = v2.RandomResizedCrop(
        32, scale=(0.5, 1.0), ratio=(0.9, 1.1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    expected = crop(image)
    factors = v2.ColorJitter(0.05, 0.05, 0.05, 0.05).make_params([image])
    cropped, jitter = transforms.random_crop_and_jitter(image, 32, (71, 3, 12))
    assert torch.equal(cropped, expected)
    names = ("brightness", "contrast", "saturation", "hue")
    assert jitter[:4].tolist() == pytest.approx([factors[f"{name}_factor"] for name in names])
    assert jitter[4:].tolist() == factors["fn_idx"].tolist()


def test_drawing_leaves_the_random_state_of_others_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    transforms.random_crop_and_jitter(torch.zeros(3, 8, 8, dtype=torch.uint8), 8, (71, 0, 1))
    assert torch.equal(torch.rand(4), expected)


def test_every_image_has_factors_and_an_order_of_its_own():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    jitter = torch.stack([transforms.random_crop_and_jitter(image, 8, (71, 0, row))[1] for row in range(400)])
    assert jitter[:, 0].unique().numel() > 390
    assert jitter[:, :3].min() >= 0.95 and jitter[:, :3].max() <= 1.05 and jitter[:, 3].abs().max() <= 0.05
    assert len({tuple(order) for order in jitter[:, 4:].tolist()}) == 24  # all orders of four operations


def test_resize_is_close_to_pillows():
    picture = gradient(size=(120, 90))
    expected = np.asarray(picture.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    resized = transforms.resize_square(F.pil_to_tensor(picture), 48).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(resized - expected).mean() < 0.5


def with_sides(format: str) -> bytes:
    """A small file whose header says 16,000 x 16,000 pixels."""
    content, side = bytearray(encoded(gradient(), format)), 16_000
    if format == "PNG":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif format == "JPEG":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif format == "WEBP":
        content[26:30] = struct.pack("<HH", side, side)
    else:
        content[6:10] = struct.pack("<HH", side, side)
    return bytes(content)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_small_file_of_many_pixels_is_refused_by_name(monkeypatch, format):
    monkeypatch.setattr(transforms, "decode_content", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(transforms.ImageError, match=r"^set/bomb\.x has too many pixels \(.*(16,000|256000000)"):
        transforms.decode_bytes(with_sides(format), "set/bomb.x")


def test_the_limit_lets_the_largest_images_pass():
    transforms.check_pixels("it", 8192, 8192)
    with pytest.raises(transforms.ImageError, match=r"it has too many pixels \(8,193 x 8,192, at most 67,108,864\)"):
        transforms.check_pixels("it", 8193, 8192)

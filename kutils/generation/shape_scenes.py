"""Draws the backgrounds of the built-in renderer, and applies its styles."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageOps

Rng = np.random.Generator


def gradient(top: str, bottom: str, size: int, rng: Rng) -> Image.Image:
    """RGB [size, size] px from one colour to the other, both slightly randomised."""
    ends = np.array([ImageColor.getrgb(top), ImageColor.getrgb(bottom)], float) + rng.normal(0, 10, (2, 3))
    column = np.linspace(ends[0], ends[1], size)
    return Image.fromarray(np.repeat(column.clip(0, 255).astype(np.uint8)[:, None], size, axis=1))


def night(size: int, rng: Rng) -> Image.Image:
    image = gradient("#05051e", "#23235a", size, rng)
    canvas = ImageDraw.Draw(image)
    for x, y, r in zip(*rng.random((2, 70)) * size, rng.uniform(0.003, 0.011, 70) * size, strict=True):
        canvas.ellipse((x - r, y - r, x + r, y + r), "white")
    x, y = rng.uniform(0.05, 0.75) * size, rng.uniform(0.03, 0.1) * size
    canvas.ellipse((x, y, x + 0.17 * size, y + 0.17 * size), "#fff3c0")
    return image


def ocean(size: int, rng: Rng) -> Image.Image:
    image = gradient("#a5d8f3", "#d5f0fa", size, rng)
    canvas = ImageDraw.Draw(image)
    x = np.arange(0, size + 8, 4)
    for number, colour in enumerate(("#2f8fc4", "#2079b0", "#14619a", "#0c4a80")):
        y = (0.42 + 0.15 * number + 0.025 * np.sin(x / size * 24 + rng.uniform(0, 6))) * size
        canvas.polygon([*zip(x, y, strict=True), (size, size), (0, size)], colour)
        canvas.line([*zip(x, y, strict=True)], "white", max(1, size // 100))
    return image


def meadow(size: int, rng: Rng) -> Image.Image:
    image = gradient("#6fb7f0", "#cfeaff", size, rng)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((-0.5 * size, 0.5 * size, 1.0 * size, 1.9 * size), "#5fae3c")
    canvas.ellipse((0.1 * size, 0.58 * size, 1.7 * size, 2.0 * size), "#4c9a2e")
    for x, y in rng.uniform((0, 0.66), (1, 1), (90, 2)) * size:
        canvas.line((x, y, x + rng.uniform(-0.02, 0.02) * size, y - 0.05 * size), "#2f7a1c", max(1, size // 120))
    return image


def desert(size: int, rng: Rng) -> Image.Image:
    image = gradient("#8fd0ea", "#fbe9c6", size, rng)
    canvas = ImageDraw.Draw(image)
    x = np.arange(0, size + 8, 4)
    for number, colour in enumerate(("#e6b96b", "#d9a250", "#c98d3c")):
        y = (0.48 + 0.17 * number + 0.07 * np.sin(x / size * rng.uniform(4, 7) + rng.uniform(0, 6))) * size
        canvas.polygon([*zip(x, y, strict=True), (size, size), (0, size)], colour)
    return image


def snow(size: int, rng: Rng) -> Image.Image:
    image = gradient("#9fb2c6", "#dfe8f1", size, rng)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((-0.4 * size, 0.65 * size, 1.4 * size, 1.8 * size), "#f7fbff")
    for x, y, r in zip(*rng.random((2, 90)) * size, rng.uniform(0.006, 0.02, 90) * size, strict=True):
        canvas.ellipse((x - r, y - r, x + r, y + r), "white")
    return image


def sunset(size: int, rng: Rng) -> Image.Image:
    image = gradient("#7a1f6b", "#ff9a3c", size, rng)
    canvas = ImageDraw.Draw(image)
    x, y, r = rng.uniform(0.2, 0.8) * size, 0.68 * size, 0.16 * size
    canvas.ellipse((x - r, y - r, x + r, y + r), "#ffe27a")
    canvas.rectangle((0, 0.72 * size, size, size), "#3a1440")
    return image


def bricks(size: int, rng: Rng) -> Image.Image:
    image = Image.new("RGB", (size, size), "#cdbfb0")
    canvas = ImageDraw.Draw(image)
    height, width = size / 11, size / 5
    for row in range(11):
        for column in range(-1, 6):
            shade = rng.integers(-18, 18)
            x, y = (column + 0.5 * (row % 2)) * width, row * height
            gap = max(1, size // 90)
            canvas.rectangle((x, y, x + width - gap, y + height - gap), (158 + shade, 74 + shade, 56 + shade))
    return image


def city(size: int, rng: Rng) -> Image.Image:
    image = gradient("#8ea6bd", "#d8dee4", size, rng)
    canvas = ImageDraw.Draw(image)
    left, window = 0.0, max(1, size // 40)
    while left < size:
        width, top = rng.uniform(0.11, 0.2) * size, rng.uniform(0.15, 0.55) * size
        shade = int(rng.integers(50, 100))
        canvas.rectangle((left, top, left + width, size), (shade, shade + 6, shade + 18))
        for y in np.arange(top + 2 * window, size, 3 * window):
            for x in np.arange(left + window, left + width - window, 2.5 * window):
                if rng.random() < 0.6:
                    canvas.rectangle((x, y, x + window, y + window), "#ffe9a0")
        left += width
    return image


def forest(size: int, rng: Rng) -> Image.Image:
    image = gradient("#20452c", "#12301c", size, rng)
    canvas = ImageDraw.Draw(image)
    for x in rng.permutation(9) / 8 * size:
        width, top = rng.uniform(0.1, 0.17) * size, rng.uniform(0.0, 0.3) * size
        green = int(rng.integers(60, 105))
        canvas.rectangle((x - 0.15 * width, top, x + 0.15 * width, size), "#3b2615")
        for level in range(4):
            y = top + 0.17 * level * size
            corners = (x, y - 0.12 * size, x - width, y + 0.16 * size, x + width, y + 0.16 * size)
            canvas.polygon(corners, (20, green, 40), (8, 30, 15))
    return image


def plain(size: int, rng: Rng) -> Image.Image:
    return gradient("#dcdcd8", "#c2c2c0", size, rng)


BACKGROUNDS: dict[str, Callable[[int, Rng], Image.Image]] = {
    "night": night,
    "ocean": ocean,
    "meadow": meadow,
    "desert": desert,
    "snow": snow,
    "sunset": sunset,
    "bricks": bricks,
    "city": city,
    "forest": forest,
    "plain": plain,
}


def edges(image: Image.Image) -> Image.Image:
    """L: dark lines on white where the picture changes."""
    bright = image.convert("L").filter(ImageFilter.FIND_EDGES)
    return ImageOps.invert(bright.point(lambda value: min(255, int(2.2 * value))))


def pencil(image: Image.Image, rng: Rng) -> Image.Image:
    """Grey strokes on paper with a breath of colour."""
    lines = edges(image).convert("RGB")
    wash = Image.blend(image, Image.new("RGB", image.size, "#f4f1e6"), 0.62)
    grain = rng.normal(0, 14, image.size[::-1]).cumsum(axis=1) % 28 - 14  # strokes run from left to right
    return add(ImageChops.multiply(wash, lines), grain)


def watercolor(image: Image.Image, rng: Rng) -> Image.Image:
    """Washed out, with soft borders and blotches."""
    size = image.size[0]
    soft = ImageEnhance.Color(image.filter(ImageFilter.MedianFilter(5))).enhance(1.2)
    soft = Image.blend(soft.filter(ImageFilter.GaussianBlur(size / 90)), Image.new("RGB", image.size, "white"), 0.38)
    blotches = Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    return add(soft, (np.asarray(blotches, float) - 128) / 4.5)


def oil(image: Image.Image, rng: Rng) -> Image.Image:
    """Flat dabs of saturated paint with relief."""
    dabs = ImageEnhance.Color(image.filter(ImageFilter.ModeFilter(7))).enhance(1.5)
    dabs = ImageEnhance.Contrast(dabs).enhance(1.15)
    strokes = Image.fromarray(rng.integers(0, 256, image.size[::-1], np.uint8)).filter(ImageFilter.GaussianBlur(1.2))
    relief = strokes.filter(ImageFilter.EMBOSS)
    return add(dabs, (np.asarray(relief, float) - 128) * 1.1)


def pixel(image: Image.Image, rng: Rng) -> Image.Image:
    """32 x 32 squares of few colours."""
    small = ImageEnhance.Color(image.resize((32, 32), Image.Resampling.BOX)).enhance(1.3)
    return ImageOps.posterize(small, 3).resize(image.size, Image.Resampling.NEAREST)


def blurred(image: Image.Image, rng: Rng) -> Image.Image:
    """Out of focus, with film grain."""
    return add(image.filter(ImageFilter.GaussianBlur(image.size[0] / 42)), rng.normal(0, 7, image.size[::-1]))


def neon(image: Image.Image, rng: Rng) -> Image.Image:
    """Bright outlines that glow in the dark."""
    bright = ImageEnhance.Color(image).enhance(2.5)
    lines = ImageOps.invert(edges(image)).filter(ImageFilter.MaxFilter(3)).convert("RGB")
    tubes = ImageChops.multiply(ImageEnhance.Brightness(bright).enhance(1.6), lines)
    glow = ImageEnhance.Brightness(tubes.filter(ImageFilter.GaussianBlur(image.size[0] / 40))).enhance(1.8)
    return ImageChops.add(ImageEnhance.Brightness(bright).enhance(0.22), ImageChops.screen(tubes, glow))


def comic(image: Image.Image, rng: Rng) -> Image.Image:
    """Few flat colours, heavy black lines and halftone dots."""
    flat = ImageOps.posterize(ImageEnhance.Color(image).enhance(1.9), 2)
    period = max(4, image.size[0] // 26)
    y, x = np.mgrid[: image.size[1], : image.size[0]] % period - period / 2 + 0.5
    dots = np.where(np.hypot(x, y) < period / 3.2, 0.0, 62.0)
    ink = edges(image).point(lambda value: 255 if value > 150 else 0).filter(ImageFilter.MinFilter(3))
    return ImageChops.multiply(add(flat, dots), ink.convert("RGB"))


def vintage(image: Image.Image, rng: Rng) -> Image.Image:
    """Sepia with dark corners, scratches and a paper frame; some of the colour is left."""
    size = image.size[0]
    sepia = ImageOps.colorize(image.convert("L"), "#2b1a0a", "#f6e3bd", "#a57c4f")
    mixed = Image.blend(image, sepia, 0.72)
    y, x = np.mgrid[: image.size[1], : image.size[0]] / size * 2 - 1
    faded = add(mixed, -70 * (x**2 + y**2) / 2 + rng.normal(0, 5, x.shape))
    canvas = ImageDraw.Draw(faded)
    for scratch in rng.uniform(0, size, 4):
        canvas.line((scratch, 0, scratch + rng.normal(0, 2), size), "#efe2c6", 1)
    return ImageOps.expand(faded.crop((s := size // 20, s, size - s, image.size[1] - s)), s, "#efe6d0")


def clean(image: Image.Image, rng: Rng) -> Image.Image:
    """As drawn, with a little noise."""
    return add(image, rng.normal(0, 4, image.size[::-1]))


def add(image: Image.Image, change: np.ndarray) -> Image.Image:
    """The picture with a brightness change [height, width] added to its three channels."""
    return Image.fromarray((np.asarray(image, float) + change[..., None]).clip(0, 255).astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "pencil": pencil,
    "watercolor": watercolor,
    "oil": oil,
    "pixel": pixel,
    "blurred": blurred,
    "neon": neon,
    "comic": comic,
    "vintage": vintage,
    "clean": clean,
}

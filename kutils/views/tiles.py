"""Images in a figure: each in a square, with a title above and a text below."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from kutils.views.figures import ORANGE, SMALL_FONT, new_axes, styled, wrap

TILE_PX = 384  # images are shown no larger: a grid of 4-megapixel files would make a notebook of 50 MB
LINE_INCHES = 0.185  # room for a line of SMALL_FONT


def show_image(axes: Axes, image) -> None:
    """Draw a path, a Pillow image or a uint8 array in a square; say so there where a file cannot be read."""
    axes.axis("off")
    if not isinstance(image, Image.Image):
        try:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image).convert("RGB")
        # what Pillow raises for missing and broken files, and for those of too many pixels
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = wrap(f"{Path(image).name}: {type(error).__name__}")
            style = {"ha": "center", "va": "center", "color": ORANGE, "parse_math": False}
            axes.text(0.5, 0.5, reason, transform=axes.transAxes, **style)
            axes.set_aspect("equal")
            return
    side = min(TILE_PX, max(image.size))
    image = ImageOps.contain(image.convert("RGB"), (side, side))
    axes.imshow(image)
    (middle_x, middle_y), half = ((size - 1) / 2 for size in image.size), side / 2
    axes.set(xlim=(middle_x - half, middle_x + half), ylim=(middle_y + half, middle_y - half))


@styled()
def new_tiles(
    count: int, columns: int, text_lines: int, *, title_lines: int = 1, width: float = 3, title: str = ""
) -> tuple[Figure, np.ndarray]:
    """A figure with room for `count` images of `width` inches and their texts; those without an image are empty.

    Args:
        columns: images side by side; fewer where there are fewer images.
        text_lines: most lines of text below an image.
        title_lines: most lines above one.
        title: of the figure; a long one is cut after two lines.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    height = width + 0.1 + LINE_INCHES * (title_lines + text_lines)
    figure, all_axes = new_axes(columns, rows, width=max(width * columns, 6), height=height * rows + 0.4 * bool(title))
    for axes in all_axes:
        axes.axis("off")
    if title:
        figure.suptitle(wrap(title, 28 * columns, 2), parse_math=False)
    return figure, all_axes


def show_tile(axes: Axes, image, title: str, text: str, **title_style) -> None:
    """An image with a title above and a text below, neither read as a formula."""
    show_image(axes, image)
    axes.set_title(title, parse_math=False, **title_style)
    axes.text(0, -0.03, text, transform=axes.transAxes, va="top", fontsize=SMALL_FONT, parse_math=False)


def count_lines(texts: Sequence[str]) -> int:
    """Of the longest text."""
    return max(text.count("\n") + 1 for text in texts)

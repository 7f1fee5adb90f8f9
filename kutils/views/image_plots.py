"""Draws images in square tiles, with a title above and a text below each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from kutils.views.figures import (
    GREEN,
    ORANGE,
    SMALL_FONT,
    PlotError,
    check_same_length,
    despine,
    finite,
    new_axes,
    new_figure,
    styled,
    wrap,
)
from kutils.views.model_style import model_color

TILE_PX = 384  # images are shown no larger: a grid of 4-megapixel files would make a notebook of 50 MB
LINE_INCHES = 0.185  # room for a line of SMALL_FONT
LINE_POINTS = 11.5  # from line to line of SMALL_FONT


@styled()
def image_grid(images: Sequence, titles: Sequence[str], columns: int = 4) -> Figure:
    """Images with a text above each.

    Args:
        images: paths, Pillow images or uint8 [H, W, 3] arrays; a file that cannot be read leaves an empty tile.
        titles: one text per image, such as its prompt; long ones are wrapped and cut after five lines.
        columns: images side by side.
    Raises: PlotError for no image, or another number of titles.
    """
    check_same_length(images=images, titles=titles)
    texts = [wrap(title) for title in titles]
    figure, all_axes = new_tiles(len(images), columns, 0, title_lines=count_lines(texts))
    for axes, image, text in zip(all_axes, images, texts, strict=False):
        show_image(axes, image)
        axes.set_title(text, fontsize=SMALL_FONT, fontweight="normal", parse_math=False)
    return figure


@styled()
def predictions(
    images: Sequence, prompts: Sequence[str], nearest: Sequence[str], cosines: Sequence[float], columns: int = 4
) -> Figure:
    """Predictions in the order given: image, cosine, true prompt, and the nearest prompt of a bank.

    Args:
        images, prompts, nearest, cosines: as for `best_and_worst`.
        columns: images side by side.
    Raises: PlotError for no image, lists of different lengths, or a cosine that is not finite.
    """
    check_same_length(images=images, prompts=prompts, nearest_prompts=nearest, cosines=cosines)
    texts = true_and_nearest(prompts, nearest)
    figure, all_axes = new_tiles(len(texts), columns, count_lines(texts))
    for axes, image, cosine, text in zip(all_axes, images, finite(cosines, "cosines"), texts, strict=False):
        show_tile(axes, image, f"cosine {cosine:.3f}", text)
    return figure


@styled()
def best_and_worst(
    image_paths: Sequence, prompts: Sequence[str], nearest: Sequence[str], cosines: Sequence[float], count: int = 4
) -> Figure:
    """The best predictions above the worst: image, cosine, true prompt, and the nearest prompt of a bank.

    Args:
        image_paths: as the images of `image_grid`, in any order.
        prompts: the true prompts.
        nearest: for each prediction, the prompt nearest to it.
        cosines: of prediction and true prompt.
        count: images per row; fewer where there are less than twice as many.
    Raises: PlotError for no image, or lists of different lengths.
    """
    check_same_length(images=image_paths, prompts=prompts, nearest_prompts=nearest, cosines=cosines)
    image_paths, prompts, nearest = list(image_paths), list(prompts), list(nearest)
    cosines = finite(cosines, "cosines")
    order = np.argsort(-cosines, kind="stable")
    count = min(count, -(-len(order) // 2))
    texts = true_and_nearest(prompts, nearest)
    figure, all_axes = new_tiles(2 * count, count, count_lines(texts))
    best, worst = order[:count], order[max(count, len(order) - count) :][::-1]
    for name, color, chosen, row in (("best", GREEN, best, 0), ("worst", ORANGE, worst, count)):
        for axes, index in zip(all_axes[row:], chosen, strict=False):
            title = f"{name}: cosine {cosines[index]:.3f}"
            show_tile(axes, image_paths[index], title, texts[index], color=color)
    return figure


def true_and_nearest(prompts: Sequence[str], nearest: Sequence[str]) -> list[str]:
    """The text below each predicted image."""
    return [f"{wrap(f'true: {a}')}\n{wrap(f'nearest: {b}')}" for a, b in zip(prompts, nearest, strict=True)]


@styled()
def pairs(images: Sequence[tuple], prompts: Sequence[tuple[str, str]], cosines: Sequence[float]) -> Figure:
    """Pairs of similar prompts: their two images side by side, the prompts below, the cosine above.

    Args:
        images: of each pair, as the images of `image_grid`.
        prompts: of each pair.
        cosines: of the two prompts' embeddings.
    Raises: PlotError for no pair, lists of different lengths, or a cosine that is not finite.
    """
    check_same_length(images=images, prompts=prompts, cosines=cosines)
    cosines = finite(cosines, "cosines")
    texts = [wrap(prompt) for pair in prompts for prompt in pair]
    figure, all_axes = new_tiles(len(texts), 4 if len(prompts) > 1 else 2, count_lines(texts))
    shown = [image for pair in images for image in pair]
    for number, (axes, image, text) in enumerate(zip(all_axes, shown, texts, strict=False)):
        pair, second = divmod(number, 2)
        title = f"pair {pair + 1}" if second else f"pair {pair + 1}: cosine {cosines[pair]:.3f}"
        show_tile(axes, image, title, text)
    return figure


@styled()
def ranked_images(
    images: Sequence, prompts: Sequence[str], cosines: Sequence[float], columns: int = 5, title: str = ""
) -> Figure:
    """The results of a search, best first: rank and cosine above each image, its prompt below.

    Args:
        images: as the images of `image_grid`, in any order.
        prompts: of the images.
        cosines: of the images, or their prompts, and what was looked for.
        columns: images side by side.
        title: what was looked for.
    Raises: PlotError for no image, lists of different lengths, or a cosine that is not finite.
    """
    check_same_length(images=images, prompts=prompts, cosines=cosines)
    cosines = finite(cosines, "cosines")
    images, texts = list(images), [wrap(prompt, 32) for prompt in prompts]
    figure, all_axes = new_tiles(len(images), columns, count_lines(texts), width=2.6, title=title)
    for rank, (axes, index) in enumerate(zip(all_axes, np.argsort(-cosines, kind="stable"), strict=False), start=1):
        show_tile(axes, images[index], f"{rank}: cosine {cosines[index]:.3f}", texts[index])
    return figure


@styled()
def disagreement(images: Sequence, texts: Sequence[Mapping[str, str]], agreement: Sequence[float]) -> Figure:
    """Images that models read differently, least agreement first: what each model takes one for, in its colour.

    Args:
        images: as the images of `image_grid`.
        texts: of each image: model -> the prompt nearest to its prediction.
        agreement: of each image: mean cosine between the models' predictions.
    Raises: PlotError for no image, lists of different lengths, or an agreement that is not finite.
    """
    check_same_length(images=images, texts=texts, agreement=agreement)
    agreement, images = finite(agreement, "agreements"), list(images)
    for number, each in enumerate(texts):
        if not each:
            raise PlotError(f"image number {number} has no model's text")
    said = [{model: wrap(prompt, lines=3) for model, prompt in each.items()} for each in texts]
    points = max(sum(LINE_POINTS * (count_lines([prompt]) + 1.8) for prompt in each.values()) for each in said)
    figure, all_axes = new_tiles(len(images), 4, math.ceil(points / 72 / LINE_INCHES))
    for axes, index in zip(all_axes, np.argsort(agreement, kind="stable"), strict=False):
        show_tile(axes, images[index], f"agreement {agreement[index]:.3f}", "")
        below = 5.0  # points under the image
        for model, prompt in said[index].items():
            place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "fontsize": SMALL_FONT}
            axes.annotate(
                model, (0, 0), (0, -below), color=model_color(model), fontweight="bold", parse_math=False, **place
            )
            axes.annotate(prompt, (0, 0), (0, -below - 1.2 * LINE_POINTS), parse_math=False, **place)
            below += LINE_POINTS * (count_lines([prompt]) + 1.8)
    return figure


@styled()
def neighbours(image, tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One image, and the prompts nearest to what each model predicts for it, as bars of their cosines.

    Args:
        image: as the images of `image_grid`.
        tables: model -> columns `rank`, `cosine`, `prompt`, nearest first.
    Raises: PlotError for no model, an empty table, or a cosine that is not finite.
    """
    check_same_length(models=list(tables))
    named = {model: finite(table["cosine"], f"cosines of {model}") for model, table in tables.items()}
    names = {model: [wrap(prompt, 56, 2) for prompt in table["prompt"]] for model, table in tables.items()}
    heights = [1.1 + 0.32 * len(rows) for rows in names.values()]
    figure = new_figure(13, max(sum(heights), 4))
    grid = figure.add_gridspec(len(tables), 2, width_ratios=(1, 2), height_ratios=heights)
    image_axes = figure.add_subplot(grid[:, 0])
    show_image(image_axes, image)
    image_axes.set_anchor("N")
    end = max(float(cosines.max()) for cosines in named.values())
    low = min(0.0, *(float(cosines.min()) for cosines in named.values()))
    for row, (model, cosines) in enumerate(named.items()):
        axes = figure.add_subplot(grid[row, 1])
        drawn = axes.barh(range(len(cosines)), cosines, color=model_color(model), height=0.65, label=names[model])
        axes.bar_label(drawn, fmt="{:.3f}", padding=4)
        axes.set_yticks(range(len(cosines)), names[model], fontsize=SMALL_FONT, parse_math=False)
        axes.invert_yaxis()
        axes.set_title(model, parse_math=False)
        axes.set_xlim(low, end + 0.15 * (end - low))
        axes.tick_params(axis="y", length=0)
        despine(axes, grid="x")
    axes.set_xlabel("cosine similarity of the prediction and the prompt")
    return figure


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


def show_tile(axes: Axes, image, title: str, text: str, **title_style) -> None:
    """An image with a title above and a text below, neither read as a formula."""
    show_image(axes, image)
    axes.set_title(title, parse_math=False, **title_style)
    axes.text(0, -0.03, text, transform=axes.transAxes, va="top", fontsize=SMALL_FONT, parse_math=False)


def count_lines(texts: Sequence[str]) -> int:
    """Of the longest text."""
    return max(text.count("\n") + 1 for text in texts)

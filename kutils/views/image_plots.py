"""Draws images in square tiles, with a title above and a text below each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from kutils.views import figures
from kutils.views.model_style import model_color

TILE_PX = 384  # of the longer side at most: a grid of 4-megapixel files would make a notebook of 50 MB
LINE_INCHES = 0.185  # room for a line of figures.SMALL_FONT
LINE_POINTS = 11.5  # from line to line of figures.SMALL_FONT


@figures.styled()
def image_grid(images: Sequence, titles: Sequence[str], columns: int = 4) -> Figure:
    """Images with a text above each.

    Args:
        images: paths, Pillow images or uint8 [H, W, 3] arrays; a file that cannot be read leaves an empty tile.
        titles: one text per image, such as its prompt; long ones are wrapped and cut after five lines.
    Raises: ValueError for no image, or another number of titles.
    """
    figures.check_same_length(images=images, titles=titles)
    texts = [figures.wrap(title) for title in titles]
    figure, all_axes = new_tiles(len(images), columns, 0, title_lines=count_lines(texts))
    for axes, image, text in zip(all_axes, images, texts, strict=False):
        show_image(axes, image)
        axes.set_title(text, fontsize=figures.SMALL_FONT, fontweight="normal", parse_math=False)
    return figure


@figures.styled()
def predictions(rows: pd.DataFrame, columns: int = 4) -> Figure:
    """Predictions in the order given: image, cosine, true prompt, and the nearest prompt of a bank.

    Args:
        rows: columns image (as the images of `image_grid`), prompt, nearest, cosine (of prediction and true prompt).
    Raises: ValueError for no row, or a cosine that is not finite.
    """
    figures.finite(rows["cosine"], "cosines")
    texts = true_and_nearest(rows)
    figure, all_axes = new_tiles(len(texts), columns, count_lines(texts))
    for axes, row, text in zip(all_axes, rows.itertuples(), texts, strict=False):
        show_tile(axes, row.image, f"cosine {row.cosine:.3f}", text)
    return figure


@figures.styled()
def best_and_worst(rows: pd.DataFrame) -> Figure:
    """The best predictions above the worst: image, cosine, true prompt, and the nearest prompt of a bank.

    Args:
        rows: of `examples.choose_extremes`: as for `predictions`, and `best`, a bool.
    Raises: ValueError for no row, or a cosine that is not finite.
    """
    figures.finite(rows["cosine"], "cosines")
    columns = int(rows["best"].value_counts().max())
    figure, all_axes = new_tiles(2 * columns, columns, count_lines(true_and_nearest(rows)))
    for name, color, group, place in (
        ("best", figures.GREEN, rows[rows["best"]], 0),
        ("worst", figures.ORANGE, rows[~rows["best"]], columns),
    ):
        for axes, row, text in zip(all_axes[place:], group.itertuples(), true_and_nearest(group), strict=False):
            show_tile(axes, row.image, f"{name}: cosine {row.cosine:.3f}", text, color=color)
    return figure


def true_and_nearest(rows: pd.DataFrame) -> list[str]:
    """The text below each predicted image."""
    pairs = zip(rows["prompt"], rows["nearest"], strict=True)
    return [f"{figures.wrap(f'true: {true}')}\n{figures.wrap(f'nearest: {nearest}')}" for true, nearest in pairs]


@figures.styled()
def pairs(rows: pd.DataFrame) -> Figure:
    """Pairs of similar prompts: their two images side by side, the prompts below, the cosine above.

    Args:
        rows: of `Exploration.near_duplicates`: columns image_a and image_b (as the images of `image_grid`), prompt_a,
            prompt_b, and cosine, of the two prompts' embeddings.
    Raises: ValueError for no pair, or a cosine that is not finite.
    """
    figures.finite(rows["cosine"], "cosines")
    texts = [figures.wrap(prompt) for row in rows.itertuples() for prompt in (row.prompt_a, row.prompt_b)]
    figure, all_axes = new_tiles(len(texts), 4 if len(rows) > 1 else 2, count_lines(texts))
    for number, row in enumerate(rows.itertuples()):
        titles = (f"pair {number + 1}: cosine {row.cosine:.3f}", f"pair {number + 1}")
        for side, image in enumerate((row.image_a, row.image_b)):
            place = 2 * number + side
            show_tile(all_axes[place], image, titles[side], texts[place])
    return figure


@figures.styled()
def ranked_images(rows: pd.DataFrame, columns: int = 5, title: str = "") -> Figure:
    """The results of a search: rank and cosine above each image, its prompt below.

    Args:
        rows: of `Exploration.search`, best first: columns image (as the images of `image_grid`), prompt, and cosine, of
            the prompt and what was searched for.
    Raises: ValueError for no image, or a cosine that is not finite.
    """
    figures.finite(rows["cosine"], "cosines")
    texts = [figures.wrap(prompt, 32) for prompt in rows["prompt"]]
    figure, all_axes = new_tiles(len(rows), columns, count_lines(texts), width=2.6, title=title)
    for rank, (axes, row, text) in enumerate(zip(all_axes, rows.itertuples(), texts, strict=False), start=1):
        show_tile(axes, row.image, f"{rank}: cosine {row.cosine:.3f}", text)
    return figure


@figures.styled()
def disagreement(rows: pd.DataFrame) -> Figure:
    """Images on which models disagree: the prompt nearest to each model's prediction, in the model's colour.

    Args:
        rows: of `Exploration.disagreement`: columns image (as the images of `image_grid`), agreement (mean cosine
            between the models' predictions), and nearest_by_model: model -> the prompt nearest to its prediction.
    Raises: ValueError for no image, or an agreement that is not finite.
    """
    figures.finite(rows["agreement"], "agreements")
    texts = [
        {model: figures.wrap(prompt, lines=3) for model, prompt in each.items()} for each in rows["nearest_by_model"]
    ]
    points = max(sum(LINE_POINTS * (count_lines([prompt]) + 1.8) for prompt in each.values()) for each in texts)
    figure, all_axes = new_tiles(len(rows), 4, math.ceil(points / 72 / LINE_INCHES))
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "fontsize": figures.SMALL_FONT}
    for axes, row, each in zip(all_axes, rows.itertuples(), texts, strict=False):
        show_tile(axes, row.image, f"agreement {row.agreement:.3f}", "")
        below = 5.0  # points under the image
        for model, prompt in each.items():
            name_style = {"color": model_color(model), "fontweight": "bold", "parse_math": False}
            axes.annotate(model, (0, 0), (0, -below), **name_style, **place)
            axes.annotate(prompt, (0, 0), (0, -below - 1.2 * LINE_POINTS), parse_math=False, **place)
            below += LINE_POINTS * (count_lines([prompt]) + 1.8)
    return figure


@figures.styled()
def neighbours(image, tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One image, and the prompts nearest to what each model predicts for it, as bars of their cosines.

    Args:
        image: as the images of `image_grid`.
        tables: model -> columns `rank`, `cosine`, `prompt`, nearest first.
    Raises: ValueError for no model, an empty table, or a cosine that is not finite.
    """
    figures.check_same_length(models=list(tables))
    named = {model: figures.finite(table["cosine"], f"cosines of {model}") for model, table in tables.items()}
    names = {model: [figures.wrap(prompt, 56, 2) for prompt in table["prompt"]] for model, table in tables.items()}
    heights = [1.1 + 0.32 * len(rows) for rows in names.values()]
    figure = figures.new_figure(13, max(sum(heights), 4))
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
        axes.set_yticks(range(len(cosines)), names[model], fontsize=figures.SMALL_FONT, parse_math=False)
        axes.invert_yaxis()
        axes.set_title(model, parse_math=False)
        axes.set_xlim(low, end + 0.15 * (end - low))
        axes.tick_params(axis="y", length=0)
        figures.despine(axes, grid="x")
    axes.set_xlabel("cosine similarity of the prediction and the prompt")
    return figure


@figures.styled()
def new_tiles(
    count: int, columns: int, text_lines: int, *, title_lines: int = 1, width: float = 3, title: str = ""
) -> tuple[Figure, np.ndarray]:
    """Make a figure with room for `count` images of `width` inches and their texts; tiles without an image stay empty.

    Args:
        text_lines: most lines of text below an image.
        title_lines: most lines above one.
        title: of the figure; a long one is cut after two lines.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    height = width + 0.1 + LINE_INCHES * (title_lines + text_lines)
    figure, all_axes = figures.new_axes(
        columns, rows, width=max(width * columns, 6), height=height * rows + 0.4 * bool(title)
    )
    for axes in all_axes:
        axes.axis("off")
    if title:
        figure.suptitle(figures.wrap(title, 28 * columns, 2), parse_math=False)
    return figure, all_axes


def show_image(axes: Axes, image) -> None:
    """Draw a path, a Pillow image or a uint8 array in a square; for a file that cannot be read, its name and error."""
    axes.axis("off")
    if not isinstance(image, Image.Image):
        try:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image).convert("RGB")
        # Pillow raises these for missing and broken files, and for those with too many pixels
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = figures.wrap(f"{Path(image).name}: {type(error).__name__}")
            style = {"ha": "center", "va": "center", "color": figures.ORANGE, "parse_math": False}
            axes.text(0.5, 0.5, reason, transform=axes.transAxes, **style)
            axes.set_aspect("equal")
            return
    side = min(TILE_PX, max(image.size))
    image = ImageOps.contain(image.convert("RGB"), (side, side))
    axes.imshow(image)
    (middle_x, middle_y), half = ((size - 1) / 2 for size in image.size), side / 2
    axes.set(xlim=(middle_x - half, middle_x + half), ylim=(middle_y + half, middle_y - half))


def show_tile(axes: Axes, image, title: str, text: str, **title_style) -> None:
    """Draw an image with a title above and a text below; neither is read as a formula."""
    show_image(axes, image)
    axes.set_title(title, parse_math=False, **title_style)
    axes.text(0, -0.03, text, transform=axes.transAxes, va="top", fontsize=figures.SMALL_FONT, parse_math=False)


def count_lines(texts: Sequence[str]) -> int:
    """Lines of the longest text."""
    return max(text.count("\n") + 1 for text in texts)

"""Sets the style of every figure: colours, sizes, and a text below it.

Figures have a transparent background, and colours that are readable on white and on dark pages. A function that draws
one is decorated with `@styled()` and begins with `new_axes`. A notebook shows a figure once, with its text as `alt`.
"""

import io
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator
from PIL import Image

# Okabe and Ito's colours, moved until each has a contrast of 3:1 on white and on #111111, and each two differ by 17 in
# CIELAB for normal and for colour-blind eyes; texts have the grey, 4:1 on both, and titles are bold to make up for it
BLUE, ORANGE, GREEN, PINK, SKY, VIOLET = COLORS = ("#4161b8", "#d55e00", "#1e8550", "#b2559e", "#249ad9", "#6e4ad9")
GREY = TEXT = "#777777"

# for prompts in Chinese, Japanese and Korean; those that are there, since Matplotlib warns of a missing family
CJK_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans KR", "Source Han Sans"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAGothic", "Hiragino Sans", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
)
INSTALLED = {font.name for font in fontManager.ttflist}

STYLE = {
    "font.family": ["sans-serif", *(name for name in CJK_FONTS if name in INSTALLED)],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.titlecolor": "auto",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.prop_cycle": cycler(color=COLORS),
    "font.size": 10.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "figure.titleweight": "bold",
    "figure.titlesize": 12,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "axes.linewidth": 0.8,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
}
CSS_PX = 100  # a page's pixels per inch of a figure
DPI = 160  # sharp on screens of more than one pixel per CSS pixel, unless that takes more than MOST_BYTES
LEAST_DPI = 50
MOST_BYTES = 1_000_000  # of a PNG in a notebook; larger figures are saved with fewer pixels
MOST_ALT_CHARACTERS = 1000
LINE_CHARACTERS = 38  # of a prompt below a tile of 3 inches, in SMALL_FONT
SMALL_FONT = 9.5


@contextmanager
def styled() -> Iterator[None]:
    """Draw with the style: `with styled():`, or `@styled()` above a function that draws.

    A character that no font has becomes a box; Matplotlib's warning of each is left out.
    """
    # not by `rc_context`: the first figure of a notebook makes Matplotlib interactive, and that would be undone, too
    before = {key: plt.rcParams[key] for key in STYLE}
    plt.rcParams.update(STYLE)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")
            yield
    finally:
        plt.rcParams.update(before)


# ---------------------------------------------------------------- a figure and its text


class DescribedFigure(Figure):
    """A figure that a notebook shows once, with its text in the output's metadata.

    nbconvert's templates `classic` and `basic` make it the image's `alt`.
    """

    def draw(self, renderer) -> None:
        with styled():  # some ticks are only made here
            super().draw(renderer)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, alt = png(self), alt_text(self)
        picture = Image.open(io.BytesIO(data))
        width = round(picture.width * CSS_PX / picture.info["dpi"][0])
        return {"image/png": data, "text/plain": f"<Figure: {alt}>"}, {"image/png": {"alt": alt, "width": width}}

    def _ipython_display_(self) -> None:
        """Display the figure and close it, so that it is not shown again when the cell ends.

        The inline backend would ask for a white page behind a transparent figure (`needs_background`).
        """
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        plt.close(self)
        display(data, metadata=metadata, raw=True)


@styled()
def new_figure(width: float, height: float) -> DescribedFigure:
    """Make an empty figure; width and height in inches."""
    return plt.figure(FigureClass=DescribedFigure, figsize=(width, height), layout="constrained")


@styled()
def new_axes(
    columns: int = 1, rows: int = 1, *, width: float = 8, height: float = 3.6, share_x: bool = False
) -> tuple[DescribedFigure, np.ndarray]:
    """Make a figure and its axes, [rows * columns]; width and height of the whole figure in inches."""
    figure = new_figure(width, height)
    return figure, figure.subplots(rows, columns, sharex=share_x, squeeze=False).ravel()


def alt_text(figure: Figure) -> str:
    """Describe a figure in words: titles, axes with their units, bars and legends with their numbers, images."""
    images = sum(bool(axes.images) for axes in figure.axes)
    sentences = [figure.get_suptitle(), f"{images} image{'s' * (images > 1)}" if images else ""]
    sentences += [*map(axes_text, figure.axes), figure.get_supxlabel()]
    sentences += ["; ".join(text.get_text() for text in legend.get_texts()) for legend in figure.legends]
    text = " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in sentences if part)
    return textwrap.shorten(text, MOST_ALT_CHARACTERS, placeholder=" ...") or "An empty figure."


def axes_text(axes: Axes) -> str:
    """Describe one panel: title, axis labels, bars, texts and legend."""
    labels = [axes.get_ylabel().replace("\n", " "), axes.get_xlabel()] if axes.axison else []
    axis_text = " against ".join(label for label in labels if label)
    bars = [patch.get_label() for patch in axes.patches if not patch.get_label().startswith("_")]
    texts = [text.get_text() for text in axes.texts]
    if len(bars) == len(texts):
        texts = [f"{bar}: {text}" for bar, text in zip(bars, texts, strict=True)]
    legend = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
    details = "; ".join(text for text in [axis_text, *texts, *legend] if text)
    return ": ".join(text for text in (axes.get_title() or axes.get_title("left"), details) if text)


@styled()
def png(figure: Figure, dpi: int = DPI) -> bytes:
    """Encode a figure as a PNG file that contains its text; above a megabyte it gets fewer pixels."""
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=dpi, bbox_inches="tight", metadata={"Description": alt_text(figure)})
        size = buffer.tell()
        if size <= MOST_BYTES or dpi <= LEAST_DPI:
            return buffer.getvalue()
        dpi = max(LEAST_DPI, int(dpi * 0.95 * (MOST_BYTES / size) ** 0.5))


@contextmanager
def print_errors() -> Iterator[None]:
    """Print an error of the block and continue: a figure that fails must not stop a notebook that has results."""
    try:
        yield
    except Exception:
        traceback.print_exc()


# ---------------------------------------------------------------- checks of arguments


def check_same_length(**lists: Sequence) -> None:
    """Raise ValueError for empty lists, or lists of different lengths."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one of each is needed: {', '.join(f'{count} {name}' for name, count in lengths.items())}")
    if 0 in lengths.values():
        raise ValueError(f"nothing to draw: no {' and no '.join(lengths)}")


def finite(values, what: str) -> np.ndarray:
    """The values as float64 [n]. Raises ValueError if there are none, or one is not finite."""
    values = np.asarray(values, np.float64).ravel()
    if not len(values):
        raise ValueError(f"nothing to draw: no {what}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} number {int(np.argmax(~np.isfinite(values)))} is not finite")
    return values


def wrap(text: str, width: int = LINE_CHARACTERS, lines: int = 5) -> str:
    """Break a text into lines; what goes beyond the last one is cut."""
    return textwrap.fill(str(text), width, max_lines=lines, placeholder=" ...")


# ---------------------------------------------------------------- parts of axes


def despine(axes: Axes, grid: str = "both") -> None:
    """Leave only the left and lower border, and draw a faint grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=TEXT, alpha=STYLE["grid.alpha"], linewidth=STYLE["grid.linewidth"])
    axes.set_axisbelow(True)


def thousands(*each: Axis) -> None:
    """Write the ticks of an axis of counts as 1,234,567, at whole numbers only."""
    for axis in each:
        axis.set_major_formatter("{x:,.0f}")
        axis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 2.5, 5, 10)))


def legend_below(axes: Axes) -> None:
    """Put the legend under the axis label, where it covers no data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))

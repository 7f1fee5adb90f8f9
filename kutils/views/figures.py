"""Sets the style of every figure: colours, sizes, and a text below it.

Figures have a transparent background, and colours that read on white as well as on dark pages. A function that draws
one is decorated with `@styled()` and begins with `new_axes`. In a notebook a figure is shown once and carries its text.
"""

import io
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator
from PIL import Image

from kutils.system import paths

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
    "svg.fonttype": "none",
}
CSS_PX = 100  # a page's pixels per inch of a figure
DPI = 160  # sharp on screens of more than one pixel per CSS pixel, unless that takes more than MOST_BYTES
LEAST_DPI = 50
MOST_BYTES = 1_000_000  # of a PNG in a notebook; a grid of photos gets fewer pixels instead
MOST_ALT_CHARACTERS = 1000
LINE_CHARACTERS = 38  # of a prompt below a tile of 3 inches, in SMALL_FONT
SMALL_FONT = 9.5


@contextmanager
def styled() -> Iterator[None]:
    """What is drawn inside has the style: `with styled():`, or `@styled()` above a function that draws.

    A character that no font has is a box, without a warning for each.

    Not by `rc_context`: the first figure of a notebook makes matplotlib interactive, and that would be undone as well.
    """
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
        with styled():  # some ticks are only made now
            super().draw(renderer)

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data, told = png(self), alt_text(self)
        picture = Image.open(io.BytesIO(data))
        width = round(picture.width * CSS_PX / picture.info["dpi"][0])
        return {"image/png": data, "text/plain": f"<Figure: {told}>"}, {"image/png": {"alt": told, "width": width}}

    def _ipython_display_(self) -> None:
        """Show and close it, so that it is not shown again when the cell ends.

        Not left to the inline backend: that asks for a white page behind a transparent figure (`needs_background`).
        """
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        plt.close(self)
        display(data, metadata=metadata, raw=True)


@styled()
def new_figure(width: float, height: float) -> DescribedFigure:
    """An empty figure of so many inches."""
    return plt.figure(FigureClass=DescribedFigure, figsize=(width, height), layout="constrained")


@styled()
def new_axes(
    columns: int = 1, rows: int = 1, *, width: float = 8, height: float = 3.6, share_x: bool = False
) -> tuple[DescribedFigure, np.ndarray]:
    """A figure of rows x columns axes, [rows * columns]; width and height are the whole figure's, in inches."""
    figure = new_figure(width, height)
    return figure, figure.subplots(rows, columns, sharex=share_x, squeeze=False).ravel()


def alt_text(figure: Figure) -> str:
    """What a figure shows, in words: titles, axes with their units, bars and legends with their numbers, images."""
    told = [figure.get_suptitle()] if figure.get_suptitle() else []
    images = [axes for axes in figure.axes if axes.images]
    if images:
        told.append(f"{len(images)} image{'s' * (len(images) > 1)}")
    told += [text for axes in figure.axes if (text := axes_text(axes))]
    told += [figure.get_supxlabel()] if figure.get_supxlabel() else []
    text = " ".join(part if part.endswith((".", "?", "!")) else f"{part}." for part in told)
    return textwrap.shorten(text, MOST_ALT_CHARACTERS, placeholder=" ...") or "An empty figure."


def axes_text(axes: Axes) -> str:
    """Title, axis labels, bars, texts and legend of one panel."""
    labels = [axes.get_ylabel().replace("\n", " "), axes.get_xlabel()] if axes.axison else []
    told = [" against ".join(label for label in labels if label)]
    bars = [patch.get_label() for patch in axes.patches if not patch.get_label().startswith("_")]
    texts = [text.get_text() for text in axes.texts]
    if len(bars) == len(texts):
        texts = [f"{bar}: {text}" for bar, text in zip(bars, texts, strict=True)]
    legend = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
    details = "; ".join(text for text in [*told, *texts, *legend] if text)
    return ": ".join(text for text in (axes.get_title() or axes.get_title("left"), details) if text)


@styled()
def png(figure: Figure, dpi: int = DPI) -> bytes:
    """A figure as a PNG file that holds its text; one of more than a megabyte gets fewer pixels."""
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=dpi, bbox_inches="tight", metadata={"Description": alt_text(figure)})
        size = buffer.tell()
        if size <= MOST_BYTES or dpi <= LEAST_DPI:
            return buffer.getvalue()
        dpi = max(LEAST_DPI, int(dpi * 0.95 * (MOST_BYTES / size) ** 0.5))


@styled()
def save(figure: Figure, path: Path | str, dpi: int = DPI) -> None:
    """Write a figure to an image file (.png, .svg, ...: the suffix says what), atomically, and close it.

    PNG and SVG files hold the figure's text as their description, and have its transparent background; others are
    white.
    """
    described = Path(path).suffix.lower() in (".png", ".svg")
    more = {"metadata": {"Description": alt_text(figure)}} if described else {"facecolor": "white"}
    with paths.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight", **more)
    plt.close(figure)


@contextmanager
def errors_shown() -> Iterator[None]:
    """Print an error of the block and go on: a figure must not cost the results that are already there."""
    try:
        yield
    except Exception:
        traceback.print_exc()


# ---------------------------------------------------------------- what figures are given


def check_same_length(**lists: Sequence) -> None:
    """Raise ValueError for empty lists, or lists of different lengths."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"one of each is needed: {', '.join(f'{count} {name}' for name, count in lengths.items())}")
    if 0 in lengths.values():
        raise ValueError(f"nothing to draw: no {' and no '.join(lengths)}")


def finite(values, what: str) -> np.ndarray:
    """float64 [n]; ValueError if there are none, or one is not finite."""
    values = np.asarray(values, np.float64).ravel()
    if not len(values):
        raise ValueError(f"nothing to draw: no {what}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} number {int(np.argmax(~np.isfinite(values)))} is not finite")
    return values


def wrap(text: str, width: int = LINE_CHARACTERS, lines: int = 5) -> str:
    return textwrap.fill(str(text), width, max_lines=lines, placeholder=" ...")


# ---------------------------------------------------------------- what figures are made of


def despine(axes: Axes, grid: str = "both") -> None:
    """Only the left and lower border, and a faint grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=TEXT, alpha=STYLE["grid.alpha"], linewidth=STYLE["grid.linewidth"])
    axes.set_axisbelow(True)


def thousands(*each: Axis) -> None:
    """1,234,567 at the ticks of an axis that counts, and no ticks between whole numbers."""
    for axis in each:
        axis.set_major_formatter("{x:,.0f}")
        axis.set_major_locator(MaxNLocator(6, integer=True, steps=(1, 2, 2.5, 5, 10)))


def legend_below(axes: Axes) -> None:
    """A legend under the axis label, where it is never on the data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))

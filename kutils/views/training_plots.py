"""Figures of training, predictions and scores, for notebooks and reports: each function draws one and returns it.

A notebook shows a figure when it is the last value of a cell, or open when the cell ends. Elsewhere figures stay open
until they are closed: `save` writes one and closes it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.runs.folders import read_metrics
from kutils.views import figures
from kutils.views.figures import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    ORANGE,
    SMALL_FONT,
    TEXT,
    PlotError,
    bars,
    check_same_length,
    despine,
    finite,
    legend_below,
    new_axes,
    styled,
    thousands,
    wrap,
)
from kutils.views.model_style import LINES, family_of, model_color
from kutils.views.tiles import count_lines, new_tiles, show_image, show_tile

save, errors_shown = figures.save, figures.errors_shown  # `plots` is what a notebook imports

# ---------------------------------------------------------------- training


@styled()
def learning_curve(metrics_path: Path | str, baseline: float | None = None) -> Figure:
    """Loss, learning rate and validation cosine of one run, also while it is going on.

    Args:
        metrics_path: the run's metrics.jsonl.
        baseline: the mean-prompt baseline, drawn as a line.
    Raises: PlotError if nothing has been logged yet.
    """
    lines = read_metrics(Path(metrics_path))
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "cosine_similarity" in line]
    if not logged:
        raise PlotError(f"nothing to draw: {metrics_path} has no logged update yet")
    steps, losses = [line["step"] for line in logged], np.array([line["loss"] for line in logged])
    figure, (loss_axes, rate_axes, score_axes) = new_axes(3, width=13, height=4.2, share_x=True)

    window = max(1, len(losses) // 30)
    loss_axes.plot(steps, losses, color=BLUE, alpha=0.45 if window > 1 else 1, linewidth=1.2)
    if window > 1:
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        loss_axes.plot(steps[window - 1 :], smooth, color=BLUE, label=f"mean of {window} log intervals")
        loss_axes.legend()
    loss_axes.set(title="Training loss", ylabel="1 - cosine similarity")

    rate_axes.semilogy(steps, [line["lr"] for line in logged], color=ORANGE)
    rate_axes.set(title="Learning rate", ylabel="learning rate (log scale)")

    draw_scores(score_axes, scored, baseline)
    score_axes.set(title="Validation", ylabel="mean cosine similarity")
    for axes in (loss_axes, rate_axes, score_axes):
        despine(axes)
        axes.set_xlabel("optimiser updates")
        thousands(axes.xaxis)
    return figure


def draw_scores(axes: Axes, scored: list[dict], baseline: float | None) -> None:
    """Validation cosine after every epoch: all rows, rows without a similar training prompt, and the baseline."""
    for key, color, style, name in (
        ("cosine_similarity", GREEN, "o-", "all rows"),
        ("cosine_similarity_clean", BLUE, "s-", "rows without a similar training prompt"),
    ):
        points = [line for line in scored if line.get(key) is not None]
        if points:
            best = max(points, key=lambda line: line[key])
            label = f"{name}: best {best[key]:.4f} (epoch {best['epoch']})"
            values = [line[key] for line in points]
            axes.plot([line["step"] for line in points], values, style, color=color, label=label)
    if not scored:
        axes.text(0.5, 0.6, "no epoch is finished yet", ha="center", transform=axes.transAxes, color=GREY)
    if baseline is not None:
        axes.axhline(baseline, color=GREY, linestyle="--", label=f"mean prompt: {baseline:.4f}")
    if scored or baseline is not None:
        legend_below(axes)


# ---------------------------------------------------------------- images


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


def true_and_nearest(prompts: Sequence[str], nearest: Sequence[str]) -> list[str]:
    """The text below each predicted image."""
    return [f"{wrap(f'true: {a}')}\n{wrap(f'nearest: {b}')}" for a, b in zip(prompts, nearest, strict=True)]


# ---------------------------------------------------------------- scores, weights, numbers


@styled()
def similarity_histogram(cosines: Sequence[float] | Mapping[str, Sequence[float]], threshold: float | None = None):
    """Histogram of cosine similarities, or of several sets of them in one picture.

    Args:
        cosines: in [-1, 1]; or name -> cosines.
        threshold: drawn as a line, with the share of each set that lies at or above it.
    Returns: the figure.
    Raises: PlotError for an empty set or a value that is not finite.
    """
    named = cosines if isinstance(cosines, Mapping) else {"": cosines}
    sets = {name: finite(values, "cosines") for name, values in named.items()}
    if not sets:
        raise PlotError("nothing to draw: no cosines")
    low, high = min(values.min() for values in sets.values()), max(values.max() for values in sets.values())
    if high - low < 0.01:  # equal but for rounding, such as duplicates
        low, high = low - 0.05, high + 0.05
    bins = np.linspace(low, high, 51)
    figure, (axes,) = new_axes()
    models = all(family_of(name) for name in sets)
    for number, (name, values) in enumerate(sets.items()):
        color = model_color(name) if models else COLORS[number % len(COLORS)]
        line = LINES[number % len(LINES)]
        told = f"mean {values.mean():.3f}"
        if threshold is not None:
            told += f", {np.mean(values >= threshold):.1%} at or above {threshold:g}"
        label = f"{name} ({len(values):,}): {told}" if name else told
        shares = np.histogram(values, bins)[0] / len(values)
        axes.stairs(shares, bins, fill=True, color=color, alpha=0.3 if len(sets) > 1 else 0.9)
        outline = np.concatenate([[0], np.repeat(shares, 2), [0]])
        axes.plot(
            np.repeat(bins, 2), outline, color=color, linestyle=line, linewidth=1.5, label=label if name else None
        )
        if threshold is None or not name:
            mean_color = color if len(sets) > 1 else ORANGE
            axes.axvline(values.mean(), color=mean_color, linestyle=line, label=None if name else label)
    if threshold is not None:
        axes.axvline(threshold, color=TEXT, linestyle="--")
    axes.set(xlabel="cosine similarity", ylabel="share of the set", title="Cosine similarity", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_below(axes)
    despine(axes, grid="y")
    return figure


@styled()
def bar_scores(
    scores: Mapping[str, float], baseline: float | None = None, title: str = "Validation cosine similarity"
) -> Figure:
    """One bar per score, in the order given, drawn from the baseline: a bar's length is the gain over it.

    Args:
        scores: name -> mean cosine similarity.
        baseline: the mean-prompt baseline; None: bars start at 0.
    Raises: PlotError for no score, or one that is not finite.
    """
    start = 0.0 if baseline is None else baseline
    told = [f"{value:.4f}" + ("" if baseline is None else f" ({value - start:+.4f})") for value in scores.values()]
    figure, axes = bars(scores, told, start, color=[model_color(name) for name in scores])
    where = "" if baseline is None else f"; bars begin at the mean prompt's {baseline:.4f}"
    axes.set(title=title, xlabel=f"mean cosine similarity{where}")
    return figure


@styled()
def weights(values: Mapping[str, float]) -> Figure:
    """One bar per ensemble weight. Raises: PlotError for no weight, or one that is not finite."""
    told = [f"{value:.3f}" for value in values.values()]
    figure, axes = bars(values, told, color=[model_color(name) for name in values])
    axes.set(title="Ensemble weights", xlabel="weight")
    return figure


@styled()
def timing(seconds: Mapping[str, float], title: str = "Time", unit: str = "seconds") -> Figure:
    """One bar per duration. Raises: PlotError for no duration, or one that is not finite."""
    told = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in seconds.values()]
    figure, axes = bars(seconds, told, color=[model_color(name) for name in seconds])
    axes.set(title=title, xlabel=unit)
    axes.xaxis.set_major_formatter("{x:,g}")
    return figure


@styled()
def counts(values: Mapping[str, int], title: str, unit: str) -> Figure:
    """One bar per number of things, such as prompts per reason. Raises: PlotError for no number."""
    figure, axes = bars(values, [f"{value:,}" for value in values.values()], color=BLUE)
    axes.set(title=title, xlabel=unit)
    thousands(axes.xaxis)
    return figure

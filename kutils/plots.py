"""Figures of the notebooks and reports: each function draws one and returns it.

A notebook shows a figure that is open when its cell ends, so a `;` after the call keeps it from being shown twice.
Elsewhere figures stay open until they are closed: `save` writes one and closes it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from kutils import figures
from kutils.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TEXT,
    PlotError,
    bars,
    check_same_length,
    despine,
    finite,
    legend_below,
    model_color,
    new_axes,
    show_image,
    styled,
    wrap,
)
from kutils.runs import read_metrics

save, errors_shown = figures.save, figures.errors_shown  # `plots` is what a notebook imports

MOST_BARS = 8  # numbers of images per prompt, and sizes, that are told apart

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
    figure, (loss_axes, rate_axes, score_axes) = new_axes(3, width=14, height=4.4, share_x=True)

    window = max(1, len(losses) // 30)
    loss_axes.plot(steps, losses, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1.2)
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
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def draw_scores(axes: Axes, scored: list[dict], baseline: float | None) -> None:
    """Validation cosine after every epoch: all rows, rows without a similar training prompt, and the baseline."""
    for key, color, name in (
        ("cosine_similarity", GREEN, "all rows"),
        ("cosine_similarity_clean", BLUE, "rows without a similar training prompt"),
    ):
        points = [line for line in scored if line.get(key) is not None]
        if points:
            best = max(points, key=lambda line: line[key])
            label = f"{name}: best {best[key]:.4f} (epoch {best['epoch']})"
            values = [line[key] for line in points]
            axes.plot([line["step"] for line in points], values, "o-", color=color, markersize=4, label=label)
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
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    texts = [wrap(title) for title in titles]
    lines = max(text.count("\n") + 1 for text in texts)
    figure, all_axes = new_axes(columns, rows, width=3 * columns, height=(3 + 0.17 * lines) * rows)
    for axes in all_axes:
        axes.axis("off")
    for axes, image, text in zip(all_axes, images, texts, strict=False):
        show_image(axes, image)
        axes.set_title(text, fontsize=9, parse_math=False)
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
    texts = [f"{wrap(f'true: {a}', 44)}\n{wrap(f'nearest: {b}', 44)}" for a, b in zip(prompts, nearest, strict=True)]
    lines = max(text.count("\n") + 1 for text in texts)
    figure, all_axes = new_axes(count, 2, width=max(3.2 * count, 6), height=2 * (3.75 + 0.16 * lines))
    for axes in all_axes:
        axes.axis("off")
    best, worst = order[:count], order[max(count, len(order) - count) :][::-1]
    for name, color, chosen, row in (("best", GREEN, best, 0), ("worst", ORANGE, worst, count)):
        for axes, index in zip(all_axes[row:], chosen, strict=False):
            show_image(axes, image_paths[index])
            axes.set_title(f"{name}: cosine {cosines[index]:.3f}", color=color, fontsize=11, fontweight="bold")
            axes.text(0, -0.03, texts[index], transform=axes.transAxes, va="top", fontsize=9, parse_math=False)
    return figure


# ---------------------------------------------------------------- prompts and folds


@styled()
def image_statistics(image_paths: Sequence) -> Figure:
    """Histograms of images' brightness and contrast: mean and standard deviation of the gray levels of each.

    Raises: PlotError for no image; OSError for one that cannot be read.
    """
    grays = (np.asarray(Image.open(path).convert("L"), np.float32) for path in image_paths)
    values = np.array([(gray.mean(), gray.std()) for gray in grays]).reshape(-1, 2)
    finite(values, "images")
    figure, all_axes = new_axes(2, width=12)
    titles = ("Brightness", "Contrast"), ("mean of an image, 0 to 255", "standard deviation within an image")
    for axes, column, title, label, last in zip(all_axes, values.T, *titles, (255, 128), strict=True):
        axes.hist(column, bins=32, range=(0, last), color=BLUE)
        axes.axvline(column.mean(), color=ORANGE, label=f"mean: {column.mean():.0f}")
        axes.set(title=title, xlabel=label, ylabel="images")
        legend_below(axes)
        despine(axes, grid="y")
    return figure


@styled()
def prompt_lengths(prompts: Sequence[str]) -> Figure:
    """Histogram of words per prompt. Raises: PlotError for no prompt."""
    words = finite([len(prompt.split()) for prompt in prompts], "prompts")
    width = -(-int(words.max()) // 60) or 1
    figure, (axes,) = new_axes()
    axes.hist(words, bins=np.arange(0.5, words.max() + 1.5 + width, width), color=BLUE)
    median, most = np.median(words), np.percentile(words, 95, method="higher")
    axes.axvline(median, color=ORANGE, label=f"median: {median:g}")
    axes.axvline(most, color=ORANGE, linestyle="--", label=f"95 % have at most {most:g}")
    title = f"{len(words):,} prompts, the longest of {words.max():g} words"
    axes.set(title=title, xlabel="words per prompt", ylabel="prompts")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    despine(axes, grid="y")
    return figure


@styled()
def image_counts(reports: Sequence[dict]) -> Figure:
    """Prompts by their number of images, and images by their size, of several data sets together.

    Args:
        reports: of `check.check_datasets`.
    Raises: PlotError for no report, or none with an image that decodes.
    """
    check_same_length(reports=reports)
    prompts, sizes = Counter(), Counter()
    for report in reports:
        for number, count in report["images_per_prompt"].items():
            prompts[min(int(number), MOST_BARS)] += count
        sizes.update(report["images"]["sizes"])
    check_same_length(images=list(sizes))
    figure, (prompt_axes, size_axes) = new_axes(2, width=11)
    numbers = sorted(prompts)
    labels = [f"{number}" if number < MOST_BARS else f"{number} or more" for number in numbers]
    prompt_axes.bar(labels, [prompts[number] for number in numbers], color=BLUE)
    prompt_axes.set(title=f"{prompts.total():,} prompts", xlabel="images per prompt", ylabel="prompts")
    shown = dict(sizes.most_common(MOST_BARS))
    size_axes.barh(list(shown), list(shown.values()), color=ORANGE)
    size_axes.set(title=f"{sizes.total():,} images", xlabel="images", ylabel="width x height, px")
    size_axes.invert_yaxis()
    despine(prompt_axes, grid="y")
    despine(size_axes, grid="x")
    return figure


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
    bins = np.linspace(min(values.min() for values in sets.values()), max(values.max() for values in sets.values()), 51)
    if bins[0] == bins[-1]:
        bins = np.linspace(bins[0] - 0.05, bins[0] + 0.05, 51)
    figure, (axes,) = new_axes()
    for (name, values), color in zip(sets.items(), (BLUE, ORANGE, GREEN, GREY) * len(sets), strict=False):
        told = f"mean {values.mean():.3f}"
        if threshold is not None:
            told += f", {np.mean(values >= threshold):.1%} at or above {threshold:g}"
        label = f"{name} ({len(values):,}): {told}" if name else told
        shares = np.full(len(values), 1 / len(values))
        axes.hist(values, bins=bins, weights=shares, color=color, alpha=0.6 if len(sets) > 1 else 1, label=label)
        if threshold is None:
            axes.axvline(values.mean(), color=color if len(sets) > 1 else ORANGE, linestyle="--")
    if threshold is not None:
        axes.axvline(threshold, color=TEXT, linestyle="--")
    axes.set(xlabel="cosine similarity", ylabel="share", title="Cosine similarity")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    legend_below(axes)
    despine(axes, grid="y")
    return figure


@styled()
def fold_report(report: dict) -> Figure:
    """Rows of every fold, and the share of its prompts that have a similar prompt in another fold.

    Args:
        report: of `grouping.assign_folds` or `grouping.read_report`.
    Raises: PlotError for a report without folds.
    """
    folds = report.get("folds") or []
    check_same_length(folds=folds)
    figure, (size_axes, leak_axes) = new_axes(2, width=11)
    numbers = [fold["fold"] for fold in folds]
    rows = [fold["rows"] for fold in folds]
    size_axes.bar(numbers, rows, color=BLUE)
    size_axes.axhline(np.mean(rows), color=GREY, linestyle="--", label=f"mean: {np.mean(rows):,.0f}")
    size_axes.set(title=f"Fold sizes: {report['rows']:,} rows", ylabel="rows")
    leak_axes.bar(numbers, [fold["leaked_share"] for fold in folds], color=ORANGE)
    leaked = report["leaked_share"]
    leak_axes.axhline(leaked, color=GREY, linestyle="--", label=f"all folds: {leaked:.1%}")
    told = f"prompts with a similar one (cosine >= {report['threshold']:g}) elsewhere"
    leak_axes.set(title=f"Leakage: {told}", ylabel="share of the fold's prompts", ylim=(0, None))
    leak_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for axes in (size_axes, leak_axes):
        axes.set(xlabel="fold", xticks=numbers)
        legend_below(axes)
        despine(axes, grid="y")
    return figure


# ---------------------------------------------------------------- scores, weights, seconds


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
    figure, axes = bars(
        values, [f"{value:.3f}" for value in values.values()], color=[model_color(name) for name in values]
    )
    axes.set(title="Ensemble weights", xlabel="weight")
    return figure


@styled()
def timing(seconds: Mapping[str, float], title: str = "Time", unit: str = "seconds") -> Figure:
    """One bar per duration. Raises: PlotError for no duration, or one that is not finite."""
    figure, axes = bars(
        seconds, [f"{value:.3g}" for value in seconds.values()], color=[model_color(name) for name in seconds]
    )
    axes.set(title=title, xlabel=unit)
    return figure


@styled()
def counts(values: Mapping[str, int], title: str, unit: str) -> Figure:
    """One bar per number of things, such as prompts per reason. Raises: PlotError for no number."""
    figure, axes = bars(values, [f"{value:,}" for value in values.values()], color=BLUE)
    axes.set(title=title, xlabel=unit)
    return figure

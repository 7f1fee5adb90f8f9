"""Draws data sets: lengths of prompts, folds, a map of prompts, sizes and brightness of images."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from kutils.prompts.leakage import STRATA
from kutils.views import figures

MOST_BARS = 8  # for images per prompt, and for sizes; the rest is one bar, or left out
MOST_LABELS = 10  # labels with their own colour in a map; the rest is grey


@figures.styled()
def prompt_lengths(prompts: Sequence[str]) -> Figure:
    """Histogram of words per prompt. Raises: ValueError for no prompt."""
    words = figures.finite([len(prompt.split()) for prompt in prompts], "prompts")
    width = -(-int(words.max()) // 60) or 1
    figure, (axes,) = figures.new_axes()
    axes.hist(words, bins=np.arange(0.5, words.max() + 1.5 + width, width), color=figures.BLUE)
    median, high = np.median(words), np.percentile(words, 95, method="higher")
    axes.axvline(median, color=figures.ORANGE, label=f"median: {median:g}")
    axes.axvline(high, color=figures.ORANGE, linestyle="--", label=f"95% have at most {high:g}")
    title = f"{len(words):,} prompts, the longest of {words.max():g} words"
    axes.set(title=title, xlabel="words per prompt", ylabel="prompts")
    figures.thousands(axes.xaxis, axes.yaxis)
    figures.legend_below(axes)
    figures.despine(axes, grid="y")
    return figure


@figures.styled()
def fold_report(report: dict) -> Figure:
    """For every fold its rows, the share of its prompts that leak, and its distance from all rows.

    Args:
        report: of `folds.assign_folds` or `folds.read_report`.
    Raises: ValueError for a report without folds.
    """
    folds = report.get("folds") or []
    figures.check_same_length(folds=folds)
    strata = [name for name in STRATA if f"{name}_distance" in (folds or [{}])[0]]
    figure, (size_axes, leak_axes, *others) = figures.new_axes(3 if strata else 2, width=11)
    for apart_axes in others:
        for name, color in zip(strata, (figures.BLUE, figures.GREEN), strict=True):
            distances = [fold[f"{name}_distance"] for fold in folds]
            apart_axes.plot([fold["fold"] for fold in folds], distances, "o-", color=color, label=f"{name}s")
        label = "share of the rows that would\nneed another source or topic"
        apart_axes.set(title="Distance to all rows", ylabel=label, ylim=(0, None))
        apart_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    numbers = [fold["fold"] for fold in folds]
    rows = [fold["rows"] for fold in folds]
    size_axes.bar(numbers, rows, color=figures.BLUE)
    size_axes.axhline(np.mean(rows), color=figures.ORANGE, linestyle="--", label=f"mean: {np.mean(rows):,.0f}")
    size_axes.set(title=f"Fold sizes: {report['rows']:,} rows", ylabel="rows")
    leak_axes.bar(numbers, [fold["leaked_share"] for fold in folds], color=figures.ORANGE)
    leaked = report["leaked_share"]
    leak_axes.axhline(leaked, color=figures.BLUE, linestyle="--", label=f"all folds: {leaked:.1%}")
    leak_label = f"prompts with a similar one\nin another fold (cosine >= {report['threshold']:g})"
    leak_axes.set(title="Leakage between folds", ylabel=leak_label, ylim=(0, None))
    figures.thousands(size_axes.yaxis)
    leak_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    for axes in (size_axes, leak_axes, *others):
        axes.set(xlabel="fold", xticks=numbers)
        figures.legend_below(axes)
        figures.despine(axes, grid="y")
    return figure


@figures.styled()
def prompt_map(points: np.ndarray, labels: Mapping[str, Sequence[str]], title: str) -> Figure:
    """Prompts as points of a plane, in a panel for each set of labels: folds, sources, ...

    Args:
        points: float [n, 2], a projection of the prompts' embeddings.
        labels: title of the panel -> the label of each point. The ten most frequent ones have colours.
    Raises: ValueError for no point, another number of labels, or a point that is not finite.
    """
    figures.check_same_length(labels=list(labels))
    for name, values in labels.items():
        figures.check_same_length(**{"points": points, f"labels {name}": values})
    figures.finite(points, "coordinates")
    figure, all_axes = figures.new_axes(len(labels), width=7.5 * len(labels), height=5.6)
    for axes, (name, values) in zip(all_axes, labels.items(), strict=True):
        draw_labels(axes, points, np.array([str(value) for value in values]))
        axes.set_title(name, parse_math=False)
    figure.suptitle(title, parse_math=False)
    figure.supxlabel(
        "Points close together are mostly similar prompts; how far apart others lie says little, and the axes have no\n"
        "unit: many dimensions are pressed into two.",
        fontsize=figures.SMALL_FONT,
    )
    return figure


def draw_labels(axes: Axes, points: np.ndarray, labels: np.ndarray) -> None:
    """Draw [n, 2] points, with a colour and a marker per label; the rarest lie on top."""
    common = [label for label, _ in Counter(labels.tolist()).most_common(MOST_LABELS)]
    size = float(np.clip(40_000 / len(points), 4, 40))
    style = {"s": size, "linewidths": 0}
    numbers = all(label.removeprefix("-").isdigit() for label in common)
    for number, label in enumerate(sorted(common, key=int) if numbers else common):
        chosen = labels == label
        style |= {"color": figures.COLORS[number % len(figures.COLORS)], "marker": "o^"[number // len(figures.COLORS)]}
        axes.scatter(
            *points[chosen].T, zorder=2 + common.index(label) / 100, label=f"{label} ({chosen.sum():,})", **style
        )
    rest = ~np.isin(labels, common)
    if rest.any():
        style |= {"color": figures.GREY, "marker": "o"}
        axes.scatter(*points[rest].T, zorder=1.9, label=f"other ({rest.sum():,})", **style)
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "markerscale": (60 / size) ** 0.5}
    # given labels, since Matplotlib leaves out labels that begin with "_" where it collects them itself
    legend = axes.legend(axes.collections, [each.get_label() for each in axes.collections], **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@figures.styled()
def image_statistics(image_paths: Sequence) -> Figure:
    """Histograms of images' brightness and contrast: mean and standard deviation of the gray levels of each.

    Raises: ValueError for no image; OSError for one that cannot be read.
    """
    grays = (np.asarray(Image.open(path).convert("L"), np.float32) for path in image_paths)
    values = np.array([(gray.mean(), gray.std()) for gray in grays]).reshape(-1, 2)
    figures.finite(values, "images")
    figure, all_axes = figures.new_axes(2, width=11, height=3.8)
    titles = (
        ("Brightness", "Contrast"),
        ("mean gray level of an image, 0 to 255", "standard deviation of an image's gray levels"),
    )
    for axes, column, title, label, last in zip(all_axes, values.T, *titles, (255, 128), strict=True):
        axes.hist(column, bins=32, range=(0, last), color=figures.BLUE)
        axes.axvline(column.mean(), color=figures.ORANGE, label=f"mean: {column.mean():.0f}")
        figures.thousands(axes.yaxis)
        axes.set(title=title, xlabel=label, ylabel="images")
        figures.legend_below(axes)
        figures.despine(axes, grid="y")
    return figure


@figures.styled()
def image_counts(reports: Sequence[dict]) -> Figure:
    """Prompts by their number of images, and images by their size, of several data sets together.

    Raises: ValueError for no report, or none with an image that decodes.
    """
    figures.check_same_length(reports=reports)
    prompts, sizes = Counter(), Counter()
    for report in reports:
        for number, count in report["images_per_prompt"].items():
            prompts[min(int(number), MOST_BARS)] += count
        sizes.update(report["images"]["sizes"])
    figures.check_same_length(images=list(sizes))
    figure, (prompt_axes, size_axes) = figures.new_axes(2, width=11)
    numbers = sorted(prompts)
    labels = [f"{number}" if number < MOST_BARS else f"{number} or more" for number in numbers]
    bars = prompt_axes.bar(labels, [prompts[number] for number in numbers], color=figures.BLUE, label=labels)
    prompt_axes.set(title=f"{prompts.total():,} prompts", xlabel="images per prompt", ylabel="prompts")
    prompt_axes.bar_label(bars, fmt="{:,.0f}")
    figures.thousands(prompt_axes.yaxis)
    names, counts = zip(*sizes.most_common(MOST_BARS), strict=True)
    bars = size_axes.barh(names, counts, color=figures.BLUE, label=names)
    size_axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    size_axes.margins(x=0.2)  # room for the numbers
    figures.thousands(size_axes.xaxis)
    size_axes.set(title=f"{sizes.total():,} images", xlabel="images", ylabel="width x height, px")
    size_axes.invert_yaxis()
    figures.despine(prompt_axes, grid="y")
    figures.despine(size_axes, grid="x")
    return figure

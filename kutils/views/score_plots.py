"""Draws numbers: histograms of cosines, and bars or dots of scores, weights, times and counts."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.views import figures
from kutils.views.model_style import LINES, family_of, model_color, model_styles

FILLS = {"-": "full", "--": "none", "-.": "left", ":": "bottom"}  # of a dot, in place of the line style


@figures.styled()
def similarity_histogram(
    cosines: Sequence[float] | Mapping[str, Sequence[float]], threshold: float | None = None
) -> Figure:
    """Histogram of cosine similarities, or of several sets of them in one picture.

    Args:
        cosines: in [-1, 1]; or name -> cosines.
        threshold: drawn as a line, with the share of each set that lies at or above it.
    Raises: ValueError for an empty set or a value that is not finite.
    """
    named = cosines if isinstance(cosines, Mapping) else {"": cosines}
    sets = {name: figures.finite(values, "cosines") for name, values in named.items()}
    if not sets:
        raise ValueError("nothing to draw: no cosines")
    low, high = min(values.min() for values in sets.values()), max(values.max() for values in sets.values())
    if high - low < 0.01:  # equal but for rounding, such as duplicates
        low, high = low - 0.05, high + 0.05
    bins = np.linspace(low, high, 51)
    figure, (axes,) = figures.new_axes()
    models = all(family_of(name) for name in sets)
    for number, (name, values) in enumerate(sets.items()):
        style = {
            "color": model_color(name) if models else figures.COLORS[number % len(figures.COLORS)],
            "linestyle": LINES[number % len(LINES)],
        }
        summary = f"mean {values.mean():.3f}"
        if threshold is not None:
            summary += f", {np.mean(values >= threshold):.1%} at or above {threshold:g}"
        shares = np.histogram(values, bins)[0] / len(values)
        axes.stairs(shares, bins, fill=True, color=style["color"], alpha=0.3 if len(sets) > 1 else 0.9)
        outline = np.concatenate([[0], np.repeat(shares, 2), [0]])
        label = f"{name} ({len(values):,}): {summary}" if name else None
        axes.plot(np.repeat(bins, 2), outline, linewidth=1.5, label=label, **style)
        if threshold is None or not name:
            style |= {} if len(sets) > 1 else {"color": figures.ORANGE}
            axes.axvline(values.mean(), label=None if name else summary, **style)
    if threshold is not None:
        axes.axvline(threshold, color=figures.TEXT, linestyle="--")
    axes.set(xlabel="cosine similarity", ylabel="share of the set", title="Cosine similarity", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    figures.legend_below(axes)
    figures.despine(axes, grid="y")
    return figure


@figures.styled()
def bars(
    values: Mapping[str, float], texts: Sequence[str], start: float = 0.0, *, color: str | Sequence[str] = figures.BLUE
) -> tuple[Figure, Axes]:
    """Horizontal bars from `start`, the first on top, each with its text at the end; one color, or one per bar."""
    ends = figures.finite(list(values.values()), "values")
    # break a published recipe's name of 80 characters behind an underscore
    names = [textwrap.fill(name.replace("_", "_ "), 44, break_on_hyphens=False).replace("_ ", "_") for name in values]
    figure, (axes,) = figures.new_axes(
        height=max(2.2, 1.3 + 0.36 * len(ends) + 0.17 * sum(name.count("\n") for name in names))
    )
    axes.barh(range(len(ends)), ends - start, left=start, color=color, height=0.65, label=list(values))
    for number, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (max(end, start), number), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(ends)), names, parse_math=False)
    axes.invert_yaxis()
    low, high = min(start, ends.min()), max(start, ends.max())
    axes.set_xlim(low - 0.02 * (high - low), high + 0.3 * (high - low or 1))  # room for the texts
    axes.axvline(start, color=figures.TEXT, linewidth=1)
    axes.tick_params(axis="y", length=0)
    figures.despine(axes, grid="x")
    axes.spines["left"].set_visible(False)
    return figure, axes


@figures.styled()
def bar_scores(
    scores: Mapping[str, float], baseline: float | None = None, title: str = "Validation cosine similarity"
) -> Figure:
    """One bar per score, in the order given, drawn from the baseline: a bar's length is the gain over it.

    Args:
        scores: name -> mean cosine similarity.
        baseline: the mean-prompt baseline; None: bars start at 0.
    Raises: ValueError for no score, or one that is not finite.
    """
    start = 0.0 if baseline is None else baseline
    texts = [f"{value:.4f}" + ("" if baseline is None else f" ({value - start:+.4f})") for value in scores.values()]
    figure, axes = bars(scores, texts, start, color=[model_color(name) for name in scores])
    where = "" if baseline is None else f"; bars begin at the mean prompt's {baseline:.4f}"
    axes.set(title=title, xlabel=f"mean cosine similarity{where}")
    return figure


@figures.styled()
def bar_weights(weights: Mapping[str, float]) -> Figure:
    """One bar per ensemble weight. Raises: ValueError for no weight, or one that is not finite."""
    texts = [f"{weight:.3f}" for weight in weights.values()]
    figure, axes = bars(weights, texts, color=[model_color(name) for name in weights])
    axes.set(title="Ensemble weights", xlabel="weight")
    return figure


@figures.styled()
def bar_times(seconds: Mapping[str, float], title: str) -> Figure:
    """One bar per duration. Raises: ValueError for no duration, or one that is not finite."""
    texts = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in seconds.values()]
    figure, axes = bars(seconds, texts, color=[model_color(name) for name in seconds])
    axes.set(title=title, xlabel="seconds")
    axes.xaxis.set_major_formatter("{x:,g}")
    return figure


@figures.styled()
def bar_counts(counts: Mapping[str, int], title: str, unit: str) -> Figure:
    """One bar per number of things, such as prompts per reason. Raises: ValueError for no number."""
    figure, axes = bars(counts, [f"{count:,}" for count in counts.values()])
    axes.set(title=title, xlabel=unit)
    figures.thousands(axes.xaxis)
    return figure


@figures.styled()
def benchmark_ratios(entries: Sequence[dict]) -> Figure:
    """How many times better than the published or plain way, on a logarithmic scale: entries of the benchmark.

    Args:
        entries: of `kutils.benchmarks.measuring.read_results`; those without a ratio are left out.
    Raises: ValueError where none has one.
    """
    compared = [item for item in entries if item["ratio"]]
    figures.check_same_length(entries=compared)
    ratios = {item["name"]: math.log10(item["ratio"]) for item in compared}
    texts = [f"{item['ratio']:.3g} ({item['ours']:,.3g}, {item['reference']:,.3g} {item['unit']})" for item in compared]
    figure, axes = bars(
        ratios, texts, color=[figures.BLUE if ratio >= 0 else figures.ORANGE for ratio in ratios.values()]
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
    axes.set(title="Compared with the published or plain way", xlabel="times better (ours and theirs in brackets)")
    return figure


@figures.styled()
def slice_scores(tables: Mapping[str, pd.DataFrame], means: Mapping[str, float]) -> Figure:
    """Mean cosine of every slice, a dot per model, beside each model's mean over all rows (a line).

    Args:
        tables: name of the slicing -> what `slices.slice_means` returns; one with a single slice is left out.
        means: model -> mean cosine over all rows.
    Raises: ValueError where no slicing has two slices.
    """
    tables = {name: table for name, table in tables.items() if len(table) > 1}
    if not tables:
        raise ValueError("nothing to draw: every slicing puts all rows into one slice")
    rows = -(-len(tables) // 2)
    panel = 1.3 + 0.36 * max(len(table) for table in tables.values())
    figure, all_axes = figures.new_axes(
        min(2, len(tables)), rows, width=13, height=max(3.4, rows * panel + 0.25 * len(means))
    )
    figure.get_layout_engine().set(h_pad=0.12)
    scores = np.concatenate([[*means.values()], *(table[list(means)].to_numpy().ravel() for table in tables.values())])
    low, high = scores.min(), scores.max()
    margin = 0.05 * (high - low or 1)
    for axes, (name, table) in zip(all_axes, tables.items(), strict=False):
        draw_slices(axes, table, means)
        axes.set(title=f"by {name}", xlim=(low - margin, high + margin))
    for axes in all_axes[len(tables) :]:
        axes.axis("off")
    for axes in all_axes[max(0, len(tables) - 2) : len(tables)]:  # the lowest of each column
        axes.set_xlabel("mean cosine similarity (in brackets: images)")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")
    return figure


def draw_slices(axes: Axes, table: pd.DataFrame, means: Mapping[str, float]) -> None:
    """Draw one slicing: a line of dots per slice."""
    places = np.arange(len(table))
    for number, (model, style) in enumerate(model_styles(list(means)).items()):
        shift = 0.5 * ((number + 0.5) / len(means) - 0.5)  # dots of equal scores lie below each other
        axes.axvline(means[model], color=style.color, linestyle=style.linestyle, linewidth=1, alpha=0.6)
        label = f"{model}: {means[model]:.4f} over all rows (line)"
        fill = FILLS[style.linestyle]
        axes.plot(table[model], places + shift, style.marker, color=style.color, fillstyle=fill, label=label)
    names = [f"{label} ({images:,})" for label, images in table["images"].items()]
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(len(table) - 0.4, -0.6)
    figures.despine(axes)

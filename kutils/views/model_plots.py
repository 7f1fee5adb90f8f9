"""Figures of models beside each other: curves of several runs, scores by slice, throughput."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.runs.finished import FinishedRun
from kutils.views.figures import (
    BLUE,
    GREY,
    ORANGE,
    PlotError,
    check_same_length,
    despine,
    legend_below,
    new_axes,
    styled,
    thousands,
)
from kutils.views.model_style import model_styles

FILLS = {"-": "full", "--": "none", "-.": "left", ":": "bottom"}  # of dots, which have no line that tells a stage


@styled()
def run_curves(finished: Sequence[FinishedRun]) -> Figure:
    """Training loss and validation cosine of several runs over the share of their training that is done.

    Raises: PlotError for no run.
    """
    check_same_length(runs=finished)
    figure, (loss_axes, score_axes) = new_axes(2, width=13, height=4 + 0.22 * len(finished))
    for run, style in zip(finished, model_styles([run.name for run in finished]).values(), strict=True):
        look = style._asdict()
        total = run.result["updates"]
        logged = [line for line in run.metrics if "loss" in line]
        scored = [line for line in run.metrics if "cosine_similarity" in line]
        losses = pd.Series([line["loss"] for line in logged], dtype=float)
        smooth = losses.rolling(max(1, len(losses) // 30), min_periods=1).mean()
        loss_axes.plot(
            [line["step"] / total for line in logged], smooth, label=run.name, **look, markevery=(len(smooth) - 1, 1)
        )
        values = [line["cosine_similarity"] for line in scored]
        score_axes.plot([line["step"] / total for line in scored], values, **look)
    loss_axes.set(title="Training loss", ylabel="1 - cosine similarity")
    score_axes.set(title="Validation", ylabel="mean cosine similarity")
    for axes in (loss_axes, score_axes):
        despine(axes)
        axes.set_xlabel("share of the run's updates")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=1 + (len(finished) > 3))
    return figure


@styled()
def slice_scores(tables: Mapping[str, pd.DataFrame], means: Mapping[str, float]) -> Figure:
    """Mean cosine of every slice, a dot per model, beside each model's mean over all rows (a line).

    Args:
        tables: name of the slicing -> what `slices.mean_scores` returns.
        means: model -> mean cosine over all rows.
    Raises: PlotError where no slicing tells two slices apart.
    """
    tables = {name: table for name, table in tables.items() if len(table) > 1}
    if not tables:
        raise PlotError("nothing to draw: every slicing puts all rows into one slice")
    rows = -(-len(tables) // 2)
    panel = 1.3 + 0.36 * max(len(table) for table in tables.values())
    figure, all_axes = new_axes(min(2, len(tables)), rows, width=13, height=max(3.4, rows * panel + 0.25 * len(means)))
    figure.get_layout_engine().set(h_pad=0.12)
    low = min([*means.values(), *(table[list(means)].to_numpy().min() for table in tables.values())])
    high = max([*means.values(), *(table[list(means)].to_numpy().max() for table in tables.values())])
    for axes in all_axes[len(tables) :]:
        axes.axis("off")
    for axes, (name, table) in zip(all_axes, tables.items(), strict=False):
        places = np.arange(len(table))
        for number, (model, style) in enumerate(model_styles(list(means)).items()):
            shift = 0.5 * ((number + 0.5) / len(means) - 0.5)  # dots of equal scores lie below each other
            axes.axvline(means[model], color=style.color, linestyle=style.linestyle, linewidth=1, alpha=0.6)
            label = f"{model}: {means[model]:.4f} over all rows (line)"
            fill = FILLS[style.linestyle]
            axes.plot(table[model], places + shift, style.marker, color=style.color, fillstyle=fill, label=label)
        names = [f"{label} ({images:,})" for label, images in table["images"].items()]
        axes.set_yticks(places, names, parse_math=False)
        axes.set_title(f"by {name}")
        axes.set_xlim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
        axes.set_ylim(len(table) - 0.4, -0.6)
        despine(axes)
    for axes in all_axes[max(0, len(tables) - 2) : len(tables)]:  # the lowest of each column
        axes.set_xlabel("mean cosine similarity (in brackets: images)")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")
    return figure


@styled()
def throughput(run: FinishedRun) -> Figure:
    """Images per second and the share of time spent waiting for data, over a run's updates.

    Raises: PlotError for a run that has logged neither.
    """
    logged = [line for line in run.metrics if "images_per_second" in line]
    check_same_length(log_lines=logged)
    steps = [line["step"] for line in logged]
    pace, waiting = run.pace
    figure, (speed_axes, wait_axes) = new_axes(2, width=13, height=3.4)
    speed_axes.plot(steps, [line["images_per_second"] for line in logged], color=BLUE)
    speed_axes.axhline(pace, color=GREY, linestyle="--", label=f"mean: {pace:,.0f}")
    speed_axes.set(title="Training speed", ylabel="images per second", ylim=(0, None))
    wait_axes.plot(steps, [line["data_wait"] for line in logged], color=ORANGE)
    wait_axes.axhline(waiting, color=GREY, linestyle="--", label=f"mean: {waiting:.1%}")
    wait_axes.set(title="Waiting for data", ylabel="share of the time", ylim=(0, None))
    wait_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (speed_axes, wait_axes):
        despine(axes)
        legend_below(axes)
        axes.set_xlabel("optimiser updates")
        thousands(axes.xaxis)
    return figure

"""Draws training: loss, learning rate, scores and speed over the updates, of one run or of several."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.runs.finished import FinishedRun
from kutils.runs.folders import read_metrics
from kutils.views import figures
from kutils.views.model_style import model_styles


@figures.styled()
def learning_curve(metrics_path: Path | str, baseline: float | None = None) -> Figure:
    """Loss, learning rate and validation cosine of one run, finished or not.

    Args:
        baseline: the mean-prompt baseline, drawn as a line.
    Raises: ValueError if nothing has been logged yet.
    """
    lines = read_metrics(Path(metrics_path))
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "cosine_similarity" in line]
    if not logged:
        raise ValueError(f"nothing to draw: {metrics_path} has no logged update yet")
    steps, losses = [line["step"] for line in logged], np.array([line["loss"] for line in logged])
    figure, (loss_axes, rate_axes, score_axes) = figures.new_axes(3, width=13, height=4.2, share_x=True)

    window = max(1, len(losses) // 30)
    loss_axes.plot(steps, losses, color=figures.BLUE, alpha=0.45 if window > 1 else 1, linewidth=1.2)
    if window > 1:
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        loss_axes.plot(steps[window - 1 :], smooth, color=figures.BLUE, label=f"mean of {window} log intervals")
        loss_axes.legend()
    loss_axes.set(title="Training loss", ylabel="1 - cosine similarity")

    rate_axes.semilogy(steps, [line["lr"] for line in logged], color=figures.ORANGE)
    rate_axes.set(title="Learning rate", ylabel="learning rate (log scale)")

    draw_scores(score_axes, scored, baseline)
    score_axes.set(title="Validation", ylabel="mean cosine similarity")
    for axes in (loss_axes, rate_axes, score_axes):
        figures.despine(axes)
        axes.set_xlabel("optimiser updates")
        figures.thousands(axes.xaxis)
    return figure


def draw_scores(axes: Axes, scored: list[dict], baseline: float | None) -> None:
    """Draw the validation cosine after every epoch: all rows, rows without a similar training prompt, the baseline."""
    for key, color, style, name in (
        ("cosine_similarity", figures.GREEN, "o-", "all rows"),
        ("cosine_similarity_clean", figures.BLUE, "s-", "rows without a similar training prompt"),
    ):
        points = [line for line in scored if line.get(key) is not None]
        if points:
            best = max(points, key=lambda line: line[key])
            label = f"{name}: best {best[key]:.4f} (epoch {best['epoch']})"
            values = [line[key] for line in points]
            axes.plot([line["step"] for line in points], values, style, color=color, label=label)
    if not scored:
        axes.text(0.5, 0.6, "no epoch is finished yet", ha="center", transform=axes.transAxes, color=figures.GREY)
    if baseline is not None:
        axes.axhline(baseline, color=figures.GREY, linestyle="--", label=f"mean prompt: {baseline:.4f}")
    if scored or baseline is not None:
        figures.legend_below(axes)


@figures.styled()
def run_curves(runs: Sequence[FinishedRun]) -> Figure:
    """Training loss and validation cosine of several runs, over the share of each run's updates.

    Raises: ValueError for no run.
    """
    figures.check_same_length(runs=runs)
    figure, (loss_axes, score_axes) = figures.new_axes(2, width=13, height=4 + 0.22 * len(runs))
    styles = model_styles([run.name for run in runs])
    for run in runs:
        style, total = styles[run.name]._asdict(), run.result.updates
        logged = [line for line in run.metrics if "loss" in line]
        scored = [line for line in run.metrics if "cosine_similarity" in line]
        losses = pd.Series([line["loss"] for line in logged], dtype=float)
        smooth = losses.rolling(max(1, len(losses) // 30), min_periods=1).mean()
        loss_axes.plot(
            [line["step"] / total for line in logged], smooth, label=run.name, **style, markevery=(len(smooth) - 1, 1)
        )
        values = [line["cosine_similarity"] for line in scored]
        score_axes.plot([line["step"] / total for line in scored], values, **style)
    loss_axes.set(title="Training loss", ylabel="1 - cosine similarity")
    score_axes.set(title="Validation", ylabel="mean cosine similarity")
    for axes in (loss_axes, score_axes):
        figures.despine(axes)
        axes.set_xlabel("share of the run's updates")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside lower center", ncols=1 + (len(runs) > 3))
    return figure


@figures.styled()
def throughput(run: FinishedRun) -> Figure:
    """Images per second and the share of time spent waiting for data, over a run's updates.

    Raises: ValueError for a run whose metrics have neither.
    """
    logged = [line for line in run.metrics if "images_per_second" in line]
    figures.check_same_length(log_lines=logged)
    steps = [line["step"] for line in logged]
    pace, waiting = run.pace
    figure, (speed_axes, wait_axes) = figures.new_axes(2, width=13, height=3.4)
    speed_axes.plot(steps, [line["images_per_second"] for line in logged], color=figures.BLUE)
    speed_axes.axhline(pace, color=figures.GREY, linestyle="--", label=f"mean: {pace:,.0f}")
    speed_axes.set(title="Training speed", ylabel="images per second", ylim=(0, None))
    wait_axes.plot(steps, [line["data_wait"] for line in logged], color=figures.ORANGE)
    wait_axes.axhline(waiting, color=figures.GREY, linestyle="--", label=f"mean: {waiting:.1%}")
    wait_axes.set(title="Waiting for data", ylabel="share of the time", ylim=(0, None))
    wait_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (speed_axes, wait_axes):
        figures.despine(axes)
        figures.legend_below(axes)
        axes.set_xlabel("optimiser updates")
        figures.thousands(axes.xaxis)
    return figure

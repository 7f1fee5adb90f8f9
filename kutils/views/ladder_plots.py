"""Draws the ladder of scores of a fold: `kutils ladder` prints its table and writes its figure."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.ensemble.ladder import AHEAD, FROZEN, MOST_ROWS, Ladder, climb, format_ladder
from kutils.runs import recipes
from kutils.system import paths
from kutils.system.output import as_cell
from kutils.views.figures import BLUE, GREY, ORANGE, despine, legend_below, new_axes, png, styled


@styled()
def draw_ladder(ladder: Ladder) -> Figure:
    """Rungs with their 95 % intervals, the learning curve with its continuation, and risk against coverage."""
    figure, (rungs, curve, risk) = new_axes(1, 3, width=9, height=14)
    draw_rungs(rungs, ladder)
    curve.plot(ladder.curve["prompts"], ladder.curve["cosine"], "o", color=BLUE, label="measured")
    if ladder.limit is not None:
        last = float(ladder.curve["prompts"].iloc[-1])
        for low, high, line, label in (
            (float(ladder.curve["prompts"].iloc[0]), last, "-", "fitted: a - b / prompts ** c"),
            (last, AHEAD * last, ":", "extrapolated, not measured"),
        ):
            prompts = np.geomspace(low, high, 50)
            color = BLUE if line == "-" else ORANGE
            curve.plot(prompts, [ladder.extrapolated(each) for each in prompts], line, color=color, label=label)
    curve.set_xscale("log")
    curve.set(xlabel="training prompts", ylabel="cosine", title=f"Learning curve: {FROZEN}")
    ticks = [*ladder.curve["prompts"], *([AHEAD * ladder.curve["prompts"].iloc[-1]] if ladder.limit else [])]
    curve.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    curve.minorticks_off()
    legend_below(curve)
    risk.plot(ladder.coverage["coverage"], ladder.coverage["cosine"], "o-", color=BLUE)
    risk.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    risk.set(xlabel="share of the images, those of the longest predictions first", ylabel="mean cosine")
    risk.set_title(f"Risk against coverage, by the length of predictions before normalising: {FROZEN}")
    for axes in (curve, risk):
        despine(axes)
    return figure


def draw_rungs(axes: Axes, ladder: Ladder) -> None:
    """A dot per rung with its interval, the lowest rung at the bottom."""
    table = ladder.table
    places = np.arange(len(table))
    errors = [table["cosine"] - table["low"], table["high"] - table["cosine"]]
    axes.errorbar(table["cosine"], places, xerr=errors, fmt="o", color=BLUE, capsize=3, label="all rows, 95 % interval")
    if table["clean"].notna().any():
        axes.plot(table["clean"], places, "D", color=GREY, markerfacecolor="none", label="clean rows")
    axes.set_yticks(places, list(table.index), parse_math=False)
    axes.set(xlabel="mean cosine", title=f"Fold {ladder.fold} of {', '.join(ladder.datasets)}")
    legend_below(axes)
    despine(axes, grid="x")


def save_ladder(ladder: Ladder, folder: Path) -> Path:
    """Write `ladder.txt`, `ladder.tsv` and `ladder.png` into a folder, replaced if there; returns the text's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw_ladder(ladder)
    contents = {
        "ladder.txt": (format_ladder(ladder) + "\n").encode(),
        "ladder.tsv": ladder.table.rename(index=as_cell).to_csv(sep="\t").encode(),
        "ladder.png": png(figure),
    }
    plt.close(figure)  # else a notebook shows it once more
    for name, content in contents.items():
        with paths.atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / "ladder.txt"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils ladder",
        description="Score models beside simpler and ideal predictions of the same images, with 95 % intervals by "
        "bootstrap over prompts; writes ladder.txt, ladder.tsv and ladder.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs of working/runs/ (default: all)")
    parser.add_argument("--datasets", default="shapes", metavar="A,B", help="data sets of input/")
    parser.add_argument("--fold", type=int, default=0, choices=range(10), metavar="K", help="validation fold")
    parser.add_argument("--config", default="conf/lite0_stage1.yaml", help="recipe of the frozen pretrained backbone")
    parser.add_argument("--most", type=int, default=MOST_ROWS, help="images of each kind; more are drawn by prompt")
    parser.add_argument("--output", type=Path, help="folder of the three files (default: working/ladder)")
    arguments = parser.parse_args(argv)
    names = recipes.split_names(arguments.datasets)
    recipe = recipes.load_recipe(arguments.config)
    ladder = climb(names, arguments.fold, arguments.runs, recipe, arguments.most)
    saved = save_ladder(ladder, arguments.output or paths.working_dir() / "ladder")
    print(f"{format_ladder(ladder)}\nsaved {saved}, ladder.tsv and ladder.png")
    return 0

"""Draws the ladder of scores of a fold: `kutils ladder` prints its table and writes its figure."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kutils.ensemble.ladder import AHEAD, COVERAGES, FROZEN, MEAN_PROMPT, MOST_ROWS, Ladder, climb
from kutils.runs import recipes
from kutils.system import paths
from kutils.system.output import as_cell
from kutils.views.figures import BLUE, GREY, ORANGE, despine, legend_below, new_axes, png, styled
from kutils.views.model_style import model_styles

COMPARED = (MEAN_PROMPT, FROZEN)  # rungs over which the text gives every other one's gain
SHOWN_COVERAGES = COVERAGES[[0, 2, 4, 9]]  # of the text's table


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
    for name, style in model_styles(list(ladder.coverage)).items():
        risk.plot(ladder.coverage.index, ladder.coverage[name], label=name, **style._asdict())
    legend_below(risk)
    risk.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    risk.set(xlabel="share of the images, those of the longest predictions first", ylabel="mean cosine")
    risk.set_title("Risk against coverage, by the length of predictions before normalising")
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


def format_ladder(ladder: Ladder) -> str:
    """The tables as text, and what their columns mean."""
    lines = [f"{'rung':44}{'cosine':>8}{'95 %':>18}{'over the rung above':>28}{'clean':>8}"]
    lines[0] += f"{'R@1':>7}{'R@5':>7}{'R@10':>7}{'rank':>7}"
    for name, row in ladder.table.iterrows():
        gain = "" if np.isnan(row["gain"]) else format_difference(row["gain"], row["gain_low"], row["gain_high"])
        clean = "" if np.isnan(row["clean"]) else f"{row['clean']:.4f}"
        lines.append(
            f"{name:44}{row['cosine']:>8.4f}  [{row['low']:.4f}, {row['high']:.4f}]{gain:>28}{clean:>8}"
            f"{row['recall_1']:>7.1%}{row['recall_5']:>7.1%}{row['recall_10']:>7.1%}{row['median_rank']:>7,.0f}"
        )
    lines.append(f"R@k: the true prompt is among the k nearest of {ladder.bank:,} prompts; rank: its median place")
    lines.append(f"\n{'rung':44}" + "".join(f"{f'over {name}':>34}" for name in COMPARED))
    over = ladder.differences.set_index(["rung", "other"])
    for name in ladder.table.index:
        cells = [format_difference(*over.loc[name, other]) if (name, other) in over.index else "" for other in COMPARED]
        if any(cells):
            lines.append(f"{name:44}" + "".join(f"{cell:>34}" for cell in cells))
    shares = ladder.coverage.loc[list(SHOWN_COVERAGES)]
    lines.append(
        f"\n{'mean cosine of the longest predictions':44}" + "".join(f"{share:>8.0%}" for share in shares.index)
    )
    lines += [f"{name:44}" + "".join(f"{cosine:>8.4f}" for cosine in values) for name, values in shares.items()]
    if ladder.limit is not None:
        prompts = AHEAD * int(ladder.curve["prompts"].iloc[-1])
        guess = ladder.extrapolated(prompts)
        lines.append(f"\n{FROZEN}: {guess:.3f} with {prompts:,} training prompts (extrapolated)")
    lines += [f"note: {note}" for note in ladder.notes]
    return "\n".join(lines)


def format_difference(mean: float, low: float, high: float) -> str:
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def save_ladder(ladder: Ladder, folder: Path) -> Path:
    """Write `ladder.txt`, two tables and `ladder.png` into a folder, replaced if there; returns the text's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = draw_ladder(ladder)
    names = {name: ladder.differences[name].map(as_cell) for name in ("rung", "other")}
    differences = ladder.differences.assign(**names)
    contents = {
        "ladder.txt": (format_ladder(ladder) + "\n").encode(),
        "ladder.tsv": ladder.table.rename(index=as_cell).to_csv(sep="\t").encode(),
        "ladder_differences.tsv": differences.to_csv(sep="\t", index=False).encode(),
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
        "bootstrap over prompts; writes ladder.txt, ladder.tsv, ladder_differences.tsv and ladder.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs of working/runs/ (default: all)")
    parser.add_argument("--datasets", default="shapes", metavar="A,B", help="data sets of input/")
    parser.add_argument("--fold", type=int, default=0, choices=range(10), metavar="K", help="validation fold")
    parser.add_argument("--config", default="conf/lite0_stage1.yaml", help="recipe of the frozen pretrained backbone")
    parser.add_argument("--most", type=int, default=MOST_ROWS, help="images of each kind; more are drawn by prompt")
    parser.add_argument("--output", type=Path, help="folder of the files (default: working/ladder)")
    arguments = parser.parse_args(argv)
    names = recipes.split_names(arguments.datasets)
    recipe = recipes.load_recipe(arguments.config)
    ladder = climb(names, arguments.fold, arguments.runs, recipe, arguments.most)
    saved = save_ladder(ladder, arguments.output or paths.working_dir() / "ladder")
    beside = "ladder.tsv, ladder_differences.tsv and ladder.png"
    print(f"{format_ladder(ladder)}\nsaved {saved}, and beside it {beside}")
    return 0

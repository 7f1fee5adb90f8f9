"""Writes `report.html` of a finished run: scores, curves, best and worst images, speed, configuration.

`kutils report [RUN ...]` writes it; so does training at its end. The page is the template `report.html`; here are the
values that it is filled with.
"""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from kutils.data import datasets, transforms
from kutils.runs import finished, folders
from kutils.runs.finished import FinishedRun
from kutils.system import paths
from kutils.training import examples, profiling, slices
from kutils.views import html_page, html_tables, score_plots, training_plots

EXAMPLES = 4  # best, and as many worst
MOST_UNREADABLE = 100  # images in the table of those that could not be read


def write_report(folder: Path) -> Path:
    """Write `<run folder>/report.html`, one file that needs nothing else; replaced if it is there.

    Where data sets have changed or images are gone, the page says so in place of what it would show.

    Raises: ValueError for a folder without a finished run, ConfigError for a configuration that cannot be read.
    """
    run = finished.read_run(Path(folder))
    values = [headline_values, training_values, validation_values, speed_values, unreadable_values]
    values += [configuration_values, environment_values, command_values]
    page = html_page.fill_template(
        "report.html", run=run, result=run.result, **{name: value for of in values for name, value in of(run).items()}
    )
    with paths.atomic_path(run.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run.folder / "report.html"


def headline_values(run: FinishedRun) -> dict:
    """The numbers at the top, and the table of scores."""
    result, base = run.result, run.result.mean_prompt_baseline
    headline = {"cosine similarity": f"{result.cosine_similarity:.4f}"}
    scores = {"all rows": (result.validation_rows, result.cosine_similarity)}
    if result.cosine_similarity_clean is not None:
        headline["on clean rows"] = f"{result.cosine_similarity_clean:.4f}"
        scores["clean rows"] = (result.clean_rows, result.cosine_similarity_clean)
    headline |= {"mean prompt (baseline)": f"{base:.4f}", "gain": f"{result.gain:+.4f}"}
    scores["mean prompt (baseline)"] = (result.validation_rows, base)
    frame = pd.DataFrame(scores, ["images", "cosine"]).T.astype({"images": int}).rename_axis("what")
    frame["over the mean prompt"] = frame["cosine"] - base
    return {"headline": headline, "score_table": html_tables.html_table(frame, {"over the mean prompt": "{:+.4f}"})}


def training_values(run: FinishedRun) -> dict:
    """The curves, and the scores after every epoch."""
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    if not losses:
        return {"losses": losses}
    columns = {
        "epoch": "epoch",
        "step": "updates",
        "cosine_similarity": "cosine",
        "cosine_similarity_clean": "clean rows",
    }
    scored = pd.DataFrame([line for line in run.metrics if "cosine_similarity" in line], columns=list(columns))
    scored = scored.dropna(axis="columns", how="all").rename(columns=columns)
    return {
        "losses": losses,
        "learning_curve": training_plots.learning_curve(
            run.folder / "metrics.jsonl", baseline=run.result.mean_prompt_baseline
        ),
        "epochs": html_tables.html_table(scored, caption="After every epoch"),
    }


def validation_values(run: FinishedRun) -> dict:
    """Scores of the single images, by slice and with examples; or what is missing, where data or predictions are gone.

    The data in `input/` may have changed since the run, and then its predictions are of other rows.
    """
    try:
        table = examples.validation_table(run.recipe, run.fold, run.folder)
        data = datasets.load_datasets(run.recipe.datasets)
        labels = slices.label_rows(data, table["row"].to_numpy(), run.fold)
    except (ValueError, OSError) as error:
        return {"missing": f"Not shown: {error}"}
    cosines = table["cosine"]
    low, median, high = cosines.quantile([0.05, 0.5, 0.95])
    histogram = score_plots.similarity_histogram(cosines)
    values = {"missing": "", "cosines": cosines, "histogram": histogram, "low": low, "median": median, "high": high}
    chosen = examples.choose_extremes(table, run.recipe, EXAMPLES)
    pictures = pd.DataFrame([read_thumbnail(data, row) for row in chosen["row"]], chosen.index, ["uri", "problem"])
    chosen = chosen.join(pictures)
    return (
        values
        | slice_values(run, cosines, labels)
        | {
            "best": list(chosen[chosen["best"]].itertuples()),
            "worst": list(chosen[~chosen["best"]].itertuples()),
            "most_prompts": examples.MOST_PROMPTS,
        }
    )


def slice_values(run: FinishedRun, cosines: pd.Series, labels: pd.DataFrame) -> dict:
    """The mean cosine of every slice: a figure where there are several, and a table of each slicing."""
    means = {name: slices.slice_means(cosines.to_frame(run.name), labels[name]) for name in labels}
    several = {name: table[run.name] for name, table in means.items() if len(table) > 1}
    extremes = [(name, each.idxmax(), each.max(), each.idxmin(), each.min()) for name, each in several.items()]
    tables = []
    for name, table in means.items():
        table = table.rename(columns={run.name: "cosine"})
        table["over all rows"] = (table["cosine"] - cosines.astype(float).mean()).round(4) + 0.0  # no -0.0000
        tables.append(html_tables.html_table(table, {"over all rows": "{:+.4f}"}, caption=f"By {name}"))
    return {
        "extremes": extremes,
        "slice_tables": tables,
        "slice_figure": score_plots.slice_scores(means, {run.name: run.result.cosine_similarity}) if several else None,
    }


def read_thumbnail(data: datasets.PromptImages, row: int) -> tuple[str, str]:
    """A row's image as a data URI, and why it cannot be read; one of them is empty."""
    try:
        return html_page.thumbnail(Image.fromarray(data.decode_image(row).permute(1, 2, 0).numpy())), ""
    except (transforms.ImageError, OSError) as error:
        return "", str(error)


def speed_values(run: FinishedRun) -> dict:
    """Images per second and the share of time without data, and what to change where that is much."""
    pace, waiting = run.pace
    if not pace > 0:
        return {"speed_numbers": {}}
    facts = {
        "images per second": f"{pace:,.0f}",
        "waiting for data": f"{waiting:.1%}",
        "trained for": html_page.duration(run.result.seconds),
        "per epoch, evaluation included": html_page.duration(run.result.seconds / run.result.epochs),
        "updates": f"{run.result.updates:,}",
    }
    if memory := [line["gpu_memory_gb"] for line in run.metrics if "gpu_memory_gb" in line]:
        total = f" of {run.environment['gpu_gb']:.0f} GB" if "gpu_gb" in run.environment else " GB"
        facts["GPU memory, at most"] = f"{max(memory):.1f}{total}"
    advice = ""
    if waiting > profiling.MUCH_WAITING:
        machine = (run.environment.get(name) for name in ("cores", "ranks_per_machine"))  # older runs lack them
        advice = profiling.waiting_advice(run.recipe, waiting, *machine)
    return {"speed_numbers": facts, "advice": advice, "throughput": training_plots.throughput(run)}


def unreadable_values(run: FinishedRun) -> dict:
    """The training images that could not be read."""
    path = run.folder / "unreadable_images.tsv"
    if not path.is_file():
        return {"unreadable_table": ""}
    frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    return {"unreadable_table": html_tables.html_table(frame.head(MOST_UNREADABLE))}


def configuration_values(run: FinishedRun) -> dict:
    """Every key of the run, beside its recipe file where that is still there."""
    frame = pd.DataFrame({"this run": pd.Series(dataclasses.asdict(run.recipe)).map(finished.as_text)})
    frame, name, changed = frame.rename_axis("key"), "", []
    if recipe_file := finished.recipe_file_of(run):
        path, recipe = recipe_file
        name, changed = str(finished.relative_to_repository(path)), finished.changed_keys(run, recipe)
        frame[name] = pd.Series(dataclasses.asdict(recipe)).map(finished.as_text)
    differing = html_tables.html_table(frame.loc[changed], caption="What differs") if changed else ""
    if name:
        frame.insert(1, "changed", ["changed" if key in changed else "" for key in frame.index])
    return {
        "recipe_name": name,
        "changed": changed,
        "num_keys": len(frame),
        "changed_keys": differing,
        "all_keys": html_tables.html_table(frame),
    }


def environment_values(run: FinishedRun) -> dict:
    """Machine, command and versions of packages."""
    values = {name: value for name, value in run.environment.items() if name not in ("packages", "overrides")}
    values |= run.environment.get("packages", {})
    frame = pd.DataFrame({"value": {name: str(value) for name, value in values.items()}}).rename_axis("what")
    return {"environment_table": html_tables.html_table(frame) if values else ""}


def command_values(run: FinishedRun) -> dict:
    """The commands that make the same run, from a clone."""
    ranks = run.environment.get("ranks", 1)
    revision, uncommitted, _ = (run.environment.get("git_commit") or "").partition("+")
    other = 1 if ranks > 1 else 8
    return {
        "commands": [*([f"git checkout {revision}"] if revision else []), finished.command(run, ranks)],
        "uncommitted": bool(uncommitted),
        "other_ranks": other,
        "other_command": finished.command(run, other),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils report",
        description="Write report.html into the folders of finished runs: scores, curves, examples, configuration.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="name in working/runs/, also with *, or folder (default: the last one)"
    )
    names = parser.parse_args(argv).runs
    run_folders = folders.find_finished(names)
    if not run_folders:
        raise ValueError("no finished run in working/runs/")
    failed = False
    for folder in run_folders if names else run_folders[-1:]:
        try:
            print(write_report(folder))
        except (ValueError, OSError) as error:
            print(f"error: {folder}: {error}", file=sys.stderr)
            failed = True
    return int(failed)

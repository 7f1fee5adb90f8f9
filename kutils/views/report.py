"""Writes `report.html` of a finished run: scores, curves, best and worst images, speed, configuration.

`kutils report [RUN ...]` writes that page, `report.html`, into the run's folder; training does so at its end.
"""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from kutils.data import datasets, transforms
from kutils.runs import finished, folders
from kutils.runs.finished import FinishedRun
from kutils.system import paths
from kutils.training import examples, profiling, slices
from kutils.training.examples import UNREADABLE
from kutils.views import html_page, html_tables, score_plots, training_plots

EXAMPLES = 4  # best, and as many worst
MOST_UNREADABLE = 100  # that are listed


# ---------------------------------------------------------------- the report of a run


@dataclass(frozen=True)
class Validation:
    """What a run's predictions are worth now: `validation_table`, and the slices of its rows; or why they cannot be."""

    table: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    data: datasets.PromptImages | None = None
    missing: str = ""


def read_validation(run: FinishedRun) -> Validation:
    """Compare a run's predictions with the data in `input/`, which may have changed or gone since."""
    try:
        table = examples.validation_table(run.recipe, run.fold, run.folder)
        data = datasets.load_datasets(run.recipe.datasets)
        return Validation(table, slices.labels(data, table["row"].to_numpy(), run.fold), data)
    except UNREADABLE as error:
        return Validation(missing=f"Not shown: {error}")


def write_report(folder: Path) -> Path:
    """Write `<run folder>/report.html`, one file that needs nothing else; replaced if it is there.

    What cannot be shown, since data sets have changed or images are gone, is said in its place.

    Raises: ValueError for a folder without a finished run, ConfigError for a configuration that cannot be read.
    """
    run = finished.read_run(Path(folder))
    validation = read_validation(run)
    sections = {
        "Training": training_section(run),
        "Scores": scores_section(run, validation),
        "Scores by slice": slices_section(run, validation),
        "Best and worst": examples_section(run, validation),
        "Speed": speed_section(run),
        "Unreadable images": unreadable_section(run),
        "Configuration": configuration_section(run),
        "Environment": environment_section(run),
        "Run it again": again_section(run),
    }
    with paths.atomic_path(run.folder / "report.html") as temporary:
        temporary.write_text(html_page.page(run.name, lead(run), sections), encoding="utf-8")
    return run.folder / "report.html"


def lead(run: FinishedRun) -> str:
    result, recipe = run.result, run.recipe
    clean = result.cosine_similarity_clean
    numbers = {"cosine similarity": f"{result.cosine_similarity:.4f}"}
    if clean is not None:
        numbers["on clean rows"] = f"{clean:.4f}"
    numbers |= {"mean prompt (baseline)": f"{result.mean_prompt_baseline:.4f}", "gain": f"{run.result.gain:+.4f}"}
    resumed = f" (last resumed {run.environment['resumed']})" if "resumed" in run.environment else ""
    told = (
        f"{recipe.model}, stage {recipe.stage}, fold {run.fold}: epoch {result.best_epoch} of {result.epochs} "
        f"was best, on {result.validation_rows:,} validation images of {', '.join(recipe.datasets)}. Started "
        f"{run.environment.get('started', 'at an unknown time')}{resumed}, trained for {duration(result.seconds)}."
    )
    return html_page.paragraph(told) + html_page.numbers(numbers)


def training_section(run: FinishedRun) -> str:
    if not any("loss" in line for line in run.metrics):
        return html_page.paragraph("Not shown: metrics.jsonl holds no logged update.", "note")
    result = run.result
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    figure = training_plots.learning_curve(run.folder / "metrics.jsonl", baseline=result.mean_prompt_baseline)
    alt = (
        f"Curves over {result.updates:,} updates: the training loss goes from {losses[0]:.3f} to {losses[-1]:.3f}, "
        f"the validation cosine reaches {result.cosine_similarity:.4f} in epoch {result.best_epoch}; the mean "
        f"prompt has {result.mean_prompt_baseline:.4f}."
    )
    scored = pd.DataFrame([line for line in run.metrics if "cosine_similarity" in line])
    names = {
        "epoch": "epoch",
        "step": "updates",
        "cosine_similarity": "cosine",
        "cosine_similarity_clean": "clean rows",
    }
    scored = scored[[name for name in names if name in scored and scored[name].notna().any()]].rename(columns=names)
    table = html_tables.table(scored, caption="After every epoch")
    return html_page.figure(figure, alt) + f"<details><summary>Numbers</summary>{html_page.scrolling(table)}</details>"


def scores_section(run: FinishedRun, validation: Validation) -> str:
    result, base = run.result, run.result.mean_prompt_baseline
    scores = {"all rows": (result.validation_rows, result.cosine_similarity)}
    if result.cosine_similarity_clean is not None:
        scores["clean rows"] = (result.clean_rows, result.cosine_similarity_clean)
    scores["mean prompt (baseline)"] = (result.validation_rows, base)
    frame = pd.DataFrame(scores, ["images", "cosine"]).T.astype({"images": int})
    frame = frame.rename_axis("what")
    frame["over the mean prompt"] = frame["cosine"] - base
    told = html_page.paragraph(
        "Mean cosine of predicted and true prompt embedding. Clean rows have no similar training prompt; the mean "
        "prompt is the score of one answer for all images.",
        "faint",
    )
    shown = told + html_page.scrolling(html_tables.table(frame, {"over the mean prompt": "{:+.4f}"}))
    if validation.table is None:
        return shown + html_page.paragraph(validation.missing, "note")
    cosines = validation.table["cosine"]
    low, middle, high = cosines.quantile([0.05, 0.5, 0.95])
    alt = (
        f"Histogram of {len(cosines):,} cosines: median {middle:.3f}, 5 % are below {low:.3f}, 5 % above {high:.3f}, "
        f"from {cosines.min():.3f} to {cosines.max():.3f}."
    )
    return shown + html_page.figure(score_plots.similarity_histogram(cosines), alt, alt)


def slices_section(run: FinishedRun, validation: Validation) -> str:
    if validation.table is None:
        return html_page.paragraph(validation.missing, "note")
    cosines = validation.table[["cosine"]].rename(columns={"cosine": run.name})
    tables = {name: slices.mean_scores(cosines, validation.labels[name]) for name in validation.labels}
    told = html_page.paragraph(
        "In what is the model good? Validation images by words of the prompt, by its source and kind, and by its "
        "cosine similarity to the nearest training prompt.",
        "faint",
    )
    figure = ""
    if any(len(table) > 1 for table in tables.values()):
        drawn = score_plots.slice_scores(tables, {run.name: run.result.cosine_similarity})
        ends = [
            f"by {name}, best for {table[run.name].idxmax()} ({table[run.name].max():.4f}) and worst for "
            f"{table[run.name].idxmin()} ({table[run.name].min():.4f})"
            for name, table in tables.items()
            if len(table) > 1
        ]
        figure = html_page.figure(drawn, f"Mean cosine of each slice: {'; '.join(ends)}.")
    shown = []
    for name, table in tables.items():
        table = table.rename(columns={run.name: "cosine"})
        table["over all rows"] = (table["cosine"] - cosines[run.name].astype(float).mean()).round(4) + 0.0  # no -0.0000
        shown.append(html_tables.table(table, {"over all rows": "{:+.4f}"}, caption=f"By {name}"))
    return told + figure + f"<div class='tables'>{html_page.scrolling(*shown)}</div>"


def examples_section(run: FinishedRun, validation: Validation) -> str:
    if validation.table is None:
        return html_page.paragraph(validation.missing, "note")
    shown = examples.best_and_worst(validation.table, run.recipe, EXAMPLES).iloc[::-1]
    content = html_page.paragraph(
        "Validation images, each prompt once; nearest is the prompt of all data sets closest to the prediction, of "
        f"{examples.MOST_PROMPTS:,} drawn where there are more.",
        "faint",
    )
    best = min(EXAMPLES, -(-len(shown) // 2))
    for kind, title, rows in (("good", "Best", shown[:best]), ("bad", "Worst", shown[best:][::-1])):
        pictures = [
            html_page.picture(
                thumbnail(validation.data, row.row),
                f"Validation image of the prompt: {row.prompt}",
                kind,
                f"cosine {row.cosine:.3f}",
                [f"true: {row.prompt}", f"nearest: {row.nearest}"],
            )
            for row in rows.itertuples()
        ]
        if pictures:
            content += f"<h3>{title}</h3><div class='gallery'>{''.join(pictures)}</div>"
    return content


def thumbnail(data: datasets.PromptImages, row: int) -> Image.Image | str:
    """A row's image, or what is to be said where it cannot be read."""
    try:
        return Image.fromarray(data.decode_image(row).permute(1, 2, 0).numpy())
    except (transforms.ImageError, OSError) as error:
        return str(error)


def speed_section(run: FinishedRun) -> str:
    pace, waiting = run.pace
    if not pace > 0:
        return html_page.paragraph("Not shown: metrics.jsonl tells no speed.", "note")
    epochs = run.result.epochs
    facts = {
        "images per second": f"{pace:,.0f}",
        "waiting for data": f"{waiting:.1%}",
        "trained for": duration(run.result.seconds),
        "per epoch, evaluation included": duration(run.result.seconds / epochs),
        "updates": f"{run.result.updates:,}",
    }
    if held := [line["gpu_memory_gb"] for line in run.metrics if "gpu_memory_gb" in line]:
        total = f" of {run.environment['gpu_gb']:.0f} GB" if "gpu_gb" in run.environment else " GB"
        facts["GPU memory, at most"] = f"{max(held):.1f}{total}"
    advice = ""
    if waiting > profiling.MUCH_WAITING:
        machine = (run.environment.get(name) for name in ("cores", "ranks_per_machine"))  # of runs before: not told
        advice = html_page.paragraph(profiling.advice(run.recipe, waiting, *machine), "note")
    alt = f"Images per second over the updates, {pace:,.0f} on average; {waiting:.1%} of the time is spent waiting."
    return html_page.numbers(facts) + advice + html_page.figure(training_plots.throughput(run), alt)


def unreadable_section(run: FinishedRun) -> str:
    """Training images that could not be read; nothing where all could."""
    path = run.folder / "unreadable_images.tsv"
    if not run.result.unreadable_images:
        return ""
    told = html_page.paragraph(
        f"{run.result.unreadable_images:,} training images could not be read; others were trained on instead. "
        f"kutils check {' '.join(f'input/{name}.tsv' for name in run.recipe.datasets)} sets them apart.",
        "note",
    )
    if not path.is_file():
        return told
    frame = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    return told + html_page.scrolling(html_tables.table(frame.head(MOST_UNREADABLE)))


def configuration_section(run: FinishedRun) -> str:
    """Every key, and what the recipe file says where the run has something else."""
    frame = pd.DataFrame({"this run": pd.Series(dataclasses.asdict(run.recipe)).map(finished.as_text)}).rename_axis(
        "key"
    )
    found = finished.recipe_of(run)
    if found is None:
        told = html_page.paragraph("The recipe file of this run is not there any more.", "faint")
        return told + html_page.scrolling(html_tables.table(frame))
    name, differs = str(finished.shown_path(found[0])), finished.changed_keys(run, found[1])
    frame[name] = pd.Series(dataclasses.asdict(found[1])).map(finished.as_text)
    told = f"{len(differs)} of {len(frame)} keys differ from {name}{': ' if differs else ''}{', '.join(differs)}."
    changed = html_page.scrolling(html_tables.table(frame.loc[differs], caption="What differs")) if differs else ""
    frame.insert(1, "changed", ["changed" if key in differs else "" for key in frame.index])
    every = html_page.scrolling(html_tables.table(frame))
    return html_page.paragraph(told) + changed + f"<details><summary>All keys</summary>{every}</details>"


def environment_section(run: FinishedRun) -> str:
    shown = {name: value for name, value in run.environment.items() if name not in ("packages", "overrides")}
    shown |= run.environment.get("packages", {})
    if not shown:
        return html_page.paragraph("Not shown: environment.json is gone.", "note")
    frame = pd.DataFrame({"value": {name: str(value) for name, value in shown.items()}}).rename_axis("what")
    return html_page.scrolling(html_tables.table(frame))


def again_section(run: FinishedRun) -> str:
    """The commands that make the same run, from a clone."""
    ranks = run.environment.get("ranks", 1)
    revision, changed, _ = (run.environment.get("git_commit") or "").partition("+")
    lines = [f"git checkout {revision}"] if revision else []
    note = html_page.paragraph("The working tree held changes that are in no commit.", "note") if changed else ""
    other, told = (1, "with one process") if ranks > 1 else (8, "on eight GPUs")
    advice = (
        f"The same {told}, the global batch of {run.recipe.global_batch_size} staying as it is. In a folder where the "
        "run is there already, add resume=never (it moves the former run aside) or prefix=NAME."
    )
    return (
        html_page.commands([*lines, finished.command(run, ranks)])
        + note
        + html_page.paragraph(advice)
        + html_page.commands([finished.command(run, other)])
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils report",
        description="Write report.html into the folders of finished runs: scores, curves, examples, configuration.",
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="name in working/runs/, also with *, or folder (default: the last one)"
    )
    arguments = parser.parse_args(argv)
    found = folders.find_finished(arguments.runs)
    if not found:
        raise ValueError("no finished run in working/runs/")
    failed = False
    for folder in found if arguments.runs else found[-1:]:
        try:
            print(write_report(folder))
        except UNREADABLE as error:
            told = f"one of its files has no {error}" if isinstance(error, KeyError) else error
            print(f"error: {folder}: {told}", file=sys.stderr)
            failed = True
    return int(failed)

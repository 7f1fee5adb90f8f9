"""Compares runs: scores, differences between their configurations, and the same validation rows row by row.

Scores compare where two runs were validated on the same rows: the same fold of the same data.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kutils.data import datasets
from kutils.ensemble import blending
from kutils.runs import folders as runs_folders
from kutils.runs import recipes
from kutils.runs.finished import FinishedRun, as_text, read_run
from kutils.runs.folders import OPERATIONAL
from kutils.training import examples, slices
from kutils.training.out_of_fold import PredictionsError, read_predictions

NAMES = ("prefix", "save_dir", *OPERATIONAL)  # keys that differ between any two runs, or change no result
STANDARD_ERRORS = 1.96  # to either side of a mean: 95 % of a normal distribution
FORMATS = {"gain": "{:+.4f}", "seconds": "{:,.0f}", "images/s": "{:,.0f}", "waiting": "{:.1%}"}  # of `table`
DIFFERENCE_FORMATS = dict.fromkeys(("difference", "low", "high"), "{:+.4f}") | {"wins": "{:.1%}"}  # of `against_best`


def select(names: str = "") -> list[FinishedRun]:
    """Finished runs by name, best first within those that compare, groups in the order of their first run.

    Args:
        names: separated by commas, each of a run in `working/runs/` (also with `*`) or a run folder; empty: all.
    Raises: ValueError for a name that no finished run has, two folders of one name, or where none is finished.
    """
    folders = runs_folders.find_finished(recipes.split_names(names))
    if not folders:
        raise ValueError("no finished run yet; train one: papermill notebooks/train.ipynb working/runs/train.ipynb")
    for name, count in Counter(folder.name for folder in folders).items():
        if count > 1:
            same = ", ".join(str(folder) for folder in folders if folder.name == name)
            raise ValueError(f"{count} runs are named {name} ({same}); rename a folder, or compare one of them")
    found = [read_run(folder) for folder in folders]
    return [run for group in groups(found) for run in group]


def groups(finished: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Runs that were validated on the same rows, best first; a run without predictions is alone."""
    found: dict[tuple, list[FinishedRun]] = {}
    for run in finished:  # data sets of the same prompts may have other images
        found.setdefault((run.fold, run.recipe.datasets, validation_hash(run)), []).append(run)
    return [sorted(group, key=lambda run: -run.result.cosine_similarity) for group in found.values()]


def pick_group(finished: Sequence[FinishedRun], wanted: str = "") -> list[FinishedRun]:
    """The runs of one letter; by default the largest group, the first of several.

    Raises: ValueError for a letter that no group has.
    """
    found = {letter(number): group for number, group in enumerate(groups(finished))}
    if wanted and wanted not in found:
        raise ValueError(f"no group {wanted!r}; there is {', '.join(found)}")
    return found[wanted] if wanted else max(found.values(), key=len)


def validation_hash(run: FinishedRun) -> str:
    """Of the prompt embeddings that the predictions were compared with; the run's folder where there are none."""
    try:
        return read_predictions(run.folder, run.fold, names=["targets_hash"])["targets_hash"]
    except PredictionsError:
        return str(run.folder)


def table(finished: Sequence[FinishedRun]) -> pd.DataFrame:
    """One row per run, named by it: `rows` (the same letter: validated on the same rows), scores, cost, origin."""
    letters = {run.folder: letter(number) for number, group in enumerate(groups(finished)) for run in group}
    return (
        pd.DataFrame(
            {
                run.name: {
                    "rows": letters[run.folder],
                    "fold": run.fold,
                    "data sets": ", ".join(run.recipe.datasets),
                    "cosine": run.result.cosine_similarity,
                    "clean rows": run.result.cosine_similarity_clean,
                    "mean prompt": run.result.mean_prompt_baseline,
                    "gain": run.result.gain,
                    "best epoch": run.result.best_epoch,
                    "epochs": run.result.epochs,
                    "updates": run.result.updates,
                    "seconds": run.result.seconds,
                    "images/s": run.pace[0],
                    "waiting": run.pace[1],
                    "device": f"{run.environment.get('ranks', '?')} x {run.environment.get('device', '?')}",
                    "commit": (run.environment.get("git_commit") or "")[:8],
                }
                for run in finished
            }
        )
        .T.infer_objects()
        .rename_axis("run")
    )


def letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def describe(finished: Sequence[FinishedRun]) -> str:
    """Which runs compare, one line for each set of validation rows."""
    lines = [
        f"{letter(number)}: fold {group[0].fold}, {group[0].result.validation_rows:,} rows of "
        f"{', '.join(group[0].recipe.datasets)}: {', '.join(run.name for run in group)}"
        for number, group in enumerate(groups(finished))
    ]
    if len(lines) > 1:
        lines.append("scores of different letters do not compare: they are of other images")
    return "\n".join(lines)


def differences(finished: Sequence[FinishedRun]) -> pd.DataFrame:
    """What the configurations differ in: a row per key and a column per run; names and operational keys left out."""
    columns = {run.name: dataclasses.asdict(run.recipe) for run in finished}
    keys = [key for key in recipes.HINTS if key not in NAMES and len({str(own[key]) for own in columns.values()}) > 1]
    return pd.DataFrame(
        {name: [as_text(own[key]) for key in keys] for name, own in columns.items()}, pd.Index(keys, name="key")
    )


@dataclasses.dataclass(frozen=True)
class SameRows:
    """Runs of one group on their common validation rows."""

    cosines: pd.DataFrame  # index: row of the data set list; a column per run, float32
    labels: pd.DataFrame  # of `slices.labels`, in the order of the rows
    prompts: np.ndarray  # int [rows]: which prompt a row is of

    def by_slice(self) -> dict[str, pd.DataFrame]:
        """Slicing -> mean cosine of every slice and run."""
        return {name: slices.mean_scores(self.cosines, self.labels[name]) for name in self.labels}

    def against_best(self) -> pd.DataFrame:
        """Each run and the best one, row by row: the mean difference and its 95 % confidence interval.

        Images of a prompt are not independent: the standard error is cluster-robust over prompts (`blending.gain`).

        Returns: index: runs, best first; cosine, difference, low, high (NaN for the best, or where prompts are too few
            to tell), wins (share of the rows where it is better than the best run).
        """
        means = self.cosines.astype(np.float64).mean().sort_values(ascending=False, kind="stable")
        best = self.cosines[means.index[0]].to_numpy()
        rows = {}
        for name, mean in means.items():
            own = self.cosines[name].to_numpy()
            told = blending.gain(own, best, self.prompts)
            error = np.nan if told["error"] is None or name == means.index[0] else STANDARD_ERRORS * told["error"]
            rows[name] = {
                "cosine": mean,
                "difference": told["mean"],
                "low": told["mean"] - error,
                "high": told["mean"] + error,
                "wins": np.nan if name == means.index[0] else float(np.mean(own > best)),
            }
        return pd.DataFrame(rows).T.rename_axis("run")


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of `by_slice` as one, with the columns `by` and `slice` in front."""
    parts = [part.rename_axis("slice").reset_index().assign(by=name) for name, part in tables.items()]
    whole = pd.concat([part.astype({"slice": str}) for part in parts], ignore_index=True)
    whole["slice"] = pd.Categorical(whole["slice"], whole["slice"].unique(), ordered=True)  # a click keeps their order
    return whole[["by", *(name for name in whole if name != "by")]]


def same_rows(group: Sequence[FinishedRun]) -> SameRows:
    """Compare the predictions of runs of one group with the data in `input/`; slices are those of the first run's data.

    Rows that a run has no prediction for are left out, and counted in a printed line.

    Raises: DataError where the data has changed since, or is gone; ValueError where two runs' rows differ.
    """
    columns = {}
    for run in group:
        scored = examples.validation_table(run.recipe, run.fold, run.folder).sort_values("row")
        columns[run.name] = scored.set_index("row")["cosine"]
    if any(not column.index.equals(next(iter(columns.values())).index) for column in columns.values()):
        raise ValueError(f"{', '.join(columns)} were validated on different rows; compare them group by group")
    cosines = pd.DataFrame(columns).dropna()
    if missing := len(next(iter(columns.values()))) - len(cosines):
        print(f"{missing:,} images are left out: a run has no prediction of them")
    first, rows = group[0], cosines.index.to_numpy()
    data = datasets.load_datasets(first.recipe.datasets)
    return SameRows(cosines, slices.labels(data, rows, first.fold), data.prompt_codes[rows])

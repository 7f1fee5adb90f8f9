"""Compares runs: scores, differences between their configurations, and the same validation rows row by row.

Scores are comparable if two runs were validated on the same rows: the same fold of the same data.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kutils.data import datasets
from kutils.ensemble import blending
from kutils.runs import folders, recipes
from kutils.runs.finished import FinishedRun, as_text, read_run
from kutils.training import examples, slices
from kutils.training.out_of_fold import PredictionsError, read_predictions

NAMES = ("prefix", "save_dir", *folders.OPERATIONAL)  # keys that differ between any two runs, or change no result
STANDARD_ERRORS = 1.96  # to either side of a mean: 95 % of a normal distribution


def select_runs(names: str = "") -> list[FinishedRun]:
    """Read finished runs; comparable runs are adjacent, the best first.

    Args:
        names: separated by commas, each of a run in `working/runs/` (also with `*`) or a run folder; empty: all.
    Raises: ValueError for a name that no finished run has, two folders of one name, or if no run is finished.
    """
    run_folders = folders.find_finished(recipes.split_names(names))
    if not run_folders:
        raise ValueError("no finished run yet; train one: papermill notebooks/train.ipynb working/runs/train.ipynb")
    for name, count in Counter(folder.name for folder in run_folders).items():
        if count > 1:
            same = ", ".join(str(folder) for folder in run_folders if folder.name == name)
            raise ValueError(f"{count} runs are named {name} ({same}); rename a folder, or compare one of them")
    return [run for group in group_runs([read_run(folder) for folder in run_folders]).values() for run in group]


def group_runs(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Group runs that were validated on the same rows, the best first; a run without predictions is alone.

    Returns: letter -> runs; A is the group of the first run.
    """
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:  # data sets with the same prompts may have different images
        groups.setdefault((run.fold, run.recipe.datasets, validation_hash(run)), []).append(run)
    return {
        letter(number): sorted(group, key=lambda run: -run.result.cosine_similarity)
        for number, group in enumerate(groups.values())
    }


def pick_group(runs: Sequence[FinishedRun], name: str = "") -> list[FinishedRun]:
    """The runs of one letter; by default the largest group, or the first of equally large ones.

    Raises: ValueError for a letter that no group has.
    """
    groups = group_runs(runs)
    if name and name not in groups:
        raise ValueError(f"no group {name!r}; there is {', '.join(groups)}")
    return groups[name] if name else max(groups.values(), key=len)


def validation_hash(run: FinishedRun) -> str:
    """The hash of the predictions' targets; without predictions, the run's folder."""
    try:
        return read_predictions(run.folder, run.fold, names=["targets_hash"])["targets_hash"]
    except PredictionsError:
        return str(run.folder)


def letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


def runs_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """One row per run: `rows` (the same letter for the same validation rows), scores, cost, origin."""
    letters = {run.folder: name for name, group in group_runs(runs).items() for run in group}
    rows = {
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
        for run in runs
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def groups_text(runs: Sequence[FinishedRun]) -> str:
    """A line for each group: its letter, its rows and its runs."""
    lines = [
        f"{name}: fold {group[0].fold}, {group[0].result.validation_rows:,} rows of "
        f"{', '.join(group[0].recipe.datasets)}: {', '.join(run.name for run in group)}"
        for name, group in group_runs(runs).items()
    ]
    if len(lines) > 1:
        lines.append("scores of different letters do not compare: they are of other images")
    return "\n".join(lines)


def configurations(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Keys that differ between the runs, except NAMES: a row per key, a column per run."""
    values = pd.DataFrame({run.name: pd.Series(dataclasses.asdict(run.recipe)).map(as_text) for run in runs})
    values = values.drop(index=[*NAMES]).rename_axis("key")
    return values[values.nunique(axis=1) > 1]


@dataclasses.dataclass(frozen=True)
class SameRows:
    """Runs of one group on their common validation rows."""

    cosines: pd.DataFrame  # index: row of the data set list; a column per run, float32
    labels: pd.DataFrame  # of `slices.label_rows`, in the order of the rows
    prompts: np.ndarray  # int [rows]: index of each row's prompt

    def by_slice(self) -> dict[str, pd.DataFrame]:
        """Slicing -> mean cosine of every slice and run."""
        return {name: slices.slice_means(self.cosines, self.labels[name]) for name in self.labels}

    def against_best(self) -> pd.DataFrame:
        """Compare each run with the best one, row by row: the mean difference and its 95 % confidence interval.

        Images of a prompt are not independent: the standard error is cluster-robust over prompts (`blending.gain`).

        Returns: index: runs, best first; cosine, difference, low, high (NaN for the best run, or with too few prompts),
            wins (share of the rows on which the run is better than the best one).
        """
        means = self.cosines.astype(np.float64).mean().sort_values(ascending=False, kind="stable")
        best = means.index[0]
        rows = {}
        for name, mean in means.items():
            cosines = self.cosines[name].to_numpy()
            gain = blending.gain(cosines, self.cosines[best].to_numpy(), self.prompts)
            error = np.nan if gain["error"] is None or name == best else STANDARD_ERRORS * gain["error"]
            rows[name] = {
                "cosine": mean,
                "difference": gain["mean"],
                "low": gain["mean"] - error,
                "high": gain["mean"] + error,
                "wins": np.nan if name == best else float(np.mean(cosines > self.cosines[best])),
            }
        return pd.DataFrame(rows).T.rename_axis("run")


def join_slices(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of `by_slice` as one, with the columns `by` and `slice` in front."""
    parts = [part.rename_axis("slice").reset_index().assign(by=name) for name, part in tables.items()]
    whole = pd.concat([part.astype({"slice": str}) for part in parts], ignore_index=True)
    whole["slice"] = pd.Categorical(
        whole["slice"], whole["slice"].unique(), ordered=True
    )  # a click sorts in this order
    return whole[["by", *(name for name in whole if name != "by")]]


def same_rows(group: Sequence[FinishedRun]) -> SameRows:
    """Compare the predictions of runs of one group with the data in `input/`; slices are those of the first run's data.

    Raises: ValueError if the data has changed since or is missing, or if two runs' rows differ.
    """
    columns = {}
    for run in group:
        table = examples.validation_table(run.recipe, run.fold, run.folder).sort_values("row")
        columns[run.name] = table.set_index("row")["cosine"]
    first, rows = group[0], columns[group[0].name].index
    if not all(column.index.equals(rows) for column in columns.values()):
        raise ValueError(f"{', '.join(columns)} were validated on different rows; compare them group by group")
    rows = rows.to_numpy()
    data = datasets.load_datasets(first.recipe.datasets)
    return SameRows(pd.DataFrame(columns), slices.label_rows(data, rows, first.fold), data.prompt_codes[rows])

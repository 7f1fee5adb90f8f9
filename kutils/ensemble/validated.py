"""Aligns several models' predictions of the same validation rows, and adds their ensemble's predictions."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kutils.data.datasets import PromptImages
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending, weights
from kutils.ensemble.members import FIT_FOLD, load_predictions
from kutils.runs import finished
from kutils.training.out_of_fold import LENGTHS, read_predictions

MEAN = "ensemble of equal weights"  # if no ensemble was fitted


class NoPredictions(ValueError):
    """Finished runs left no predictions of a fold to compare; the message says how to make them."""


@dataclass(frozen=True)
class Validated:
    """Several models' predictions of the validation rows that they have in common."""

    fold: int
    rows: np.ndarray  # int64 [n] of the data sets
    predictions: dict[str, np.ndarray]  # model -> float32 [n, 384], unit rows
    cosines: pd.DataFrame  # [n, models]: between prediction and prompt
    baseline: float  # mean cosine of the mean training prompt with these rows' prompts
    folders: dict[str, Path]  # model -> its run; without ensembles
    notes: list[str]  # what a reader of the scores should know
    lengths: dict[str, np.ndarray]  # model -> float32 [n], norms before scaling; runs of earlier versions have none

    @property
    def best(self) -> str:
        return str(self.cosines.mean().idxmax())

    @property
    def single_models(self) -> list[str]:
        return list(self.folders)

    def agreement(self) -> np.ndarray:
        """Mean cosine between the single models' predictions of each row, [n]; NaN if there is only one model."""
        return blending.agreement({name: self.predictions[name] for name in self.folders})

    def scores(self) -> dict[str, float]:
        """Model -> mean cosine, the best first."""
        return self.cosines.mean().sort_values(ascending=False).to_dict()


def read_validated(data: PromptImages, fold: int, folders: Sequence[Path]) -> Validated:
    """Read what finished runs predicted for a fold of these data sets, and add the predictions of their ensemble.

    Raises: NoPredictions if no run has predicted the fold's rows, or if no row is predicted by all runs.
    """
    runs, notes = read_runs(data, fold, folders)
    names = ", ".join(runs)
    if not runs:
        raise NoPredictions(
            f"no finished run was validated on fold {fold} of {', '.join(data.names)}; train one: papermill "
            f"notebooks/train.ipynb working/runs/train_lite0_fold{fold}.ipynb -p model lite0 "
            f"-p fold {fold}" + "".join(f"\n  {note}" for note in notes)
        )
    rows = functools.reduce(np.intersect1d, (own_rows for own_rows, *_ in runs.values()))
    if not len(rows):
        raise NoPredictions(f"{names} were validated on different images; choose some of them by models=")
    if len(rows) < max(len(own_rows) for own_rows, *_ in runs.values()):
        notes.append(f"{names} are compared on the {len(rows):,} images of fold {fold} that all were validated on")
    predictions = {name: take_rows(rows, own_rows, values) for name, (own_rows, values, _) in runs.items()}
    lengths = {name: take_rows(rows, own_rows, own) for name, (own_rows, _, own) in runs.items() if own is not None}
    if len(predictions) > 1:
        name, together, note = predict_together(data, fold, rows, list(predictions.values()))
        predictions[name], lengths[name] = blending.unit(together), np.linalg.norm(together, axis=1)
        notes.append(note)
    targets = data.targets(rows)
    cosines = pd.DataFrame({name: np.einsum("nd,nd->n", values, targets) for name, values in predictions.items()})
    baseline = float((targets @ data.training_mean(fold)).mean(dtype=np.float64))
    run_folders = {folder.name: folder for folder in folders if folder.name in runs}
    return Validated(fold, rows, predictions, cosines, baseline, run_folders, notes, lengths)


def read_runs(
    data: PromptImages, fold: int, folders: Sequence[Path]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]], list[str]]:
    """Run -> result of `predictions_of`, for the runs of a fold; and a note for each run that is left out."""
    runs, notes = {}, []
    for folder in folders:
        if finished.read_result(folder).fold != fold:
            continue
        try:
            runs[folder.name] = predictions_of(data, folder, fold)
        except ValueError as error:
            notes.append(f"{folder.name} is left out: {error}")
    return runs, notes


def predict_together(
    data: PromptImages, fold: int, rows: np.ndarray, predictions: Sequence[np.ndarray]
) -> tuple[str, np.ndarray, str]:
    """Name, predictions and a note of the ensemble fitted last, or of equal weights if there is none."""
    try:
        together, score = read_ensemble(data, fold, rows)
    except ValueError as error:  # none was fitted, a member is missing, folds have changed, ...
        note = f"instead of a fitted ensemble, predictions are averaged: {error}"
        equal = dict.fromkeys(range(len(predictions)), 1 / len(predictions))
        return MEAN, blending.weighted_total(dict(enumerate(predictions)), equal), note
    note = f"the weights of the ensemble were fitted on half of these images; on the others it has {score:.4f}"
    return "ensemble", together, note


def predictions_of(data: PromptImages, folder: Path, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows int64 [n] of the data sets, a run's predictions of them, float32 [n, 384], and their lengths [n] if saved.

    Raises: ValueError if they are not there, damaged, or of other data.
    """
    saved = read_predictions(folder, fold)
    hashes = json.loads(saved["folds_hash"])
    if missing := sorted(set(hashes) - set(data.names)):
        raise ValueError(f"it was validated on {', '.join(missing)} too; look at datasets={','.join(hashes)}")
    if any(data.folds_hashes[name] != value for name, value in hashes.items()):
        raise ValueError("prompts were assigned to other folds since; train it again")
    rows = data.rows_of(saved["dataset"], saved["row"])
    if rows.max() >= len(data) or data.hash_targets(rows) != saved["targets_hash"]:
        raise ValueError("its data sets have other rows or prompts now; train it again")
    return rows, saved["embeddings"], saved.get(LENGTHS)


def take_rows(wanted: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values [n, ...] of the wanted rows, in their order, from one value for each of `rows`."""
    order = np.argsort(rows)
    return values[order[np.searchsorted(rows[order], wanted)]]


def read_ensemble(data: PromptImages, fold: int, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Read the predictions for rows of the ensemble fitted last.

    Returns: float32 [n, 384], before scaling to unit length; the ensemble's score on rows not used in its fit.
    Raises: ValueError if none was fitted on these rows, or a member is missing.
    """
    files = weights.ensemble_files(weights.weight_folders())
    if not files or fold != FIT_FOLD:
        raise ValueError(f"none was fitted on fold {fold}")
    path, fitted = files[0], weights.load_ensemble(files[0])
    together, common = blend_families(path, fitted)
    if not set(common["dataset"]) <= set(data.names):
        raise ValueError(f"{path.name} was fitted on other data sets")
    own_rows = data.rows_of(common["dataset"], common["row"])
    if not np.isin(rows, own_rows).all():
        raise ValueError(f"{path.name} was fitted on other images")
    return take_rows(rows, own_rows, together), fitted.scores["chosen"]


def blend_families(path: Path, fitted: weights.Ensemble) -> tuple[np.ndarray, dict]:
    """An ensemble's predictions for the rows that it was fitted on, before scaling to unit length.

    Args:
        path: of the ensemble's file; its neighbours' prompts are beside it.
    Returns: float32 [n, 384], and the facts about the rows from `load_predictions`.
    Raises: ValueError for a member without predictions.
    """
    families, common = load_predictions(fitted.families)
    bank = PromptBank.load(path.with_name(fitted.neighbours_bank)) if fitted.neighbours_bank else None
    for family, members in fitted.families.items():
        member = next(member for member in members if member.fold == FIT_FOLD)
        families[family] = member.apply_neighbours(families[family], bank, "auto")
    return blending.weighted_total(families, fitted.weights), common

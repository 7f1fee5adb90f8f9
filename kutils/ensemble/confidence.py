"""Estimates confidence from the norm of a prediction before scaling, and from validation scores at such norms.

A network that recognises little predicts a short vector, and so does an ensemble whose families disagree.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kutils.data import datasets
from kutils.ensemble import validated
from kutils.ensemble.blending import unit
from kutils.ensemble.members import load_targets
from kutils.ensemble.weights import Ensemble
from kutils.runs import finished
from kutils.training.out_of_fold import read_predictions

SHARE = 0.1  # of the validation images, those with the nearest norms, give the expected cosine


@dataclass(frozen=True)
class Confidence:
    """Validation predictions of a model or an ensemble, by their length before scaling."""

    fold: int
    lengths: np.ndarray  # float [n], ascending
    cosines: np.ndarray  # float [n], with the true prompts, in the order of the lengths

    @classmethod
    def measure(cls, fold: int, lengths: np.ndarray, cosines: np.ndarray) -> "Confidence":
        """From lengths and cosines of the same images in any order, both float [n]."""
        order = np.argsort(lengths, kind="stable")
        return cls(fold, lengths[order], cosines[order])

    def shorter(self, length: float) -> float:
        """The share of the validation predictions that are shorter."""
        return float(np.searchsorted(self.lengths, length) / len(self.lengths))

    def expected(self, length: float) -> float:
        """The mean cosine of the tenth of the validation images whose predictions' lengths rank nearest."""
        count = max(1, round(SHARE * len(self.lengths)))
        first = np.clip(np.searchsorted(self.lengths, length) - count // 2, 0, len(self.lengths) - count)
        return float(self.cosines[first : first + count].mean(dtype=np.float64))

    def describe(self, length: float) -> str:
        """One line for a prediction of this length."""
        return (
            f"confidence: longer than {self.shorter(length):.0%} of the predictions of fold {self.fold}; there, "
            f"predictions of such a length have a mean cosine of {self.expected(length):.2f} with the true prompts "
            f"(all: {self.cosines.mean(dtype=np.float64):.2f})"
        )


def of_run(folder: Path) -> Confidence | None:
    """The confidence of a finished run; None if its predictions have no lengths or no longer fit the data sets."""
    fold = finished.read_result(folder).fold
    try:
        saved = read_predictions(folder, fold, names=["folds_hash"])
        data = datasets.load_datasets(sorted(json.loads(saved["folds_hash"])))
        rows, embeddings, lengths = validated.predictions_of(data, folder, fold)
    except (OSError, ValueError):
        return None
    if lengths is None:
        return None
    return Confidence.measure(fold, lengths, np.einsum("nd,nd->n", embeddings, data.targets(rows)))


def of_ensemble(path: Path, fitted: Ensemble) -> Confidence | None:
    """The confidence of a fitted ensemble, from its file and content; None if its members' predictions are unusable."""
    try:
        together, common = validated.blend_families(path, fitted)
        targets, *_ = load_targets(common)
    except (OSError, ValueError):
        return None
    cosines = np.einsum("nd,nd->n", unit(together), targets)
    return Confidence.measure(common["fold"], np.linalg.norm(together, axis=1), cosines)

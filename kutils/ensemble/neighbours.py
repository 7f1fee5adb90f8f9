"""Scores the mean of the training prompts nearest to a prediction as a prediction: `kutils neighbours RUN`."""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank, in_fold
from kutils.ensemble import blending
from kutils.ensemble.members import load_targets
from kutils.runs import finished, folders
from kutils.training.out_of_fold import predictions_path, read_predictions

NEIGHBOURS, TEMPERATURES = (5, 20, 50), (0.02, 0.05, 0.1)
MOST_ROWS = 20_000  # of a fold that are scored


@dataclass(frozen=True)
class Baseline:
    """Mean cosines on rows of a validation fold that were not used to choose the settings."""

    run: str
    fold: int
    own: float  # of the run's predictions
    nearest: float  # of the weighted mean of the nearest training prompts to each
    gain: dict[str, float | None]  # of nearest over own: mean and standard error, as from blending.gain
    neighbours: int
    temperature: float
    chosen: float  # of nearest, on the rows on which neighbours and temperature were chosen
    rows: int
    bank: int  # training prompts

    def __str__(self) -> str:
        error = "" if self.gain["error"] is None else f", standard error {self.gain['error']:.4f}"
        return (
            f"{self.run}: mean cosine on {self.rows:,} rows of fold {self.fold} on which nothing was chosen\n"
            f"  {'its own predictions':42} {self.own:.4f}\n"
            f"  {f'the nearest of {self.bank:,} training prompts':42} {self.nearest:.4f}   ({self.gain['mean']:+.4f}"
            f"{error})\n"
            f"{self.neighbours} neighbours at temperature {self.temperature:g}: the best on the other rows of the "
            f"fold, there {self.chosen:.4f}"
        )


def measure_neighbours(
    folder: Path,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    device: str = "auto",
) -> Baseline:
    """Replace a run's out-of-fold predictions by `PromptBank.knn` among the prompts of the other folds.

    Number and temperature are chosen on the half of the topics that an ensemble's weights are fitted on.

    Args:
        neighbours, temperatures: to choose from.
        seed: of the halves, and of the sample if the fold has more than MOST_ROWS.
        Raises: ValueError for predictions that are missing, of changed data, or too few for two halves.
    """
    fold = finished.read_result(folder).fold
    saved = read_predictions(folder, fold)
    targets, prompts, _ = load_targets(saved)
    rows = np.arange(len(targets))
    if len(rows) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))
    own, targets, prompts = saved["embeddings"][rows], targets[rows], prompts[rows]
    groups = blending.topics(targets, prompts, seed)
    seen = blending.split_groups(groups, seed)
    if seen.all():  # also if there are no rows
        raise ValueError(
            f"{predictions_path(folder, fold)} holds predictions of {len(np.unique(prompts))} prompts; choosing and "
            "scoring take two or more"
        )
    names = sorted(json.loads(saved["folds_hash"]))
    bank = PromptBank.from_datasets(names)
    exclude = in_fold(bank, names, fold)
    indices, cosines = bank.nearest(own, max(neighbours), device, exclude)

    def nearest(some: np.ndarray, k: int, temperature: float) -> np.ndarray:
        return bank.weighted_mean(indices[some, :k], cosines[some, :k], temperature)

    scores = {
        pair: blending.mean_cosine(nearest(seen, *pair), targets[seen])
        for pair in itertools.product(neighbours, temperatures)
    }
    best = max(scores, key=scores.get)
    own_cosines = np.einsum("nd,nd->n", own[~seen], targets[~seen])
    nearest_cosines = np.einsum("nd,nd->n", nearest(~seen, *best), targets[~seen])
    return Baseline(
        run=folder.name,
        fold=fold,
        own=float(own_cosines.mean(dtype=np.float64)),
        nearest=float(nearest_cosines.mean(dtype=np.float64)),
        gain=blending.gain(nearest_cosines, own_cosines, groups[~seen]),
        neighbours=min(best[0], indices.shape[1]),
        temperature=best[1],
        chosen=scores[best],
        rows=int((~seen).sum()),
        bank=int((~exclude).sum()),
    )


def prompt_counts(text: str) -> list[int]:
    """Argument type: integers of at least 1, separated by commas."""
    values = [int(value) for value in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{min(values)} is no number of prompts; each is 1 or more")
    return values


def temperatures(text: str) -> list[float]:
    """Argument type: numbers above 0, separated by commas."""
    values = [float(value) for value in text.split(",")]
    if wrong := [value for value in values if not 0 < value < math.inf]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is no temperature; each is above 0 and finite")
    return values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils neighbours",
        description="Score a run's out-of-fold predictions, and the nearest training prompts to them: a baseline, and "
        "what a member with `neighbours` in an ensemble's configuration predicts.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of working/runs/ (a name may hold *)")
    defaults = [",".join(map(str, values)) for values in (NEIGHBOURS, TEMPERATURES)]
    parser.add_argument(
        "--k",
        type=prompt_counts,
        default=defaults[0],
        help=f"numbers of prompts to choose from (default: {defaults[0]})",
    )
    parser.add_argument(
        "--temperature", type=temperatures, default=defaults[1], help=f"to choose from (default: {defaults[1]})"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)"
    )
    args = parser.parse_args(argv)
    for folder in folders.find_finished(args.runs):
        print(measure_neighbours(folder, args.k, args.temperature, device=args.device), flush=True)
    return 0

"""Scores a checkpoint without training: `kutils evaluate --config conf/RECIPE.yaml --fold 0 [key=value ...]`.

It scores any checkpoint on any rows: another validation fold, other data sets, published weights. Predictions and the
features before the head can be saved. It runs as one process or as ranks of torchrun.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kutils.data import datasets
from kutils.models import checkpoints
from kutils.runs import recipes
from kutils.runs.published_names import RecipeParser
from kutils.runs.recipes import Recipe
from kutils.system import devices, paths
from kutils.system.ranks import Ranks, join_ranks
from kutils.training import engine, out_of_fold
from kutils.training.loading import validation_loader


@dataclass(frozen=True)
class Score:
    """Scores of a checkpoint on some rows; cosines are means over rows."""

    rows: int
    cosine_similarity: float
    cosine_similarity_clean: float | None  # over rows without a similar prompt in another fold
    mean_prompt_baseline: float | None  # None for rows of all folds
    unseen: bool | None  # whether the checkpoint has not trained on these rows; None: unknown


def score_checkpoint(
    recipe: Recipe,
    checkpoint: Path,
    fold: int | None,
    ranks: Ranks,
    *,
    predictions_path: Path | None = None,
    features_path: Path | None = None,
) -> Score:
    """Predict every row of a fold of the recipe's data sets once, as validation during training does.

    Args:
        recipe: network, data sets, input size, precision, workers; `max_local_batch_size` images at a time.
        checkpoint: in the published layout, with or without the metadata that this package adds.
        fold: the fold to score; None: all rows, with or without a fold.
        predictions_path: .npz in the format of out-of-fold predictions.
        features_path: .npy, float32 [rows, C]: inputs of the head.
        Raises: ValueError for an unusable checkpoint, recipe or path.
    """
    data = datasets.load_datasets(recipe.datasets, need_folds=fold is not None)
    rows = np.arange(len(data)) if fold is None else data.validation_rows(fold)
    if not len(rows):
        raise ValueError(f"no row of {', '.join(recipe.datasets)} is in fold {fold}")
    network, _, facts = checkpoints.load_model(checkpoint, recipe)
    network.to(ranks.device, memory_format=torch.channels_last)
    loader = validation_loader(data, rows, recipe, ranks)
    dtype = devices.autocast_dtype(recipe.amp_dtype, ranks.device)
    evaluation = engine.evaluate(
        network, loader, recipe, dtype, ranks, total=len(rows), keep_features=features_path is not None
    )
    if predictions_path is not None:
        origin = {"fold": -1 if fold is None else fold, "prefix": recipe.prefix, "checkpoint": str(checkpoint)}
        predicted = evaluation.embeddings, evaluation.lengths
        out_of_fold.save_predictions(predictions_path, data, rows, *predicted, ranks, **origin)
    if features_path is not None:
        save_features(features_path, evaluation.features, len(rows), ranks)
    clean = None if data.clean is None or fold is None else data.clean[rows]
    return Score(
        rows=len(rows),
        cosine_similarity=engine.mean(evaluation.cosines),
        cosine_similarity_clean=None if clean is None else engine.mean(evaluation.cosines, clean),
        mean_prompt_baseline=None if fold is None else data.mean_prompt_baseline(fold),
        unseen=is_unseen(facts, fold, data.folds_hashes),
    )


def is_unseen(facts: dict, fold: int | None, folds_hashes: dict[str, str]) -> bool | None:
    """Whether the checkpoint has not trained on the rows of this fold; None if that is unknown."""
    trained = facts.get("folds_hashes", {})
    if fold is None or "fold" not in facts or any(name not in trained for name in folds_hashes):
        return None
    return facts["fold"] == fold and all(trained[name] == value for name, value in folds_hashes.items())


def save_features(path: Path, local: torch.Tensor, total: int, ranks: Ranks) -> None:
    """Write float32 [total, C] as .npy on the main rank; called by all ranks."""
    if ranks.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
    with out_of_fold.gathered(ranks, local, total, path.parent) as features:
        if ranks.is_main:
            with paths.atomic_path(path) as temporary:
                np.save(temporary, features)


def describe_score(score: Score, checkpoint: Path) -> str:
    """The score as lines to print."""
    lines = [f"{checkpoint.name}: cosine {score.cosine_similarity:.4f} on {score.rows:,} images"]
    if score.cosine_similarity_clean is not None:
        lines.append(f"  {score.cosine_similarity_clean:.4f} on rows without a similar prompt in another fold")
    if score.mean_prompt_baseline is not None:
        lines.append(f"  {score.mean_prompt_baseline:.4f} for the mean training prompt")
    if score.unseen is False:
        lines.append("  warning: this checkpoint has trained on (some of) these rows; the score flatters it")
    if score.unseen is None:
        lines.append("  whether the checkpoint has trained on these rows is not known")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(
        prog="kutils evaluate",
        description="Score a checkpoint on the rows of a fold, without training.",
        epilog=f"keys of a recipe, for key=value (datasets=, amp_dtype=, num_workers=, max_local_batch_size=, ...):\n"
        f"{recipes.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folds = [*map(str, range(10)), "all"]
    parser.add_argument("--config", required=True, help="recipe file, as given or below the repository's conf/")
    parser.add_argument(
        "--fold", required=True, choices=folds, help="fold to score; all: every row, with or without a fold"
    )
    parser.add_argument("--checkpoint", type=Path, help="default: the recipe's best of this fold")
    parser.add_argument("--predictions", type=Path, help=".npz to write: predicted embeddings with data set and row")
    parser.add_argument("--features", type=Path, help=".npy to write: float32 [rows, C], inputs of the head")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    arguments = parser.parse_args(argv)
    recipe = recipes.load_recipe(arguments.config, arguments.overrides)
    fold = None if arguments.fold == "all" else int(arguments.fold)
    if arguments.checkpoint is None and fold is None:
        raise ValueError("--fold all needs a --checkpoint")
    checkpoint = arguments.checkpoint or recipe.checkpoint_path(fold)
    for path, suffix in ((arguments.predictions, ".npz"), (arguments.features, ".npy")):
        if path is not None and path.suffix != suffix:
            raise ValueError(f"{path} is no {suffix} file")
        if path is not None and path.exists():
            raise ValueError(f"{path} exists; remove it or give another name")
        if path is not None:
            paths.check_output(path, 0, "name")
    ranks = join_ranks(recipe.device)
    ranks.barrier()  # all ranks have checked the paths before one of them writes
    score = score_checkpoint(
        recipe,
        checkpoint,
        fold,
        ranks,
        predictions_path=arguments.predictions,
        features_path=arguments.features,
    )
    if ranks.is_main:
        print(describe_score(score, checkpoint), flush=True)
    return 0

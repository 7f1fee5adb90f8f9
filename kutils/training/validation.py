"""Validates the network after an epoch and, with `ema_decay`, the average of its weights."""

import numpy as np
import torch
from torch.autograd.profiler import record_function
from torch.utils.data import DataLoader

from kutils.data import transforms, validation_check
from kutils.models.networks import PromptEmbedder
from kutils.runs.recipes import Recipe
from kutils.system.ranks import Ranks
from kutils.training import engine, profiling


def validate(
    models: dict[str, PromptEmbedder],
    loader: DataLoader,
    recipe: Recipe,
    dtype: torch.dtype,
    ranks: Ranks,
    epoch: int,
) -> tuple[str, engine.Evaluation, dict[str, float]]:
    """Predict the validation rows after an epoch with the network and, if there is one, its average.

    Returns: the name of the better model, its evaluation, and the cosine of each model.
    Raises: ValueError if an image can no longer be read or a score is not finite.
    """
    evaluations = {kind: predict_rows(model, loader, recipe, dtype, ranks) for kind, model in models.items()}
    scores = {kind: engine.mean(evaluation.cosines) for kind, evaluation in evaluations.items()}
    for kind, score in scores.items():
        if not np.isfinite(score):
            which = "" if len(scores) == 1 else f" of the {kind} weights"
            raise ValueError(
                f"the validation cosine{which} after epoch {epoch} is {score}; the best checkpoint is untouched"
            )
    best = max(scores, key=scores.get)
    return best, evaluations[best], scores


def predict_rows(
    network: PromptEmbedder, loader: DataLoader, recipe: Recipe, dtype: torch.dtype, ranks: Ranks
) -> engine.Evaluation:
    """Predict the validation rows; ValueError if an image can no longer be read."""
    images = loader.dataset
    ranks.copy_from_main(network.buffers())  # BatchNorm's statistics differ between ranks; the main rank's are saved
    try:
        with record_function(profiling.EVALUATION):
            return engine.evaluate(network, loader, recipe, dtype, ranks, total=len(images))
    except transforms.ImageError as error:
        validation_check.forget_checked(images.data, images.rows)
        # the last line of a worker's traceback
        reason = str(error).splitlines()[-1].removeprefix("kutils.data.transforms.ImageError: ")
        raise ValueError(
            f"a validation image was in order when it was checked, and is not any more: {reason}; put it back, and "
            "the same command goes on"
        ) from error

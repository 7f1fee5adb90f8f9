"""Images to embeddings: `python -m kutils.predict --config conf/x.yaml --checkpoint FILE --images DIR --output FILE`.

One model, alone or as ranks of torchrun; or all models of an ensemble one after the other, for the submission.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kutils import blending, checkpoints, config, datasets, devices, ensemble, paths, transforms
from kutils.config import EMBEDDING_DIM, Recipe
from kutils.devices import Ranks
from kutils.progress import progress_bar

BATCH_SIZE = 64


class PredictionError(ValueError):
    """Images that cannot be predicted as asked; the message names them."""


class OutOfTime(Exception):
    """The deadline passed before all images were predicted."""


# ---------------------------------------------------------------- images


def find_images(folder: Path | str) -> list[Path]:
    """Files in a folder (not below) with an extension that Pillow reads, sorted by name without extension.

    Raises: PredictionError if the folder is not there, or two files differ in their extension alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PredictionError(f"no folder of images at {folder}")
    known = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    found.sort(key=lambda path: (path.stem, path.name))
    for first, second in itertools.pairwise(found):
        if first.stem == second.stem:
            raise PredictionError(
                f"{first} and {second.name} have the same id {first.stem!r}; rename or remove one of them"
            )
    return found


class ImageFiles(torch.utils.data.Dataset):
    """position -> one image resized to the square; one that cannot be read is black, and named in `bad`."""

    def __init__(self, images: Sequence[Path], input_size: int):
        self.images, self.input_size = images, input_size

    def __getitem__(self, position: int) -> dict:
        """Keys: image uint8 [3, S, S], row (the position), bad (list of position and reason)."""
        try:
            image = transforms.resize_square(transforms.decode_rgb(self.images[position]), self.input_size)
            return {"image": image, "row": position, "bad": []}
        except transforms.ImageError as error:
            black = torch.zeros(3, self.input_size, self.input_size, dtype=torch.uint8)
            return {"image": black, "row": position, "bad": [(position, str(error))]}


# ---------------------------------------------------------------- one model


@torch.inference_mode()
def predict(
    model: nn.Module,
    recipe: Recipe,
    images: Sequence[Path],
    ranks: Ranks,
    *,
    batch_size: int = BATCH_SIZE,
    deadline: float = math.inf,
) -> tuple[np.ndarray, dict[Path, str]]:
    """Predict every image once, decoded, resized and normalised as in validation; shared among ranks.

    Args:
        model: in evaluation mode; moved to the device of this rank.
        recipe: input_size, mean, std, amp_dtype, num_workers.
        images: files; they may be unreadable.
        batch_size: per rank; halved as often as the GPU's memory asks for.
        deadline: by time.monotonic().
    Returns: float32 [n, 384], unit rows, NaN for an unreadable image, on every rank; and file -> reason of those.
    Raises: OutOfTime after the deadline; torch.OutOfMemoryError if one image alone does not fit.
    """
    loader = DataLoader(
        ImageFiles(images, recipe.input_size),
        sampler=range(ranks.rank, len(images), ranks.world_size),
        batch_size=batch_size,
        num_workers=min(recipe.num_workers, os.cpu_count() or 1, len(images) // batch_size),
        collate_fn=datasets.collate,
        pin_memory=ranks.device.type == "cuda",
        generator=torch.Generator(),  # a loader draws a seed when it starts; nobody else's numbers must move
    )
    dtype = devices.autocast_dtype(recipe.amp_dtype, ranks.device)
    model.to(ranks.device, memory_format=torch.channels_last)
    forward = HalvingForward(model, batch_size)
    predicted, bad, done = [torch.empty(0, EMBEDDING_DIM, device=ranks.device)], [], 0
    with progress_bar(len(loader.sampler), "image", delay=5, disable=ranks.rank > 0) as bar:
        for batch in loader:
            pixels = transforms.normalize(batch["image"].to(ranks.device, non_blocking=True), recipe.mean, recipe.std)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                rows = forward(pixels)
            if not rows.isfinite().all():  # float16 ends at 65,504, and some activations do not
                rows = forward(pixels)
            predicted.append(rows)
            bad += batch["bad"]
            bar.update(len(rows))
            done += len(rows)
            if done < len(loader.sampler) and time.monotonic() > deadline:
                raise OutOfTime(f"{done:,} of {len(loader.sampler):,} images were done")
    embeddings = ranks.gather_interleaved(torch.cat(predicted), len(images))
    bad = dict(sorted(item for part in ranks.gather_objects(bad) for item in part))
    embeddings[list(bad)] = np.nan
    return embeddings, {images[position]: reason for position, reason in bad.items()}


class HalvingForward:
    """The model's forward pass in parts of a size that is halved whenever the GPU's memory does not hold it."""

    def __init__(self, model: nn.Module, size: int):
        self.model, self.size = model, size

    def __call__(self, pixels: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([self.model(part) for part in pixels.split(self.size)])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            self.size //= 2  # outside of `except`, whose traceback holds the memory of the failed pass
            torch.cuda.empty_cache()
            print(f"the GPU's memory is full: going on with {self.size} images at a time", flush=True)


# ---------------------------------------------------------------- all models of an ensemble


@dataclass
class EnsemblePrediction:
    """The state of a submission while its models run."""

    embeddings: np.ndarray  # float32 [n, 384], unit rows: the best so far
    families: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [n, 384], NaN for an unreadable image
    seconds: dict[str, float] = field(default_factory=dict)  # by member
    dropped: dict[str, str] = field(default_factory=dict)  # member -> reason
    unreadable: dict[Path, str] = field(default_factory=dict)  # image -> reason


def predict_ensemble(
    fitted: ensemble.Ensemble,
    checkpoint_files: Mapping[ensemble.Member, Path],
    images: Sequence[Path],
    hours: float = math.inf,
    batch_size: int = BATCH_SIZE,
) -> Iterator[EnsemblePrediction]:
    """Predict with one model in memory at a time; gives a complete result at the start and after every family.

    The first result is the mean training embedding for every image, which an unreadable image keeps. Families of the
    largest weights come first. A model for which there is no time, or not enough GPU memory, is dropped, and the
    weights of the others count for more.

    Args:
        fitted: weights, members and the mean training embedding.
        checkpoint_files: of every member.
        images: files.
        hours: time for all models, from the first call on.
    """
    deadline = time.monotonic() + 3600 * hours
    ranks = devices.join_ranks("auto")
    mean, weights = np.asarray(fitted.mean_embedding, np.float32), fitted.mean_weights()
    state = EnsemblePrediction(embeddings=np.tile(mean, (len(images), 1)))
    yield state
    for family in sorted(weights, key=weights.get, reverse=True):
        predicted = []
        for member in fitted.families[family]:
            if not np.any(fitted.weights[family]):
                state.dropped[member.name] = "its weight is 0"
                continue
            began = time.monotonic()
            try:
                if began > deadline:
                    raise OutOfTime("not started")
                model, recipe, _ = checkpoints.load_model(checkpoint_files[member])
                rows, state.unreadable = predict(model, recipe, images, ranks, batch_size=batch_size, deadline=deadline)
            except OutOfTime as error:
                state.dropped[member.name] = f"no time left ({error})"
                continue
            except torch.OutOfMemoryError:
                state.dropped[member.name] = "one image alone does not fit the GPU's memory"
                continue
            finally:
                model = None  # the next one must not be loaded beside it
            predicted.append(rows)
            state.seconds[member.name] = time.monotonic() - began
        if predicted:
            state.families[family] = blending.average(predicted)
            state.embeddings = blending.combine(state.families, fitted.weights, fallback=mean)
            yield state


# ---------------------------------------------------------------- command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kutils.predict",
        description="Predict the prompt embeddings of a folder of images with one model: an .npz file of `ids` (names "
        "without extension, sorted) and `embeddings` (float32 [n, 384], unit rows).",
        epilog=f"keys of a recipe, for key=value:\n{config.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="recipe file, as given or below the repository's conf/")
    parser.add_argument("--checkpoint", required=True, type=Path, help="trained with that recipe")
    parser.add_argument("--images", required=True, type=Path, help="folder of images")
    parser.add_argument("--output", required=True, type=Path, help=".npz file; one that is there is not overwritten")
    parser.add_argument(
        "--fallback",
        type=Path,
        help="file of ensemble weights: unreadable images get its mean training embedding (default: they are an error)",
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help=f"images at a time (default: {BATCH_SIZE})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Predict and write; PredictionError for what is in the way, before the model is loaded where possible."""
    if arguments.output.suffix != ".npz":
        raise PredictionError(f"--output is {arguments.output}; it is an .npz file")
    if arguments.output.exists():
        raise PredictionError(f"{arguments.output} exists; remove it or give another --output")
    recipe = config.load_recipe(arguments.config, arguments.overrides)
    images = find_images(arguments.images)
    if not images:
        raise PredictionError(f"{arguments.images} holds no image")
    fallback = ensemble.load_ensemble(arguments.fallback).mean_embedding if arguments.fallback else None
    model, _, _ = checkpoints.load_model(arguments.checkpoint, recipe)
    ranks = devices.join_ranks(recipe.device)
    embeddings, unreadable = predict(model, recipe, images, ranks, batch_size=max(1, arguments.batch_size))
    if unreadable and fallback is None:
        raise PredictionError(
            f"{len(unreadable)} of {len(images)} images cannot be read; remove them, or give --fallback:\n  "
            + "\n  ".join(list(unreadable.values())[:10])
        )
    if unreadable:
        embeddings = np.where(np.isnan(embeddings), np.asarray(fallback, np.float32), embeddings)
    if not ranks.is_main:
        return
    for reason in unreadable.values():
        print(f"warning: {reason}; it gets the mean training embedding", flush=True)
    with paths.atomic_path(arguments.output) as temporary:
        np.savez(temporary, ids=np.array([path.stem for path in images]), embeddings=embeddings)
    print(f"{len(images):,} embeddings in {arguments.output}", flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        devices.leave_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())

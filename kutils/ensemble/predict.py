"""Predicts the embeddings of a folder of images with one model: `kutils predict`.

Runs on all GPUs of this process, or as ranks of torchrun.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import math
import queue
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kutils.ensemble.image_cache import PixelCache, find_images
from kutils.ensemble.weights import load_ensemble
from kutils.models import checkpoints
from kutils.models.networks import PromptEmbedder
from kutils.runs import recipes
from kutils.runs.published_names import RecipeParser
from kutils.runs.recipes import Recipe
from kutils.system import devices, paths
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.progress import progress_bar
from kutils.system.ranks import join_ranks
from kutils.training import network_input

BATCH_SIZE = 64
TTA = ("none", "two_resolutions")
LARGER = 1.15  # the second resolution, as a multiple of the recipe's
SIDE_STEP = 32  # px; both resolutions are multiples of it, since a ConvNeXt halves its input five times


class OutOfTime(Exception):
    """The deadline passed before all images were predicted."""


# ---------------------------------------------------------------- two resolutions


def check_tta(tta: str) -> None:
    if tta not in TTA:
        raise ValueError(f"tta is {tta!r}; it can be {', '.join(TTA)}")


def input_sizes(model: PromptEmbedder, recipe: Recipe, tta: str) -> list[int]:
    """Sizes in px at which a network predicts each image: the recipe's, and with `two_resolutions` a larger one.

    With `two_resolutions` the predictions at both sizes are averaged. Other teams report a gain of 0.001 to 0.002 in
    this competition; it is not measured here.

    Raises: ValueError for another `tta`, or if the network takes only one size.
    """
    check_tta(tta)
    if tta == "none":
        return [recipe.input_size]
    if not takes_other_sizes(model):
        raise ValueError(f"{recipe.backbone} takes images of one size, {recipe.input_size} px: predict with tta none")
    patches = getattr(model.backbone, "patch_embed", None)
    step = patches.patch_size[0] if patches else SIDE_STEP
    return [recipe.input_size, step * max(recipe.input_size // step + 1, round(LARGER * recipe.input_size / step))]


def sizes_of_member(model: PromptEmbedder, recipe: Recipe, tta: str) -> list[int]:
    """As `input_sizes`, but without an error: a network that takes only one size gets the recipe's."""
    return input_sizes(model, recipe, tta if takes_other_sizes(model) else "none")


def takes_other_sizes(model: PromptEmbedder) -> bool:
    """Whether a network takes images of another size than the recipe's: ConvNets, and ViTs that timm makes flexible.

    Other ViTs have position embeddings for one number of patches.
    """
    fixed = model.backbone.pretrained_cfg.get("fixed_input_size", False)
    return not fixed or getattr(model.backbone, "dynamic_img_size", False)


def predict_at_sizes(
    model: nn.Module, recipe: Recipe, caches: Sequence[PixelCache], device_list: Sequence[torch.device], **options
) -> np.ndarray:
    """The mean of the predictions at every cache's image size, scaled to unit length; arguments as for `predict`."""
    rows = [predict(model, recipe, pixels, device_list, **options) for pixels in caches]
    if len(rows) == 1:
        return rows[0]
    total = np.sum(rows, axis=0)  # NaN where an image was unreadable
    return total / np.linalg.norm(total, axis=1, keepdims=True)


# ---------------------------------------------------------------- one model


def local_devices(device: torch.device, world_size: int) -> list[torch.device]:
    """The devices of this process: every visible GPU if it is the only rank, else its own GPU."""
    if device.type == "cuda" and world_size == 1:
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [device]


def predict(
    model: nn.Module,
    recipe: Recipe,
    pixels: PixelCache,
    device_list: Sequence[torch.device],
    *,
    positions: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    deadline: float = math.inf,
    progress: bool = True,
    unit_rows: bool = True,
) -> np.ndarray:
    """Predict images, decoded, resized and normalised as in validation, on several devices at once.

    Args:
        model: in evaluation mode; moved to the first device, copied to the others.
        recipe: mean, std and amp_dtype.
        pixels: of all images, at a size that the model takes; some may be unreadable.
        device_list: devices, each with one batch at a time.
        positions: of the images to predict (default: all).
        batch_size: per device; halved as often as a GPU's memory asks for.
        deadline: by time.monotonic().
        unit_rows: False: return the head's outputs, of any norm.
    Returns: float32 [len(positions), 384], unit rows, NaN for an unreadable image (`pixels.bad` says why).
    Raises: OutOfTime after the deadline; torch.OutOfMemoryError if one image alone does not fit; ValueError if
        the model gives readable images no finite prediction.
    """
    positions = np.arange(len(pixels.images)) if positions is None else np.asarray(positions, np.int64)
    embeddings = np.full((len(pixels.images), EMBEDDING_DIM), np.nan, np.float32)
    replicas = [model, *(copy.deepcopy(model) for _ in device_list[1:])]
    idle: queue.SimpleQueue[Predictor] = queue.SimpleQueue()
    for replica, device in zip(replicas, device_list, strict=True):
        idle.put(Predictor(replica, recipe, device, batch_size, unit_rows))

    def work(predictor: Predictor, chosen: np.ndarray, batch: Tensor) -> int:
        try:
            embeddings[chosen] = predictor(batch)
        finally:
            idle.put(predictor)
        return len(chosen)

    done, running = 0, collections.deque()
    try:
        with (
            concurrent.futures.ThreadPoolExecutor(len(device_list)) as pool,
            progress_bar(len(positions), "image", delay=5, disable=not progress) as bar,
        ):
            for chosen, batch in pixels.batches(positions, batch_size):  # the next is decoded while the devices compute
                running.append(pool.submit(work, idle.get(), chosen, batch))
                while running and (running[0].done() or len(running) > len(device_list)):
                    count = running.popleft().result()
                    done += count
                    bar.update(count)
                if done < len(positions) and time.monotonic() > deadline:
                    raise OutOfTime(f"{done:,} of {len(positions):,} images were done")
            while running:
                bar.update(running.popleft().result())
    finally:
        running.clear()  # a failed task's traceback would keep this frame, and with it the models, in memory
    embeddings[list(pixels.bad)] = np.nan
    missing = np.setdiff1d(positions[np.isnan(embeddings[positions]).any(axis=1)], list(pixels.bad))
    if len(missing):
        first = pixels.images[missing[0]]
        raise ValueError(f"{len(missing):,} images have no finite prediction, {first} is the first")
    return embeddings[positions]


class Predictor:
    """A model on one device: uint8 pixels to embeddings on the CPU, in batches that fit into its memory."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device, batch_size: int, unit_rows: bool = True):
        self.model = model.to(device, memory_format=torch.channels_last)
        self.recipe, self.device, self.size, self.unit_rows = recipe, device, batch_size, unit_rows
        self.options = {} if unit_rows else {"unit_rows": False}
        self.dtype = devices.autocast_dtype(recipe.amp_dtype, device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """uint8 [B, 3, S, S] to float32 [B, 384]; inference mode, GPU and autocast are set per thread."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            while True:
                try:
                    return np.concatenate([self.embed(part) for part in pixels.split(self.size)])
                except RuntimeError as error:
                    if self.size == 1 or not devices.is_out_of_memory(error):
                        raise
                self.size = (min(self.size, len(pixels)) + 1) // 2  # outside of `except`, whose traceback holds memory
                torch.cuda.empty_cache()
                print(f"{self.device}: the memory is full, going on with {self.size} images at a time", flush=True)

    def embed(self, pixels: Tensor) -> np.ndarray:
        """uint8 [B, 3, S, S] to float32 [B, 384], all at once."""
        inputs = network_input.normalize(pixels.to(self.device), self.recipe.mean, self.recipe.std)
        rows = self.forward(inputs.contiguous(memory_format=torch.channels_last))
        return (nn.functional.normalize(rows, dim=1) if self.unit_rows else rows).cpu().numpy()

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, 3, S, S] to float32 [B, 384]; rows that overflow in half precision are computed again in float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            rows = self.model(inputs, **self.options).float()
        overflown = ~rows.isfinite().all(dim=1)  # some activations exceed float16's 65,504
        if self.dtype != torch.float32 and overflown.any():
            inputs = inputs[overflown].contiguous(memory_format=torch.channels_last)
            rows[overflown] = self.model(inputs, **self.options).float()
        return rows


# ---------------------------------------------------------------- command


def predict_folder(arguments: argparse.Namespace) -> None:
    """Predict and write; ValueError for unusable arguments, before the model is loaded if possible."""
    if arguments.output.suffix != ".npz":
        raise ValueError(f"--output is {arguments.output}; it is an .npz file")
    if arguments.output.exists():
        raise ValueError(f"{arguments.output} exists; remove it or give another --output")
    recipe = recipes.load_recipe(arguments.config, arguments.overrides)
    images = find_images(arguments.images)
    if not images:
        raise ValueError(f"{arguments.images} holds no image")
    paths.check_output(arguments.output, len(images) * EMBEDDING_DIM * 4, "--output")
    fallback = load_ensemble(arguments.fallback).mean_embedding if arguments.fallback else None
    model, _, _ = checkpoints.load_model(arguments.checkpoint, recipe)
    sizes = input_sizes(model, recipe, arguments.tta)
    ranks = join_ranks(recipe.device)
    caches = [PixelCache(images, size, num_workers=recipe.num_workers) for size in sizes]
    local = predict_at_sizes(
        model,
        recipe,
        caches,
        local_devices(ranks.device, ranks.world_size),
        positions=range(ranks.rank, len(images), ranks.world_size),
        batch_size=max(1, arguments.batch_size),
        progress=ranks.is_main,
    )
    embeddings = ranks.gather_interleaved(torch.from_numpy(local).to(ranks.device), len(images))
    bad = {position: reason for pixels in caches for position, reason in pixels.bad.items()}
    bad = dict(sorted(item for part in ranks.gather_objects(list(bad.items())) for item in part))
    unreadable = {images[position]: reason for position, reason in bad.items()}
    if unreadable and fallback is None:
        raise ValueError(
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = RecipeParser(
        prog="kutils predict",
        description="Predict the prompt embeddings of a folder of images with one model: an .npz file of `ids` (names "
        "without extension, sorted) and `embeddings` (float32 [n, 384], unit rows).",
        epilog=f"keys of a recipe, for key=value:\n{recipes.describe_keys()}",
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
    parser.add_argument(
        "--tta",
        default="none",
        choices=TTA,
        help="two_resolutions: predict at the recipe's size and at a larger one, and average (default: none)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    predict_folder(parser.parse_args(argv))
    return 0

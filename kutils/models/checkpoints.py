"""Saves and loads published checkpoints, and the state from which an interrupted run continues."""

import dataclasses
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kutils.models import published
from kutils.models.networks import PromptEmbedder, build_model
from kutils.runs.recipes import HINTS, ConfigError, Recipe, from_values
from kutils.system import checksums, paths

HEADER_KEY = "kutils"  # in a safetensors file's metadata, whose values are texts
CHECKSUM_KEY = "sha256"  # in the same metadata
HEADS = {  # a tensor that only this kind of head has
    "fc.weight": "one Linear, as published (head_width=0)",
    "fc.0.weight": "two and a BatchNorm (head_width above 0)",
    "fc.keys.weight": "one of keys (head_keys above 0)",
}
# what the readers of damaged files raise
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError)
UNREADABLE += (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile)


def save_checkpoint(path: Path, model: PromptEmbedder, recipe: Recipe, **facts) -> None:
    """Write `{"model": weights, "recipe": ..., **facts}`, atomically, the weights in the published layout.

    Args:
        path: an existing file is replaced; the caller checks whether it may be.
        model: on any device; weights are saved in float32 on the CPU.
        recipe: as resolved for the run.
        facts: fold, folds_hashes, epoch, cosine_similarity: plain values, so that `weights_only` loading takes them.
    """
    save(path, {"model": published.to_published(model), "recipe": dataclasses.asdict(recipe), **facts})


def save(path: Path, content: dict) -> None:
    """torch.save to a temporary name, then rename; a full disk leaves the previous file."""
    try:
        with paths.atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        raise ValueError(
            f"{path} could not be written ({error}); is the disk full? The previous file is untouched"
        ) from error


def save_half(path: Path, content: dict) -> None:
    """Write a checkpoint as `read` returns it to float16 safetensors, half the size; all but the weights is JSON in the
    header.

    Raises: ValueError for a weight beyond float16's 65,504, naming it, or a full disk.
    """
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in content["model"].items()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that float16 cannot; the file is not written: {path}")
    facts = {key: value for key, value in content.items() if key != "model"}
    try:
        with paths.atomic_path(path) as temporary:
            save_file(weights, temporary, {HEADER_KEY: json.dumps(facts), CHECKSUM_KEY: hash_weights(weights, facts)})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} could not be written ({error}); is the disk full?") from error


def read_half(path: Path) -> dict:
    """Read what `save_half` wrote; raises one of UNREADABLE for another file."""
    with safe_open(path, "pt") as stored:
        texts = stored.metadata() or {}
        facts = json.loads(texts[HEADER_KEY])
        weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if CHECKSUM_KEY in texts and texts[CHECKSUM_KEY] != hash_weights(weights, facts):
        raise checksums.Damaged(f"{path} is damaged: its checksum does not fit")
    return {**facts, "model": weights}


def hash_weights(weights: dict[str, torch.Tensor], facts: dict) -> str:
    """Hex SHA-256 of the content of a safetensors file."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(path: Path) -> dict:
    """Load a .pth or .safetensors checkpoint to the CPU without unpickling code; ValueError for another file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return read_half(path)
        if zipfile.is_zipfile(path):  # torch's older format has no checksums
            checksums.check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except checksums.Damaged:
        raise
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = (
            "it holds no weights of torch" if "weights" in reason.lower() else reason
        )  # and no advice to run its code
        raise ValueError(f"{path} is no readable checkpoint (truncated?): {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} holds no {{'model': weights}}")
    return content


def kind_of_head(names: Iterable[str]) -> str | None:
    """What the names of a network's weights say of its head, in words; None where they name no head."""
    return next((kind for name, kind in HEADS.items() if name in names), None)


def load_weights(model: PromptEmbedder, weights: dict, path: Path) -> None:
    """Load weights of the published layout strictly; ValueError naming missing, unexpected or misshapen tensors."""
    own, theirs = (kind_of_head(names) for names in (model.state_dict(), weights))
    if theirs not in (own, None):
        raise ValueError(
            f"{path} is of another network: its head is {theirs}, that of the recipe is {own}; give both stages the "
            "same head_width and head_keys"
        )
    if mismatches := published.differences(model, weights):
        more = f" and {len(mismatches) - 5} more differences" if len(mismatches) > 5 else ""
        raise ValueError(f"{path} is of another network: it {'; '.join(mismatches[:5])}{more}")
    published.load_published(model, weights)


def recipe_of(content: dict, path: Path) -> Recipe:
    """The recipe that a checkpoint was trained with; keys that this version does not know are left out."""
    values = content.get("recipe")
    if not isinstance(values, dict):
        raise ValueError(f"{path} carries no recipe; give one with --config")
    try:
        return from_values({key: value for key, value in values.items() if key in HINTS}, path)
    except ConfigError as error:
        raise ValueError(f"the recipe that this checkpoint carries cannot be read: {error}") from error


def load_model(path: Path, recipe: Recipe | None = None) -> tuple[PromptEmbedder, Recipe, dict]:
    """A trained network, ready to predict, in float32 on the CPU.

    Args:
        path: a checkpoint written by `save_checkpoint`, or a published one, which carries no recipe.
        recipe: None: the checkpoint's own.
    Returns: the model in evaluation mode, its recipe, and the facts beside the weights (fold, folds_hashes, epoch,
        cosine_similarity).
    Raises: ValueError for a file that is not a checkpoint, has no recipe, or is of another network.
    """
    content = read(path)
    recipe = recipe or recipe_of(content, path)
    model = build_model(dataclasses.replace(recipe, gradient_checkpointing=False), pretrained=False)
    load_weights(model, content["model"], path)
    return model.eval(), recipe, {key: value for key, value in content.items() if key not in ("model", "recipe")}


def check_folds(facts: dict, fold: int, folds_hashes: dict[str, str], path: Path) -> bool:
    """Refuse a checkpoint of other folds than the data's: rows that it has trained on could be validation rows now.

    Returns: False for a checkpoint that names no fold, such as a published one: its training rows are not known.
    Raises: ValueError naming the data set whose folds differ, or the fold.
    """
    if "fold" not in facts:
        return False
    if facts.get("fold") != fold:
        raise ValueError(f"{path} was validated on fold {facts.get('fold')}, this run is for fold {fold}")
    saved = facts.get("folds_hashes", {})
    changed = [name for name, value in folds_hashes.items() if name in saved and saved[name] != value]
    if changed:
        raise ValueError(
            f"{path} was trained on other folds of {', '.join(changed)} (folds hash {saved[changed[0]][:12]}, now "
            f"{folds_hashes[changed[0]][:12]}): rows it has trained on would be validated. Train that stage again, or "
            f"put the previous input/{changed[0]}.tsv.bak back"
        )
    return True

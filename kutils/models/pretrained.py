"""Loads pretrained backbones from the hub, a package, a file or a folder; `kutils pretrained FOLDER` downloads them.

On a machine without network, `pretrained=FOLDER` takes each recipe's own file from a folder that was downloaded
elsewhere.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import timm
from timm.models import (
    PretrainedCfg,
    get_pretrained_cfg,
    load_state_dict,
    load_state_dict_from_hf,
    split_model_name_tag,
)
from torch import Tensor, nn

from kutils.models.packages import load_packaged
from kutils.runs import recipes as runs_recipes
from kutils.system import paths
from kutils.system.errors import first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def check_backbone(name: str) -> None:
    """Raise ValueError, naming similar ones, for a backbone or weights tag that timm does not have."""
    model, tag = split_model_name_tag(name)
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if not timm.is_model(model):
        close = timm.list_models(f"*{model.split('_')[0]}*")[:5]
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; it has {', '.join(close) or 'others'}")
    if tag and tag not in tags:
        raise ValueError(
            f"timm {timm.__version__} has no weights {tag!r} of {model}; it has {', '.join(tags) or 'none'}"
        )


def create_backbone(name: str, weights: bool | str, keep_projection: bool, **options) -> nn.Module:
    """A timm model with the given weights, in float32 on the CPU.

    Args:
        name: timm model name with its weights tag, such as `vit_large_patch14_clip_224.laion2b`.
        weights: True from the hub, False random, `package` from an installed package, else the path of a file or of a
            folder that holds `<name>.safetensors` (.pth, .pt, .bin). A file may hold timm's names or a whole open_clip
            model; position embeddings of another resolution are resampled, both by timm.
        keep_projection: keep the weights' own last layer (CLIP's projection); else it is removed.
    Raises: ValueError for weights that cannot be loaded or do not fit this network exactly.
    """
    source = get_pretrained_cfg(name)
    if weights is False:
        classes = source.num_classes if keep_projection else 0
        return timm.create_model(name, pretrained=False, num_classes=classes, **options)
    file = None if weights in (True, runs_recipes.FROM_PACKAGE) else find_weights(Path(weights), name)
    state = load_packaged(name) if weights == runs_recipes.FROM_PACKAGE else None
    try:
        if file is not None:
            state = load_state_dict(str(file), weights_only=True)
        overlay = {}
        if state is not None:
            overlay = {"state_dict": state, "num_classes": count_classes(state, source)}
        # with the weights' own number of classes: with another, timm would accept weights of another network
        classes = overlay.get("num_classes", source.num_classes)
        backbone = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **options
        )
    except TypeError:  # an option that this backbone does not have
        raise
    except Exception as error:  # the hub's client and the readers of weights files raise errors of many kinds
        raise ValueError(
            f"the weights of {name} could not be loaded from {file or 'the model hub'}: {first_line(error)}\n"
            "pretrained=PATH takes a weights file or a folder of them on this machine (a machine with network fills "
            "one: kutils pretrained FOLDER), pretrained=false starts from random weights"
        ) from error
    backbone.pretrained_cfg.pop("state_dict", None)  # timm would keep the whole file in memory
    if not keep_projection:
        backbone.reset_classifier(0)
    elif not classes:
        raise ValueError(f"{file} holds no projection, which head=clip_projection starts from")
    return backbone


def count_classes(weights: dict[str, Tensor], source: PretrainedCfg) -> int:
    """Rows of the last layer in a weights file; 0 if it has none. open_clip's last layer is CLIP's projection."""
    last = weights.get(f"{source.classifier}.weight")
    if last is not None:
        return len(last)
    return source.num_classes if any(name.startswith("visual.") for name in weights) else 0


def find_weights(path: Path, name: str) -> Path:
    """The file itself, or `<name>.<suffix>` in the folder; ValueError naming what was looked for."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"pretrained={path}: no such file or folder; give one that is there, true or false")
    for suffix in SUFFIXES:
        if (path / f"{name}{suffix}").is_file():
            return path / f"{name}{suffix}"
    there = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)) or "no weights file"
    raise ValueError(
        f"pretrained={path}: the folder holds no {name}{SUFFIXES[0]} ({', '.join(SUFFIXES[1:])}) but {there}; "
        f"kutils pretrained {path} downloads it"
    )


def download(folder: Path, name: str) -> Path:
    """Download one backbone's weights from the hub as `<folder>/<name>.safetensors`; an existing file is kept.

    Raises: ValueError if the backbone has no weights on the hub, or the hub cannot be reached.
    """
    check_backbone(name)
    path, source = folder / f"{name}.safetensors", get_pretrained_cfg(name)
    if path.is_file():
        return path
    if not source.hf_hub_id:
        raise ValueError(f"timm {timm.__version__} knows no weights of {name!r} on the model hub")
    filename = {"filename": source.hf_hub_filename} if source.hf_hub_filename else {}
    try:
        weights = load_state_dict_from_hf(source.hf_hub_id, weights_only=True, **filename)
    except Exception as error:
        raise ValueError(f"{name} could not be fetched from {source.hf_hub_id}: {first_line(error)}") from error
    with paths.atomic_path(path) as temporary:
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, temporary)
    return path


def wanted_backbones(models: list[str]) -> dict[str, list[str]]:
    """Backbone -> models that use it: those with a stage-1 recipe that starts from the hub's weights, or the named
    ones.

    Raises: ConfigError for a model without a recipe.
    """
    files = [path for (_, stage), path in runs_recipes.recipe_files().items() if stage == 1]
    recipes = [
        runs_recipes.load_recipe(runs_recipes.find_recipe(model, 1) if models else model) for model in models or files
    ]
    wanted: dict[str, list[str]] = {}
    for recipe in recipes:
        if recipe.pretrained is True:
            wanted.setdefault(recipe.backbone, []).append(recipe.model)
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils pretrained",
        description="Download the pretrained weights of the recipes into a folder, for training without network: "
        "there, pretrained=FOLDER takes each recipe's own file from it. Existing files are kept.",
    )
    parser.add_argument("folder", type=Path, help="folder for the weights; made if missing")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models of conf/ (default: all that need weights)")
    arguments = parser.parse_args(argv)
    for backbone, models in wanted_backbones(arguments.models).items():
        print(f"{backbone} (for {', '.join(models)}) ...", flush=True)
        path = download(arguments.folder, backbone)
        print(f"  {path}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    return 0

"""Maps options and keys of the published training code to their names here, for error messages."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from kutils.runs.recipe_keys import Recipe

KEYS = {field.name for field in dataclasses.fields(Recipe)}
EVALUATE = "kutils evaluate --config conf/RECIPE.yaml --fold K --checkpoint FILE"
NAMES = {
    "c": "is --config FILE, or the recipe without an option for dist_train.sh",
    "conf": "is --config FILE, or the recipe without an option for dist_train.sh",
    "m": f"is initialize_from=FILE in training; to score a checkpoint: {EVALUATE}",
    "ckpt_path": f"is initialize_from=FILE in training; to score a checkpoint: {EVALUATE}",
    "train_bs": "was of one GPU; here global_batch_size=N is of all, and max_local_batch_size=N the most of one",
    "valid_bs": "has no equivalent: validation takes max_local_batch_size, and its score depends on no batch",
    "val_fold": f"has no equivalent while training, which validates on the fold left out; afterwards: {EVALUATE}",
    "skip_val": "has no equivalent: every epoch is validated, since the best checkpoint is chosen by that",
    "test": f"is a command of its own: {EVALUATE}",
    "save_feats": f"needs no option in training (fold<k>_predictions.npz); else: {EVALUATE} --predictions FILE.npz",
    "extract_feat": f"is {EVALUATE} --predictions FILE.npz (or --features FILE.npy, what the head sees)",
    "dataset_name": "is datasets=A,B",
    "amp": "is amp_dtype=float32 to switch it off",
    "backend": "has no equivalent: ranks are torchrun's, with NCCL on GPUs and gloo on the CPU",
    "debug": "has no equivalent; a short run is datasets=shapes epochs=1",
    "train_fold": "is --fold K, or train_folds=0,1 of a recipe for dist_train.sh",
    "n_fold": "has no equivalent: there are 10 folds",
    "base_dir": "is the environment variable KUTILS_INPUT",
    "log_dir": "is run_dir=FOLDER",
    "print_freq": "has no equivalent: progress is shown by time",
    "save_every_epoch": "has no equivalent: the best checkpoint and the last are kept",
    "model_name": "is backbone=NAME of timm, with head=",
    "backbone_name": "is backbone=NAME of timm",
    "backbone_pretrained": "is part of backbone=NAME.TAG of timm; pretrained=true loads it",
    "backbone_freeze_epochs": "is freeze_epochs=N",
    "set_grad_checkpointing": "is gradient_checkpointing=true",
    "torch_compile": "is compile=true",
    "warmup_lr_init": "is warmup_lr=RATE",
    "rgb_mean": "is mean=R,G,B",
    "rgb_std": "is std=R,G,B",
    "input_width": "is input_size=PX",
    "input_height": "is input_size=PX",
    "sam": "is sam_rho=0.05",
    "drop_duplicates": "has no equivalent: an epoch always has one image of a prompt",
    "train_trans_mode": "is augment=published or none",
    "valid_trans_mode": "has no equivalent: validation resizes to the square",
    "eva_drop_path_rate": "is drop_path_rate=RATE",
    "cls_mode": "is head=cls_avg or cls_only",
    "task_type": "has no equivalent: image embedding is the only task",
}


def hint(name: str) -> str:
    """'; the published code's X is Y' for an option or key of the published code, with or without dashes, else ''."""
    key = key_of_option(name)
    return f"; the published code's {key} {NAMES[key]}" if key in NAMES else ""


def key_of_option(name: str) -> str:
    """An option as a key: `--train-bs=16` is train_bs."""
    return name.partition("=")[0].lstrip("-").replace("-", "_")


class RecipeParser(argparse.ArgumentParser):
    """A parser whose errors explain how to give a recipe's key, and how options of the published code are called
    here."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        names = dict.fromkeys(text for text in self.given if text.startswith("-"))
        keys = [f"write {key_of_option(name)}=VALUE, without dashes" for name in names if key_of_option(name) in KEYS]
        hints = [hint(name).removeprefix("; ") for name in names if hint(name)]
        super().error("\n  ".join([message, *keys, *hints]))

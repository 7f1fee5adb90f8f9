"""Three small finished runs that tests look at: two of one fold, and one of another."""

from pathlib import Path

import numpy as np
from conftest import make_dataset

from kutils.system.tables import read_table, write_table
from kutils.training import train

SCRIPT = 'a toy </p><script>alert("1")</script> & more'  # prompt of fold 0, twice
FAST = [
    *("datasets=toy", "epochs=2", "warmup_epochs=0", "freeze_epochs=0", "input_size=32", "backbone=test_convnext"),
    *("num_workers=0", "global_batch_size=16", "max_local_batch_size=16", "device=cpu", "amp_dtype=float32"),
]


def train_three(root: Path) -> None:
    """Make `input/toy` of two kinds of prompts, with a mark of clean rows, and train on it; KUTILS_* name `root`."""
    make_dataset(root / "input", num_prompts=60)
    path = root / "input" / "toy.tsv"
    table = read_table(path, ["image", "prompt", "fold"])
    prompts = table["prompt"].to_pylist()
    prompts[:2] = [SCRIPT] * 2
    kinds = np.where(np.arange(120) // 2 % 20 < 10, "short", "long").tolist()
    write_table(path, {"image": table["image"], "prompt": prompts, "fold": table["fold"], "kind": kinds})
    for arguments in (
        ("--config", "conf/tiny_convnext_stage1.yaml", "--fold", "0", "prefix=first", *FAST),
        ("--config", "conf/tiny_convnext_stage1.yaml", "--fold", "0", "prefix=second", *FAST, "lr=1e-4", "seed=3"),
        ("--config", "conf/tiny_convnext_stage1.yaml", "--fold", "1", "prefix=first", *FAST),
    ):
        assert train.main(list(arguments)) == 0

"""A small data set and a small recipe that many tests start from. Everything is on the CPU and without network."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch processes side by side would spin away each other's time
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kutils.runs.recipes import Recipe
from kutils.system.tables import write_table

torch.set_num_threads(1)

TINY = {
    "prefix": "tiny",
    "save_dir": "tiny",
    "model": "tiny",
    "stage": 1,
    "train_folds": (0,),
    "datasets": ("toy",),
    "backbone": "test_convnext",
    "pretrained": False,
    "input_size": 32,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "augment": True,
    "epochs": 2,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "global_batch_size": 8,
    "max_local_batch_size": 8,
    "num_workers": 0,
    "device": "cpu",
    "amp_dtype": "float32",  # auto would be bfloat16 on some machines
}


@pytest.fixture
def tiny_recipe():
    """Make a Recipe of the smallest network; keyword arguments change keys."""
    return lambda **changes: Recipe(**{**TINY, **changes})


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, 384] random unit rows."""
    rows = np.random.default_rng(seed).standard_normal((count, 384)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_dataset(
    root: Path, name: str = "toy", num_prompts: int = 40, images_per_prompt: int = 2, size: int = 40
) -> None:
    """A data set of noise images whose mean colour goes with the prompt; fold = number % 10."""
    random = np.random.default_rng(len(name))
    folder = root / f"{name}_images"
    folder.mkdir(parents=True, exist_ok=True)
    embeddings, images, prompts, folds, rows = unit_rows(num_prompts, seed=1), [], [], [], []
    for prompt in range(num_prompts):
        color = random.integers(0, 200, 3)
        for number in range(images_per_prompt):
            pixels = (color + random.integers(0, 56, (size, size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{prompt:04d}_{number}.png")
            images.append(f"{name}_images/{prompt:04d}_{number}.png")
            prompts.append(f'{name} prompt "{prompt}, with a comma')
            folds.append(prompt % 10)
            rows.append(embeddings[prompt])
    write_table(root / f"{name}.tsv", {"image": images, "prompt": prompts, "fold": folds})
    np.save(root / f"{name}.npy", np.stack(rows))


@pytest.fixture(autouse=True)
def no_traces(tmp_path_factory, monkeypatch):
    """Nothing that a test works out lands in the repository's `working/`."""
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path_factory.mktemp("working")))


def use_folders(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Let kutils use `input/` and `working/` of a folder."""
    patch.setenv("KUTILS_INPUT", str(root / "input"))
    patch.setenv("KUTILS_WORKING", str(root / "working"))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with `input/` (with the data set `toy`: 80 images of 40 prompts) and `working/`, which kutils uses."""
    use_folders(monkeypatch, tmp_path)
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    make_dataset(tmp_path / "input")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `input/` and `working/`, where first_fold0, second_fold0 and first_fold1 have been trained."""
    from finished_runs import train_three

    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        train_three(root)
    return root


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):
    """A copy of `trained`, which kutils uses."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    use_folders(monkeypatch, tmp_path)
    return tmp_path

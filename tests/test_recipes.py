"""The seed's recipes: the five networks at their real size, and all twelve files in a chain on miniature data.

The recipes beyond: their eight networks at their real size, and two of them from stage 1 to a submission.

Longer than the quick tests: `make test-recipes`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset
from fixtures.forked_python import REAL_PYTHON
from fixtures.published_networks import published_network

from kutils.models import checkpoints
from kutils.models.networks import build_model
from kutils.runs import recipes
from kutils.runs.folders import read_metrics
from kutils.system.paths import repository_root
from kutils.training import averaging, engine, network_input, optimizers

pytestmark = pytest.mark.recipes
ROOT = repository_root()
NETWORKS = ["convnext_large", "vit_large", "eva02_large_clsavg", "eva02_large_clsonly", "convnext_xxlarge"]
CHAINS = {  # model -> the fold that is trained (one that its last stage has), and what stands in for its backbone
    "convnext_large": (3, "backbone=test_convnext head=pooled input_size=32"),
    "vit_large": (8, "backbone=test_vit head=pooled input_size=240"),  # 10 x 10 strided patches, as at 160 px
    "convnext_xxlarge": (6, "backbone=test_convnext head=pooled input_size=32"),
    "eva02_large_clsavg": (2, "backbone=eva02_tiny_patch14_224 input_size=56"),
    "eva02_large_clsonly": (5, "backbone=eva02_tiny_patch14_224 input_size=56"),
}
SMALL = "device=cpu pretrained=false amp_dtype=float32 global_batch_size=16 max_local_batch_size=4 num_workers=0"
DATASETS = {  # prompts, images per prompt: the proportions of the six sets, roughly
    "cc3m": (20, 3),
    "cc3m_part2": (24, 1),
    "lexica": (10, 3),
    "diffusiondb": (20, 3),
    "diffusiondb_part2": (24, 1),
    "mscoco": (12, 3),
}


# ---------------------------------------------------------------- the five networks at their real size


def real_batch(size: int) -> dict:
    random = torch.Generator().manual_seed(0)
    target = torch.nn.functional.normalize(torch.randn(1, 384, generator=random), dim=1)
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=random)
    return {"image": image, "jitter": torch.zeros(1, 8), "target": target, "row": torch.zeros(1), "bad": []}


@pytest.mark.parametrize("model", NETWORKS)
def test_a_network_of_a_recipe_trains_and_the_published_network_reads_its_file(model, tmp_path):
    """Stage 1's network makes a training step on one image (the XXL forward and backward alone: its optimiser's state
    does not fit a small machine), is saved, and gives the same embeddings as the network of the publication that loads
    the file strictly."""
    recipe = recipes.load_recipe(recipes.find_recipe(model, 1), ["augment=false", "amp_dtype=float32"])
    torch.manual_seed(0)
    network = build_model(recipe, pretrained=False).train()
    batch = real_batch(recipe.input_size)
    before = network.fc.weight.detach().clone()
    if model == "convnext_xxlarge":
        images = network_input.to_network_input(batch, recipe, torch.device("cpu"))
        (1 - (network(images) * batch["target"]).sum()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        network.zero_grad(set_to_none=True)
    else:
        optimizer = optimizers.build_optimizer(network, recipe)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        assert engine.update(network, [batch], optimizer, scaler, recipe, torch.float32).isfinite()
        assert all(state["step"] == 1 for state in optimizer.state.values())
        assert not torch.equal(network.fc.weight, before)
        del optimizer

    path = tmp_path / "network.pth"
    checkpoints.save_checkpoint(path, network, recipe, fold=0)
    images = network_input.to_network_input(batch, recipe, torch.device("cpu"))
    with torch.no_grad():
        ours = network.eval()(images)
    rotary_positions = getattr(network.backbone, "rope", None)
    del network
    with torch.device("meta"):
        reference = published_network(model, recipe.input_size)
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    reference.load_state_dict(weights, strict=True, assign=True)
    if model.startswith("eva02"):  # its rotary position table is computed, not saved
        reference.backbone.rope = rotary_positions
    with torch.no_grad():
        theirs = reference.eval()(images)
    assert (ours * theirs).sum() > 0.99999
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


BEYOND = sorted(model for model, stage in recipes.recipe_files() if model.startswith("beyond_") and stage == 1)
TOO_LARGE = ("xxlarge", "so400m")  # for float32 with AdamW's state and the average, on a small machine


@pytest.mark.parametrize("model", BEYOND)
def test_a_network_beyond_trains_a_step_and_is_saved_and_loaded(model, tmp_path):
    """At its real size, with random weights: an update on one image with AdamW, layer decay, clipping and the average;
    what is frozen stays, and the file holds the same network, by its weights and by what it predicts."""
    recipe = recipes.load_recipe(recipes.find_recipe(model, 1), ["amp_dtype=float32", "augment=none"])
    dtype = torch.bfloat16 if any(word in model for word in TOO_LARGE) else torch.float32
    torch.manual_seed(0)
    network = build_model(recipe, pretrained=False).train().to(dtype)
    average = averaging.start_average(network, recipe)
    optimizer = optimizers.build_optimizer(network, recipe)
    frozen = {id(parameter) for parameter in network.lowest}
    assert bool(frozen) == (recipe.freeze_blocks > 0)
    before = [parameter.detach().flatten()[:100].clone() for parameter in network.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = real_batch(recipe.input_size)
    loss = engine.update(network, [batch], optimizer, scaler, recipe, torch.bfloat16)
    average.update(network, 1)
    assert loss.isfinite()
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert parameter.isfinite().all()
        assert id(parameter) not in frozen or torch.equal(parameter.detach().flatten()[:100], value)
    assert not torch.equal(network.fc.weight.detach().flatten()[:100], before[-1])
    del optimizer
    path = tmp_path / "network.pth"
    checkpoints.save_checkpoint(path, average.module, recipe, fold=0)
    images = network_input.to_network_input(batch, recipe, torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network.eval()(images)
    del network, average
    loaded, its_recipe, _ = checkpoints.load_model(path)
    assert its_recipe == recipe
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (loaded(images) * expected).sum() > 0.999


def test_the_vit_at_its_true_resolution_is_open_clips_at_336_px(tmp_path):
    """patch_mode=interpolated: 24 x 24 tokens; with strided patches the same weights would see 44 % of the pixels."""
    recipe = recipes.load_recipe(recipes.find_recipe("vit_large", 1), ["patch_mode=interpolated", "augment=false"])
    torch.manual_seed(0)
    network = build_model(recipe, pretrained=False).eval()
    checkpoints.save_checkpoint(tmp_path / "vit.pth", network, recipe)
    images = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        ours = network(images)
    reference = published_network("vit_large", image_size=336)
    assert reference.backbone.grid_size == (24, 24)
    content = torch.load(tmp_path / "vit.pth", weights_only=True)
    reference.load_state_dict(content["model"], strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours, reference.eval()(images), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- twelve recipes in a chain


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The six data sets in small, and an environment in which commands use them."""
    root = tmp_path_factory.mktemp("miniature")
    for name, (num_prompts, images_per_prompt) in DATASETS.items():
        make_dataset(root / "input", name, num_prompts, images_per_prompt)
    environment = os.environ | {
        "KUTILS_INPUT": str(root / "input"),
        "OMP_NUM_THREADS": "1",
        "VIRTUAL_ENV": sys.prefix,  # dist_train.sh takes the Python that this runs with
        "PATH": f"{Path(REAL_PYTHON).parent}:{os.environ['PATH']}",
    }
    return root, environment


def run(command: list[str], environment: dict, working: Path, folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | {"KUTILS_WORKING": str(working)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def stages_of(model: str) -> list[Path]:
    """Its recipe files, in order."""
    files = recipes.recipe_files()
    return [files[model, stage] for stage in (1, 2, 3) if (model, stage) in files]


def check_run(working: Path, path: Path, overrides: list[str], fold: int, notebook: Path) -> list[float]:
    """The run of one recipe left what it should; returns its losses."""
    recipe = recipes.load_recipe(path, overrides)
    folder = working / "runs" / f"{recipe.prefix}_fold{fold}"
    result = json.loads((folder / "result.json").read_text())
    prompts = sum(DATASETS[name][0] for name in recipe.datasets)
    validation = [(n, k) for n, k in (DATASETS[name] for name in recipe.datasets)]
    assert result["validation_rows"] == sum(k * len(range(fold, n, 10)) for n, k in validation)
    training_prompts = prompts - sum(len(range(fold, n, 10)) for n, _ in validation)
    assert result["updates"] == recipe.epochs * (training_prompts // 16)
    assert notebook.is_file() and "image/png" in notebook.read_text()
    models = working / "models" / recipe.save_dir
    content = checkpoints.read(models / f"{recipe.prefix}_fold{fold}_best_cossim.pth")
    assert content["fold"] == fold and set(content["folds_hashes"]) == set(recipe.datasets)
    assert (models / f"{recipe.prefix}_fold{fold}_epoch{recipe.epochs}.pth").is_file()
    saved = np.load(folder / f"fold{fold}_predictions.npz")
    assert len(saved["embeddings"]) == result["validation_rows"]
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_there_are_twelve_recipes():
    names = [path.name for model in CHAINS for path in stages_of(model)]
    assert len(set(names)) == 12 == len(list((ROOT / "conf").glob("*_madgrad_*.yaml")))


@pytest.mark.parametrize("model", CHAINS)
def test_a_chain_of_stages(miniature, model):
    """Stage 1, 2 and, where there is one, 3, each from the checkpoint of the one before: by `dist_train.sh 2` on two
    gloo ranks, and by papermill in one process. Epochs, rates, drop path, SAM and checkpointing are the recipes' own;
    where no random drop path sets them apart, both ways have the same losses."""
    root, environment = miniature
    fold, stand_in = CHAINS[model]
    overrides = [*SMALL.split(), *stand_in.split()]
    for path in stages_of(model):
        recipe = recipes.load_recipe(path, overrides)
        command = ["bash", "dist_train.sh", "2", f"conf/{path.name}", *overrides, f"train_folds={fold}"]
        shown = run(command, environment, root / "by_dist_train", ROOT / "working")
        assert f"fold {fold} (1 of 1)" in shown
        kind = "train" if recipe.stage == 1 else "refine"
        notebook = root / "by_dist_train" / "runs" / f"{recipe.prefix}_fold{fold}" / f"{kind}.ipynb"
        assert "2 ranks x 4 x 2 accumulated" in notebook.read_text()
        ranks = check_run(root / "by_dist_train", path, overrides, fold, notebook)

        output = root / f"{path.stem}.ipynb"
        command = [REAL_PYTHON, "-m", "papermill", f"notebooks/{kind}.ipynb", str(output), "-p", "model", model]
        command += ["-p", "fold", str(fold), "-r", "overrides", " ".join(overrides), "--no-progress-bar"]
        command += ["-p", "stage", str(recipe.stage)] if kind == "refine" else []
        run(command, environment, root / "by_papermill", ROOT)
        alone = check_run(root / "by_papermill", path, overrides, fold, output)
        assert len(ranks) == len(alone)
        if recipe.drop_path_rate == 0:
            np.testing.assert_allclose(ranks, alone, atol=2e-3)
    notebook = root / "by_dist_train" / "runs" / f"{recipe.prefix}_fold{fold}" / "refine.ipynb"
    before = notebook.read_bytes()
    command = ["bash", "dist_train.sh", "2", f"conf/{path.name}", *overrides, f"train_folds={fold}"]
    assert "already finished" in run(command, environment, root / "by_dist_train", ROOT / "working")
    assert notebook.read_bytes() == before  # the record of the run stays


# ---------------------------------------------------------------- the recipes beyond, up to a submission


def test_two_recipes_beyond_from_stage_1_to_a_submission(miniature):
    """Stage 1, stage 2 at a larger input, the fit of an ensemble, and the notebook that submits; stand-ins for the
    networks, one with a wide head, everything else as the recipes say."""
    root, environment = miniature
    working, families = root / "beyond", []
    # a miniature has a few updates an epoch: the average must follow them
    small = [*SMALL.split(), "ema_decay=0.5"]
    stand_ins = {
        "beyond_vit_large": ["backbone=test_vit", "head=pooled"],
        "beyond_convnext_xxlarge": ["backbone=test_convnext", "head=pooled", "freeze_blocks=4", "head_width=32"],
    }
    for model, stand_in in stand_ins.items():
        wide = ["head_init=xavier"] if "head_width=32" in stand_in else []
        for stage, size in ((1, 32), (2, 64)):
            path = recipes.find_recipe(model, stage)
            overrides = [*small, *stand_in, *wide, f"input_size={size}"]
            command = [REAL_PYTHON, "-m", "kutils", "train", "--config", f"conf/{path.name}", "--fold", "0", *overrides]
            shown = run(command, environment, working, ROOT)
            assert ("resampled from 2 x 2 to 4 x 4 tokens" in shown) == (stage == 2 and "test_vit" in stand_in[0])
            assert ("head in closed form" in shown) == (stage == 1 and not wide)
            folder = working / "runs" / f"{model}_stage{stage}_fold0"
            lines = [line for line in read_metrics(folder / "metrics.jsonl") if "cosine_similarity" in line]
            assert all({"cosine_similarity_raw", "cosine_similarity_ema"} <= set(line) for line in lines)
        recipe = folder / "config.yaml"
        families.append(f"  {model}:\n    - {{recipe: {recipe}, fold: 0}}\n")
    config = root / "ensemble_beyond.yaml"
    config.write_text(f"method: family\nfamilies:\n{''.join(families)}")
    command = [REAL_PYTHON, "-m", "kutils", "ensemble", "fit", "--config", str(config)]
    run(command, environment, working, ROOT)
    fitted = working / "models" / "ensemble_beyond.json"
    weights = json.loads(fitted.read_text())["weights"]
    assert set(weights) <= set(stand_ins) and sum(weights.values()) == pytest.approx(1)
    images = root / "input" / "mscoco_images"
    output = root / "submission.csv"
    command = [REAL_PYTHON, "-m", "papermill", "notebooks/submission.ipynb", str(root / "submission.ipynb")]
    command += ["-p", "images", str(images), "-p", "ensemble", str(fitted), "-p", "output", str(output)]
    run([*command, "--no-progress-bar"], environment, working, ROOT)
    lines = output.read_text().splitlines()
    assert lines[0] == "imgId_eId,val" and len(lines) == 1 + 384 * len(list(images.iterdir()))

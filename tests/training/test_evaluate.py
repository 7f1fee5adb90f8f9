"""Evaluating a checkpoint: the score of training, on any rows, alone and on two ranks; what it keeps in files."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from fixtures.datasets import TINY, make_dataset, use_folders
from fixtures.forked_python import REAL_PYTHON

from kutils import __main__
from kutils.models import checkpoints
from kutils.models.networks import build_model
from kutils.runs.recipes import Recipe
from kutils.system.tables import read_table, write_table


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A folder with the data set `toy` and a finished run of its fold 0."""
    root = tmp_path_factory.mktemp("run")
    make_dataset(root / "input")
    (root / "tiny.yaml").write_text(Recipe(**TINY | {"max_local_batch_size": 4}).to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        use_folders(patch, root)
        assert __main__.run("train", ["--config", str(root / "tiny.yaml"), "--fold", "0"]) == 0
    return root


@pytest.fixture
def trained(run_folder, workspace):
    """A copy of the finished run: its recipe file and its result."""
    shutil.copytree(run_folder, workspace, dirs_exist_ok=True)
    return workspace / "tiny.yaml", json.loads((workspace / "working/runs/tiny_fold0/result.json").read_text())


def run(path, *arguments):
    return __main__.run("evaluate", ["--config", str(path), *map(str, arguments)])


def test_it_gives_the_score_and_the_predictions_of_training(trained, workspace, capsys):
    path, result = trained
    assert run(path, "--fold", 0, "--predictions", workspace / "p.npz", "--features", workspace / "f.npy") == 0
    shown = capsys.readouterr().out
    assert f"tiny_fold0_best_cossim.pth: cosine {result['cosine_similarity']:.4f} on 8 images" in shown
    assert f"{result['mean_prompt_baseline']:.4f} for the mean training prompt" in shown and "warning" not in shown
    ours = np.load(workspace / "p.npz")
    theirs = np.load(workspace / "working" / "runs" / "tiny_fold0" / "fold0_predictions.npz")
    assert set(ours) == set(theirs)
    for key in ("dataset", "row", "targets_hash", "fold", "folds_hash"):
        assert ours[key].tolist() == theirs[key].tolist()
    np.testing.assert_allclose(ours["embeddings"], theirs["embeddings"], atol=1e-6)
    # the features are what the head turns into the predictions
    features = np.load(workspace / "f.npy")
    weight = checkpoints.read(workspace / "working" / "models" / "tiny" / "tiny_fold0_best_cossim.pth")["model"]
    expected = features @ weight["fc.weight"].numpy().T
    assert features.shape == (8, 64)
    np.testing.assert_allclose(expected / np.linalg.norm(expected, axis=1)[:, None], ours["embeddings"], atol=1e-5)
    for saved in (ours, theirs):
        np.testing.assert_allclose(saved["lengths"], np.linalg.norm(expected, axis=1), rtol=1e-5)


def test_rows_that_were_trained_on_are_said(trained, workspace, capsys):
    path, _ = trained
    checkpoint = workspace / "working" / "models" / "tiny" / "tiny_fold0_best_cossim.pth"
    assert run(path, "--fold", 3, "--checkpoint", checkpoint) == 0
    assert "warning: this checkpoint has trained on (some of) these rows" in capsys.readouterr().out
    make_dataset(workspace / "input", "other", num_prompts=20)
    assert run(path, "--fold", 3, "--checkpoint", checkpoint, "datasets=other") == 0
    shown = capsys.readouterr().out
    assert "on 4 images" in shown and "is not known" in shown
    assert run(path, "--fold", "all", "--checkpoint", checkpoint, "datasets=other") == 0
    shown = capsys.readouterr().out
    assert "on 40 images" in shown and "mean training prompt" not in shown


def test_a_checkpoint_without_facts_as_the_published_ones(trained, workspace, tiny_recipe, capsys):
    path, _ = trained
    torch.manual_seed(5)
    torch.save({"model": build_model(tiny_recipe()).state_dict()}, workspace / "published.pth")
    assert run(path, "--fold", 0, "--checkpoint", workspace / "published.pth") == 0
    shown = capsys.readouterr().out
    assert "published.pth: cosine" in shown and "is not known" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fold", "7"], "no checkpoint at"),
        (["--fold", "all"], "--fold all needs a --checkpoint"),
        (["--fold", "0", "--predictions", "{}/there.npz"], "there.npz exists"),
        (["--fold", "0", "--features", "{}/x.npz"], "x.npz is no .npy file"),
        (["--fold", "0", "datasets=gone"], "data set 'gone'"),
        (["--fold", "0", "backbone=test_vit"], "of another network"),
    ],
)
def test_what_cannot_be_evaluated(trained, workspace, capsys, arguments, said):
    (workspace / "there.npz").write_bytes(b"dear")
    assert run(trained[0], *(text.format(workspace) for text in arguments)) == 1
    assert said in capsys.readouterr().err
    assert (workspace / "there.npz").read_bytes() == b"dear" and not (workspace / "x.npz").exists()


def test_rows_that_are_all_of_one_fold_have_no_baseline(trained, workspace, capsys):
    make_dataset(workspace / "input", "one", num_prompts=4)
    table = read_table(workspace / "input" / "one.tsv", ["fold"]).to_pydict()
    write_table(workspace / "input" / "one.tsv", table | {"fold": [0] * 8})
    assert run(trained[0], "--fold", 0, "datasets=one") == 0
    shown = capsys.readouterr().out
    assert "on 8 images" in shown and "nan" not in shown and "mean training prompt" not in shown


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_no_bus_error(tmp_path):
    """A sparse file in a mapping would be killed by SIGBUS where the disk is full."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("this machine gives a process no file system of its own (unshare -rm)")
    code = """
import sys, torch
from pathlib import Path
from kutils.training import out_of_fold
from kutils.system.ranks import Ranks
try:
    with out_of_fold.gathered(Ranks(0, 1, torch.device("cpu")), torch.ones(4000, 384), 4000, Path(sys.argv[1])):
        print("written")
except OSError as error:
    print(error.strerror)
"""
    mount = 'mount -t tmpfs -o size=2M none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "bash", "-c", mount, "bash", str(tmp_path), REAL_PYTHON, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "No space left on device\n", done


@pytest.mark.slow
def test_two_ranks_keep_every_row_in_order(trained, workspace, start_ranks):
    """40 x 2 images of all folds, in blocks of three per rank, none of which 2 ranks divide evenly at the end."""
    path, _ = trained
    code = "import sys\nfrom kutils.training import evaluate, out_of_fold\n"
    code += "out_of_fold.BLOCK = 3\nsys.exit(evaluate.main())"
    (workspace / "small_blocks.py").write_text(code)
    checkpoint = workspace / "working" / "models" / "tiny" / "tiny_fold0_best_cossim.pth"
    arguments = ["--config", str(path), "--fold", "all", "--checkpoint", str(checkpoint)]
    make_dataset(workspace / "input", "odd", num_prompts=37, images_per_prompt=1)
    arguments += ["datasets=toy,odd"]
    for number, name in enumerate(("one", "two"), start=1):
        files = ["--predictions", str(workspace / f"{name}.npz"), "--features", str(workspace / f"{name}.npy")]
        if name == "one":
            target = ["kutils", "evaluate"]
        else:
            target = [workspace / "small_blocks.py"]
        assert "on 117 images" in start_ranks(*target, *arguments, *files, num_ranks=number).run()
    one, two = np.load(workspace / "one.npz"), np.load(workspace / "two.npz")
    assert one["row"].tolist() == two["row"].tolist() and one["dataset"].tolist() == two["dataset"].tolist()
    np.testing.assert_allclose(two["embeddings"], one["embeddings"], atol=1e-6)
    np.testing.assert_allclose(np.load(workspace / "two.npy"), np.load(workspace / "one.npy"), atol=1e-5)

"""The kernels as Kaggle runs them: its Python and versions, no network, read-only inputs, packed code and weights.

Longer than the quick tests: `make test-kernel`. KAGGLE_PYTHON names the interpreter; root is needed for namespaces.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures.datasets import make_dataset, unit_rows
from fixtures.ensembles import by_hand, save_images, write_ensemble
from fixtures.kaggle_machine import Machine, kill, problem_of
from fixtures.kaggle_stub import SETTINGS

from kutils.benchmarks.prediction import make_images
from kutils.data import prompt_bank
from kutils.ensemble import image_cache
from kutils.ensemble import weights as ensemble_weights
from kutils.ensemble.members import Member
from kutils.kaggle import packing, submission
from kutils.models import checkpoints
from kutils.models import networks as models_networks
from kutils.runs import folders as runs_folders
from kutils.runs.recipes import Recipe
from kutils.system import paths

pytestmark = pytest.mark.kernel
COMPETITION = "stable-diffusion-image-to-prompts"
TINY = {"a": ("test_convnext", 64), "b": ("test_vit", 64), "c": ("test_convnext2", 96), "z": ("test_vit", 64)}
HEAVY = {"a": ("test_vit", 64), "b": ("convnext_base", 224), "c": ("convnext_base", 224)}  # seconds per image
WEIGHTS, WITHOUT = {"a": 0.5, "b": 0.3, "c": 0.2, "z": 0.0}, {"a": 0.50, "b": 0.58, "c": 0.59, "z": 0.60}
USER = "someone"


@pytest.fixture(scope="session")
def python():
    """Kaggle's interpreter. Where it has to be there (CI), its absence is a failure, not a skip."""
    given = os.environ.get("KAGGLE_PYTHON", "")
    problem = problem_of(given) if given else "KAGGLE_PYTHON names no interpreter: make test-kernel"
    problem = problem or ("" if os.geteuid() == 0 and shutil.which("unshare") else "namespaces need root and unshare")
    if problem:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    made = not Path("/kaggle").exists()
    Path("/kaggle").mkdir(exist_ok=True)  # where the session's folders are mounted, in a namespace of its own
    yield given
    if made:
        Path("/kaggle").rmdir()


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Folders as `make kaggle-code`, `kaggle-weights` and `kaggle-push` lay them out, from a commit of this tree."""
    root = tmp_path_factory.mktemp("packed")
    clone = root / "clone"
    for name in ("kutils", "conf", "notebooks", "kernel-metadata"):
        shutil.copytree(paths.repository_root() / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(paths.repository_root() / "LICENSE", clone)
    (clone / "kernel-metadata" / "kaggle.yaml").write_text(SETTINGS)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", clone, *identity, *command], check=True)
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "code_root", lambda: clone)
        settings = packing.read_settings(user=USER)
        settings.train["parameters"] = {}
        for name, networks in (("tiny", TINY), ("heavy", HEAVY)):
            patch.setenv("KUTILS_WORKING", str(root / name))
            fit(root / name / "models", networks)
            folders[name] = packing.stage_weights(settings)
        folders["code"] = packing.stage_code(settings)
        folders["submission"] = packing.stage_kernel("submission", settings) / "submission.ipynb"
        folders["train"] = packing.stage_kernel("train", settings) / "train.ipynb"
    return folders


def fit(folder, networks):
    """An ensemble of networks with random weights, as if fitted; they are float16 numbers, which packing keeps."""
    families = {}
    for seed, (family, (backbone, size)) in enumerate(networks.items()):
        torch.manual_seed(seed)
        recipe = Recipe(
            prefix=family, save_dir=family, model=family, stage=1, train_folds=(0,), datasets=("toy",),
            backbone=backbone, pretrained=False, input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, augment=False,
            epochs=1, lr=1e-3, min_lr=0.0, global_batch_size=8, max_local_batch_size=8, num_workers=2,
            amp_dtype="float32", head_width=24 if family == "b" else 0,
        )  # fmt: skip
        path = folder / family / f"{family}_fold0_best_cossim.pth"
        checkpoints.save_checkpoint(
            path, models_networks.build_model(recipe).half().float(), recipe, fold=0, folds_hashes={}
        )
        name = path.relative_to(folder).as_posix()
        families[family] = [Member(f"conf/{family}.yaml", 0, name, paths.sha256_of(path), 0.5)]
    scores = dict.fromkeys(("equal", "family", "dimension", "baseline", "chosen"), 0.6)
    scores["members"] = dict.fromkeys(networks, 0.5)
    counts = {"fit": 1, "unseen": 1}
    weights = {family: WEIGHTS[family] for family in networks}
    path = write_ensemble(folder, families, weights, unit_rows(1)[0], scores, counts, WITHOUT)
    path.rename(folder / "ensemble_tiny.json")
    prompt_bank.PromptBank([f"prompt {number}" for number in range(50)], unit_rows(50, 3)).save(
        folder / "ensemble_tiny.prompts.arrow"
    )


def competition(folder, make_images):
    """The competition's data; `make_images` fills `images/`."""
    folder.mkdir(parents=True)
    (folder / "sample_submission.csv").write_text("imgId_eId,val\n20057f34d_0,0.018848453\n")
    make_images(folder / "images")
    return folder


def mounts_of(packed, data, form, weights="tiny"):
    if form == "new":
        owned = {f"datasets/{USER}/kutils-code": packed["code"], f"datasets/{USER}/kutils-weights": packed[weights]}
        return owned | {f"competitions/{COMPETITION}": data}
    return {"kutils-code": packed["code"], "kutils-weights": packed[weights], COMPETITION: data}


def seven(folder):
    """The competition's own images where they are at hand, else seven rendered ones."""
    real = os.environ.get("KUTILS_REAL_DATA")
    if real:
        shutil.copytree(Path(real) / "competition" / "images", folder)
    else:
        make_images(folder, 7)


def valid(session, ids):
    """The values of a session's file, [n, 384], once all that a scored one needs is checked; and its report."""
    assert session.code == 0, session.output[-5000:]
    path = session.working / "submission.csv"
    assert submission.check_submission(path, ids) == 384 * len(ids)
    assert not list(session.working.glob(".*partial*"))
    values = pd.read_csv(path)["val"].to_numpy().reshape(-1, 384)
    return values, json.loads((session.working / "submission_report.json").read_text())


def expected_rows(packed, files, weights="tiny", families="abc"):
    """The ensemble by hand, from the packed files."""
    total = 0
    for family in families:
        model, recipe, _ = checkpoints.load_model(packed[weights] / family / f"{family}_fold0_best_cossim.safetensors")
        total = total + WEIGHTS[family] * by_hand(model, recipe, files)
    return total / np.linalg.norm(total, axis=1, keepdims=True)


def figures(working):
    notebook = json.loads((working / "__notebook__.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("form", ["new", "old"])
def test_the_competitions_images(python, packed, tmp_path, form):
    data = competition(tmp_path / "data", seven)
    files = image_cache.find_images(data / "images")
    session = Machine(python, tmp_path / "working", mounts_of(packed, data, form)).run(packed["submission"])
    values, report = valid(session, [path.stem for path in files])
    np.testing.assert_allclose(values, expected_rows(packed, files), atol=2e-6)
    assert len(files) == 7 and report["left_out"] == {} and len(report["seconds"]) == 3
    assert report["weights"] == pytest.approx({family: WEIGHTS[family] for family in "abc"})  # z has none
    commit = (packed["code"] / "COMMIT").read_text().strip()
    assert "Python 3.13" in session.output and "torch 2.11.0, torchvision 0.26.0" in session.output
    assert f"commit {commit}" in session.output and "no GPU is visible" in session.output
    assert figures(tmp_path / "working") == 3  # time, nearest prompts, agreement


def test_odd_images(python, packed, tmp_path):
    data = competition(tmp_path / "data", save_images)
    (data / "images" / "b.jpeg").write_bytes(b"the same name as b.png")
    with pytest.warns(UserWarning, match="same id 'b'"):
        files = image_cache.find_images(data / "images", same_name_is_error=False)
    session = Machine(python, tmp_path / "working", mounts_of(packed, data, "new")).run(packed["submission"])
    values, report = valid(session, [*"abcdefghij", "k.dotted.name", *"lmn"])
    mean = np.array(ensemble_weights.load_ensemble(packed["tiny"] / "ensemble_tiny.json").mean_embedding)
    good = [number for number, path in enumerate(files) if path.stem not in "bmn"]
    np.testing.assert_allclose(values[good], expected_rows(packed, [files[number] for number in good]), atol=2e-6)
    np.testing.assert_allclose(values[[1, 12, 13]], np.tile(mean, (3, 1)), atol=1e-6)  # b.jpeg comes before b.png
    assert set(report["unreadable"]) == {"b.jpeg", "m.png", "n.jpg"}
    assert "b.jpeg and b.png have the same id" in session.output
    assert "it holds the mean embedding for m.png" in session.output


def test_no_images(python, packed, tmp_path):
    data = competition(tmp_path / "data", lambda folder: folder.mkdir())
    session = Machine(python, tmp_path / "working", mounts_of(packed, data, "old")).run(packed["submission"])
    _, report = valid(session, [])
    assert (tmp_path / "working" / "submission.csv").read_text() == "imgId_eId,val\n" and report["images"] == 0


def test_sixteen_thousand_images(python, packed, tmp_path):
    data = competition(tmp_path / "data", lambda folder: make_images(folder, 16_000))
    files = image_cache.find_images(data / "images")
    session = Machine(python, tmp_path / "working", mounts_of(packed, data, "new")).run(packed["submission"])
    values, report = valid(session, [path.stem for path in files])
    assert len(values) == 16_000 and report["left_out"] == {}
    some = np.random.default_rng(0).choice(16_000, 20, replace=False)
    np.testing.assert_allclose(values[some], expected_rows(packed, [files[n] for n in some]), atol=2e-6)
    left = sum(path.stat().st_size for path in (tmp_path / "working-temporary").rglob("*") if path.is_file())
    assert left < 1e6  # of the decoded pixels, 0.6 GB, nothing stays


def test_a_budget_for_one_model(python, packed, tmp_path):
    data = competition(tmp_path / "data", lambda folder: make_images(folder, 1500, extension="jpg"))
    files = image_cache.find_images(data / "images")
    machine = Machine(python, tmp_path / "working", mounts_of(packed, data, "new", "heavy"))
    session = machine.run(packed["submission"], hours=40 / 3600)
    values, report = valid(session, [path.stem for path in files])
    assert list(report["seconds"]) == ["a fold 0"] and report["weights"] == {"a": 1.0}
    assert all("no time left: it takes" in reason for reason in report["left_out"].values())
    assert list(report["left_out"]) == ["c fold 0", "b fold 0"]  # by which least is lost, first
    assert "there is time for a fold 0\n" in session.output and "left out: b fold 0" in session.output
    np.testing.assert_allclose(values[::50], expected_rows(packed, files[::50], "heavy", "a"), atol=2e-6)


def test_a_kill_in_the_middle(python, packed, tmp_path):
    data = competition(tmp_path / "data", lambda folder: make_images(folder, 600, extension="jpg"))
    files = image_cache.find_images(data / "images")
    machine = Machine(python, tmp_path / "working", mounts_of(packed, data, "new", "heavy"))
    process = machine.start(packed["submission"])
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "submission.csv: 1 models" in line:
            kill(process)
            break
    else:
        pytest.fail("".join(seen)[-3000:])
    path = tmp_path / "working" / "submission.csv"
    assert submission.check_submission(path, [file.stem for file in files]) == 384 * 600
    values = pd.read_csv(path)["val"].to_numpy().reshape(-1, 384)
    np.testing.assert_allclose(values[::50], expected_rows(packed, files[::50], "heavy", "a"), atol=2e-6)


def test_what_is_missing_is_said_with_the_tree(python, packed, tmp_path):
    data = competition(tmp_path / "data", seven)
    inputs = mounts_of(packed, data, "new")
    del inputs[f"datasets/{USER}/kutils-weights"]
    session = Machine(python, tmp_path / "working", inputs).run(packed["submission"])
    assert session.code != 0 and "no ensemble is fitted" in session.output
    assert "/kaggle/input/" in session.output and "kutils-code/" in session.output


def test_training_goes_on_from_a_former_version(python, packed, tmp_path):
    """Two ranks, a data set among the inputs; cut by the hour, finished by the next version."""
    make_dataset(tmp_path / "data", num_prompts=400)
    changes = (
        "datasets=toy device=cpu input_size=32 epochs=250 global_batch_size=16 max_local_batch_size=8 num_workers=0"
    )
    options = {"model": "tiny_vit", "fold": 0, "num_processes": 2, "overrides": changes}
    inputs = {f"datasets/{USER}/kutils-code": packed["code"], f"datasets/{USER}/toy": tmp_path / "data"}
    for seconds in (40, 120, 360):  # a machine with other work may not have begun to train after the first
        working = tmp_path / f"first_{seconds}"
        first = Machine(python, working, inputs).run(packed["train"], hours=seconds / 3600, **options)
        assert first.code == 0 and "stopped after" in first.output, first.output[-5000:]
        run = working / "runs" / "tiny_vit_stage1_fold0"
        if steps := [line["step"] for line in runs_folders.read_metrics(run / "metrics.jsonl")]:
            break
    assert (run / "resume.pt").is_file() and not (run / "result.json").exists()
    assert steps
    inputs[f"notebooks/{USER}/kutils-train"] = working
    second = Machine(python, tmp_path / "second", inputs).run(packed["train"], **options)
    assert second.code == 0, second.output[-5000:]
    run = tmp_path / "second" / "runs" / "tiny_vit_stage1_fold0"
    assert f"going on from /kaggle/input/notebooks/{USER}/kutils-train/runs/{run.name}" in second.output
    result = json.loads((run / "result.json").read_text())
    assert result["epochs"] == 250
    lines = runs_folders.read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines][: len(steps)] == steps  # nothing was trained twice
    environment = json.loads((run / "environment.json").read_text())
    assert environment["ranks"] == 2 and environment["python"].startswith("3.13")
    model, _, facts = checkpoints.load_model(tmp_path / "second/models/tiny_vit/tiny_vit_stage1_fold0_best_cossim.pth")
    assert facts["fold"] == 0 and model.fc.weight.isfinite().all()
    assert figures(tmp_path / "second") >= 4

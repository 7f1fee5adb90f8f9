"""What is packed and pushed, and what becomes of it: the whole way to a submission, against a stub of Kaggle."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import papermill
import pytest
import torch
from fixtures import kaggle_stub
from fixtures.datasets import unit_rows
from fixtures.ensembles import write_ensemble
from fixtures.kaggle_stub import OWNER

from kutils.__main__ import run as run_command
from kutils.data import prompt_bank
from kutils.ensemble.members import Member, read_config
from kutils.ensemble.weights import bank_path, load_ensemble, neighbours_path
from kutils.ensemble.weights import write_ensemble as write_weights
from kutils.kaggle import api, packing, sending, submission
from kutils.kaggle.metadata import KaggleError
from kutils.models import checkpoints, networks
from kutils.runs import folders
from kutils.system import paths

absent = importlib.util.find_spec("kaggle") is None and not os.environ.get("CI")  # there it has to be installed
needs_client = pytest.mark.skipif(absent, reason="pip install kaggle six")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A clone with one commit and, beside it, a file and a change that are not committed; working/ of its own."""
    root = tmp_path / "clone"
    for name in ("kutils", "conf", "notebooks", "kernel-metadata"):
        shutil.copytree(paths.repository_root() / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(paths.repository_root() / "LICENSE", root)
    (root / "kernel-metadata" / "kaggle.yaml").write_text(kaggle_stub.SETTINGS)
    run = lambda *command: subprocess.run(["git", "-C", root, *command], check=True, capture_output=True)  # noqa: E731
    run("init", "-q")
    run("add", ".")
    run("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "first")
    (root / "kutils" / "kaggle.json").write_text('{"key": "secret"}')
    with (root / "kutils" / "system" / "paths.py").open("a") as stream:
        stream.write("# not committed\n")
    monkeypatch.setattr(paths, "code_root", lambda: root)
    monkeypatch.setenv("KUTILS_WORKING", str(tmp_path / "working"))
    return root


@pytest.fixture
def settings():
    return packing.read_settings(user=OWNER)


@pytest.fixture
def fitted(tmp_path, tiny_recipe):
    """An ensemble in working/models: a with two members, b without weight; and its models."""
    folder, families, built = tmp_path / "working" / "models", {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (family, fold) in enumerate([("a", 0), ("a", 1), ("b", 0)]):
        torch.manual_seed(seed)
        name = f"{family}/{family}_fold{fold}_best_cossim.pth"
        recipe = tiny_recipe(prefix=family, amp_dtype="float32", head_width=16 * fold)  # one with a wide head
        built[name] = networks.build_model(recipe).eval()
        if recipe.head_width:
            built[name].fc[1].num_batches_tracked += 100_000  # updates of a long run, beyond float16
            built[name].fc[1].running_mean.uniform_(-0.1, 0.1)
        checkpoints.save_checkpoint(folder / name, built[name], recipe, fold=fold, folds_hashes={})
        member = Member(f"conf/{family}.yaml", fold, name, paths.sha256_of(folder / name))
        families.setdefault(family, []).append(member)
    path = write_ensemble(folder, families, {"a": 1.0, "b": 0.0}, unit_rows(1)[0])
    path.rename(folder / "ensemble_tiny.json")
    prompt_bank.PromptBank(["a cat"], unit_rows(1)).save(folder / "ensemble_tiny.prompts.arrow")
    return folder, built


# ---------------------------------------------------------------- what is laid out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("user: INSERT_KAGGLE_NAME_HERE", "user: INSERT_KAGGLE_NAME_HERE"), "put your Kaggle name there"),
        (("user: INSERT_KAGGLE_NAME_HERE", "user: a b"), "user is a b"),
        (("user: INSERT_KAGGLE_NAME_HERE", "user: a_b"), "user is a_b"),
        (("user: INSERT_KAGGLE_NAME_HERE", 'user: "caf\u00e9"'), "user is caf\u00e9"),
        (("ensemble:", "ensembel:"), "no key 'ensembel'; did you mean 'ensemble'?"),
        (("  kernels: []", "  kernel: []"), "train: no key 'kernel'; did you mean 'kernels'?"),
        (("  kernels: []", ""), "train: kernels is missing"),
        (("train:", "train: {}\nother:"), "no key 'other'"),
    ],
)
def test_settings_that_cannot_be_used(repository, change, said):
    path = repository / "kernel-metadata" / "kaggle.yaml"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(KaggleError) as caught:
        packing.read_settings()
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_the_repositorys_settings_are_read_with_any_name_and_choices_in_them():
    settings = packing.read_settings(user=OWNER)
    assert settings.user == OWNER and packing.PLACEHOLDER not in str(settings)
    assert read_config(settings.ensemble)[0] in ("equal", "family", "dimension")


def test_the_code_is_what_was_committed(repository, settings, capsys):
    folder = packing.stage_code(settings)
    sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"kutils/system/paths.py", "conf/tiny_vit_stage1.yaml", "LICENSE", "COMMIT", "dataset-metadata.json"} <= sent
    assert not any(name.startswith(("notebooks", "kernel-metadata", ".git")) for name in sent)
    assert (
        "kutils/kaggle.json" not in sent
        and "not committed" not in (folder / "kutils" / "system" / "paths.py").read_text()
    )
    said = capsys.readouterr().out
    assert "not committed, and not sent" in said and "kutils/system/paths.py" in said and "kutils/kaggle.json" in said
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert (folder / "COMMIT").read_text() == head
    assert json.loads((folder / "dataset-metadata.json").read_text())["id"] == f"{OWNER}/kutils-code"
    (folder / "left over").write_text("of an earlier time")
    assert not (packing.stage_code(settings) / "left over").exists()


def test_the_code_tells_its_commit_where_there_is_no_repository(repository, settings, monkeypatch):
    folder = packing.stage_code(settings)
    monkeypatch.setattr(paths, "code_root", lambda: folder)
    assert folders.git_commit() == (folder / "COMMIT").read_text().strip() and len(folders.git_commit()) == 40


def test_without_a_clone_nothing_is_sent(repository, settings):
    shutil.rmtree(repository / ".git")
    with pytest.raises(KaggleError, match="what is sent is the committed tree"):
        packing.stage_code(settings)


def test_the_weights_are_half_as_large_and_the_same_models(repository, settings, fitted):
    models_folder, built = fitted
    folder = packing.stage_weights(settings)
    packed = load_ensemble(folder / "ensemble_tiny.json")
    assert list(packed.families) == ["a"] and packed.weights == {"a": 1.0}  # b has no weight
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    for member in packed.members():
        path = folder / member.checkpoint
        assert paths.sha256_of(path) == member.sha256 == manifest[member.checkpoint]["sha256"]
        original = member.checkpoint.replace(".safetensors", ".pth")
        assert manifest[member.checkpoint]["packed_from_sha256"] == paths.sha256_of(models_folder / original)
        assert manifest[member.checkpoint]["bytes"] == path.stat().st_size
        assert path.stat().st_size < 0.6 * (models_folder / original).stat().st_size
        assert path.with_suffix(".yaml").read_text().startswith("prefix: a\n")
        model, recipe, facts = checkpoints.load_model(path)
        images = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            assert torch.cosine_similarity(model(images), built[original](images)).min() > 0.9999
        assert recipe.prefix == "a" and facts["fold"] == member.fold
    assert prompt_bank.PromptBank.load(bank_path(folder / "ensemble_tiny.json")).texts([0]) == ["a cat"]
    assert not list(folder.rglob("b_*"))


def test_the_prompts_of_neighbours_are_sent_where_they_count(repository, settings, fitted):
    models_folder, _ = fitted
    path = models_folder / "ensemble_tiny.json"
    plain = load_ensemble(path)
    bank = neighbours_path(path)
    prompt_bank.PromptBank(["a cat", "a dog"], unit_rows(2)).save(bank, np.float16)
    nearest = [dataclasses.replace(member, neighbours=1) for member in plain.families["a"]]
    changes = {"neighbours_bank": bank.name, "neighbours_sha256": paths.sha256_of(bank)}
    changes["families"] = plain.families | {"nearest": nearest}
    for weight in (0.5, 0.0):
        weights = plain.weights | {"nearest": weight}
        write_weights(dataclasses.replace(plain, weights=weights, **changes), path)
        folder = packing.stage_weights(settings)
        packed = load_ensemble(folder / path.name)
        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        assert (
            (folder / bank.name).is_file() == (bank.name in manifest) == (bank.name in packed.files()) == bool(weight)
        )
        assert set(manifest) == set(packed.files()) and len(list(folder.rglob("*.safetensors"))) == 2
    assert manifest.keys() == {member.checkpoint for member in packed.members()}
    bank.write_bytes(b"other prompts")
    write_weights(dataclasses.replace(plain, weights=plain.weights | {"nearest": 1.0}, **changes), path)
    with pytest.raises(ValueError, match=r"neighbours.arrow .*not what was fitted"):
        packing.stage_weights(settings)


def test_a_checkpoint_that_changed_since_the_fit_is_not_sent(repository, settings, fitted):
    models_folder, _ = fitted
    (models_folder / "a" / "a_fold1_best_cossim.pth").write_bytes(b"trained again")
    with pytest.raises(ValueError, match=r"a_fold1_best_cossim.pth .*not what was fitted"):
        packing.stage_weights(settings)
    assert not packing.staging_folder("weights").exists()
    (models_folder / "ensemble_tiny.json").unlink()
    with pytest.raises(KaggleError, match=r"kutils ensemble fit --config conf/ensemble_tiny.yaml"):
        packing.stage_weights(settings)


def test_the_training_kernel_carries_its_parameters(repository, settings):
    folder = packing.stage_kernel("train", settings)
    notebook = json.loads((folder / "train.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    injected = next(source for source in sources if source.startswith("# Parameters"))
    assert 'model = "vit_large_24gb"' in injected and "hours = 11.5" in injected
    assert "datasets=cc3m" in injected
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    values = json.loads((folder / "kernel-metadata.json").read_text())
    owned = [f"{OWNER}/kutils-{name}" for name in ("code", "training-data", "pretrained")]
    assert values["dataset_sources"] == owned and values["code_file"] == "train.ipynb"
    assert papermill.inspect_notebook(folder / "train.ipynb")["model"]["default"] == '"lite0"'  # its own stays
    settings.train["parameters"]["modell"] = "x"
    with pytest.raises(KaggleError, match=r"train.ipynb has no parameter 'modell'; did you mean 'model'\?"):
        packing.stage_kernel("train", settings)


# ---------------------------------------------------------------- what is sent


@pytest.fixture
def stub(tmp_path_factory, monkeypatch):
    """The state of a stub that the client speaks to, without waiting between two questions."""
    with kaggle_stub.serve() as (state, address):
        kaggle_stub.send_client_here(monkeypatch, address, tmp_path_factory.mktemp("home"))
        monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
        yield state


def valid_output(state, left_out=None):
    """What the submission kernel leaves, of two images."""
    path = paths.working_dir() / "s.csv"
    submission.write_submission(path, ["aa", "b_b"], unit_rows(2))
    report = {"images": 2, "gpus": 2, "seconds": {"a fold 0": 1.0}, "weights": {"a": 1.0}, "unreadable": {}}
    state.outputs = {
        "submission.csv": path.read_bytes(),
        "submission_report.json": json.dumps(report | {"left_out": left_out or {}}).encode(),
    }


def run(*arguments):
    return run_command("kaggle", [*arguments, "--user", OWNER])


@needs_client
def test_the_whole_way_to_a_submission(repository, fitted, stub, capsys):
    valid_output(stub)
    assert run("code") == 0 and run("weights") == 0
    code = stub.datasets[f"{OWNER}/kutils-code"].versions[0]
    with zipfile.ZipFile(io.BytesIO(code["kutils.zip"])) as archive:
        assert "system/paths.py" in archive.namelist() and "kaggle.json" not in archive.namelist()
    weights = stub.datasets[f"{OWNER}/kutils-weights"].versions[0]
    with zipfile.ZipFile(io.BytesIO(weights["a.zip"])) as archive:
        assert "a_fold1_best_cossim.safetensors" in archive.namelist()
    assert "ensemble_tiny.json" in weights and "manifest.json" in weights
    assert run("push") == 0
    pushed = stub.kernels[f"{OWNER}/kutils-submission"][0]
    assert pushed["datasetDataSources"] == [f"{OWNER}/kutils-code", f"{OWNER}/kutils-weights"]
    assert pushed["enableInternet"] is False and pushed["competitionDataSources"] == [
        "stable-diffusion-image-to-prompts"
    ]
    assert json.loads(pushed["text"])["cells"]
    assert run("submit", "--message", "first try") == 0
    (sent,) = stub.submissions
    assert sent["kernelVersion"] == 1 and sent["submissionDescription"] == "first try"
    said = capsys.readouterr().out
    assert "768 valid rows of 2 images by 1 models" in said and "4711" in said
    assert kaggle_stub.TOKEN not in said


@needs_client
def test_what_ran_badly_is_not_submitted(repository, stub, capsys):
    assert run("submit") == 1
    assert "nothing was pushed from here" in capsys.readouterr().err
    valid_output(stub, left_out={"a fold 0": "it failed: no CUDA"})
    assert run("push") == 1
    assert "left out a fold 0: it failed: no CUDA" in capsys.readouterr().err
    assert run("submit") == 1
    assert "the output of version 1" in capsys.readouterr().err
    stub.outputs["submission.csv"] = b"imgId_eId,val\naa_0,0.1\n"
    assert run("push") == 1
    assert "has 1 rows" in capsys.readouterr().err
    report = json.loads(stub.outputs["submission_report.json"])
    valid_output(stub)
    stub.outputs["submission_report.json"] = json.dumps(report | {"left_out": {}, "gpus": 0}).encode()
    assert run("push") == 1
    assert "ran without a GPU" in capsys.readouterr().err
    stub.outputs = {"other.txt": b"x"}
    assert run("push") == 1
    assert "holds no submission.csv" in capsys.readouterr().err
    stub.run_states, stub.failure_message = ["RUNNING", "ERROR"], "Notebook Threw Exception"
    assert run("push") == 1
    assert "Notebook Threw Exception" in capsys.readouterr().err
    assert not stub.submissions


@needs_client
def test_the_training_kernel_is_pushed(repository, stub, capsys):
    stub.outputs = {"runs/x_fold0/resume.pt": b"state"}
    assert run("push", "train") == 0
    assert "# Parameters" in stub.kernels[f"{OWNER}/kutils-train"][0]["text"]
    fetched = packing.staging_folder("train-output")
    assert (fetched / "version1" / "runs" / "x_fold0" / "resume.pt").read_bytes() == b"state"
    assert run("push", "train", "--no-wait") == 0 and len(stub.called("GetKernelSessionStatus")) == 3
    stub.outputs = {"runs/x_fold0/resume.pt": b"of a run that was cut"}
    stub.run_states = ["ERROR"]
    assert run_command("kaggle", ["check", "train"]) == 1  # what it has left is fetched all the same
    assert (fetched / "version2" / "runs" / "x_fold0" / "resume.pt").read_bytes() == b"of a run that was cut"
    assert (fetched / "version1" / "runs" / "x_fold0" / "resume.pt").read_bytes() == b"state"


@needs_client
def test_a_kernel_that_nobody_waited_for_is_checked_later(repository, stub, capsys):
    valid_output(stub)
    assert run_command("kaggle", ["check"]) == 1
    assert "nothing was pushed from here: make kaggle-push KERNEL=submission" in capsys.readouterr().err
    assert run("push", "--no-wait") == 0 and run("submit") == 1
    assert run_command("kaggle", ["check"]) == 0 and run("submit") == 0
    assert len(stub.submissions) == 1 and len(stub.kernels[f"{OWNER}/kutils-submission"]) == 1


@pytest.mark.parametrize("command", [("code",), ("weights",), ("push",), ("push", "train")])
def test_a_dry_run_shows_and_sends_nothing(repository, fitted, stub, capsys, command):
    assert run(*command, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f'"id": "{OWNER}/kutils-' in said and "would do the same as: kaggle" in said and not stub.requests
    assert re.search(r": \d+ files, [\d,.]+ MB\n", said)


def test_the_dry_run_of_a_submission(repository, stub, capsys):
    pushed = {"ref": f"{OWNER}/kutils-submission", "version": 3, "url": "u", "commit": "c" * 40, "checked": True}
    paths.write_json(sending.pushed_path("submission"), pushed)
    assert run("submit", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"stable-diffusion-image-to-prompts -k {OWNER}/kutils-submission -v 3 -f submission.csv" in said
    assert not stub.requests


def test_ids_are_read_in_order(tmp_path):
    ids = [f"{number:05x}_x" for number in range(700)]  # several chunks
    rows = np.tile(unit_rows(1), (700, 1))
    submission.write_submission(tmp_path / "s.csv", ids, rows)
    assert submission.read_ids(tmp_path / "s.csv") == ids


def test_the_command_helps_without_the_client(capsys):
    """Kaggle's package signs in when it is imported: nothing may import it that sends nothing."""
    for command in ("code", "weights", "push", "submit"):
        with pytest.raises(SystemExit):
            sending.main([command, "--help"])
        assert "--dry-run" in capsys.readouterr().out
    code = "import sys; sys.modules['kaggle'] = None; from kutils.kaggle import client"
    subprocess.run([sys.executable, "-c", code], check=True)

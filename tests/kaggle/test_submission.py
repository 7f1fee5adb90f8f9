"""submission.csv: its exact text, its speed, what the check must find; and the kernel that writes it, as on Kaggle."""

import json
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import by_hand, save_images, write_ensemble
from fixtures.forked_python import REAL_PYTHON

from kutils.ensemble.members import Member
from kutils.kaggle import submission
from kutils.models import checkpoints, networks
from kutils.system import paths

IDS = ["20057f34d", "227ef0887", "92e911621"]


@pytest.fixture
def written(tmp_path):
    """A valid file of three images."""
    submission.write_submission(tmp_path / "submission.csv", IDS, unit_rows(3))
    return tmp_path / "submission.csv"


def test_the_file_is_the_competitions(written, tmp_path):
    embeddings = unit_rows(3)
    lines = written.read_text().split("\n")
    assert lines[0] == "imgId_eId,val" and lines[-1] == "" and len(lines) == 3 * 384 + 2
    assert lines[1] == f"20057f34d_0,{round(float(embeddings[0, 0]), 6)}"
    assert lines[2 * 384 + 11].startswith("92e911621_10,")
    table = pd.read_csv(written)
    assert table["imgId_eId"].tolist() == [f"{name}_{number}" for name in IDS for number in range(384)]
    np.testing.assert_allclose(table["val"].to_numpy().reshape(3, 384), embeddings, atol=5.1e-7)
    assert submission.check_submission(written, IDS) == 1152
    assert list(tmp_path.iterdir()) == [written]


def test_no_images_make_a_header(tmp_path):
    path = tmp_path / "submission.csv"
    submission.write_submission(path, [], np.empty((0, 384), np.float32))
    assert path.read_text() == "imgId_eId,val\n" and submission.check_submission(path, []) == 0


def test_tiny_values_and_many_chunks_survive(tmp_path):
    ids = [f"{number:09x}" for number in range(1000)]  # four chunks, several blocks
    embeddings = np.zeros((1000, 384), np.float32)
    embeddings[:, 0], embeddings[:, 1], embeddings[:, 2] = 1, 1e-6, -2e-9
    submission.write_submission(tmp_path / "s.csv", ids, embeddings)
    assert submission.check_submission(tmp_path / "s.csv", ids) == 384_000
    values = pd.read_csv(tmp_path / "s.csv")["val"].to_numpy().reshape(1000, 384)
    np.testing.assert_array_equal(values[:, :3], [[1, 1e-6, 0]] * 1000)


@pytest.mark.parametrize(
    ("ids", "change", "said"),
    [
        (["a", "b", "a"], {}, "two images have the id 'a'"),
        (["a", "b,c", "d"], {}, "'b,c' cannot be an id"),
        (["a", "", "d"], {}, "'' cannot be an id"),
        (["a", "b\udcff", "d"], {}, "'b\\udcff' cannot be an id"),
        (["a", "b"], {}, "2 images with embeddings [3, 384]"),
        (IDS, {(1, 7): np.nan}, "the value 227ef0887_7 is no finite number"),
        (IDS, {(2, 0): 2.0}, "the embedding of 92e911621 has length"),
    ],
)
def test_what_cannot_be_scored_is_not_written(written, ids, change, said):
    before, embeddings = written.read_bytes(), unit_rows(3)
    for place, value in change.items():
        embeddings[place] = value
    with pytest.raises(ValueError) as caught:
        submission.write_submission(written, ids, embeddings)
    assert said in str(caught.value) and written.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: ["imgId,val", *lines[1:]], "the first line is 'imgId,val'"),
        (lambda lines: [], "the first line is ''"),
        (lambda lines: lines[:-1], "1,151 rows, not 3 x 384 = 1,152"),
        (lambda lines: [*lines, "x_0,0.1"], "1,153 rows, more than 3 x 384"),
        (lambda lines: lines[: 1 + 384], "384 rows, not 3 x 384"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2: the id is 20057f34d_1, not 20057f34d_0"),
        (
            lambda lines: [*lines[:500], lines[499], *lines[501:]],
            "line 501: the id is 227ef0887_114, not 227ef0887_115",
        ),
        (lambda lines: [*lines[:9], "20057f34d_8,nan", *lines[10:]], "the value 20057f34d_8 is no finite number"),
        (lambda lines: [*lines[:9], "20057f34d_8,", *lines[10:]], "the value 20057f34d_8 is no finite number"),
        (lambda lines: [*lines[:9], "20057f34d_8,inf", *lines[10:]], "the value 20057f34d_8 is no finite number"),
        (lambda lines: [*lines[:9], "20057f34d_8,0.9", *lines[10:]], "the embedding of 20057f34d has length"),
        (lambda lines: [*lines[:9], "20057f34d_8,many", *lines[10:]], "cannot be read"),
        (lambda lines: [*lines[:9], "20057f34d_8,0.1,0.2", *lines[10:]], "cannot be read"),
    ],
)
def test_the_check_finds(written, change, said):
    lines = written.read_text().splitlines()
    written.write_text("".join(f"{line}\n" for line in change(lines)))
    with pytest.raises(ValueError) as caught:
        submission.check_submission(written, IDS)
    assert said in str(caught.value)


def test_the_check_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        submission.check_submission(tmp_path / "submission.csv", IDS)


def test_sixteen_thousand_images_in_seconds_and_little_memory(tmp_path):
    program = f"""
import resource, sys, time
import numpy as np
from kutils.kaggle import submission
rows = np.random.default_rng(0).standard_normal((16_000, 384)).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
ids, began = [f"{{i:09x}}" for i in range(16_000)], time.time()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
submission.write_submission({str(tmp_path / "s.csv")!r}, ids, rows)
assert submission.check_submission({str(tmp_path / "s.csv")!r}, ids) == 6_144_000
assert "torch" not in sys.modules
print(time.time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([REAL_PYTHON, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 60 and megabytes < 500


def test_a_finished_submission_outlives_the_runs_that_fail_after_it(tmp_path):
    path, report = tmp_path / "submission.csv", tmp_path / "submission_report.json"
    submission.set_previous_aside(path)
    assert not list(tmp_path.iterdir())
    path.write_text("good")
    report.write_text("of the good one")
    for attempt in ("first failure", "second failure"):
        submission.set_previous_aside(path)
        assert not report.exists() and (tmp_path / "submission.csv.bak").read_text() == "good"
        assert (tmp_path / "submission_report.json.bak").read_text() == "of the good one"
        path.write_text(attempt)  # the fallback that is written first
    path.write_text("better")
    report.write_text("of the better one")
    submission.set_previous_aside(path)
    assert (tmp_path / "submission.csv.bak").read_text() == "better" and not path.exists()
    other = tmp_path / "other.csv"  # somebody's own file, no run of ours
    other.write_text("mine")
    submission.set_previous_aside(other)
    assert (tmp_path / "other.csv.bak").read_text() == "mine"


# ---------------------------------------------------------------- the kernel

KERNEL = """
import os, runpy, sys
ABSENT = {"madgrad", "sentence_transformers", "pymetis", "diffusers", "open_clip"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"{name} is not on Kaggle")
sys.meta_path.insert(0, Absent())
for inputs, working in zip(sys.argv[2::2], sys.argv[3::2]):
    os.environ |= {"KUTILS_INPUT": inputs, "KUTILS_WORKING": working}
    os.chdir(working)
    runpy.run_path(sys.argv[1], init_globals={"In": []})
"""
COMPETITION = "stable-diffusion-image-to-prompts"


@pytest.fixture
def weights(tmp_path, tiny_recipe):
    """A folder of weights as it would be uploaded, the fitted ensemble, and its models."""
    folder, families, built = tmp_path / "upload", {}, {}
    for seed, family in enumerate("ab"):
        torch.manual_seed(seed)
        built[family] = networks.build_model(tiny_recipe()).eval(), tiny_recipe(amp_dtype="float32", device="cuda")
        path = folder / "models" / family / f"{family}_fold0_best_cossim.pth"
        checkpoints.save_checkpoint(path, *built[family], fold=0)
        name = str(path.relative_to(folder / "models"))
        families[family] = [Member(f"conf/{family}.yaml", 0, name, paths.sha256_of(path))]
    mean = unit_rows(1, seed=8)[0]
    scores = dict.fromkeys(("equal", "family", "dimension", "baseline"), 0.5) | {"members": {"a": 0.5, "b": 0.5}}
    report = {"scores": scores, "rows": {"fit": 1, "unseen": 1}}
    return write_ensemble(folder, families, {"a": 0.8, "b": 0.2}, mean, **report).parent, mean, built


def competition(folder, num_images):
    folder.mkdir(parents=True)
    (folder / "sample_submission.csv").write_text("imgId_eId,val\n20057f34d_0,0.018848453\n")
    if num_images:
        save_images(folder / "images")
    else:
        (folder / "images").mkdir()


@pytest.mark.slow
def test_the_kernel_writes_a_valid_file_from_both_forms_of_mounts(tmp_path, weights):
    upload, mean, built = weights
    new, old = tmp_path / "new", tmp_path / "old"
    competition(new / "competitions" / COMPETITION, num_images=14)
    shutil.copytree(upload, new / "datasets" / "someone" / "kutils-weights")
    competition(old / COMPETITION, num_images=0)
    shutil.copytree(upload, old / "kutils-weights")
    for name in ("w1", "w2"):
        (tmp_path / name).mkdir()
    kernel = paths.repository_root() / "notebooks" / "submission.py"
    environment = os.environ | {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [REAL_PYTHON, "-c", KERNEL, str(kernel), str(new), str(tmp_path / "w1"), str(old), str(tmp_path / "w2")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    files = sorted((new / "competitions" / COMPETITION / "images").glob("[a-n].*"))[:12]
    ids = [*"abcdefghij", "k.dotted.name", *"lmn"]
    assert submission.check_submission(tmp_path / "w1" / "submission.csv", ids) == 14 * 384
    a, b = (by_hand(*built[family], files) for family in "ab")
    total = 0.8 * a + 0.2 * b
    values = pd.read_csv(tmp_path / "w1" / "submission.csv")["val"].to_numpy().reshape(14, 384)
    np.testing.assert_allclose(values[:12], total / np.linalg.norm(total, axis=1, keepdims=True), atol=2e-6)
    np.testing.assert_allclose(values[12:], np.stack([mean, mean]), atol=1e-6)
    assert "the mean embedding for m.png" in done.stdout and "5,376 rows" in done.stdout
    assert (tmp_path / "w2" / "submission.csv").read_text() == "imgId_eId,val\n"
    assert {path.name for path in (tmp_path / "w1").iterdir()} == {"submission.csv", "submission_report.json"}
    report = json.loads((tmp_path / "w1" / "submission_report.json").read_text())
    assert (
        report["images"] == 14
        and report["gpus"] == 0
        and list(report["unreadable"]) == ["m.png", "n.jpg"]
        and report["left_out"] == {}
    )
    assert report["weights"] == pytest.approx({"a": 0.8, "b": 0.2}) and len(report["seconds"]) == 2


def test_the_kernel_test_would_notice_an_import(tmp_path):
    (tmp_path / "kernel.py").write_text("import madgrad")
    command = [REAL_PYTHON, "-c", KERNEL, str(tmp_path / "kernel.py"), str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "madgrad is not on Kaggle" in done.stderr

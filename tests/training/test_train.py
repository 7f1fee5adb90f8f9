"""Training by its command: what it writes, that ranks agree, that nothing is lost, that bad input stops it early."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset
from fixtures.forked_python import REAL_PYTHON

from kutils import __main__
from kutils.data import datasets, transforms, validation_check
from kutils.models import checkpoints
from kutils.runs import launch
from kutils.runs.folders import read_metrics
from kutils.runs.recipes import load_recipe
from kutils.system.paths import is_running
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table
from kutils.training import engine, network_input, out_of_fold


@pytest.fixture
def recipe_file(workspace, tiny_recipe):
    """Write a recipe file; keyword arguments change keys."""

    def write(name="tiny", **changes):
        path = workspace / f"{name}.yaml"
        path.write_text(tiny_recipe(prefix=name, **changes).to_yaml())
        return path

    return write


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """A report takes longer to draw than these runs to train; the first test looks at one."""
    if request.function is not test_a_run_leaves_what_the_next_steps_need:
        monkeypatch.setattr(__main__, "ensure_report", lambda folder: None)


def start(path, *overrides, fold=0):
    return __main__.run("train", ["--config", str(path), "--fold", str(fold), *overrides])


def contents(folder):
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if "tensorboard" not in name and not name.startswith("cache/"))


def test_a_run_leaves_what_the_next_steps_need(workspace, recipe_file):
    assert start(recipe_file(epochs=3, warmup_epochs=1, freeze_epochs=1, warmup_lr=1e-2)) == 0
    working = workspace / "working"
    assert contents(working) == [
        "models/tiny/tiny_fold0_best_cossim.pth",
        "models/tiny/tiny_fold0_epoch3.pth",
        "runs/tiny_fold0/config.yaml",
        "runs/tiny_fold0/environment.json",
        "runs/tiny_fold0/fold0_predictions.npz",
        "runs/tiny_fold0/metrics.jsonl",
        "runs/tiny_fold0/report.html",
        "runs/tiny_fold0/result.json",
    ]
    run = working / "runs" / "tiny_fold0"
    assert list((run / "tensorboard").iterdir())
    metrics = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 13))  # 36 prompts, batch 8: 4 updates
    scores = [line["cosine_similarity"] for line in metrics if "cosine_similarity" in line]
    assert all(line["cosine_similarity_clean"] is None for line in metrics if "cosine_similarity" in line)
    assert metrics[0]["lr"] == pytest.approx(1e-2) and metrics[-2]["lr"] < 2e-4
    result = json.loads((run / "result.json").read_text())
    assert result["cosine_similarity"] == max(scores) and result["best_epoch"] == 1 + int(np.argmax(scores))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["ranks"] == 1
    assert environment["config"] == str(workspace / "tiny.yaml") and environment["overrides"] == []

    # the score is the mean cosine over every row of the fold once, of the checkpoint's own predictions: plain NumPy
    data = datasets.load_datasets(["toy"])
    rows = np.flatnonzero(data.folds == 0)
    targets = np.load(workspace / "input" / "toy.npy")[rows]
    model, recipe, facts = checkpoints.load_model(working / "models" / "tiny" / "tiny_fold0_best_cossim.pth")
    images = [transforms.resize_square(transforms.decode_rgb(data.image_path(row)), 32) for row in rows]
    with torch.no_grad():
        expected = model(network_input.normalize(torch.stack(images), recipe.mean, recipe.std)).numpy()
    saved = np.load(run / "fold0_predictions.npz", allow_pickle=False)
    np.testing.assert_allclose(saved["embeddings"], expected, atol=2e-5)
    assert saved["row"].tolist() == rows.tolist() and set(saved["dataset"]) == {"toy"}
    assert facts["cosine_similarity"] == pytest.approx((expected * targets).sum(1).mean(), abs=1e-5)
    assert json.loads(str(saved["folds_hash"])) == facts["folds_hashes"] == data.folds_hashes

    # the baseline by its definition
    others = np.load(workspace / "input" / "toy.npy")[data.folds != 0]
    mean = others.mean(0) / np.linalg.norm(others.mean(0))
    assert result["mean_prompt_baseline"] == pytest.approx((targets @ mean).mean(), abs=1e-6)


def test_a_second_start_shows_the_result_and_another_configuration_is_refused(workspace, recipe_file, capsys):
    path = recipe_file()
    assert start(path) == 0
    before = {name: (workspace / "working" / name).read_bytes() for name in contents(workspace / "working")}
    assert start(path, "num_workers=1") == 0  # does not change what is computed
    assert "already finished: tiny fold 0: cosine" in capsys.readouterr().out
    assert start(path, "lr=2e-3") == 1
    error = capsys.readouterr().err
    assert "lr was 0.001, is 0.002" in error and "prefix=NAME" in error and "resume=never" in error
    assert {name: (workspace / "working" / name).read_bytes() for name in contents(workspace / "working")} == before
    assert start(path, "lr=2e-3", "resume=never") == 0
    aside = workspace / "working" / "runs" / "tiny_fold0.1"
    assert (aside / "result.json").read_bytes() == before["runs/tiny_fold0/result.json"]
    assert (aside / "tiny_fold0_best_cossim.pth").read_bytes() == before["models/tiny/tiny_fold0_best_cossim.pth"]


def test_a_checkpoint_without_its_run_is_not_overwritten(workspace, recipe_file, capsys):
    path = workspace / "working" / "models" / "tiny" / "tiny_fold0_best_cossim.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"dear")
    assert start(recipe_file()) == 1
    assert "exists and" in capsys.readouterr().err and path.read_bytes() == b"dear"


def test_refining_starts_from_the_checkpoint_of_the_same_folds(workspace, recipe_file, capsys):
    refine = recipe_file(
        "refined",
        stage=2,
        sam_rho=0.05,
        augment=False,
        initialize_from="tiny/tiny_fold{fold}_best_cossim.pth",
        lr=1e-9,
        min_lr=0.0,
    )
    assert start(refine) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    assert contents(workspace / "working") == []
    assert start(recipe_file()) == 0
    assert start(refine) == 0
    working = workspace / "working"
    before = checkpoints.read(working / "models" / "tiny" / "tiny_fold0_best_cossim.pth")
    after = checkpoints.read(working / "models" / "tiny" / "refined_fold0_best_cossim.pth")
    for name, value in before["model"].items():  # at this rate nothing moves
        torch.testing.assert_close(after["model"][name], value, rtol=0, atol=1e-4)
    assert after["cosine_similarity"] == pytest.approx(before["cosine_similarity"], abs=1e-3)

    table = read_table(workspace / "input" / "toy.tsv", ["fold"]).to_pydict()
    write_table(workspace / "input" / "toy.tsv", table | {"fold": [(fold + 1) % 10 for fold in table["fold"]]})
    assert start(refine, "prefix=again") == 1
    assert "other folds of toy" in capsys.readouterr().err
    assert not (working / "runs" / "again_fold0").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["global_batch_size=12"], "no multiple of 1 ranks x max_local_batch_size=8"),
        (["datasets=toy,gone"], "data set 'gone': gone.tsv and gone.npy not in"),
        (["device=cuda"], "needs a GPU of its own, and 0 are visible"),
        (["lr=fast"], "lr is 'fast'"),
        (["pretrained=/nowhere.safetensors"], "no such file"),
        (["freeze_blocks=99"], "freeze_blocks=99: backbone ConvNeXt has 9 blocks; lower it"),
    ],
)
def test_what_cannot_be_trained_is_said_and_leaves_nothing(workspace, recipe_file, capsys, overrides, said):
    if "device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert start(recipe_file(), *overrides) == 1
    assert said in capsys.readouterr().err
    assert contents(workspace / "working") == []


def test_a_broken_validation_image_stops_before_the_first_step(workspace, recipe_file, capsys):
    data = datasets.load_datasets(["toy"])
    for row in data.validation_rows(0)[:2]:
        data.image_path(int(row)).write_bytes(b"")
    assert start(recipe_file()) == 1
    error = capsys.readouterr().err
    assert "2 of 8 validation images cannot be read" in error and "0000_0.png is empty" in error
    assert contents(workspace / "working") == []


def test_a_validation_image_that_broke_after_it_was_checked_is_named(workspace, recipe_file, capsys, monkeypatch):
    path = recipe_file(epochs=1, num_workers=1)
    data = datasets.load_datasets(["toy"])
    rows = data.validation_rows(0)
    validation_check.check_validation_images(data, rows, 0, Ranks(0, 1, torch.device("cpu")))
    record, _ = validation_check.checked_record(data, rows)
    broken = data.image_path(int(rows[3]))
    content = broken.read_bytes()
    broken.write_bytes(b"")
    monkeypatch.setattr(validation_check, "SAMPLE", 0)
    assert record.is_file() and start(path, "checkpoint_every_steps=1") == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: a validation image was in order when it was checked, and is not any more: "
        f"{broken} is empty (0 bytes); put it back, and the same command goes on"
    ]
    assert not record.exists()
    broken.write_bytes(content)
    assert start(path, "checkpoint_every_steps=1") == 0
    assert "going on after update 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_broken_training_image_is_listed_and_too_many_stop_the_run(workspace, recipe_file, capsys):
    make_dataset(workspace / "input", "large", num_prompts=300, images_per_prompt=2, size=8)
    data = datasets.load_datasets(["large"])
    broken = data.image_path(int(data.training_rows(0)[3]))
    broken.write_bytes(b"x")
    path = recipe_file(
        "once", datasets=("large",), global_batch_size=30, max_local_batch_size=30, epochs=1, input_size=32
    )
    assert start(path, "epochs=2", "prefix=twice") in (0, 1)  # 540 images: too few to judge by a share
    listed = (workspace / "working" / "runs" / "twice_fold0" / "unreadable_images.tsv").read_text()
    assert f"large_images/{broken.name}\t" in listed and "no image of a known format" in listed
    for row in data.training_rows(0)[10:40]:
        data.image_path(int(row)).write_bytes(b"x")
    assert start(path, "epochs=5") == 1
    assert "training images could not be read, more than 0.1%" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best(workspace, recipe_file, capsys, monkeypatch):
    calls = []

    def exploding(*arguments):
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 6 else loss

    original = engine.update
    monkeypatch.setattr(engine, "update", exploding)
    assert start(recipe_file(epochs=3)) == 1
    assert "not finite on rank 0 at update 6;" in capsys.readouterr().err
    working = workspace / "working"
    assert checkpoints.read(working / "models" / "tiny" / "tiny_fold0_best_cossim.pth")["epoch"] == 1
    assert checkpoints.read(working / "runs" / "tiny_fold0" / "resume.pt")["step"] == 4


def command(path, *overrides):
    return ["kutils", "train", "--config", str(path), "--fold", "0", *overrides]


def real_command(path):
    return [REAL_PYTHON, "-m", *command(path)]


@pytest.mark.slow
def test_two_ranks_train_like_one_and_score_every_row_once(workspace, recipe_file, start_ranks):
    """Same global batch, augmentation on; the fold holds 11 rows, which 2 does not divide."""
    make_dataset(workspace / "input", "odd", num_prompts=101, images_per_prompt=1)
    changes = {"datasets": ("odd",), "lr": 1e-3, "max_local_batch_size": 4}
    assert start(recipe_file("alone", **changes)) == 0
    told = start_ranks(*command(recipe_file("both", profile_steps=3, **changes)), num_ranks=2).run()
    runs = workspace / "working" / "runs"
    assert "3 updates profiled" in told  # by rank 0 alone
    assert [path.name for path in (runs / "both_fold0" / "profile").iterdir()] == ["trace.json.gz"]
    alone, both = (read_metrics(runs / f"{name}_fold0" / "metrics.jsonl") for name in ("alone", "both"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (alone, both)]
    assert len(losses[0]) == 22 and losses[0][0] - losses[0][-1] > 0.01
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
    saved = np.load(runs / "both_fold0" / "fold0_predictions.npz")
    targets = np.load(workspace / "input" / "odd.npy")[saved["row"]]
    assert saved["row"].tolist() == list(range(0, 101, 10))
    best = max(line["cosine_similarity"] for line in both if "cosine_similarity" in line)
    assert best == pytest.approx(float((saved["embeddings"] * targets).sum(1).mean()), abs=1e-6)


def losses_of(metrics) -> list[float]:
    return [line["loss"] for line in read_metrics(metrics) if "loss" in line]


def run_and_kill(started, metrics) -> None:
    """SIGKILL every rank after the seventh update."""
    while started.running and len(losses_of(metrics)) < 7:
        time.sleep(0.002)
    started.kill()
    first, *others = [process.returncode for process in started.processes]
    # another rank may have met the first one's end before its own
    assert first == -signal.SIGKILL and {-signal.SIGKILL, 1}.issuperset(others)
    assert checkpoints.read(metrics.parent / "resume.pt")["step"] >= 6


@pytest.mark.slow
def test_a_run_that_cannot_compile_says_so_once_and_is_the_run_without(
    workspace, recipe_file, monkeypatch, start_ranks
):
    """There is no C++ compiler, and nothing that an earlier run has compiled."""
    changes = {"freeze_epochs": 1, "drop_path_rate": 0.2}
    assert start(recipe_file("plain", **changes)) == 0
    code = "import torch._inductor.config as config\nconfig.cpp.cxx = (None, '/nonexistent')\n"
    (workspace / "job.py").write_text(f"{code}import sys\nfrom kutils import __main__\nsys.exit(__main__.main())\n")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(workspace / "inductor"))
    arguments = command(recipe_file("compiled", compile=True, **changes))[1:]
    said = start_ranks(workspace / "job.py", *arguments).run()
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "could not be compiled" in warnings[0] and "No working C++ compiler" in warnings[0]
    runs = workspace / "working" / "runs"
    plain, compiled = (losses_of(runs / f"{name}_fold0" / "metrics.jsonl") for name in ("plain", "compiled"))
    assert len(plain) == 8 and plain == compiled


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 1), (2, 2)])
def test_a_killed_run_goes_on_to_the_same_weights(workspace, recipe_file, start_ranks, stage, ranks):
    """SIGKILL in the second epoch, with drop path (random numbers), and the head alone in the first epoch."""
    changes = {"epochs": 3, "drop_path_rate": 0.2, "num_workers": 1, "freeze_epochs": 1, "checkpoint_every_steps": 3}
    if stage == 2:
        changes |= {"sam_rho": 0.05, "max_local_batch_size": 4 // ranks, "ema_decay": 0.9, "head_width": 16}
    whole, killed = recipe_file("whole", **changes), recipe_file("killed", **changes)
    start_ranks(*command(whole), num_ranks=ranks).run()
    metrics = workspace / "working" / "runs" / "killed_fold0" / "metrics.jsonl"
    run_and_kill(start_ranks(*command(killed), num_ranks=ranks), metrics)
    start_ranks(*command(killed), num_ranks=ranks).run()
    models = workspace / "working" / "models" / "tiny"
    for kind in ("", "_ema")[:stage]:
        one, other = (checkpoints.read(models / f"{name}_fold0_epoch3{kind}.pth") for name in ("whole", "killed"))
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        assert one["cosine_similarity"] == other["cosine_similarity"]
    drop = ("images_per_second", "data_wait")
    lines = [
        [{key: value for key, value in line.items() if key not in drop} for line in read_metrics(path)]
        for path in (metrics, metrics.parent.parent / "whole_fold0" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(workspace, recipe_file, start_ranks, capsys):
    """The same global batches and, with SAM, the same local ones: the losses of a run that was never cut."""
    changes = {"epochs": 3, "checkpoint_every_steps": 3, "sam_rho": 0.05, "max_local_batch_size": 4}
    whole, killed = recipe_file("whole", **changes), recipe_file("killed", **changes)
    assert start(whole) == 0
    metrics = workspace / "working" / "runs" / "killed_fold0" / "metrics.jsonl"
    run_and_kill(start_ranks(*command(killed), num_ranks=2), metrics)
    assert start(killed) == 0
    assert "warning: cut with 2 ranks, going on with 1: drop path is drawn anew" in capsys.readouterr().out
    expected = losses_of(metrics.parent.parent / "whole_fold0" / "metrics.jsonl")
    assert len(expected) == 12
    np.testing.assert_allclose(losses_of(metrics), expected, atol=1e-4)


FULL_DISK = """
set -u
mount -t tmpfs -o size=40M none "$KUTILS_WORKING"
"$@" > "$OUT/first" 2>&1 & pid=$!
until [ -f "$RUN/resume.pt" ] || ! kill -0 $pid; do sleep 0.02; done
head -c 100M /dev/zero > "$KUTILS_WORKING/rubbish" 2> /dev/null
wait $pid; echo "full: $?"
find "$KUTILS_WORKING" -name "*.partial*"
rm "$KUTILS_WORKING/rubbish"
"$@" > "$OUT/second" 2>&1; echo "room: $?"
"""


@pytest.mark.slow
def test_a_full_disk_stops_with_a_clear_error_and_loses_nothing(workspace, recipe_file):
    """A real one: a small file system of its own, filled while the run trains."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("this machine gives a process no file system of its own (unshare -rm)")
    path = recipe_file(epochs=8, checkpoint_every_steps=1)
    environment = os.environ | {"OUT": str(workspace), "RUN": str(workspace / "working" / "runs" / "tiny_fold0")}
    script = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", *real_command(path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    first, second = ((workspace / name).read_text() for name in ("first", "second"))
    assert done.stdout.splitlines() == ["full: 1", "room: 0"], done.stdout + done.stderr + first + second
    said = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in first, first
    assert "is the disk full? The previous file is untouched" in said[0] or "make room" in said[0]
    assert "going on after update" in second and "finished: tiny fold 0" in second


def test_what_an_epoch_reached_is_saved_before_it_is_evaluated(workspace, recipe_file, monkeypatch):
    """No signal is heard during an evaluation; cut there, the epoch is evaluated by the next start, once."""
    path = recipe_file(checkpoint_every_minutes=1e-9)
    real = engine.evaluate

    def cut(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate", cut)
    assert start(path) == 130
    folder = workspace / "working" / "runs" / "tiny_fold0"
    saved = checkpoints.read(folder / "resume.pt")
    assert (saved["step"], saved["epoch"]) == (4, 0)

    def cut_afterwards(*arguments, **options):
        if arguments[0] == folder / "fold0_predictions.npz":
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate", real)
    monkeypatch.setattr(out_of_fold, "save_predictions", cut_afterwards)
    assert start(path) == 130  # with the epoch's line in the metrics, and the state from before it
    monkeypatch.undo()
    monkeypatch.setenv("KUTILS_INPUT", str(workspace / "input"))
    monkeypatch.setenv("KUTILS_WORKING", str(workspace / "working"))
    assert start(path) == 0
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines if "cosine_similarity" in line] == [1, 2]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_run_from_before_a_key_existed_is_still_known(workspace, recipe_file, capsys):
    path = recipe_file()
    assert start(path) == 0
    saved = workspace / "working" / "runs" / "tiny_fold0" / "config.yaml"
    kept = [line for line in saved.read_text().splitlines() if not line.startswith(("sam_gradient", "ema_decay"))]
    saved.write_text("\n".join(kept).replace("augment: published", "augment: true"))
    assert start(path) == 0 and "already finished" in capsys.readouterr().out
    assert start(path, "ema_decay=0.9") == 1 and "ema_decay was 0.0, is 0.9" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals a process group")
def test_sigterm_to_the_whole_group_leaves_the_data_loaders_alone(workspace, recipe_file):
    """As `timeout` and many job systems send it; here with a profile that does not come to its end."""
    path = recipe_file(epochs=60, num_workers=2, profile_steps=100)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        real_command(path),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    metrics = workspace / "working" / "runs" / "tiny_fold0" / "metrics.jsonl"
    while child.poll() is None and len(losses_of(metrics)) < 6:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGTERM)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 143 and "stopped by a signal after update" in errors and "Traceback" not in errors
    assert checkpoints.read(metrics.parent / "resume.pt")["step"] >= 6


@pytest.mark.skipif(sys.platform != "linux", reason="a worker of another system takes seconds to notice")
def test_workers_last_for_a_run_and_end_with_it(workspace, recipe_file, monkeypatch):
    real, seen = engine.update, []

    def update(*arguments):
        seen.append({child.pid for child in multiprocessing.active_children()})
        return real(*arguments)

    monkeypatch.setattr(engine, "update", update)
    assert start(recipe_file(epochs=3, num_workers=2)) == 0
    assert len(seen) == 12 and len(seen[0]) == 2 and all(pids == seen[0] for pids in seen)
    assert not multiprocessing.active_children()
    assert start(recipe_file("broken", epochs=3, num_workers=2), "lr=1e30") == 1  # and with an error
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_run_leaves_no_worker(workspace, recipe_file):
    # 18 updates an epoch: at the sixth, no worker of an evaluation is there, or just begins
    path = recipe_file(epochs=60, num_workers=2, global_batch_size=2, max_local_batch_size=2)
    child = subprocess.Popen(real_command(path), env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics = workspace / "working" / "runs" / "tiny_fold0" / "metrics.jsonl"
    while child.poll() is None and len(losses_of(metrics)) < 6:
        time.sleep(0.01)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.kill()
    child.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 4  # a worker would look for its parent every five
    while any(is_running(int(pid)) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(workspace, recipe_file, monkeypatch, capsys, number):
    path = recipe_file(epochs=3)
    real = engine.update
    calls, heard = [], []
    monkeypatch.setattr(__main__, "ensure_report", lambda folder: heard.append(signal.getsignal(number)))
    environment = workspace / "working" / "runs" / "tiny_fold0" / "environment.json"

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(engine, "update", interrupted)
    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {each: signal.signal(each, handler) for each, handler in defaults.items()}
    assert start(path) == 128 + number
    assert "stopped by a signal after update 6; the same command goes on from there" in capsys.readouterr().err
    first = json.loads(environment.read_text())
    environment.write_text(json.dumps(first | {"started": "2020-01-01 00:00:00"}))
    assert start(path) == 0
    second = json.loads(environment.read_text())
    assert "resumed" not in first and second["started"] == "2020-01-01 00:00:00" < first["started"] <= second["resumed"]
    # the report can be ended
    assert heard == [defaults[number]]
    assert "going on after update 6" in capsys.readouterr().out and len(calls) == 12
    for each, handler in before.items():
        signal.signal(each, handler)


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        __main__.run("train", ["--help"])
    text = capsys.readouterr().out
    assert "sam_rho" in text and "key=value" in text


def test_the_tiny_recipes_load():
    for stem in ("tiny_convnext_stage1", "tiny_convnext_stage2", "tiny_vit_stage1", "tiny_vit_stage2"):
        assert load_recipe(f"conf/{stem}.yaml").datasets == ("shapes",)


def test_a_planned_run_is_the_run_of_its_recipe_file_and_overrides(workspace, recipe_file, capsys):
    path = recipe_file()
    planned = launch.plan(path, 0, ["prefix=planned", "lr=2e-3"]).write()
    assert start(path, "lr=2e-3") == 0 and __main__.run("train", ["--plan", str(planned)]) == 0
    runs = workspace / "working" / "runs"
    losses = [losses_of(runs / f"{name}_fold0" / "metrics.jsonl") for name in ("tiny", "planned")]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    environment = json.loads((runs / "planned_fold0" / "environment.json").read_text())
    assert environment["config"] == str(path) and environment["overrides"] == ["prefix=planned", "lr=2e-3"]
    plan = ["--plan", str(planned)]
    for arguments in (["--config", str(path)], [*plan, "lr=1"], ["--fold", "0", *plan], ["--config", str(path), *plan]):
        with pytest.raises(SystemExit):
            __main__.run("train", arguments)
        assert "give --config and --fold, or --plan alone" in capsys.readouterr().err

"""Every fold of a recipe by dist_train.sh: on one node, on two, stopped in the middle, failing on one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.ranks import reserve_port

from kutils.runs.folders import read_metrics
from kutils.runs.nodes import this_node
from kutils.system.paths import repository_root

ROOT = repository_root()
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """None of a job system that runs these tests."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("PET_"))]:
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- which node is this?


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (1, 0, "")),
        ({"NNODES": "1", "PET_NNODES": "2", "PET_NODE_RANK": "1"}, (1, 0, "")),
        ({"PET_NODE_RANK": "3", "PET_RDZV_ENDPOINT": "x:1", "PET_STANDALONE": "1"}, (1, 0, "")),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, (2, 1, "a:29500")),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "7"}, (2, 0, "[fd00::1]:7")),
        (
            {"PET_NNODES": "2:2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "5"},
            (2, 1, "a:5"),
        ),
        (
            {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_RDZV_ENDPOINT": "b:6", "PET_MASTER_ADDR": "a"},
            (3, 2, "b:6"),
        ),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "[fd00::1]"}, (2, 1, "[fd00::1]:29500")),
        (
            {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_RDZV_ENDPOINT": "b:6"}
            | {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "c", "MASTER_PORT": "7"},
            (2, 0, "c:7"),
        ),
    ],
)
def test_both_families_of_variables_are_read_and_ours_goes_first(variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    node = this_node()
    assert (node.count, node.rank, node.endpoint) == found


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NNODES": "two"}, r"NNODES \(or PET_NNODES\) is 'two'; it is a whole number"),
        ({"PET_NNODES": "1:4"}, r"NNODES \(or PET_NNODES\) is '1:4'; it is a whole number"),
        ({"NODE_RANK": "1"}, "NODE_RANK is '1' and NNODES is 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, r"NODE_RANK \(or PET_NODE_RANK\) is not set; .*, 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK .* is '2'; it is a whole number, 0 to 1"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "-1"}, "NODE_RANK .* is '-1'"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES is 2 and MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT .* is 'x'"),
    ],
)
def test_variables_that_do_not_go_together_stop(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        this_node()


# ---------------------------------------------------------------- dist_train.sh


@pytest.fixture
def start(workspace, tiny_recipe):
    """Start dist_train.sh on a tiny recipe of folds 0 and 1; what is still running at the end is killed."""
    recipe = workspace / "recipe.yaml"
    recipe.write_text(tiny_recipe(train_folds=(0, 1)).to_yaml())
    started = []

    def start_one(num_processes: int, *overrides: str, **variables: str) -> subprocess.Popen:
        tools = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            ["bash", "dist_train.sh", str(num_processes), str(recipe), *overrides],
            cwd=ROOT / "working",
            env=os.environ | tools | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def end_of(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def two_nodes(port: str) -> list[dict[str, str]]:
    return [{"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in ("0", "1")]


def run_folder(workspace: Path, fold: int) -> Path:
    return workspace / "working" / "runs" / f"tiny_fold{fold}"


def ranks_of(workspace: Path) -> list[int]:
    """Processes that train in this workspace: those that have its folder in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"kutils\0train\0" in (path / "cmdline").read_bytes():
                found += [int(path.name)] * (str(workspace).encode() in (path / "environ").read_bytes())
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.fixture
def port():
    reserved, number = reserve_port()
    with reserved:
        yield number


@pytest.mark.slow
def test_two_nodes_train_every_fold_as_one_node_does(start, start_ranks, workspace, port):
    for fold in (0, 1):
        recipe = ["--config", workspace / "recipe.yaml", "--fold", fold, "prefix=alone"]
        start_ranks("kutils", "train", *recipe, num_ranks=2).run()

    # node 1 comes first and is ready with each fold before node 0 has drawn its figures
    names = {name: f"PET_{name}" for name in VARIABLES}
    one = start(1, **{names[name]: value for name, value in two_nodes(port)[1].items()})
    zero = start(1, **two_nodes(port)[0])
    code, shown = end_of(zero)
    code_of_one, shown_by_one = end_of(one)
    assert (code, code_of_one) == (0, 0), shown + shown_by_one
    for fold in (0, 1):
        folder = run_folder(workspace, fold)
        assert json.loads((folder / "environment.json").read_text())["ranks"] == 2
        assert (folder / "result.json").is_file()
        assert len(list((folder / "logs").rglob("stdout.log"))) == 2
        assert list(folder.glob("*.ipynb")) == [folder / "train.ipynb"]
        assert "validation cosine" in (folder / "train.ipynb").read_text()  # rank 0 is where the notebook is
        assert f"finished: tiny fold {fold}" in shown
        losses, expected = (
            [line["loss"] for line in read_metrics(place / "metrics.jsonl") if "loss" in line]
            for place in (folder, folder.with_name(f"alone_fold{fold}"))
        )
        assert len(losses) == 8 and losses == pytest.approx(expected, abs=1e-6)
    assert "validation cosine" not in shown_by_one

    before = [(run_folder(workspace, fold) / "train.ipynb").stat().st_mtime_ns for fold in (0, 1)]
    again = [start(1, **variables) for variables in two_nodes(port)]
    for process in again:
        code, shown = end_of(process)
        assert code == 0 and shown.count("already finished: tiny fold") == 2
    assert before == [(run_folder(workspace, fold) / "train.ipynb").stat().st_mtime_ns for fold in (0, 1)]


@pytest.mark.slow
def test_a_failure_on_one_node_ends_both_and_names_the_log(start, workspace, port):
    (workspace / "empty").mkdir()
    one = start(1, **two_nodes(port)[1], KUTILS_INPUT=str(workspace / "empty"))
    zero = start(1, **two_nodes(port)[0])
    code, shown = end_of(zero)
    code_of_one, shown_by_one = end_of(one)
    assert code == 1 and code_of_one == 1
    logs = run_folder(workspace, 0) / "logs"
    assert f"another node knows why: {logs}/node*" in shown
    assert "exit code 1" in shown_by_one and "error: data set 'toy': toy.tsv and toy.npy not in" in shown_by_one
    (log,) = [line.removeprefix("its log: ") for line in shown_by_one.splitlines() if line.startswith("its log: ")]
    assert Path(log).is_relative_to(logs / "node1") and "toy.npy not in" in Path(log).read_text()
    assert not run_folder(workspace, 1).exists() and not ranks_of(workspace)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for ranks in /proc")
def test_a_signal_lets_the_ranks_save_and_the_same_command_goes_on(start, workspace):
    # data loaders, because torchrun signals a rank's whole group and a loader that dies takes its rank along
    overrides = ("train_folds=0", "epochs=12", "num_workers=1")
    folder = run_folder(workspace, 0)
    cut = start(2, *overrides)
    deadline = time.monotonic() + 300
    while len(read_metrics(folder / "metrics.jsonl")) < 5:
        assert time.monotonic() < deadline and cut.poll() is None
        time.sleep(0.05)
    assert len(ranks_of(workspace)) >= 2
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # the last two change nothing
        cut.send_signal(number)
        time.sleep(0.3)
    code, shown = end_of(cut)
    assert code == 143 and "stopped by a signal after update" in shown, shown
    assert shown.endswith("error: stopped by a signal; start the same command again to go on\n")
    assert not ranks_of(workspace)
    assert (folder / "resume.pt").is_file() and not (folder / "result.json").exists()
    step = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert f"after update {step};" in shown and 0 < step < 48

    variables = {"PET_NNODES": "1", "PET_STANDALONE": "0", "PET_NODE_RANK": "3", "PET_RDZV_ID": "x"}
    code, shown = end_of(start(2, *overrides, **variables))  # of a job system that is not used
    assert code == 0 and f"going on after update {step}" in shown, shown
    assert "finished: tiny fold 0" in shown and not (folder / "resume.pt").exists()
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 48


def test_too_few_gpus_and_a_wrong_node_are_said_at_once(start, workspace):
    code, shown = end_of(start(8, "device=cuda", CUDA_VISIBLE_DEVICES="0"))
    assert code == 1 and shown.startswith("error: 8 GPUs are asked for and 1 are visible")
    code, shown = end_of(start(1, NNODES="2", NODE_RANK="0"))
    assert code == 1 and shown.startswith("error: NNODES is 2 and MASTER_ADDR is not set")
    assert not (workspace / "working" / "runs").exists()

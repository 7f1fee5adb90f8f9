"""Launching: failures are loud, nothing is left running, wrong parameters stop a notebook."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from fixtures.finished_runs import RESULT
from fixtures.forked_python import REAL_PYTHON

from kutils.runs import all_folds, launch
from kutils.runs.launch import CommandFailed, check_parameters
from kutils.runs.nodes import Node
from kutils.system.paths import is_running

# a shell lets its background jobs ignore SIGINT, and these tests may be one
HEARS_INTERRUPTS = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
CELLS = ["", 'model: str = "tiny"  # a model\nfold: int = 0', '# Parameters\nmodel = "other"\nfold = 3\n', "import sys"]


def test_known_parameters_pass():
    check_parameters(CELLS)
    check_parameters(["", "model = 1", "x = 5"])  # not run by papermill: nothing to look at


def test_an_unknown_parameter_stops_and_names_the_nearest():
    with pytest.raises(ValueError, match=r"no parameter 'modle'; did you mean 'model'\? \(it has fold, model\)"):
        check_parameters([*CELLS[:2], "# Parameters\nmodle = 1\n"])


def test_a_parameter_of_another_type_stops_and_text_of_digits_has_a_way():
    defaults = 'model: str = "tiny"\nfold: int = 0\nhours: float = 0.0\nkeep: bool = False\nseeds: str = "0,1"'
    check_parameters([defaults, '# Parameters\nmodel = "7"\nfold = -1\nhours = 2\nkeep = True\nseeds = 3\n'])
    check_parameters([defaults, '# Parameters\nmodel = """two\nlines"""\nhours = float("nan")\nseeds = "3"\n'])
    with pytest.raises(ValueError, match=r"parameter model is 2020; it is text; papermill .* `-r model 2020`$"):
        check_parameters([defaults, "# Parameters\nmodel = 2020\n"])
    with pytest.raises(ValueError, match=r"parameter fold is 'one'; it is a whole number$"):
        check_parameters([defaults, '# Parameters\nfold = "one"\n'])
    with pytest.raises(ValueError, match=r"parameter fold is True; it is a whole number$"):
        check_parameters([defaults, "# Parameters\nfold = True\n"])


def test_a_plan_resolves_model_overrides_and_folder(workspace):
    run = launch.plan_run("convnext_large", 2, 3, "epochs=1 prefix=mine")
    assert run.recipe.epochs == 1 and run.folder == workspace / "working" / "runs" / "mine_fold3"
    assert run.overrides == ("epochs=1", "prefix=mine") and run.fold == 3
    path = run.write()
    assert path == run.folder / "logs" / "plan.json" and launch.plan_run("", 1, 0, planned=str(path)) == run
    assert launch.plan_run("x", 1, 0, recipe="conf/tiny_vit_stage2.yaml").recipe.model == "tiny_vit"


@pytest.mark.parametrize(
    ("model", "fold", "overrides", "said"),
    [
        ("convnext_lrge", 0, "", "did you mean 'convnext_large'"),
        ("convnext_large", 10, "", "fold is 10"),
        ("convnext_large", "0", "", "fold is '0'"),
        ("convnext_large", 0, "epoch=1", "did you mean 'epochs'"),
    ],
)
def test_a_wrong_plan_stops_at_once(model, fold, overrides, said):
    with pytest.raises(ValueError, match=said):
        launch.plan_run(model, 1, fold, overrides)


def test_gpus_are_counted_without_touching_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5")
    assert launch.visible_gpus() == 3 == launch.count_processes(0, "auto")
    assert launch.count_processes(2, "cuda") == 2
    with pytest.raises(ValueError, match="8 GPUs are asked for and 3 are visible"):
        launch.count_processes(8, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.visible_gpus() == 0 and launch.count_processes(0, "auto") == 1
    with pytest.raises(ValueError, match="1 GPUs are asked for and 0 are visible"):
        launch.count_processes(0, "cuda")


def test_cpu_ranks_are_said(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch.count_processes(2, "auto") == 2
    assert "2 ranks on the CPU (gloo)" in capsys.readouterr().out


def test_a_fold_is_finished_with_its_result_and_alone_with_its_notebook_too(workspace, tiny_recipe):
    (workspace / "recipe.yaml").write_text(tiny_recipe().to_yaml())
    run = launch.plan_run("", 1, 0, recipe=str(workspace / "recipe.yaml"))
    notebook, alone, first = run.folder / "train.ipynb", Node(1, 0, ""), Node(2, 0, "a:1")
    assert not all_folds.is_finished(run, notebook, alone) and not all_folds.is_finished(run, notebook, first)
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.recipe.to_yaml())
    RESULT.write(run.folder)
    assert not all_folds.is_finished(run, notebook, alone) and all_folds.is_finished(run, notebook, first)
    ended = "2026-01-01T10:00:00"
    for exception, end_time, finished in ((True, ended, False), (None, None, False), (None, ended, True)):
        record = {"exception": exception, "end_time": end_time}  # failed, cut, as it should be: what papermill writes
        notebook.write_text(json.dumps({"metadata": {"papermill": record}}))
        assert all_folds.is_finished(run, notebook, alone) is finished
    other = launch.plan_run("", 1, 0, "epochs=7", str(workspace / "recipe.yaml"))
    with pytest.raises(ValueError, match=r"another configuration .*epochs was 2, is 7"):
        all_folds.is_finished(other, notebook, alone)
    again = launch.plan_run("", 1, 0, "resume=never", str(workspace / "recipe.yaml"))
    assert not all_folds.is_finished(again, notebook, alone)


def test_a_kernel_that_dies_or_may_open_too_few_files_is_one_line(tmp_path, monkeypatch, capfd):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os\nos.kill(os.getpid(), 9)")])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "source.ipynb")
    monkeypatch.setattr(all_folds.paths, "repository_path", lambda _: tmp_path / "source.ipynb")
    with pytest.raises(CommandFailed, match=r"the notebook's kernel has ended \(Kernel died\)"):
        all_folds.execute(tmp_path / "train.ipynb", {})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 64))
    with pytest.raises(ValueError, match="32 open files are allowed and 128 are needed; before it: ulimit -n 1024"):
        all_folds.run_folds(1, "tiny_convnext_stage1", ())
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 64))
    with pytest.raises(ValueError, match="no recipe"):
        all_folds.run_folds(1, "absent", ())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that a child process can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text):
        (tmp_path / "job.py").write_text(text)
        return "job"

    return write


def test_output_is_shown_and_a_failure_ends_with_the_last_lines(module, capsys):
    name = module("import sys\nfor n in range(60): print('line', n)\nsys.exit(3 if sys.argv[1:] == ['fail'] else 0)")
    launch.run_module(name)
    assert capsys.readouterr().out.splitlines()[-1] == "line 59"
    with pytest.raises(CommandFailed, match="job fail ended with exit code 3") as caught:
        launch.run_module(name, "fail")
    lines = str(caught.value).splitlines()
    assert lines[1] == "line 20" and lines[-1] == "line 59" and len(lines) == 41


def test_a_clear_error_is_repeated_alone(module):
    name = module("import sys\nprint('noise')\nprint('error: the file x is not there', file=sys.stderr)\nsys.exit(1)")
    with pytest.raises(CommandFailed) as caught:
        launch.run_module(name)
    assert str(caught.value).splitlines()[1:] == ["error: the file x is not there"]


def test_an_interrupt_ends_the_child(module, tmp_path):
    name = module("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    code = f"{HEARS_INTERRUPTS}from kutils.runs import launch\nlaunch.run_module({name!r})"
    parent = subprocess.Popen([REAL_PYTHON, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    child = wait_for_pid(tmp_path / "pid")
    parent.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in parent.communicate(timeout=300)[1]
    assert gone(child)


def test_a_second_interrupt_does_not_cut_what_the_child_saves(module, tmp_path):
    name = module(
        "import os, signal, sys, time\n"
        "def save(*_):\n    print('saving')\n    time.sleep(1)\n    print('saved')\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    code = f"{HEARS_INTERRUPTS}from kutils.runs import launch\nlaunch.run_module({name!r})"
    parent = subprocess.Popen([REAL_PYTHON, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = wait_for_pid(tmp_path / "pid")
    for _ in range(3):
        parent.send_signal(signal.SIGINT)
        time.sleep(0.2)
    shown, error = parent.communicate(timeout=300)
    assert shown == b"saving\nsaved\n" and b"KeyboardInterrupt" in error
    assert gone(child)


def cut(name, capsys) -> tuple[bool, str]:
    """Run a module with less time than it needs, but enough to begin: what came of it, and its output."""
    subprocess.run([sys.executable, "-c", ""], check=True)  # the first start loads the libraries
    for seconds in (1, 4, 16, 64):
        came_to_its_end = launch.run_module(name, seconds=seconds)
        shown = capsys.readouterr().out
        if shown.startswith("begun\n"):
            return came_to_its_end, shown
    raise TimeoutError(shown)


def test_the_end_of_the_time_lets_the_child_save(module, capsys):
    name = module(
        "import signal, sys, time\n"
        "def save(*_):\n    print('saved')\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('begun')\ntime.sleep(600)"
    )
    assert cut(name, capsys) == (False, "begun\nsaved\n")
    assert launch.run_module("this", seconds=60) is True


@pytest.mark.parametrize(
    ("said", "fails"),
    [("stopped by a signal after update 6; the same command goes on", False), ("no space left on the device", True)],
)
def test_what_could_not_be_saved_at_the_end_of_the_time_is_an_error(module, capsys, said, fails):
    name = module(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit('error: {said}'))\nprint('begun')\ntime.sleep(600)"
    )
    if fails:
        with pytest.raises(CommandFailed, match="no space left"):
            cut(name, capsys)
    else:
        assert cut(name, capsys)[0] is False


CLEANING = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
THREADS = {  # which Python waits for at its end, each at another moment
    "plain": "",
    "cleans up, with a thread that does not end": f"{CLEANING}import threading\n"
    "threading.Thread(target=time.sleep, args=(600,)).start()\n",
    "cleans up, with a pool's thread that does not end": f"{CLEANING}import concurrent.futures as futures\n"
    "futures.ThreadPoolExecutor(1).submit(time.sleep, 600)\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("cleaning", THREADS.values(), ids=THREADS)
def test_a_killed_parent_takes_its_child_along(module, tmp_path, cleaning):
    name = module(f"import os, time\n{cleaning}open('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    parent = subprocess.Popen(
        [REAL_PYTHON, "-c", f"from kutils.runs import launch\nlaunch.run_module({name!r})"], cwd=tmp_path
    )
    child = wait_for_pid(tmp_path / "pid")
    parent.kill()
    parent.wait()
    assert gone(child)


def wait_for_pid(path) -> int:
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def gone(pid: int) -> bool:
    """True as soon as no such process runs, False after 300 s."""
    deadline = time.monotonic() + 300
    while is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_torchrun_shows_rank_0_keeps_every_log_and_fails_loudly(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PET_NNODES", "1")
    monkeypatch.setenv("PET_NO_PYTHON", "1")  # torchrun itself would obey and start the module's name as a program
    name = module(
        "import os, sys\nprint('I am rank', os.environ['RANK'], sys.argv[1:])\n"
        "print('left', [name for name in os.environ if name.startswith('PET_')])\n"
        "print('grace', os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])\n"
        "if 'fail' in sys.argv and os.environ['RANK'] == '1':\n    print('I broke', file=sys.stderr)\n    sys.exit(5)"
    )
    launch.torchrun([name, "go"], num_processes=2, log_dir=tmp_path / "logs")
    shown = capsys.readouterr().out
    assert "I am rank 0 ['go']" in shown.splitlines() and "rank 1" not in shown
    assert "left []" in shown and "grace 600" in shown
    logs = [path.read_text().splitlines()[0] for path in (tmp_path / "logs").rglob("stdout.log")]
    assert sorted(logs) == ["I am rank 0 ['go']", "I am rank 1 ['go']"]
    with pytest.raises(CommandFailed, match="rank 1 failed first: local rank 1, exit code 5") as caught:
        launch.torchrun([name, "fail"], num_processes=2, log_dir=tmp_path / "logs")
    assert "Traceback" not in capsys.readouterr().out  # torchrun's own says nothing more
    said, log = str(caught.value).splitlines()[-2:]
    assert said.startswith("first to fail here: local rank 1, exit code 5") and said.endswith(": I broke")
    assert Path(log.removeprefix("its log: ")).read_text() == "I broke\n"


@pytest.mark.parametrize(
    ("rank", "losses", "begun", "calls"), [(1, 2, False, 3), (1, 9, False, 3), (0, 9, False, 1), (1, 9, True, 1)]
)
def test_a_node_that_met_the_end_of_the_last_run_meets_again(monkeypatch, tmp_path, capsys, rank, losses, begun, calls):
    """The first node keeps the place where nodes meet until its last run has ended, a moment after the others'."""
    monkeypatch.setattr(launch, "this_node", lambda: Node(2, rank, "a:1"))
    called = []

    def run_module(*arguments, **options):
        called.append(1)
        if begun:
            (tmp_path / "x" / "logs" / "node1" / "x_1" / "attempt_0").mkdir(parents=True)
        if len(called) <= losses:
            raise CommandFailed("torchrun failed", ("...RendezvousConnectionError: the connection has failed.",))
        return True

    monkeypatch.setattr(launch, "run_module", run_module)
    if losses < calls:
        launch.torchrun(["job"], num_processes=1, log_dir=tmp_path / "x" / "logs")
    else:
        with pytest.raises(CommandFailed, match="another node knows why"):
            launch.torchrun(["job"], num_processes=1, log_dir=tmp_path / "x" / "logs")
    assert len(called) == calls == 1 + capsys.readouterr().out.count("this one meets it again")


@pytest.mark.slow
def test_killing_the_launcher_ends_every_rank(module, tmp_path):
    name = module(
        "import os, time\nfrom kutils.runs import launch\nlaunch.end_with_parent()\n"
        "open('pid' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    call = f"launch.torchrun([{name!r}], num_processes=2, log_dir=Path('l'))"
    code = f"from pathlib import Path\nfrom kutils.runs import launch\n{call}"
    parent = subprocess.Popen([REAL_PYTHON, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL)
    ranks = [wait_for_pid(tmp_path / f"pid{rank}") for rank in (0, 1)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert all(gone(rank) for rank in ranks)


def test_lines_that_are_hidden_are_not_shown(capsys):
    launch.run_module("this", hide=r".* is better than .*|\s*")
    shown = capsys.readouterr().out.splitlines()
    assert "The Zen of Python, by Tim Peters" in shown and "Readability counts." in shown
    assert "" not in shown and not any("is better than" in line for line in shown)


def test_paths_mean_the_same_to_the_launcher_the_notebook_and_the_ranks(workspace, tiny_recipe, monkeypatch):
    """`cd working && bash dist_train.sh ... run_dir=mine`: notebooks run in the repository's folder."""
    monkeypatch.chdir(workspace)
    recipe = tiny_recipe(run_dir="mine", pretrained="weights", model_dir="/models")
    expected = {"run_dir": f"{workspace}/mine", "pretrained": f"{workspace}/weights", "model_dir": "/models"}
    assert all_folds.with_absolute_paths(recipe) == tiny_recipe(**expected)
    assert all_folds.with_absolute_paths(tiny_recipe()) == tiny_recipe()  # random weights, default folders


def test_a_plan_on_several_nodes_is_each_nodes_own_and_what_is_none_is_named(workspace, tiny_recipe, monkeypatch):
    (workspace / "recipe.yaml").write_text(tiny_recipe(pretrained=False, train_folds=(3, 4)).to_yaml())
    run = launch.plan(workspace / "recipe.yaml", 4, ["lr=3e-5", "initialize_from=a/b.pth"])
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    path = run.write()
    assert path == run.folder / "logs" / "node1" / "plan.json" and launch.read_plan(path) == run
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"recipe": content["recipe"] | {"lrr": 1}}))
    with pytest.raises(ValueError, match=rf"{path}: a recipe has no key 'lrr'; did you mean 'lr'"):
        launch.read_plan(path)
    path.write_text(json.dumps({"fold": 0}))
    with pytest.raises(ValueError, match=rf"{path} is no planned run: it lacks config, overrides, recipe"):
        launch.read_plan(path)

"""The one command: what it lists, how it answers what is wrong, and whose code it runs."""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.forked_python import REAL_PYTHON

from kutils import UNCHANGED
from kutils import __main__ as command
from kutils.system import children, paths
from kutils.system.paths import repository_root
from kutils.system.tables import write_table

ROOT = repository_root()
NAMES = sorted(command.COMMANDS)
BAD_INPUTS = {  # what a user can put right, for each command
    "sources": ["none.txt", "--output", "out.tsv"],
    "templates": ["--join", "none.tsv", "--count", "5", "--output", "out.tsv"],
    "embed": ["none.tsv"],
    "dedup": ["none.tsv", "--kept", "kept.tsv", "--rest", "rest.tsv"],
    "folds": ["none.tsv"],
    "generate": ["none.tsv", "--output", "out"],
    "ladder": ["--config", "none.yaml"],
    "import": ["none.tar", "--output", "input/none"],
    "export": ["none", "--format", "parquet"],
    "check": ["none.tsv"],
    "shards": ["none.tsv"],
    "pretrained": ["folder", "no_model"],
    "train": ["--config", "none.yaml", "--fold", "0"],
    "train-folds": ["1", "none.yaml"],
    "evaluate": ["--config", "none.yaml", "--fold", "0"],
    "predict": ["--config", "none.yaml", "--checkpoint", "none.pth", "--images", "none", "--output", "out.npz"],
    "report": ["none"],
    "ensemble": ["fit", "--config", "none.yaml"],
    "neighbours": ["none"],
    "bank": ["--prompts", "none.tsv", "--output", "out.arrow"],
    "ask": ["none.png"],
    "kaggle": ["code", "--dry-run", "--user", "no/name"],
    "benchmark": ["--sections", "none"],
    "gpu-check": ["--parts", "none"],
    "demo": [],  # takes nothing that could be wrong: here without a clone
}


def run_python(*arguments, environment=None, python=REAL_PYTHON, **options):
    """Run Python, with no kutils on its search path but what the environment or current folder brings."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | (environment or {})
    command = [python, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def in_a_folder(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


# ---------------------------------------------------------------- help


def test_the_overview_lists_every_command_and_loads_no_library():
    """So it answers at once: loading torch alone takes seconds."""
    code = "import sys\nfrom kutils.__main__ import main\nmain(['--help'])\nprint(*sys.modules)"
    done = run_python("-c", code, cwd=ROOT)
    *overview, modules = done.stdout.splitlines()
    assert not {"torch", "numpy", "pandas", "pyarrow", "matplotlib", "PIL"} & set(modules.split())
    for name in NAMES:
        assert re.search(rf"^  {name} +[a-z].{{20,}}$", "\n".join(overview), re.MULTILINE), name


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_every_key_with_its_default(name, capsys, monkeypatch):
    parsers = []
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, *rest: parsers.append(self) or parse(self, *rest)
    )
    with pytest.raises(SystemExit) as ended:
        command.run(name, ["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: kutils {name} ")
    for parser in parsers:  # with the parsers of its subcommands
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                continue
            text = parser._get_formatter()._expand_help(action) if action.help else ""
            assert re.search(r"[a-z]{2}", text.partition("(default")[0]), f"{parser.prog}: {action.dest} has no help"
            nothing = action.default in (None, "", [], argparse.SUPPRESS) or action.default is False
            if action.option_strings and not nothing:
                assert f"default: {action.default}" in text, f"{parser.prog}: {action.dest}: {text}"


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_input_ends_in_one_line(name, in_a_folder, capsys, monkeypatch):
    if name == "demo":
        monkeypatch.setattr(paths, "code_root", lambda: in_a_folder)
    assert command.run(name, BAD_INPUTS[name]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in lines].count("error: ") == 1 and lines[-1].startswith("error: "), lines
    assert not re.search("Traceback|Error:", "\n".join(lines)) and re.search("none|no_|no/|clone", lines[-1]), lines
    monkeypatch.setenv("KUTILS_DEBUG", "1")
    with pytest.raises((ValueError, OSError, children.CommandFailed)):
        command.run(name, BAD_INPUTS[name])


def test_a_bad_input_of_a_process(tmp_path):
    environment, arguments = {"PYTHONPATH": str(ROOT)}, ["-m", "kutils", "generate", "none.tsv", "--output", "x"]
    done = run_python(*arguments, environment=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: none.tsv is not there\n")
    done = run_python(*arguments, environment=environment | {"KUTILS_DEBUG": "1"}, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "none.tsv is not there" in done.stderr


def test_a_wrong_command_names_the_nearest(capsys):
    for wrong, message in (
        ("trian", "error: there is no command 'trian'; did you mean 'train'? `kutils --help` lists all\n"),
        ("xyz", "error: there is no command 'xyz'; `kutils --help` lists all\n"),
    ):
        assert command.main([wrong, "--fold", "0"]) == 2
        assert capsys.readouterr().err == message


def test_errors_that_every_rank_meets_are_printed_by_the_first(in_a_folder, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(command.time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert command.run("generate", BAD_INPUTS["generate"]) == 1
    assert capsys.readouterr().err == "" and waits == [command.FIRST_RANK_SECONDS]
    monkeypatch.setattr(command, "have_joined", lambda: True)  # from here on it may be this rank's own
    monkeypatch.setattr("kutils.system.ranks.leave_ranks", lambda: None)
    assert command.run("generate", BAD_INPUTS["generate"]) == 1
    assert capsys.readouterr().err == "error: none.tsv is not there\n" and len(waits) == 1


def test_an_interrupt_ends_in_one_line(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("kutils.data.checking.main", interrupted)
    assert command.run("check", []) == 130
    assert capsys.readouterr().err == "error: stopped by a signal; start the same command again to go on\n"


def processes_of(folder) -> list[str]:
    """Command lines of the processes that were started with this folder of data sets."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"KUTILS_INPUT={folder}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_ends_a_command_and_its_processes(in_a_folder, number, to_all):
    """A terminal's Ctrl-C goes to all processes of the command; others signal the first alone."""
    prompts = [f"a red house, number {row}" for row in range(4000)]
    write_table(in_a_folder / "p.tsv", {"prompt": prompts, "source": ["me"] * len(prompts)})
    inputs = in_a_folder / "signalled"
    arguments = ["generate", "p.tsv", "--output", str(inputs / "made"), "--size", "256", "--workers", "2"]
    child = subprocess.Popen(
        [REAL_PYTHON, "-m", "kutils", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "KUTILS_INPUT": str(inputs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # not ignored, as in background
    )
    while child.poll() is None and len(list(inputs.rglob("*.jpg"))) < 20:
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(child.pid, number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == "error: stopped by a signal; start the same command again to go on"
    assert "Traceback" not in errors and errors.count("error: ") == 1, errors
    assert not processes_of(inputs) and not list(inputs.rglob("*.partial*")) and not list(inputs.rglob("*.lock"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_kill_leaves_no_process(in_a_folder):
    prompts = [f"a red house, number {row}" for row in range(4000)]
    write_table(in_a_folder / "p.tsv", {"prompt": prompts, "source": ["me"] * len(prompts)})
    inputs = in_a_folder / "killed"
    arguments = ["generate", "p.tsv", "--output", str(inputs / "made"), "--size", "256", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KUTILS_INPUT": str(inputs)}
    child = subprocess.Popen([REAL_PYTHON, "-m", "kutils", *arguments], env=environment, stdout=subprocess.DEVNULL)
    while child.poll() is None and len(list(inputs.rglob("*.jpg"))) < 20:
        time.sleep(0.02)
    child.kill()
    child.wait()
    deadline = time.monotonic() + 300
    while (left := processes_of(inputs)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_an_interrupt_that_python_drops_comes_again(in_a_folder):
    """Exceptions while an object is deleted are dropped; this one is sent again."""
    program = """
import os, signal, sys, time
from kutils import __main__ as command
class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
class Command:
    def main(arguments):
        held = Held()
        del held
        time.sleep(60)
command.importlib.import_module = lambda name: Command
sys.exit(command.run("check", [], is_process=True))
"""
    done = run_python("-c", program, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 143
    assert done.stderr == "error: stopped by a signal; start the same command again to go on\n"


def test_a_signal_while_libraries_are_loaded_ends_at_once(in_a_folder):
    """A library may catch what is raised while it is imported."""
    program = """
import os, signal, sys
from kutils import __main__ as command
def import_module(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
command.importlib.import_module = import_module
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(command.run("check", [], is_process=True))
"""
    done = run_python("-c", program, environment={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (130, "error: stopped by a signal\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_to_a_worker_that_was_just_forked_says_nothing(in_a_folder, number, code):
    """Ctrl-C reaches a loader's workers before they have handlers of their own; only the command answers it."""
    program = f"""
import os, signal, sys
from kutils import __main__ as command
class Command:
    def main(arguments):
        if not (child := os.fork()):
            os.kill(os.getpid(), {int(number)})
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
command.importlib.import_module = lambda name: Command
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(command.run("check", [], is_process=True))
"""
    done = run_python("-c", program, environment={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (code, "")


# ---------------------------------------------------------------- what was typed before

MODULES = {  # what stood after `python -m kutils.`, and the command that does it now
    **{f"{name} --key 'a b'": f"{name} --key 'a b'" for name in UNCHANGED},
    "prompts input/x.tsv": "embed input/x.tsv",
    "prompt_bank": "bank",
    "retrieval a.png": "ask a.png",
    "launch 8 conf/x.yaml": "train-folds 8 conf/x.yaml",
    "grouping folds a.tsv": "folds a.tsv",
    "grouping dedup a.tsv": "dedup a.tsv",
    "grouping": "folds",
    "training.train --fold 0": "train --fold 0",  # a module of now, which would do nothing
    "data.pair_import": "import",
}


@pytest.mark.parametrize("before", MODULES)
def test_a_module_that_is_no_command_names_the_one_that_is(before):
    module, *arguments = shlex.split(before)
    done = run_python("-u", "-m", f"kutils.{module}", *arguments, cwd=ROOT)
    name = MODULES[before].split()[0]
    message = f"error: -m kutils.{module} is no command; write -m kutils {name}, or: kutils {MODULES[before]}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message) and name in NAMES


def test_other_modules_are_looked_up_as_ever():
    assert "No module named kutils.trian" in run_python("-m", "kutils.trian", cwd=ROOT).stderr
    assert "No module named kutils.data.__main__" in run_python("-m", "kutils.data", cwd=ROOT).stderr
    done = run_python("-m", "kutils.system.children", "kutils", "--help", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: kutils COMMAND")


@pytest.mark.slow
def test_ranks_of_torchrun_name_the_new_command_once():
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(*ranks, "-m", "kutils.train", cwd=ROOT)
    assert (
        done.returncode != 0 and done.stderr.count("error: -m kutils.train is no command; write -m kutils train") == 1
    )


# ---------------------------------------------------------------- whose code runs


@pytest.fixture
def clone(tmp_path):
    """Another clone, whose command prints its arguments."""
    clone = tmp_path / "another" / "clone"
    for folder in ("kutils", "conf", "working", "input"):
        (clone / folder).mkdir(parents=True)
    (clone / "kutils" / "__init__.py").touch()
    (clone / "kutils" / "__main__.py").write_text("import sys\nprint('the clone', *sys.argv[1:])\nsys.exit(3)")
    shutil.copy(ROOT / "working" / "dist_train.sh", clone / "working")
    return clone


# our command as an editable install of this repository brings it
INSTALLED = f"import sys; sys.path.append({str(ROOT)!r}); from kutils.__main__ import main; sys.exit(main())"


def test_a_command_runs_the_clone_that_it_is_typed_in(clone):
    for folder in (clone / "working", clone):  # in the second, Python itself would find it
        done = run_python("-P", "-c", INSTALLED, "generate", "x y", cwd=folder)
        assert (done.returncode, done.stdout) == (3, "the clone generate x y\n"), done.stderr
    done = run_python("-P", "-c", INSTALLED, "generate", "--help", cwd=clone.parent)
    assert done.returncode == 0 and done.stdout.startswith("usage: kutils generate")


def test_a_command_runs_the_code_that_was_asked_for(clone):
    """As children of a run do, wherever the run was started."""
    environment = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = run_python("-m", "kutils", "generate", "--help", environment=environment, cwd=clone)
    assert done.returncode == 0 and done.stdout.startswith("usage: kutils generate")


def test_a_package_in_the_current_folder_does_not_keep_the_clone_around_it_from_running(clone):
    shutil.copytree(ROOT / "kutils", clone / "working" / "kutils", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_python("-m", "kutils", "generate", cwd=clone / "working")
    assert (done.returncode, done.stdout) == (3, "the clone generate\n"), done.stderr


def test_dist_train_runs_the_clone_that_it_stands_in(clone, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(REAL_PYTHON)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    script = [clone / "working" / "dist_train.sh", "8", "conf/x.yaml"]
    for folder in (ROOT, clone, clone / "working", tmp_path):
        done = subprocess.run(["bash", *script], cwd=folder, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (3, "the clone train-folds 8 conf/x.yaml\n"), done.stderr


def test_children_run_the_code_of_their_parent(clone, capfd, monkeypatch):
    monkeypatch.chdir(clone)
    assert children.run_module("kutils", "generate", "--help")
    assert "usage: kutils generate" in capfd.readouterr().out


# ---------------------------------------------------------------- without a clone


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds kutils as a wheel installs it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "repository"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "kutils", copy / "kutils", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", folder / "site-packages"]
    subprocess.run([*pip, "install", *options, copy], check=True, timeout=300)
    return folder / "site-packages"


def test_a_wheel_holds_every_module(site):
    for path in (ROOT / "kutils").rglob("*.py"):
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert {path.name for path in site.iterdir()} <= {"kutils", "kutils-0.1.0.dist-info", "bin"}
    assert "kutils" in {path.name for path in (site / "bin").iterdir()}


SEVERAL = """
import json, sys
from kutils.__main__ import run
for arguments in json.loads(sys.argv[1]):
    print(run(arguments[0], arguments[1:]), file=sys.stderr)
"""


@pytest.fixture
def installed(site, tmp_path):
    """Run commands of the installed package in an empty folder: lines of stderr, an exit status after each command."""

    def run(*commands: str) -> list[str]:
        environment = {"PYTHONPATH": str(site), "KUTILS_INPUT": "", "KUTILS_WORKING": ""}
        arguments = json.dumps([shlex.split(command) for command in commands])
        options = {"environment": environment, "cwd": tmp_path, "python": sys.executable}
        return run_python("-c", SEVERAL, arguments, **options).stderr.splitlines()

    before = files_of(site)
    yield run
    assert files_of(site) == before, "it wrote beside the package"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def test_what_needs_a_clone_says_so(installed, site, tmp_path):
    commands = {
        "train --config conf/tiny_vit_stage1.yaml --fold 0": "conf",
        "train-folds 1 conf/tiny_vit_stage1.yaml": "conf",
        "pretrained folder": "conf",
        "demo": "notebooks",
        "kaggle code --dry-run": "kernel-metadata",
    }
    lines = installed(*commands, "generate --shapes-dataset tiny")
    assert lines[1::2] == ["1"] * 6
    for line, missing in zip(lines[::2], commands.values(), strict=False):
        assert line.startswith(f"error: this needs a clone: {missing} is not beside the package in {site}; clone the")
    folder = tmp_path / "input"
    assert lines[-2].startswith(
        f"error: kutils is installed without a clone, and {folder} is not there: make that fold"
    )
    assert "KUTILS_INPUT" in lines[-2] and "KUTILS_WORKING" in lines[-2] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_installed_package_works_in_the_current_folder(installed, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    shutil.copy(ROOT / "conf" / "tiny_vit_stage1.yaml", tmp_path / "own.yaml")
    make = "generate --shapes-dataset tiny --num-prompts 60 --images-per-prompt 1 --size 32"
    lines = installed(make, "train --config own.yaml --fold 0 device=cpu datasets=none")
    assert "0" in lines and (tmp_path / "input" / "tiny.folds.json").is_file(), lines
    assert "data set 'none': none.tsv and none.npy not in" in "".join(lines[-8:]) and lines[-1] == "1", lines

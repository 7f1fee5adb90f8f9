"""Start training and other commands from a cell or the shell: output live, failures loud, nothing left running.

This module imports no torch: a notebook that launches ranks must not hold a GPU itself.
"""

import argparse
import ast
import collections
import ctypes
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kutils import config, paths

LAST_LINES = 40  # of the output, repeated in the exception


class LaunchError(ValueError):
    """What was to be started cannot be started as asked."""


class CommandFailed(RuntimeError):
    """A started command ended with an error; the message ends with its last lines."""


def check_parameters(cells: Sequence[str]) -> None:
    """Stop a notebook that was given a parameter it does not have; papermill itself only warns.

    Args:
        cells: IPython's `In`: the source of every cell that has run. Papermill's cell starts with `# Parameters`; names
            assigned before it are those that the notebook has. Without such a cell nothing is checked.
    Raises: LaunchError naming the parameter and the nearest that exists.
    """
    injected = [number for number, source in enumerate(cells) if source.startswith("# Parameters")]
    if not injected:
        return
    known = {name for source in cells[: injected[0]] for name in assigned_names(source)}
    for name in assigned_names(cells[injected[-1]]):
        if name not in known:
            close = config.nearest(name, known)
            raise LaunchError(f"this notebook has no parameter {name!r}{close} (it has {', '.join(sorted(known))})")


def assigned_names(source: str) -> list[str]:
    """Names assigned at the top level of a cell; none for a cell that is no plain Python (magics)."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return []
    names = []
    for statement in statements:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.append(statement.target.id)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return names


@dataclass(frozen=True)
class Run:
    """One fold of one recipe, as a notebook starts it."""

    config_path: Path
    recipe: config.Recipe
    fold: int
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder(self.fold)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def predictions_path(self) -> Path:
        return self.folder / f"fold{self.fold}_predictions.npz"

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config_path), "--fold", str(self.fold), *self.overrides]


def plan_run(model: str, stage: int, fold: int, overrides: str = "", recipe: str = "") -> Run:
    """Resolve a notebook's parameters: the recipe of a model and stage, or a recipe file; overrides as one text.

    Raises: ConfigError for an unknown model (naming the nearest), key or value.
    """
    path = config.find_config(recipe) if recipe else config.find_recipe(model, stage)
    changes = tuple(shlex.split(overrides))
    if not isinstance(fold, int) or not 0 <= fold <= 9:
        raise LaunchError(f"fold is {fold!r}; it is 0 to 9")
    return Run(path, config.load_recipe(path, changes), fold, changes)


def ensure_datasets(recipe: config.Recipe) -> None:
    """Stop if data sets of the recipe are missing; the built-in `shapes` is made on the spot instead.

    Raises: LaunchError naming what is missing, and the commands that make it.
    """
    if missing := paths.missing_datasets(name for name in recipe.datasets if name != "shapes"):
        raise LaunchError(missing)
    if "shapes" in recipe.datasets and not (paths.input_dir() / "shapes.folds.json").is_file():
        run_module("kutils.generate", "--shapes-dataset", "shapes")


def visible_gpus() -> int:
    """Number of GPUs that a rank could use, found without touching one."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len(
            [number for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if number.strip() not in ("", "-1")]
        )
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def count_processes(wanted: int, device: str) -> int:
    """Ranks on this machine: as many as wanted; 0 means one per visible GPU, or one on the CPU.

    Raises: LaunchError if a recipe that trains on GPUs wants more ranks than there are, or none is there.
    """
    gpus = 0 if device == "cpu" else visible_gpus()
    if device == "cpu" or (device == "auto" and gpus == 0):
        if wanted > 1:
            print(f"no GPU is used: {wanted} ranks on the CPU (gloo)", flush=True)
        return wanted or 1
    if gpus < max(wanted, 1):
        raise LaunchError(
            f"{max(wanted, 1)} GPUs are asked for and {gpus} are visible; start fewer processes, or train on the CPU "
            "with device=cpu (minutes become weeks for the large models)"
        )
    return wanted or gpus


def torchrun(module: str, arguments: Sequence[str], *, num_processes: int, log_dir: Path) -> None:
    """Run `python -m <module> <arguments>` as ranks of torchrun and show rank 0; every rank's log stays in `log_dir`.

    NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT make it one of several nodes.

    Raises: CommandFailed with the last lines if any rank fails. An interrupt ends all ranks.
    """
    nodes = int(os.environ.get("NNODES", 1))
    if nodes > 1:
        endpoint = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
        rendezvous = [f"--nnodes={nodes}", f"--node-rank={os.environ.get('NODE_RANK', 0)}"]
        rendezvous += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=kutils"]
    else:
        rendezvous = ["--standalone"]
    log_dir.mkdir(parents=True, exist_ok=True)
    logging = ["--log-dir", str(log_dir), "--tee", "3", "--local-ranks-filter", "0"]
    ranks = ["torch.distributed.run", *rendezvous, f"--nproc-per-node={num_processes}", *logging, "-m", module]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    run_module(*ranks, *arguments, environment={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))})


def run_module(
    module: str, *arguments: str, environment: dict[str, str] | None = None, hide: str | None = None
) -> None:
    """Run `python -m <module> <arguments>` as a child: output line by line as it comes, an exception when it fails.

    The child ends when this process does, however that ends.

    Args:
        module, arguments: what to run.
        environment: variables to set for it.
        hide: regular expression of whole lines that are not shown.
    Raises: CommandFailed with the command's last lines.
    """
    settings = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    search_path = os.pathsep.join(filter(None, [str(paths.repository_root()), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-m", "kutils.launch", "--child", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=os.environ | settings | (environment or {}) | {"PYTHONPATH": search_path},
        start_new_session=True,  # an interrupt goes to this process, which ends the child in order
    )
    last, error, speaker = collections.deque(maxlen=LAST_LINES), [], None
    try:
        for line in child.stdout:
            rank, line = re.fullmatch(r"(\[[a-z]+\d+\]:)?(.*)", line.rstrip("\n")).groups()
            last.append(line)
            if line.startswith("error: "):
                error, speaker = [line], rank
            elif error and rank == speaker:  # its further lines, not torchrun's own traceback without a rank's prefix
                error.append(line)
            if hide is None or not re.fullmatch(hide, line):
                print(line, flush=True)
        code = child.wait()
    except BaseException:
        end(child)
        raise
    if code:
        told = "\n".join(error[:LAST_LINES] or last)
        raise CommandFailed(f"{module} {shlex.join(arguments)} ended with exit code {code}:\n{told}")


def end(child: subprocess.Popen) -> None:
    """SIGTERM to the child and all that it started, SIGKILL after 30 s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=30)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies, however it dies: ranks and a notebook's children need it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def run_folds(num_processes: int, config_name: str, overrides: Sequence[str]) -> None:
    """Train every fold of a recipe, one after the other; each leaves an executed notebook in its run folder.

    Folds that are finished are passed over, one that was cut goes on. On further nodes of a job the ranks start without
    a notebook.
    """
    import papermill  # takes a second; only this command needs it

    path = config.find_config(config_name)
    recipe = config.load_recipe(path, overrides)
    count_processes(num_processes, recipe.device)  # says now, not after a minute, that there are too few GPUs
    for number, fold in enumerate(recipe.train_folds, start=1):
        run = Run(path, recipe, fold, tuple(overrides))
        print(f"fold {fold} ({number} of {len(recipe.train_folds)}): {run.folder}", flush=True)
        if int(os.environ.get("NODE_RANK", 0)) > 0:
            torchrun("kutils.train", run.arguments, num_processes=num_processes, log_dir=run.folder / "logs")
            continue
        name = "train" if recipe.stage == 1 else "refine"
        run.folder.mkdir(parents=True, exist_ok=True)
        parameters = {
            "recipe": str(path),
            "fold": fold,
            "num_processes": num_processes,
            "overrides": shlex.join(overrides),
        }
        papermill.execute_notebook(
            paths.repository_root() / "notebooks" / f"{name}.ipynb",
            run.folder / f"{name}.ipynb",
            parameters=parameters,
            cwd=str(paths.repository_root()),
            log_output=True,
            progress_bar=False,
        )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        end_with_parent()
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return 0
    parser = argparse.ArgumentParser(
        prog="dist_train.sh",
        description="Train every fold of a recipe on the GPUs of this machine, one fold after the other.",
        epilog=f"keys of a recipe, for key=value:\n{config.describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("num_processes", type=int, help="ranks on this machine: its number of GPUs")
    parser.add_argument("config", help="recipe file, as given or below the repository's conf/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change for these runs")
    arguments = parser.parse_args(argv)
    try:
        run_folds(arguments.num_processes, arguments.config, arguments.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

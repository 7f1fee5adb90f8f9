"""Plans one fold of a recipe and trains it on the ranks of this machine, from a notebook or the shell.

This module imports no torch: a notebook that launches ranks must not hold a GPU itself.
"""

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kutils.runs import folders, published_names, recipes
from kutils.runs.nodes import this_node
from kutils.system import paths
from kutils.system.children import SAVING_SECONDS, CommandFailed, end_with_parent, run_module

# also imported from here by notebooks and ranks
__all__ = ["CommandFailed", "end_with_parent", "run_module"]
KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "True or False"}  # of parameters
MEETINGS = 3  # attempts to connect to the first node, which may still be ending its last run


def check_parameters(cells: Sequence[str]) -> None:
    """Stop a notebook that was given a parameter it does not have; papermill itself only warns.

    Args:
        cells: IPython's `In`: the source of every cell that has run. Papermill's cell starts with `# Parameters`; the
            names assigned before it are the notebook's parameters. Without such a cell nothing is checked.
    Raises: ValueError naming a parameter that does not exist and the nearest that does, or a value of another type than
        the notebook gives the parameter: papermill's `-p name 2020` is a number, `-r name 2020` is text.
    """
    injected = [number for number, source in enumerate(cells) if source.startswith("# Parameters")]
    if not injected:
        return
    known = {name: statement for source in cells[: injected[0]] for name, statement in assignments(source).items()}
    for name, statement in assignments(cells[injected[-1]]).items():
        if name not in known:
            close = published_names.hint(name) or recipes.nearest(name, known)
            raise ValueError(f"this notebook has no parameter {name!r}{close} (it has {', '.join(sorted(known))})")
        annotation = getattr(known[name], "annotation", None)
        kind, given = annotation and ast.unparse(annotation), getattr(statement.value, "value", None)
        default = str(getattr(known[name].value, "value", ""))
        numbers = kind == "float" or (kind == "str" and default.replace(",", "").isdigit())  # "0,1": a list of numbers
        if kind and given is not None and type(given).__name__ not in (kind, "int" if numbers else kind):
            text = f"; papermill takes text by `-r {name} {given}`" if kind == "str" else ""
            raise ValueError(f"parameter {name} is {given!r}; it is {KINDS.get(kind, kind)}{text}")


def assignments(source: str) -> dict[str, ast.Assign | ast.AnnAssign]:
    """Names assigned at the top level of a cell, and where; none if the cell is not plain Python (magics)."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return {}
    found = {}
    for statement in statements:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    return found


@dataclass(frozen=True)
class Run:
    """One fold of one recipe, planned once: the launcher writes the plan to a file, which all ranks read."""

    config_path: Path
    recipe: recipes.Recipe
    fold: int
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder(self.fold)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def write(self) -> Path:
        """Write the plan below `logs/` of the run's folder; returns its file."""
        path = this_node().log_dir(self.folder / "logs") / "plan.json"
        content = {"config": str(self.config_path), "overrides": self.overrides, "fold": self.fold}
        paths.write_json(path, content | {"recipe": self.recipe.values()})
        return path


def read_plan(path: Path) -> Run:
    """Read a plan that `Run.write` wrote; ValueError naming the file if it is not a plan."""
    content = folders.read_run_json(path)
    if missing := {"config", "recipe", "fold", "overrides"} - set(content):
        raise ValueError(f"{path} is no planned run: it lacks {', '.join(sorted(missing))}")
    recipe = recipes.from_values(content["recipe"], path)
    return Run(Path(content["config"]), recipe, content["fold"], tuple(content["overrides"]))


def plan(config: str | Path, fold: int, overrides: Sequence[str]) -> Run:
    """Plan a fold of a recipe file; ConfigError for an unknown key or a wrong value, naming it."""
    if not isinstance(fold, int) or not 0 <= fold <= 9:
        raise ValueError(f"fold is {fold!r}; it is 0 to 9")
    path = recipes.find_config(config)
    return Run(path, recipes.load_recipe(path, overrides), fold, tuple(overrides))


def plan_run(model: str, stage: int, fold: int, overrides: str = "", recipe: str = "", planned: str = "") -> Run:
    """Plan a run from a notebook's parameters.

    Args:
        model, stage: select the recipe in `conf/`.
        overrides: `key=value` texts, separated by spaces.
        recipe: a recipe file, instead of the one for model and stage.
        planned: file of a plan, instead of all other parameters.
    Raises: ConfigError for an unknown model (naming the nearest), key or value.
    """
    if planned:
        return read_plan(Path(planned))
    return plan(recipe or recipes.find_recipe(model, stage), fold, shlex.split(overrides))


def ensure_datasets(recipe: recipes.Recipe) -> None:
    """Raise ValueError if data sets of the recipe are missing; the built-in `shapes` is made instead.

    Raises: ValueError naming what is missing, and the commands that make it.
    """
    if missing := paths.missing_datasets(name for name in recipe.datasets if name != "shapes"):
        raise ValueError(missing)
    if "shapes" in recipe.datasets and not (paths.input_dir() / "shapes.folds.json").is_file():
        run_module("kutils", "generate", "--shapes-dataset", "shapes")


def visible_gpus() -> int:
    """Number of GPUs that ranks could use, counted without initialising CUDA."""
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
    """Number of ranks on this machine: as wanted, or for 0 one per visible GPU, or one on the CPU.

    Raises: ValueError if a recipe for GPUs wants more ranks than GPUs are visible.
    """
    gpus = 0 if device == "cpu" else visible_gpus()
    if device == "cpu" or (device == "auto" and gpus == 0):
        if wanted > 1:
            print(f"no GPU is used: {wanted} ranks on the CPU (gloo)", flush=True)
        return wanted or 1
    if gpus < max(wanted, 1):
        raise ValueError(
            f"{max(wanted, 1)} GPUs are asked for and {gpus} are visible; start fewer processes, or train on the CPU "
            "with device=cpu (minutes become weeks for the large models)"
        )
    return wanted or gpus


def train_on_ranks(run: Run, num_processes: int = 0, hours: float = 0) -> None:
    """Train a planned run on the ranks of this machine, which read the plan from its file.

    Args:
        num_processes: ranks; 0: one per visible GPU, or one on the CPU.
        hours: after which the ranks save and stop; 0: no limit.
    """
    command = ["kutils", "train", "--plan", str(run.write())]
    ranks = count_processes(num_processes, run.recipe.device)
    torchrun(command, num_processes=ranks, log_dir=run.folder / "logs", hours=hours)


def torchrun(command: Sequence[str], *, num_processes: int, log_dir: Path, hours: float = 0) -> None:
    """Run `python -m <command>` as ranks of torchrun and show rank 0; every rank's log stays in `log_dir`.

    NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT make it one of several nodes. The rendezvous id is the name of the
    folder that holds `log_dir`, so that a late node of one run cannot join the next.

    After `hours` (0: no limit) the ranks save their state and end: Kaggle stops a session after 12 hours and then
    discards its output.

    Raises: CommandFailed with the last lines and the log of the rank that failed first. An interrupt reaches the ranks
        as SIGTERM and leaves them SAVING_SECONDS.
    """
    node = this_node()
    # torchrun would use PET_ variables as defaults of the arguments that are not given here
    environment = dict.fromkeys(name for name in os.environ if name.startswith("PET_"))
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVING_SECONDS)  # since torch 2.12; before, it is always 30 s
    torchrun_options = ["--standalone"]
    if node.count > 1:
        log_dir = node.log_dir(log_dir)
        environment["NODE_RANK"] = str(node.rank)
        torchrun_options = [*node.rendezvous, f"--rdzv-id={log_dir.parent.parent.name}"]
        print(f"node {node.rank} of {node.count} meets the others at {node.endpoint}, within 30 minutes", flush=True)
    log_dir.mkdir(parents=True, exist_ok=True)
    torchrun_options += [f"--nproc-per-node={num_processes}", "--log-dir", str(log_dir), "--tee", "3"]
    torchrun_options += ["--local-ranks-filter", "0", "-m", "kutils.system.children", *command]
    begun = set(log_dir.glob("*/attempt_*"))
    for attempt in range(1, MEETINGS + 1):
        try:
            ended = run_module(
                "torch.distributed.run", *torchrun_options, environment=environment, seconds=3600 * hours or None
            )
            break
        except CommandFailed as failure:
            lost = "RendezvousConnectionError" in "\n".join(failure.last_lines)
            if lost and node.rank > 0 and attempt < MEETINGS and begun == set(log_dir.glob("*/attempt_*")):
                print("the first node was still ending its last run; this one meets it again", flush=True)
                continue
            details = failed_rank(failure.last_lines, log_dir)
            if node.count > 1:
                details += f"\nif it lost a connection only, another node knows why: {log_dir.parent}/node*"
            raise CommandFailed(f"{failure}{details}", failure.last_lines) from None
    if not ended:
        print(
            f"stopped after {hours:g} hours; started again, it goes on from there (on Kaggle, with this version's "
            "output as an input)",
            flush=True,
        )


def failed_rank(last_lines: Sequence[str], log_dir: Path) -> str:
    """The rank that failed first, its last message and its log file, from torchrun's last lines; empty if none
    failed."""
    ranks = re.findall(
        r"^rank \d+ failed first: local rank (\d+), exit code (.*)$", "\n".join(last_lines), re.MULTILINE
    )
    if not ranks:
        return ""
    local_rank, exit_code = ranks[-1]
    logs = log_dir.glob(f"*/attempt_0/{local_rank}/stderr.log")
    log = max(logs, key=lambda path: path.stat().st_mtime, default=log_dir)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()] or [""]
    return f"\nfirst to fail here: local rank {local_rank}, exit code {exit_code}: {errors[-1]}\nits log: {log}"

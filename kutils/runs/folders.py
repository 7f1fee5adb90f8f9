"""Writes and reads a run's folder, and refuses to overwrite a run of another configuration."""

import dataclasses
import fnmatch
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from kutils.runs import recipes
from kutils.runs.recipe_keys import Recipe, spelled_now
from kutils.system import paths

# keys that may differ between two starts of one run: they do not change what is computed
OPERATIONAL = ("num_workers", "resume", "checkpoint_every_steps", "checkpoint_every_minutes", "profile_steps")
OPERATIONAL += ("model_dir", "run_dir")
# numbers that occur together in a line of metrics.jsonl
PAIRED = {"loss": ("lr",), "images_per_second": ("data_wait",), "cosine_similarity": ()}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pyarrow", "sentence-transformers")


def read_run_json(path: Path) -> dict:
    """The content of a run folder's JSON file; ValueError naming the file if it is damaged."""
    try:
        return paths.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; put it back, or move the run's folder away") from error


def find_finished(names: Sequence[str] = ()) -> list[Path]:
    """Folders of finished runs, in the order in which they finished: all in `working/runs/`, or the named ones.

    Args:
        names: of folders in `working/runs/` (which may hold `*`), or paths of run folders.
    Raises: ValueError for a name that no finished run has, naming the nearest that one has.
    """
    root = paths.working_dir() / "runs"
    results = filter(Path.is_file, root.glob("*/result.json"))
    all_finished = sorted(results, key=lambda path: (path.stat().st_mtime, path))
    known = [path.parent for path in all_finished if (path.parent / "config.yaml").is_file()]
    if not names:
        return known
    chosen: list[Path] = []
    for name in names:
        matching = [folder for folder in known if folder.name == name]  # it may hold brackets
        matching = matching or [folder for folder in known if fnmatch.fnmatch(folder.name, name)]
        if not matching and (Path(name) / "result.json").is_file():
            matching = [Path(name)]
        if not matching:
            close = recipes.nearest(name, [folder.name for folder in known])
            raise ValueError(f"no finished run {name!r} in {root}{close} ({len(known)} finished runs are there)")
        chosen += [folder for folder in matching if folder not in chosen]
    return chosen


def check_same_configuration(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError if the folder holds a run with another or a damaged configuration; a missing one is fine."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}  # of newer keys
    advice = "put it back, or start over with resume=never"
    try:
        saved = defaults | spelled_now(recipes.read_yaml(path))
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    now = decisive(recipe)
    if lacking := [key for key in now if saved[key] is dataclasses.MISSING]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}; {advice}")
    differing = [key for key in now if saved[key] != now[key]]
    if differing:
        changes = ", ".join(f"{key} was {saved[key]!r}, is {now[key]!r}" for key in differing[:5])
        raise ValueError(
            f"{folder} holds a run of another configuration ({changes}); give this one a name with prefix=NAME, "
            "or start over with resume=never, which moves the previous run and its checkpoints aside"
        )


def decisive(recipe: Recipe) -> dict:
    """The keys of a recipe that change the computation, with values in YAML's types."""
    return {key: value for key, value in yaml.safe_load(recipe.to_yaml()).items() if key not in OPERATIONAL}


def check_no_foreign_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Raise ValueError if a checkpoint of this name exists that is not this run's own."""
    if checkpoint.is_file() and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{checkpoint} exists and {folder}, the run that made it, does not; give this run a name of its own with "
            "prefix=NAME, or start over with resume=never, which moves the checkpoint aside"
        )


def move_aside(folder: Path, checkpoints: list[Path]) -> Path | None:
    """Move a previous run's files and checkpoints to `<name>.<n>` beside it; None if there is nothing to move.

    Logs and notebooks stay: the new run is already writing them.
    """
    files = [path for path in folder.glob("*") if path.name != "logs" and path.suffix != ".ipynb"]
    files += [path for path in checkpoints if path.is_file()]
    if not files:
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    aside.mkdir(parents=True)
    for path in files:
        path.rename(aside / path.name)
    return aside


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Raise ValueError if `folder` cannot be written, OSError if its disk has less free space than needed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written; choose another with model_dir= or run_dir=")
    paths.check_room(folder, needed_bytes, "choose another folder with model_dir= or run_dir=")


def start(folder: Path, recipe: Recipe, **facts) -> None:
    """Save the resolved configuration and the environment, before the first step.

    A resumed run keeps its first start time, `started`, beside its last one, `resumed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with paths.atomic_path(folder / "config.yaml") as temporary:
        temporary.write_text(recipe.to_yaml(), encoding="utf-8")
    path, now = folder / "environment.json", time.strftime("%Y-%m-%d %H:%M:%S")
    times = {"started": now}
    if (folder / "resume.pt").is_file():
        times = {"started": (paths.read_record(path) or {}).get("started", now), "resumed": now}
    environment = {
        **times,
        "command": " ".join(sys.orig_argv),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "machine": platform.node(),
        "packages": {name: version_of(name) for name in PACKAGES},
        **facts,
    }
    paths.write_json(path, environment)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The repository's commit, with `+changes` if there are uncommitted changes; None if it is unknown.

    The code data set on Kaggle has no repository; there a file beside the package holds the commit.
    """
    root = paths.code_root()
    if (root / paths.COMMIT_FILE).is_file():
        return (root / paths.COMMIT_FILE).read_text(encoding="utf-8").strip()
    if not paths.is_clone(root):  # an environment may lie in a repository that is not this one
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Metrics:
    """Writes `metrics.jsonl`: a line per log interval and per epoch; on resume, later lines are removed."""

    def __init__(self, path: Path, last_step: int, epochs_done: int):
        self.path = path
        lines = (line for line in read_metrics(path) if line["step"] <= last_step)
        kept = [line for line in lines if line["epoch"] <= epochs_done or "cosine_similarity" not in line]
        with paths.atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, **values) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """All complete lines; an unfinished last line (of a killed run) is left out.

    Raises: ValueError naming file and line if a line is no JSON or lacks a required number.
    """
    if not path.is_file():
        return []
    try:
        texts = path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and figures lack the curves") from error
    metrics = []
    for number, text in enumerate(texts, start=1):
        if text.startswith("{") and text.endswith("}"):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); remove it") from error
            needed = {"epoch", "step"} | {name for key in PAIRED if key in line for name in (key, *PAIRED[key])}
            if wrong := sorted(name for name in needed if not isinstance(line.get(name), (int, float))):
                raise ValueError(f"{path}, line {number} has no number for {', '.join(wrong)}; remove the line")
            metrics.append(line)
    return metrics

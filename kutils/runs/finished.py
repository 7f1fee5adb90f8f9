"""Reads a finished run's folder: result, speed, changes to its recipe, and the commands that repeat it."""

import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kutils.runs import folders, recipes
from kutils.runs.recipes import Recipe
from kutils.system import paths


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run reached: `result.json` in its folder. Cosines are means over validation rows."""

    prefix: str
    fold: int
    cosine_similarity: float  # of the best epoch
    cosine_similarity_clean: float | None  # over rows without a similar training prompt; None: rows are not marked
    best_epoch: int  # from 1
    epochs: int
    mean_prompt_baseline: float  # cosine if the mean training embedding is predicted for all rows
    validation_rows: int
    clean_rows: int | None
    unreadable_images: int  # of the training images
    updates: int
    seconds: float  # of training, over all starts of the run
    checkpoint: str  # the best epoch's file, relative to model_dir

    @property
    def gain(self) -> float:
        """Cosine minus the mean-prompt baseline."""
        return self.cosine_similarity - self.mean_prompt_baseline

    def summary(self) -> str:
        """The scores in one line."""
        clean = self.cosine_similarity_clean
        clean_text = f", {clean:.4f} on rows without a similar training prompt" if clean is not None else ""
        return (
            f"{self.prefix} fold {self.fold}: cosine {self.cosine_similarity:.4f} (epoch {self.best_epoch} of "
            f"{self.epochs}{clean_text}); mean-prompt baseline {self.mean_prompt_baseline:.4f}"
        )

    def write(self, folder: Path) -> None:
        paths.save_record(folder / "result.json", dataclasses.asdict(self))


def read_result(folder: Path) -> RunResult | None:
    """Read the result of a finished run; None if it is not finished. Raises ValueError for a damaged file."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    content, names = folders.read_run_json(path), [item.name for item in dataclasses.fields(RunResult)]
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return RunResult(**{name: content[name] for name in names})


@dataclass(frozen=True)
class FinishedRun:
    """All that the folder of a finished run holds."""

    folder: Path
    recipe: Recipe
    result: RunResult
    environment: dict  # empty where the file is gone
    metrics: list[dict]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def fold(self) -> int:
        return self.result.fold

    @property
    def pace(self) -> tuple[float, float]:
        """Images per second, and the share of time spent waiting for data, over all updates; NaN if none was logged.

        Log intervals are weighted by their time.
        """
        logged = [line for line in self.metrics if "images_per_second" in line]
        images = np.diff([line["step"] for line in logged], prepend=0) * self.recipe.global_batch_size
        seconds = images / np.array([line["images_per_second"] for line in logged])
        if not seconds.sum() > 0:
            return math.nan, math.nan
        waiting = sum(seconds * [line["data_wait"] for line in logged])
        return float(images.sum() / seconds.sum()), float(waiting / seconds.sum())


def read_run(folder: Path) -> FinishedRun:
    """Read a run folder; ValueError if it has no result, ConfigError if its configuration is not a recipe."""
    result = read_result(folder)
    if result is None:
        raise ValueError(f"{folder} holds no finished run (no result.json)")
    return FinishedRun(
        folder,
        recipes.load_recipe(folder / "config.yaml"),
        result,
        paths.read_record(folder / "environment.json") or {},  # it only informs
        folders.read_metrics(folder / "metrics.jsonl"),
    )


def recipe_file_of(run: FinishedRun) -> tuple[Path, Recipe] | None:
    """The recipe file that started the run, or the one for its model and stage if the run did not record it, and its
    recipe; None if it is gone."""
    try:
        if "config" in run.environment:
            path = recipes.find_config(run.environment["config"])
        else:  # a run of an earlier version, which did not record its file
            path = recipes.find_recipe(run.recipe.model, run.recipe.stage)
        return path, recipes.load_recipe(path)
    except recipes.ConfigError:
        return None


def changed_keys(run: FinishedRun, recipe: Recipe) -> list[str]:
    """Keys for which the run has another value than the recipe."""
    return [
        item.name for item in dataclasses.fields(Recipe) if getattr(run.recipe, item.name) != getattr(recipe, item.name)
    ]


def as_text(value) -> str:
    """A value of a recipe as it is written after `key=`."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def relative_to_repository(path: Path) -> Path:
    """A path relative to the repository if it is inside."""
    root = paths.code_root()
    return path.relative_to(root) if path.is_relative_to(root) else path


def command(run: FinishedRun, processes: int) -> str:
    """The command that trains the run again, from the repository root, with the recipe file's current content."""
    start = "python -m" if processes == 1 else f"torchrun --standalone --nproc-per-node {processes} -m"
    path, changes = run.folder / "config.yaml", []
    if source := recipe_file_of(run):
        path, recipe = relative_to_repository(source[0]), source[1]
        changes = [f"{key}={as_text(getattr(run.recipe, key))}" for key in changed_keys(run, recipe)]
    return f"{start} kutils train " + shlex.join(["--config", str(path), "--fold", str(run.fold), *changes])

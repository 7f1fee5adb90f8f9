"""Saves the state of a run, and continues an interrupted run from it."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kutils.data import datasets
from kutils.models import checkpoints
from kutils.runs import finished, folders
from kutils.runs.finished import RunResult
from kutils.runs.recipe_keys import Recipe, spelled_now
from kutils.system import paths
from kutils.system.ranks import Ranks
from kutils.training.meter import Interval


@dataclass
class State:
    """The progress of a run, over all its starts."""

    started: float = field(default_factory=time.monotonic)  # on this machine's clock; earlier starts move it back
    epoch: int = 0  # finished epochs, evaluation included
    step: int = 0  # finished updates
    best: float = -1.0  # validation cosine
    best_epoch: int = 0  # from 1
    best_clean: float | None = None  # validation cosine of the best epoch over clean rows
    seen: int = 0  # training images
    bad: list[tuple[int, str]] = field(default_factory=list)  # those that could not be read: row and reason
    block_rows: int = 0  # rows per shard, which the order of the training images depends on; 0: image files
    work: dict = field(default_factory=dict)  # as of `work_of`: what must not change between starts

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def count(self, interval: Interval) -> None:
        """Add the images of a log interval."""
        self.seen += interval.images
        self.bad += interval.bad

    def to_file(self) -> dict:
        """The values that `resume.pt` keeps under these names."""
        values = dataclasses.asdict(self) | {"seconds": self.seconds}
        del values["started"]
        return values


class ResumeFile:
    """`resume.pt` of a run folder: the state of a run, with weights, optimiser, loss scaler and random numbers."""

    def __init__(self, run_folder: Path, network, optimizer, scaler, ranks: Ranks, average=None):
        """`average` is the result of `averaging.start_average`."""
        self.path, self.ranks = run_folder / "resume.pt", ranks
        self.parts = {"model": network, "optimizer": optimizer, "scaler": scaler}
        self.parts |= {"average": average} if average else {}

    def exists(self) -> bool:
        return self.path.is_file()

    def load(self, state: State, data: datasets.PromptImages, recipe: Recipe) -> None:
        """Restore the state, weights, optimiser and random numbers of an interrupted run; without a file nothing
        changes.

        Raises: ValueError if the file is damaged, or if data or recipe have changed since the interruption.
        """
        work = work_of(recipe, data)
        block_rows = 0  # in files that lack it
        if self.exists():
            content = checkpoints.read(self.path)
            check_same_work(content.pop("work", work), work, self.path)  # files of earlier versions have none
            for name, part in self.parts.items():
                part.load_state_dict(content.pop(name))
            self.restore_random(content.pop("random"), content.pop("world_size"))
            state.started -= content.pop("seconds")
            block_rows = content.pop("block_rows", block_rows)
            for name, value in content.items():
                setattr(state, name, value)
            if block_rows != data.block_rows and self.ranks.is_main:
                print(
                    "warning: images were packed or unpacked since the run was cut: in the epoch it goes on with, some "
                    "prompts come twice and others not",
                    flush=True,
                )
        state.block_rows, state.work = data.block_rows, work

    def restore_random(self, random: list[dict], world_size: int) -> None:
        """Restore torch's generators, which drop path draws from, if the number of ranks is still the same."""
        ranks = self.ranks
        if world_size == ranks.world_size:
            torch.set_rng_state(random[ranks.rank]["cpu"])
            if ranks.device.type == "cuda" and "cuda" in random[ranks.rank]:
                torch.cuda.set_rng_state(random[ranks.rank]["cuda"], ranks.device)
        elif ranks.is_main:
            print(
                f"warning: cut with {world_size} ranks, going on with {ranks.world_size}: drop path is drawn anew",
                flush=True,
            )

    def save(self, state: State) -> None:
        """Write everything that the next start needs; to be called by every rank."""
        random = self.ranks.gather_objects(random_state(self.ranks))
        if self.ranks.is_main:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            common = {"random": random, "world_size": self.ranks.world_size}
            checkpoints.save(self.path, {**state.to_file(), **parts, **common})

    def remove(self) -> None:
        """Delete the file: it is four times the size of the checkpoint, and a finished run needs it no more."""
        self.path.unlink(missing_ok=True)


def work_of(recipe: Recipe, data: datasets.PromptImages) -> dict:
    """All that decides a run and must not change while it is cut: hashes of its data, and the recipe's keys."""
    return {"data": data.content_hashes, "recipe": folders.decisive(recipe)}


def check_same_work(saved: dict, now: dict, path: Path) -> None:
    """Raise ValueError naming what has changed: rows that the run has trained on could be validated."""
    before = {item.name: item.default for item in dataclasses.fields(Recipe)}  # of keys that came later
    before |= spelled_now(saved["recipe"])
    recipe = [key for key, value in now["recipe"].items() if before[key] != value]
    changed = [f"the recipe's {', '.join(recipe)}"] if recipe else []
    for name, hashes in now["data"].items():
        own = saved["data"].get(name, {})
        changed += [f"{kind} of {name}" for kind, value in hashes.items() if own.get(kind) != value]
    if list(saved["data"]) != list(now["data"]) and not changed:
        changed = ["the order of the data sets"]
    if changed:
        raise ValueError(
            f"{path} is of a run that was cut before these were changed: {'; '.join(changed)}. Put them back (input/ "
            "may hold the previous table as .tsv.bak), or start over with resume=never"
        )


def random_state(ranks: Ranks) -> dict:
    """torch's generators of this rank; augmentation and sampling need none, they are keyed by seed, epoch and row."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


# ---------------------------------------------------------------- before anything is loaded


def check_start(recipe: Recipe, fold: int, ranks: Ranks) -> RunResult | None:
    """Look at the run's folder: whether the run may start, and whether it has finished.

    With resume=never a previous run is moved aside first.

    Returns: the result of a finished run, else None.
    Raises: ValueError if the folder holds a run of another configuration, a checkpoint of this name belongs to another
        run, or not all nodes see the folder.
    """
    folder, best_path = recipe.run_folder(fold), recipe.checkpoint_path(fold)
    last_paths = recipe.last_checkpoints(fold).values()
    if ranks.is_main:  # up to 13 GB of what a killed start was saving
        for each in (folder, best_path.parent):
            paths.remove_leftovers(each)
        if recipe.resume == "never" and (aside := folders.move_aside(folder, [best_path, *last_paths])):
            print(f"the previous run is now {aside}", flush=True)
    ranks.barrier()
    check_same_folder(folder, ranks)
    folders.check_same_configuration(folder, recipe)
    folders.check_no_foreign_checkpoint(folder, best_path)
    result = finished.read_result(folder)
    if result and ranks.is_main:
        print(f"already finished: {result.summary()}\n(resume=never trains it again)", flush=True)
        (folder / "resume.pt").unlink(missing_ok=True)  # of a run that was killed after its result
    return result


def check_same_folder(folder: Path, ranks: Ranks) -> None:
    """Raise ValueError on every rank if nodes do not share the run folder: only one of them could resume."""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # torchrun's number of nodes
        return
    mark = folder / ranks.gather_objects(f".shared-{os.getpid()}-{time.time_ns()}")[0]
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    ranks.barrier()
    blind = [rank for rank, sees in enumerate(ranks.gather_objects(mark.is_file())) if not sees]
    if ranks.is_main:
        mark.unlink()
    if blind:
        raise ValueError(
            f"ranks {', '.join(map(str, blind))} do not see what rank 0 writes to {folder}: the nodes must share "
            "working/runs and working/models, or be given such places by run_dir= and model_dir="
        )

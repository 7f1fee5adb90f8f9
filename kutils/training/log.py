"""Logs a run: metrics.jsonl, TensorBoard, progress lines, and advice if the run waits for data."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from kutils.runs import folders
from kutils.runs.recipes import Recipe
from kutils.system import progress
from kutils.system.devices import machine_facts
from kutils.system.ranks import Ranks
from kutils.training import profiling
from kutils.training.meter import Interval
from kutils.training.resume import State


class RunLog:
    """The log of a run that trains. Rank 0 writes it; on other ranks every method does nothing."""

    def __init__(self, run_folder: Path, recipe: Recipe, state: State, total_steps: int, ranks: Ranks):
        """Open the log at `state`; lines of later updates, left by an interrupted run, are removed."""
        self.recipe, self.is_main = recipe, ranks.is_main
        if not self.is_main:
            return
        self.machine, self.data_wait = machine_facts(ranks.device), profiling.DataWait()
        self.metrics = folders.Metrics(run_folder / "metrics.jsonl", state.step, state.epoch)
        self.board = SummaryWriter(run_folder / "tensorboard", purge_step=state.step)
        self.progress = progress.Progress(total_steps, state.step, self.machine.get("gpu_gb"))

    def say(self, text: str) -> None:
        """Show a text."""
        if self.is_main:
            self.progress.say(text)

    def updates(self, interval: Interval, state: State, lr: float) -> None:
        """Log the updates since the last line."""
        if not self.is_main:
            return
        values = {"loss": interval.loss, "lr": lr, "images_per_second": interval.images_per_second}
        values |= {"data_wait": interval.data_wait}
        if interval.gpu_memory_gb is not None:
            values["gpu_memory_gb"] = interval.gpu_memory_gb
        self.metrics.add(epoch=state.epoch + 1, step=state.step, **values)
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, state.step)
        self.progress.show(state.step, f"epoch {state.epoch + 1}/{self.recipe.epochs}", values)
        if not interval.first and (share := self.data_wait.add(interval)):
            self.say(
                profiling.waiting_advice(self.recipe, share, self.machine["cores"], self.machine["ranks_per_machine"])
            )

    def evaluation(self, state: State, score: float, clean_score: float | None, scores: dict[str, float]) -> None:
        """Log the validation cosine after an epoch.

        Args:
            scores: `raw` and `ema`, if the run has both; `score` is the higher one.
        """
        if not self.is_main:
            return
        each = {f"cosine_similarity_{kind}": value for kind, value in scores.items()} if len(scores) > 1 else {}
        both = {"cosine_similarity": score, "cosine_similarity_clean": clean_score}
        self.metrics.add(epoch=state.epoch, step=state.step, **both, **each)
        for name, value in ({"cosine_similarity": score} | each).items():
            self.board.add_scalar(f"validation/{name}", value, state.step)
        parts = f" ({', '.join(f'{kind} {value:.4f}' for kind, value in scores.items())})" if each else ""
        self.say(f"epoch {state.epoch}/{self.recipe.epochs}: validation cosine {score:.4f}{parts}")

    def close(self) -> None:
        if self.is_main:
            self.board.close()
            self.progress.close()

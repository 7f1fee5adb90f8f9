"""Decides after each update, on all ranks alike, whether to log, save or stop."""

import signal
import time
from dataclasses import dataclass

from kutils.runs.recipes import Recipe
from kutils.system import children
from kutils.system.ranks import Ranks
from kutils.training.meter import Interval

POLL_SECONDS = 5.0  # between two looks for a signal: most of a cluster's grace period is left for saving


@dataclass(frozen=True)
class Due:
    """What is due after an update, beside a log line."""

    save: bool
    stop: bool


class Clock:
    """Knows when a log line, a saved state and the end of the run are due.

    A log line is due ten times an epoch or more. A state is saved every so many updates and minutes, as the recipe
    says; the end of an epoch saves it anyway. SIGTERM or SIGINT on any rank stops the run.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int):
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.log_interval = max(1, min(50, steps_per_epoch // 10))
        self.poll_interval = 1  # updates between two exchanges with the other ranks
        self.signals = watch_for_signals()
        self.saved()

    def saved(self) -> None:
        """Measure checkpoint_every_minutes from now on."""
        self.saved_at = time.monotonic()

    def adapt(self, interval: Interval) -> None:
        """Let the ranks exchange signals about every POLL_SECONDS, at the speed of the last interval."""
        self.poll_interval = max(1, int(POLL_SECONDS * interval.updates_per_second))

    def due(self, step: int, ranks: Ranks) -> Due | None:
        """What is due after update number `step` (from 1), the same on every rank; None: not even a log line."""
        epoch_ends = step % self.steps_per_epoch == 0
        every = self.recipe.checkpoint_every_steps
        save = every > 0 and step % every == 0
        log = step % self.log_interval == 0 or epoch_ends or save
        stop = too_long = False
        if log or step % self.poll_interval == 0:
            minutes = self.recipe.checkpoint_every_minutes
            minutes = min(minutes, 1.0) if epoch_ends else minutes  # no signal is noticed during an evaluation
            too_long = 0 < 60 * minutes < time.monotonic() - self.saved_at
            stop, too_long = ranks.any(bool(self.signals), too_long)
        if not (log or stop or too_long):
            return None
        return Due(save=stop or too_long or (save and not epoch_ends), stop=stop)


def watch_for_signals() -> list[int]:
    """Keep SIGTERM and Ctrl-C from ending the process; returns a list to which those that come are added.

    A second Ctrl-C ends it, without saving. Where SIGINT is ignored, as in a script's background job, it stays so.
    """
    received: list[int] = []

    def note(number: int, frame) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    children.handle_signals(note)
    return received

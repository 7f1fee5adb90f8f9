"""Decides after each update, equally on all ranks, whether to log, save or stop."""

import signal
import time
from dataclasses import dataclass

from kutils.runs.recipes import Recipe
from kutils.system import children
from kutils.system.ranks import Ranks
from kutils.training.meter import Interval

POLL_SECONDS = 5.0  # between two checks for a signal: short, to leave most of a cluster's grace period for saving


@dataclass(frozen=True)
class Due:
    """What is due after an update, in addition to a log line."""

    save: bool
    stop: bool


class Clock:
    """Knows when a log line, a saved state and the end of the run are due.

    A log line is due at least ten times an epoch. The state is saved every so many updates or minutes, as the recipe
    says, and at the end of each epoch. SIGTERM or SIGINT on any rank stops the run.
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
        """What is due after update number `step` (from 1), equal on all ranks; None if nothing is, not even a log
        line."""
        epoch_ends = step % self.steps_per_epoch == 0
        every = self.recipe.checkpoint_every_steps
        save = every > 0 and step % every == 0
        log = step % self.log_interval == 0 or epoch_ends or save
        stop = too_long = False
        if log or step % self.poll_interval == 0:
            minutes = self.recipe.checkpoint_every_minutes
            minutes = min(minutes, 1.0) if epoch_ends else minutes  # signals are not checked during an evaluation
            too_long = 0 < 60 * minutes < time.monotonic() - self.saved_at
            stop, too_long = ranks.any(bool(self.signals), too_long)
        if not (log or stop or too_long):
            return None
        return Due(save=stop or too_long or (save and not epoch_ends), stop=stop)


def watch_for_signals() -> list[int]:
    """Keep SIGTERM and Ctrl-C from ending the process; returns a list to which received signals are appended.

    A second Ctrl-C ends the process without saving. If SIGINT is ignored, as in a script's background job, it stays
    ignored.
    """
    received: list[int] = []

    def note(number: int, frame) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    children.handle_signals(note)
    return received

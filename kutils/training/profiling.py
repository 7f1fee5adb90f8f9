"""Profiles some updates, measures how long a run waits for data, and advises what to change."""

import atexit
import gzip
import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from kutils.runs import finished
from kutils.runs.recipes import Recipe
from kutils.system import paths
from kutils.training.meter import Interval

PARTS = ("waiting for data", "augmentation and copy", "forward", "backward", "optimiser")  # labels in the trace
EVALUATION = "evaluation"  # label of an evaluation between two updates, which is not counted
IDLE = "idle"
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace
WARMUP = (3, 2)  # updates before a profile: not recorded, and recorded but discarded
MOST_OPERATIONS = 10  # in the summary
MUCH_WAITING = 0.1  # share of the time from which advice is printed
JUDGED_SECONDS, JUDGED_UPDATES = 20.0, 20  # window over which waiting is averaged: whichever is reached first


# ---------------------------------------------------------------- a profile of some updates


class UpdateProfiler:
    """Profile some updates of this process, then write `<run folder>/profile/trace.json.gz` and print a summary.

    An existing trace is kept: the next one is `trace.2.json.gz`. Traces open in https://ui.perfetto.dev.
    """

    def __init__(self, folder: Path, num_updates: int, left: int, device: torch.device, say: Callable[[str], None]):
        """Begin, before the first update.

        Args:
            num_updates: to profile, after WARMUP.
            left: remaining updates of the run; if there are too few, the warm-up is shortened first.
        """
        self.folder, self.device, self.say, self.done = folder, device, say, 0
        self.profile = None
        if not num_updates:
            return
        self.num_updates = min(num_updates, left)
        spare = left - self.num_updates
        recorded = min(WARMUP[1], spare)
        passed = min(WARMUP[0], spare - recorded)
        self.first = passed + recorded
        if left < num_updates + sum(WARMUP):
            say(f"updates left: {left}; profiled: {self.num_updates}, after a warm-up of {self.first}")
        if not self.num_updates:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # said above
            plan = schedule(wait=passed, warmup=recorded, active=self.num_updates, repeat=1)
        if device.type == "cpu":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library warns that there is no GPU
        self.profile = profile(activities=activities, schedule=plan, on_trace_ready=self.finish)
        self.profile.start()
        atexit.register(self.stop)

    def step(self) -> None:
        """To be called after each update; after the last one, write the trace and print the summary."""
        if self.profile is None:
            return
        self.done += 1
        # else the GPU's unfinished work would count for the wrong update
        if self.device.type == "cuda" and self.done in (self.first, self.first + self.num_updates):
            torch.cuda.synchronize(self.device)
        self.profile.step()
        if self.done == self.first + self.num_updates:
            self.stop()

    def stop(self) -> None:
        """Stop the profiler without a trace if the run ends early: with an open profile the process would crash."""
        if self.profile is not None:
            self.profile.on_trace_ready = None
            self.profile.stop()
            self.profile = None

    def finish(self, result: profile) -> None:
        """Write the trace, and print the summary."""
        path, number = self.folder / "profile" / "trace.json.gz", 1
        while path.exists():
            number += 1
            path = path.with_name(f"trace.{number}.json.gz")
        with paths.atomic_path(path) as temporary:
            result.export_chrome_trace(str(temporary))
        events = read_trace(path)
        measured = shares(events)
        lines = [describe_shares(measured, self.num_updates), costly_operations(result.key_averages())]
        if self.device.type == "cuda" and IDLE not in measured:
            lines.append("nothing of the GPU was recorded (is CUPTI allowed here?): times are the host's")
        lines.append(f"{path} opens in https://ui.perfetto.dev and chrome://tracing")
        self.say("\n".join(lines))


def read_trace(path: Path) -> list[dict]:
    """Events of a trace, as the profiler has written it."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)["traceEvents"]


def shares(events: list[dict]) -> dict[str, float]:
    """The share of the profiled updates' time that each part took, in [0, 1], without evaluations between them.

    Returns: PARTS -> share. On a CPU they do not overlap. With a GPU, waiting is time of the host; the other parts are
        GPU time of the kernels launched in them, and IDLE is the time without kernels.
    """
    marks = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            marks.setdefault(event["name"].partition("#")[0], []).append(span(event))
    evaluations = marks.get(EVALUATION, [])
    total = covered(marks["ProfilerStep"]) - covered(evaluations)
    by_part = {part: covered(marks.get(part, [])) / total for part in PARTS}
    work = [event for event in events if event.get("cat") in GPU_WORK]
    if not work:
        return by_part
    # a kernel's part is found by the time of its launch: autograd launches from a thread without labels
    launches = (event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    launched = {argument(event, "correlation"): event["ts"] for event in launches}
    times = np.array([launched.get(argument(event, "correlation"), -np.inf) for event in work])
    spans = np.array([span(event) for event in work])
    for part in PARTS[1:]:
        by_part[part] = covered(spans[inside(times, marks.get(part, []))]) / total
    return by_part | {IDLE: 1 - covered(spans[~inside(times, evaluations)]) / total}


def span(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def argument(event: dict, name: str) -> int | None:
    return event.get("args", {}).get(name)


def covered(spans: Sequence[tuple[float, float]] | np.ndarray) -> float:
    """Total length of the union of spans (begin, end)."""
    length, reached = 0.0, -np.inf
    for begin, end in sorted(map(tuple, spans)):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def inside(times: np.ndarray, spans: list[tuple[float, float]]) -> np.ndarray:
    """bool [n]: whether each time lies in one of the spans, which do not overlap."""
    if not spans:
        return np.zeros(len(times), bool)
    begins, ends = np.array(sorted(spans)).T
    number = np.searchsorted(begins, times, side="right") - 1
    return (number >= 0) & (times <= ends[number])


def describe_shares(by_part: dict[str, float], num_updates: int) -> str:
    """The shares as a line to print."""
    if IDLE in by_part:
        parts = ", ".join(f"{name} {by_part[name]:.0%}" for name in (*PARTS[1:], IDLE))
        return f"{num_updates} updates profiled: {PARTS[0]} {by_part[PARTS[0]]:.0%} of the time; of the GPU's, {parts}"
    parts = ", ".join(f"{name} {by_part[name]:.0%}" for name in PARTS)
    return f"{num_updates} updates profiled: {parts}, the rest {max(0.0, 1 - sum(by_part.values())):.0%}"


def costly_operations(averages: Iterable[FunctionEventAvg]) -> str:
    """A table of the operations with the most self time: on the GPU if there is one, else on the CPU."""
    measured = [average for average in averages if not average.is_user_annotation]
    operations = [average for average in measured if average.device_type == DeviceType.CPU]
    work = sum(average.self_device_time_total for average in measured if average.device_type != DeviceType.CPU)
    own_time = attrgetter("self_device_time_total" if work else "self_cpu_time_total")
    total = work or sum(map(own_time, operations))
    lines = [f"{'share of ' + ('GPU' if work else 'CPU') + ' time':>18} {'ms':>10} {'calls':>9}  operation"]
    for average in sorted(operations, key=own_time, reverse=True)[:MOST_OPERATIONS]:
        own = own_time(average)
        lines.append(f"{own / total:>18.1%} {own / 1000:>10.1f} {average.count:>9,}  {average.key[:80]}")
    return "\n".join(lines)


# ---------------------------------------------------------------- waiting for data


class DataWait:
    """Reports once that a run waits much for data, averaged over some time so that short delays do not count."""

    def __init__(self):
        self.waited = self.seconds = 0.0
        self.updates, self.reported = 0, False

    def add(self, interval: Interval) -> float | None:
        """Add a log interval; returns the share of waiting the first time it exceeds MUCH_WAITING, else None."""
        self.waited += interval.data_wait * interval.seconds
        self.seconds += interval.seconds
        self.updates += interval.updates
        if self.reported or (self.seconds < JUDGED_SECONDS and self.updates < JUDGED_UPDATES):
            return None
        share = self.waited / self.seconds
        self.waited, self.seconds, self.updates = 0.0, 0.0, 0
        self.reported = share > MUCH_WAITING
        return share if self.reported else None


def waiting_advice(recipe: Recipe, share: float, cores: int | None, ranks: int | None) -> str:
    """Advice for a run that waits for data.

    Args:
        share: of the time, spent waiting.
        cores, ranks: of one machine; None where they are not known.
    """
    from kutils.data.shards import shards_folder  # imports PyArrow, which the profiler does not need

    workers, advice = recipe.num_workers, [f"{share:.0%} of the time went by in waiting for images."]
    if cores is None or ranks is None:
        advice.append(f"More num_workers than {workers} help where there are cores for them.")
    else:
        shared = f"{cores} core{'s' * (cores > 1)} for {ranks} rank{'s' * (ranks > 1)}"
        wanted = min(cores // ranks, max(1, 2 * workers))
        more = f"num_workers={wanted} instead of {workers} would help"
        advice.append(f"{shared}: {more if wanted > workers else f'none is left for more than num_workers={workers}'}.")
    tables = [paths.input_dir() / f"{name}.tsv" for name in recipe.datasets]
    files = [str(finished.relative_to_repository(path)) for path in tables if not shards_folder(path).is_dir()]
    if files:
        size = recipe.input_size * 7 // 6  # larger than the input, so that crops stay sharp
        packing = shlex.join(["kutils", "shards", *files, "--size", str(size)])
        advice.append(f"Images packed at the size of training load faster: {packing}")
    else:
        advice.append("The images are packed already: a faster disk or more cores would help.")
    return " ".join(advice)

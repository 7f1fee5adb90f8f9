"""Times sections of the benchmark, and keeps their results in `working/benchmark/results.json`.

A section is a function that returns entries. Loading and training are compared with `kutils/benchmarks/published.py`.
"""

import importlib
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

import torch

from kutils.runs import launch, recipes
from kutils.system import paths

QUICK = ("loader", "step", "differences", "predict_ensemble", "nearest_prompts")  # 5 minutes together on two cores
LEAST_SECONDS = 0.5  # of work between two looks at the clock
SECTIONS = (
    *QUICK,
    "open_5m_rows",
    "embed_prompts",
    "similar_pairs",
    "grown_pairs",
    "folds",
    "check_images",
    "packed_shards",
    "import_pairs",
)


# ---------------------------------------------------------------- entries


@dataclass(frozen=True)
class Entry:
    """One line of the results; the medians of what was measured."""

    name: str
    unit: str
    ours: float
    reference: float | None  # of the published or plain implementation, on the same machine and data
    ratio: float | None  # how many times better than the reference
    spread: float  # largest minus smallest of ours, as a share of the median
    machine: str


def make_entry(
    name: str, unit: str, ours: Sequence[float], reference: Sequence[float] = (), *, more: bool = False
) -> Entry:
    """Make an entry from repeated measurements; without a reference there is no ratio.

    Args:
        more: more is better (a rate), and `ratio` is ours / reference; else it is reference / ours.
    """
    middle = statistics.median(ours)
    other = statistics.median(reference) if reference else None
    ratio = None
    if reference and middle and other:
        ratio = middle / other if more else other / middle
    spread = (max(ours) - min(ours)) / middle if middle else 0.0
    return Entry(name, unit, middle, other, ratio, spread, machine_name())


def machine_name() -> str:
    """Processor, cores, memory and GPU of this machine."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [model[1] if model else "CPU", f"{os.cpu_count()} cores", f"{gigabytes:.0f} GB"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)


def choose_sections(sections: str) -> list[str]:
    """The sections of a comma-separated list, or `quick` or `all`; ValueError for one that there is not."""
    if sections.strip() in ("quick", "all"):
        return list(QUICK if sections.strip() == "quick" else SECTIONS)
    chosen = recipes.split_names(sections)
    for name in chosen:
        if name not in SECTIONS:
            raise ValueError(f"no section {name!r}{recipes.nearest(name, SECTIONS)} (sections: {', '.join(SECTIONS)})")
    return chosen


def results_path() -> Path:
    return paths.working_dir() / "benchmark" / "results.json"


def save_entries(entries: Sequence[Entry]) -> None:
    """Add entries to the results; those of the same name are replaced."""
    items = {item["name"]: item for item in read_results()} | {item.name: asdict(item) for item in entries}
    paths.write_json(results_path(), {"entries": list(items.values())})


def read_results() -> list[dict]:
    """Read all entries, in the order in which they were first measured; none if there is no file."""
    path = results_path()
    return json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []


def format_results() -> str:
    """All entries as a table to print, under the machine that they are from."""
    lines = []
    for machine, entries in itertools.groupby(sorted(read_results(), key=itemgetter("machine")), itemgetter("machine")):
        rows = [("name", "unit", "ours", "reference", "ratio", "spread")]
        for item in entries:
            numbers = [format_number(item[key]) for key in ("ours", "reference", "ratio")]
            rows.append((item["name"], item["unit"], *numbers, f"{item['spread']:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [machine] + ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join(lines)


def format_number(value: float | None) -> str:
    """A number with two decimals, or two digits if it is small; empty for None."""
    if value is None:
        return ""
    return f"{value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


# ---------------------------------------------------------------- time


def alternate(repeats: int, *measure: Callable[[], float]) -> list[list[float]]:
    """Call functions alternately, `repeats` times, so that slow moments of the machine affect all. Returns their
    results."""
    results = [[] for _ in measure]
    for _ in range(repeats):
        for values, once in zip(results, measure, strict=True):
            values.append(once())
    return results


def repetitions(work: Callable[[], object], device: torch.device) -> int:
    """How many calls of `work` take LEAST_SECONDS; calls it twice to find out."""
    timed(work, 1, device)
    return max(1, round(LEAST_SECONDS / timed(work, 1, device)))


def timed(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one call of `work`, averaged over `count` calls in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- a process of its own


def in_child(function: Callable[..., dict], *arguments: str, **environment: str) -> dict:
    """Call a module's function with texts in a new process, in which nothing is left from earlier work.

    A command, since a process that is not forked would run a script, which the notebook can be, once more.

    Args:
        environment: variables to set for the process.
    Returns: what the function returns, through JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, call = Path(folder, "result.json"), (function.__module__, function.__name__)
        launch.run_module("kutils.benchmarks.measuring", *call, str(result), *arguments, environment=environment)
        return json.loads(result.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- memory


def private_megabytes(process: int | str = "self") -> float:
    """Memory of a process that no file holds and that it shares with no other process: MB of 10**6 bytes.

    Pages of mapped files are left out: the system keeps one copy for all processes and may drop it.
    """
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(re.search(r"^Private_Dirty:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024 / 1e6


def anonymous_megabytes() -> float:
    """Private memory of this process in MB, faster to read (microseconds); valid as long as it has not forked."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024 / 1e6


@contextmanager
def peak_megabytes() -> Iterator[list[float]]:
    """Yields a list whose one number is, after the block, the most memory that was held within: a look per 2 ms."""
    peak, done = [anonymous_megabytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def forget_files(folder: Path) -> None:
    """Ask the system to drop its copies of all files of a folder, so that the next reader waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":  # of `in_child`
    module, name, result, *arguments = sys.argv[1:]
    paths.write_json(result, getattr(importlib.import_module(module), name)(*arguments))

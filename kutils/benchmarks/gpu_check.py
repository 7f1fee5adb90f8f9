"""Checks and measures everything that needs a GPU, within minutes: `kutils gpu-check`, `make gpu`.

Needs torch, torchvision and timm alone. Each part is a process of its own with a time limit: what crashes, or hangs,
loses nothing of what the others measured. This module imports no torch: it must not hold a GPU itself.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from kutils.benchmarks import gpu_report
from kutils.benchmarks.gpu_report import Setting
from kutils.runs import launch, recipes
from kutils.system import paths
from kutils.system.children import CommandFailed, end_with_parent, interrupt_once

PARTS = {  # in order of worth: the most seconds that each may take of MINUTES
    "tests": 60,
    "convnext_large": 100,
    "several_gpus": 100,
    "vit_large": 45,
    "eva02_large": 60,
    "convnext_xxlarge": 80,
    "loader": 70,
    "pairs": 150,
    "prediction": 60,
    "resume": 40,
    "embedding": 40,
    "compile": 150,
}
MINUTES = 8.0
LEAST_SHARE = 1 / 6  # a part is not started if less than this share of its time limit is left
STOP_SECONDS = 3  # between SIGTERM and SIGKILL
MODULE = "kutils.benchmarks.gpu_parts"  # its `run_part` is what the processes call


def check(setting: Setting, chosen: Sequence[str], minutes: float) -> None:
    """Run parts one after the other; each leaves its record.

    Args:
        setting: how; its folder holds the records.
        minutes: for all together; a part gets its limit in proportion, and no more than what is left.
    """
    deadline = time.monotonic() + 60 * minutes
    for name in chosen:  # remove records of an earlier call
        for kind in ("json", "log"):
            (setting.folder / f"{name}.{kind}").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")  # which imports torch once for all parts
    context.set_forkserver_preload([MODULE])
    ready = context.Process(target=int)
    ready.start()
    ready.join(60 * minutes / 4)  # the import, perhaps from a slow disk, must not count for a part's limit
    for number, name in enumerate(chosen, start=1):
        limit, left = PARTS[name] * minutes / MINUTES, deadline - time.monotonic()
        if left < LEAST_SHARE * limit:
            record = unfinished(setting, name, f"not started: {max(0.0, left):.0f} s were left", "skipped")
        else:
            record = start_part(context, setting, name, min(limit, left))
        result = f"{record['status']} after {record['seconds']:.0f} s"
        print(f"{number} of {len(chosen)}, {name}: {result}{record['reason'] and ': '}{record['reason']}", flush=True)


def read_records(setting: Setting) -> list[dict]:
    """The record of each part on this card, also from earlier calls; a part that was stopped counts as failed."""
    records = []
    for name in PARTS:
        record = paths.read_record(setting.folder / f"{name}.json")
        if record and (record["card"], record["tiny"]) == (setting.card, setting.tiny):
            stopped = record["status"] == "running"
            records.append(unfinished(setting, name, "it was stopped") if stopped else record)
    return records


def start_part(context, setting: Setting, name: str, limit: float) -> dict:
    """Run one part, kill it and its children at its time limit, and return its record in any case."""
    process = context.Process(target=call, args=(MODULE, name, setting))
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:  # also at an interrupt
        end_group(process)
    record = paths.read_record(setting.folder / f"{name}.json")
    if late:
        return unfinished(setting, name, f"it took more than its {limit:.0f} s")
    if record is None or record["status"] == "running":
        return unfinished(setting, name, describe_exit(process.exitcode))
    return record


def call(module: str, name: str, setting: Setting) -> None:
    """Run in a part's process: its children end with it, and its output goes into its log."""
    os.setsid()
    end_with_parent()
    with (setting.folder / f"{name}.log").open("wb", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    importlib.import_module(module).run_part(name, setting)


def end_group(process) -> None:
    """Send SIGTERM, then SIGKILL, to a part and its children."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(ProcessLookupError):
            if process.is_alive():  # it has no process group of its own yet; or it is just ending
                os.kill(process.pid, number)
        process.join(seconds)


def describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code} and no result"


def unfinished(setting: Setting, name: str, reason: str, status: str = "failed") -> dict:
    """The record of a part that did not finish: its measurements so far, and the last line of its log."""
    path, log = setting.folder / f"{name}.json", setting.folder / f"{name}.log"
    empty = {"part": name, "card": setting.card, "tiny": setting.tiny, "seconds": 0.0}
    empty |= {"entries": [], "recipes": [], "notes": []}
    lines = log.read_text("utf-8", errors="replace").split("\n") if status == "failed" and log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    reason += f"; its last line: {last[:200]}" if last else ""
    record = empty | (paths.read_record(path) or {}) | {"status": status, "reason": reason}
    paths.write_json(path, record)
    return record


def card_and_versions(device: str, gpus: int) -> dict:
    """Card, driver and versions."""
    facts = {"card": "no GPU" if device == "cpu" else "a GPU that nvidia-smi does not name"}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        if device == "cuda" and (lines := subprocess.check_output(query, text=True, timeout=60).splitlines()):
            facts["card"], facts["memory"], facts["driver"] = (cell.strip() for cell in lines[0].split(",", 2))
    facts |= {"gpus": gpus, "cores": os.cpu_count(), "Python": platform.python_version()}
    for name in ("torch", "torchvision", "timm"):
        with suppress(metadata.PackageNotFoundError):
            facts[name] = metadata.version(name)
    return facts


def count_gpus() -> int:
    """Visible GPUs, by nvidia-smi, or by the driver's devices where there is no nvidia-smi."""
    return launch.visible_gpus() or (
        0 if "CUDA_VISIBLE_DEVICES" in os.environ else len(list(Path("/dev").glob("nvidia[0-9]*")))
    )


def save_results(folder: Path, machine: dict, records: Sequence[dict], price: float) -> str:
    """Write `gpu.json` and `gpu.md` into the results' folder; returns the tables."""
    content = gpu_report.summary(machine, records, price)
    paths.write_json(folder / "gpu.json", content)
    text = gpu_report.markdown(content)
    with paths.atomic_path(folder / "gpu.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils gpu-check",
        description="Say within minutes whether all that needs a GPU works on this one, how fast it is, and what "
        "a fold of each recipe takes. It needs torch, torchvision and timm, no network and no data.",
        epilog=f"parts, in order of worth: {', '.join(PARTS)}. Results: gpu.md and gpu.json in the folder, and a "
        "record and a log of each part.",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time limit of all parts together (default: 8.0)"
    )
    parser.add_argument("--output", type=Path, help="folder of results (default: working/gpu_check)")
    device = "cpu goes with --tiny (default: cuda)"
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=device)
    parser.add_argument(
        "--tiny", action="store_true", help="try every part with tiny networks and data; its numbers mean nothing"
    )
    parser.add_argument("--parts", default="", help="names of parts to run, separated by commas (default: all)")
    parser.add_argument("--price", type=float, help="of one GPU per hour, to compute the cost of each recipe")
    arguments = parser.parse_args(argv)
    chosen = recipes.split_names(arguments.parts) or list(PARTS)
    for name in chosen:
        if name not in PARTS:
            raise ValueError(f"no part {name!r}{recipes.nearest(name, PARTS)} (parts: {', '.join(PARTS)})")
    if arguments.device == "cpu" and not arguments.tiny:
        raise ValueError("on a CPU the large networks take hours; --device cpu --tiny runs every part with stand-ins")
    if not 0 < arguments.minutes < float("inf"):
        raise ValueError(f"--minutes {arguments.minutes:g}: give more than 0")
    gpus = count_gpus() if arguments.device == "cuda" else 0
    if arguments.device == "cuda" and not gpus:
        raise ValueError("no GPU is visible; --device cpu --tiny runs every part with stand-ins")
    folder = (arguments.output or paths.working_dir() / "gpu_check").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    search_path = filter(None, [str(paths.code_root()), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(search_path)  # where the parts find this package
    os.environ |= {"KUTILS_WORKING": str(folder / "made_working"), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    machine = card_and_versions(arguments.device, gpus)
    setting = Setting(arguments.device, arguments.tiny, machine["card"], gpus, folder)
    interrupt_once("stopping: what was measured is written\n")
    try:
        check(setting, [name for name in PARTS if name in chosen], arguments.minutes)
    finally:
        records = read_records(setting)
        report = save_results(folder, machine, records, arguments.price or 0.0)
        print(f"\n{report}\nin {folder}: gpu.md, gpu.json", flush=True)
        for path in folder.glob("made_*"):
            shutil.rmtree(path, ignore_errors=True)
    if failed := [record["part"] for record in records if record["status"] == "failed"]:
        raise CommandFailed(f"{len(failed)} of {len(records)} parts failed: {', '.join(failed)}")
    return 0

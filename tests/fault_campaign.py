"""Does to the commands what machines do to them, at random, and counts what comes out: `make test-faults`.

Kills and signals at random moments, damaged files, full and read-only disks, a small /dev/shm, 32 open files, output in
ASCII, the same command twice at once. A case has survived if the command ends in time, without a traceback, and either
with the results of an undisturbed run or with a line that names the error. After a kill or a signal no child of it may
be left, and it must come to these results when started again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fixtures import forked_python
from fixtures.fault_steps import STEPS, WRITES_ONCE, Step, cut_training, make_folder

from kutils.system import arrow

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that a command may take
SIGNAL_SECONDS = 60  # that it may take to end after a signal
CHILD_SECONDS = 30  # that a child may outlive it: ranks of torchrun save their state first
FEW_FILES = ("sh", "-c", 'ulimit -n 32 && exec "$0" "$@"')


# ---------------------------------------------------------------- one command in a folder of its own


def start(python: str, folder: Path, step: Step, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
    """Start a command in a case's folder."""
    variables = {"KUTILS_INPUT": "input", "KUTILS_WORKING": "working", "PYTHONPATH": str(ROOT)} | variables
    folders = {name: str(folder / value) for name, value in variables.items() if name.startswith("KUTILS_")}
    return subprocess.Popen(
        [*prefix, python, "-m", "kutils", *step.arguments],
        cwd=folder,
        env=os.environ | variables | folders,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen, seconds: float = SECONDS) -> tuple[int | None, str]:
    """Exit status and output; None where it did not end in time."""
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output.decode(errors="replace")
    except subprocess.TimeoutExpired:
        forked_python.kill(process)
        process.stdout.close()  # not read to its end: a child that is left would keep it open
        return None, ""


def wait_for_handlers(process: subprocess.Popen, folder: Path) -> None:
    """Wait until the command handles signals: while Python itself starts, no program can."""
    while process.poll() is None:
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                if int(status.parent.name) != process.pid and (status.parent / "cwd").readlink() == folder:
                    caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)
                    if caught >> (signal.SIGTERM - 1) & 1:  # which Python does not handle by itself
                        return
        time.sleep(0.01)


def children_of(folder: Path) -> list[str]:
    """Command lines of processes that were started in a case's folder and are still there after CHILD_SECONDS."""
    deadline = time.monotonic() + CHILD_SECONDS
    variable = f"KUTILS_INPUT={folder}/".encode()
    while True:
        left = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if variable in (process / "environ").read_bytes():
                    left.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:150])
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def results_of(folder: Path, step: Step) -> dict[str, str]:
    """Hash of the content of each result, without times and names of temporary files."""
    found = {}
    for pattern in step.results:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                found[str(path.relative_to(folder))] = hashlib.sha256(content_of(path)).hexdigest()
    return found


def content_of(path: Path) -> bytes:
    """What a file says: the tensors of a checkpoint, the arrays of an .npz file, the columns of an Arrow file."""
    if path.suffix == ".pth":
        weights = torch.load(path, weights_only=True)["model"]
        return b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(weights.items()))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            names = sorted(set(arrays.files) - {"checkpoint"})  # which names the folder
            return b"".join(name.encode() + arrays[name].tobytes() for name in names)
    if path.suffix == ".arrow":  # beside the times of the image files
        return repr(arrow.map_table(path).to_pydict()).encode()
    if path.suffix == ".json":
        return json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()
    return path.read_bytes()


def judge(code: int | None, error: str, folder: Path, step: Step, expected: dict[str, str], *, may_fail: bool) -> str:
    """What is wrong with a case; empty if it has survived."""
    if code is None:
        return f"did not end within {SECONDS} s"
    if "Traceback" in error:
        return "traceback: " + error.strip().splitlines()[-1][:200]
    if code < 0 or code > 128:
        return f"ended by a signal ({code})"
    if code:
        named = re.search(r"^(error: |  problem: |  bad: )", error, re.MULTILINE)  # `check` reports bad rows
        return "" if may_fail and named else f"exit {code}: {error.strip()[-200:]}"
    if may_fail and "warning: " in error:  # such as of images that were left out
        return ""
    differing = [name for name, value in expected.items() if results_of(folder, step).get(name) != value]
    return f"other results in silence: {', '.join(differing[:3])}" if differing else ""


# ---------------------------------------------------------------- what is done to it

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "bit": lambda content: (n := len(content) // 2, content[:n] + bytes([content[n] ^ 16]) + content[n + 1 :])[1],
    "zeros": lambda content: content[: len(content) // 3] + bytes(2048) + content[len(content) // 3 + 2048 :],
}
MOUNT = 'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
FULL = (  # a copy of the folder on a disk with 40 kB more
    'mkdir "$0.full" && mount -t tmpfs -o size=$(($(du -sk "$0" | cut -f1) + 40))k tmpfs "$0.full" && '
    'cp -a "$0/." "$0.full" && mount --bind "$0.full" "$0" && cd "$0" && exec "$@"'
)
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'


class Campaign:
    """Templates of every step's folder, and the cases that are tried in copies of them."""

    def __init__(self, root: Path, seed: int):
        self.root, self.random = root, random.Random(seed)
        self.python = forked_python.make_python()
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.counts: Counter = Counter()
        self.failures: list[str] = []

    def python_of(self, name: str) -> str:
        """The Python to be killed: a notebook's kernel is in no group, and looks for a real parent."""
        return forked_python.REAL_PYTHON if name == "train-folds" else self.python

    def prepare(self) -> None:
        """Run every step once, undisturbed, each in a copy of what the steps before it have left."""
        folder = self.root / "start"
        make_folder(folder)
        for name, step in STEPS.items():
            if name == "go on":
                shutil.copytree(self.root / "train", self.root / name)
                cut_training(self.root / name, lambda *case: start(self.python, *case))
                self.expected[name], self.seconds[name] = self.expected["train"], self.seconds["train"]
                continue
            shutil.copytree(folder, self.root / name)
            began = time.monotonic()
            code, error = finish(start(self.python_of(name), folder, step))
            if code:
                sys.exit(f"{name} fails undisturbed: {error}")
            self.seconds[name] = time.monotonic() - began
            self.expected[name] = results_of(folder, step)
            if step.results and not self.expected[name]:
                sys.exit(f"{name} leaves none of {step.results}")

    def case(self, kind: str, name: str, what: str, disturb) -> None:
        """Try one case in a folder of its own, and count it."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        try:
            shutil.copytree(self.root / name, folder, dirs_exist_ok=True)
            problem = disturb(folder, STEPS[name])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.counts[kind, "failed" if problem else "survived"] += 1
        if problem:
            self.failures.append(f"{kind}, {name}, {what}: {problem}")
            print(self.failures[-1], flush=True)

    def again(self, name: str, folder: Path) -> str:
        """Start a command again after it was ended."""
        step = STEPS[name]
        code, error = finish(start(self.python, folder, step))
        if name in WRITES_ONCE and code == 1 and re.search("exists|is there already", error):  # it had come to its end
            code = 0
        left = [path.name for path in folder.rglob("*.partial*") if path.is_file()]
        wrong = judge(code, error, folder, step, self.expected[name], may_fail=False)
        return wrong or (f"left behind: {left[:3]}" if left else "")

    def killed(self, name: str, after: float, python: str) -> None:
        """Kill the command; a real Python's children must notice, while the forked one's group is killed with it."""

        def disturb(folder: Path, step: Step) -> str:
            process = start(python, folder, step)
            time.sleep(after)
            process.kill() if python == forked_python.REAL_PYTHON else forked_python.kill(process)
            process.wait()
            process.stdout.close()  # as above
            if left := children_of(folder):
                return f"children are left: {left[:3]}"
            return self.again(name, folder)

        self.case("killed, started again", name, f"after {after:.2f} s", disturb)

    def signalled(self, name: str, number: signal.Signals, after: float) -> None:
        def disturb(folder: Path, step: Step) -> str:
            process = start(self.python, folder, step)
            wait_for_handlers(process, folder)
            time.sleep(after)
            process.send_signal(number)
            code, error = finish(process, SIGNAL_SECONDS)
            if code is None:
                return f"did not end within {SIGNAL_SECONDS} s"
            if code not in (0, 128 + number):
                return f"exit {code}: {error.strip()[-200:]}"
            lines = 2 if name == "train-folds" else 1  # a rank's own error is shown, too
            if "Traceback" in error or error.count("error: ") > lines:
                return f"not one line: {error.strip()[-300:]}"
            if left := children_of(folder):
                return f"children are left: {left[:3]}"
            return self.again(name, folder)

        self.case(f"{number.name}, started again", name, f"after {after:.2f} s", disturb)

    def damaged(self, name: str, pattern: str, damage: str) -> None:
        def disturb(folder: Path, step: Step) -> str:
            for path in folder.glob(pattern):
                path.write_bytes(DAMAGES[damage](path.read_bytes()))
            code, error = finish(start(self.python, folder, step))
            return judge(code, error, folder, step, self.expected[name], may_fail=True)

        self.case("damaged file", name, f"{damage} of {pattern}", disturb)

    def mounted(self, kind: str, name: str, script: str, place: str) -> None:
        """A real Python in a mount namespace: a process of the forking server would be outside of it."""

        def disturb(folder: Path, step: Step) -> str:
            target = place or str(folder)
            prefix = ("unshare", "-m", "sh", "-c", script, target)
            code, error = finish(start(forked_python.REAL_PYTHON, folder, step, prefix))
            return judge(code, error, folder, step, {}, may_fail=True)

        self.case(kind, name, "", disturb)

    def with_few_files(self, name: str) -> None:
        def disturb(folder: Path, step: Step) -> str:
            code, error = finish(start(forked_python.REAL_PYTHON, folder, step, FEW_FILES))
            return judge(code, error, folder, step, self.expected[name], may_fail=True)

        self.case("32 open files", name, "", disturb)

    def in_ascii(self, name: str) -> None:
        def disturb(folder: Path, step: Step) -> str:
            variables = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
            code, error = finish(start(forked_python.REAL_PYTHON, folder, step, **variables))
            return judge(code, error, folder, step, self.expected[name], may_fail=False)

        self.case("output in ASCII", name, "", disturb)

    def twice(self, name: str) -> None:
        def disturb(folder: Path, step: Step) -> str:
            both = [start(self.python, folder, step) for _ in range(2)]
            for code, error in map(finish, both):
                if problem := judge(code, error, folder, step, self.expected[name], may_fail=True):
                    return problem
            return judge(0, "", folder, step, self.expected[name], may_fail=False)

        self.case("twice at once", name, "", disturb)

    def cases(self, kills: int) -> list[tuple]:
        """All cases, in random order: a function and its arguments."""
        cases: list[tuple] = []
        for number in range(kills):
            name = list(STEPS)[number % len(STEPS)]
            python = forked_python.REAL_PYTHON if number // len(STEPS) % 4 == 1 else self.python_of(name)
            cases.append((self.killed, name, self.random.uniform(0, 1.1 * self.seconds[name]), python))
        for name, step in STEPS.items():
            cases += [(self.damaged, name, pattern, damage) for pattern in step.reads for damage in DAMAGES]
            cases += [(self.in_ascii, name), (self.twice, name), (self.with_few_files, name)]
            for number in (signal.SIGINT, signal.SIGTERM):
                cases += [(self.signalled, name, number, self.random.uniform(0, self.seconds[name])) for _ in range(2)]
            if os.geteuid() == 0 and sys.platform == "linux":
                cases += [(self.mounted, "read-only disk", name, READ_ONLY, "")]
                cases += [(self.mounted, "full disk", name, FULL, "")]
                cases += [(self.mounted, "64 kB of /dev/shm", name, MOUNT.format(size="64k"), "/dev/shm")]
        self.random.shuffle(cases)
        return cases

    def table(self) -> str:
        """What was tried and what has failed, as a table of tests/README.md."""
        kinds = sorted({kind for kind, _ in self.counts})
        failed = [self.counts[kind, "failed"] for kind in kinds]
        tried = [self.counts[kind, "survived"] + count for kind, count in zip(kinds, failed, strict=True)]
        cells = [f"{count}, {count - bad}, {bad}" for count, bad in zip(tried, failed, strict=True)]
        rows = [["", *kinds], ["---"] * (len(kinds) + 1), ["tried, survived, failed", *cells]]
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__))
    parser.add_argument("--kills", type=int, default=200, help="over all commands (default: 200)")
    parser.add_argument("--minutes", type=float, default=20, help="after which no case is begun (default: 20)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    parser.add_argument("--skip", type=int, default=0, help="cases that an earlier run of this seed has tried")
    parser.add_argument("--only", default="", help="kinds and commands to try (a regular expression)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order (default: 0)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(Path(root), arguments.seed)
        campaign.prepare()
        cases = [
            case
            for case in campaign.cases(arguments.kills)
            if re.search(arguments.only, f"{case[0].__name__} {case[1]} {case[2:]}")
        ][arguments.skip :]

        def attempt(case: tuple) -> bool:
            if time.monotonic() < deadline:
                case[0](*case[1:])
                return True
            return False

        with ThreadPoolExecutor(arguments.jobs) as pool:
            tried = sum(pool.map(attempt, cases))
    print(campaign.table())
    print(f"{tried} of {len(cases)} cases tried, {len(campaign.failures)} failed")
    return int(bool(campaign.failures))


if __name__ == "__main__":
    sys.exit(main())

"""Does to the commands what machines do to them, at random, and counts what comes out: `make test-faults`.

Kills at random moments, damaged files, full and read-only disks, a small /dev/shm, output in ASCII, the same command
twice at once. A case has survived if the command ends in time, without a traceback, and either with the results of an
undisturbed run or with a line that names the error. After a kill it must come to these results when started again.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fixtures import forked_python
from fixtures.datasets import TINY, make_dataset

from kutils.runs.recipes import Recipe
from kutils.system import arrow
from kutils.system.tables import write_table

ROOT = Path(__file__).parents[1]
SECONDS = 300  # that a command may take
PROMPTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("house", "cat", "boat")]
TRAIN = ["--config", "tiny.yaml", "--fold", "0"]
MODEL = "working/models/tiny/tiny_fold0_best_cossim.pth"


@dataclass(frozen=True)
class Step:
    """A command of the pipeline, and what it leaves; {} is the folder of the case."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]  # patterns of files that must be those of an undisturbed run
    reads: tuple[str, ...] = ()  # files of earlier steps that are damaged before it


STEPS = {
    "generate": Step(("generate", "prompts.tsv", "--output", "input/set", "--size", "32"), ("input/set*",)),
    "check": Step(("check", "input/toy.tsv", "--workers", "1"), ("input/toy.check.json",), ("input/toy.npy",)),
    "folds": Step(("folds", "input/toy.tsv"), ("input/toy.tsv", "input/toy.clean.npz"), ("input/toy.npy",)),
    "shards": Step(
        ("shards", "input/toy.tsv", "--size", "32", "--format", "png", "--workers", "1"), ("input/toy.shards/*.arrow",)
    ),
    "train": Step(
        ("train", *TRAIN),
        ("working/models/tiny/*.pth", "working/runs/tiny_fold0/fold0_predictions.npz"),
        ("input/toy.npy", "input/toy.clean.npz", "input/toy.shards/00000.arrow", "input/toy.shards/record.json"),
    ),
    "evaluate": Step(
        ("evaluate", *TRAIN, "--predictions", "eval.npz"), ("eval.npz",), (MODEL, "working/cache/*.arrow")
    ),
    "predict": Step(
        ("predict", "--config", "tiny.yaml", "--checkpoint", MODEL, "--images", "input/toy_images")
        + ("--output", "preds.npz"),
        ("preds.npz",),
        (MODEL,),
    ),
    "bank": Step(("bank", "--datasets", "toy", "--output", "bank.arrow"), ("bank.arrow",), ("working/cache/*.arrow",)),
}


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


def finish(process: subprocess.Popen) -> tuple[int | None, str]:
    """Exit status and output; None where it did not end in time."""
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output.decode(errors="replace")
    except subprocess.TimeoutExpired:
        forked_python.kill(process)
        process.communicate()
        return None, ""


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
        named = re.search(r"^(error: |  problem: )", error, re.MULTILINE)  # `check` reports problems
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

    def prepare(self) -> None:
        """Run every step once, undisturbed, each in a copy of what the steps before it have left."""
        folder = self.root / "start"
        (folder / "input").mkdir(parents=True)
        (folder / "working").mkdir()
        make_dataset(folder / "input", num_prompts=40, images_per_prompt=2)
        write_table(folder / "prompts.tsv", {"prompt": PROMPTS, "source": ["campaign"] * len(PROMPTS)})
        recipe = Recipe(**TINY | {"backbone": "test_convnext", "checkpoint_every_steps": 1, "augment": False})
        (folder / "tiny.yaml").write_text(recipe.to_yaml())
        for name, step in STEPS.items():
            shutil.copytree(folder, self.root / name)
            began = time.monotonic()
            code, error = finish(start(self.python, folder, step))
            if code:
                sys.exit(f"{name} fails undisturbed: {error}")
            self.seconds[name] = time.monotonic() - began
            self.expected[name] = results_of(folder, step)

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

    def killed(self, name: str, after: float) -> None:
        def disturb(folder: Path, step: Step) -> str:
            process = start(self.python, folder, step)
            time.sleep(after)
            forked_python.kill(process)
            process.communicate()
            code, error = finish(start(self.python, folder, step))
            refused = name in ("evaluate", "predict", "bank") and "exists; remove it" in error  # it had come to its end
            return judge(0 if refused else code, error, folder, step, self.expected[name], may_fail=False)

        self.case("killed, started again", name, f"after {after:.2f} s", disturb)

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
            cases.append((self.killed, name, self.random.uniform(0, 1.1 * self.seconds[name])))
        for name, step in STEPS.items():
            cases += [(self.damaged, name, pattern, damage) for pattern in step.reads for damage in DAMAGES]
            cases += [(self.in_ascii, name), (self.twice, name)]
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
        rows = [["", *kinds], ["---"] * (len(kinds) + 1), ["tried", *tried], ["failed", *failed]]
        return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__))
    parser.add_argument("--kills", type=int, default=200, help="over all commands (default: 200)")
    parser.add_argument("--minutes", type=float, default=20, help="after which no case is begun (default: 20)")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order (default: 0)")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(Path(root), arguments.seed)
        campaign.prepare()
        cases = campaign.cases(arguments.kills)

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

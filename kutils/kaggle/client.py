"""Runs the Kaggle client and turns the failures that it hides into errors.

The client ends with exit code 0 when a push fails, a source is not added or a folder is left out, and ignores a
misspelt key. So each step is checked before it, in what the client prints, and in what Kaggle holds afterwards.
Read in the sources of kaggle 2.2.5, which is needed; that package authenticates when imported, so it runs as a child.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kutils.kaggle.metadata import KaggleError, check_dataset, check_kernel, contents, differences
from kutils.system import paths

CLIENT = [sys.executable, "-P", "-m", "kaggle"]  # -P: this file, or a folder `kaggle`, is not taken for the client
CALL_SECONDS = 300  # for a call that moves no data; the client itself would wait for ever
LAST_LINES = 12  # of what the client said, repeated in an error
SECRET_VARIABLES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_TOKEN", "KAGGLE_API_V1_TOKEN", "KAGGLE_IAP_TOKEN")
SECRET_FILES = ("kaggle.json", "access_token", "access_token.txt", "credentials.json")
SIGNED = re.compile(r"(?i)((?:signature|sig|token|key|credential)=)[^&\s'\"]+|(://[^/\s:@]+:)[^/\s@]+(?=@)")
ABSENT = re.compile(r"The resource was not found|You don't have access to this resource")  # 404, 403
TRANSIENT = re.compile(r"on Kaggle's side|\b5\d\d Server Error|rate limited|no answer within|Connection|Max retries")
COMPLAINT = re.compile(  # printed with exit code 0
    r"^(?:Kernel push error|Dataset (?:version )?creation error|The following are not valid|"
    r"Your kernel title does not resolve|Skipping|.* is retired\.).*",
    re.M,
)


@dataclass(frozen=True)
class Pushed:
    """A saved version of a kernel, which Kaggle now runs: owner/slug, number, web page."""

    ref: str
    version: int
    url: str


def upload_dataset(folder: Path, message: str, *, wait_seconds: float = 3600, poll_seconds: float = 10) -> None:
    """Create a private data set, or a new version of it, and wait until it can be mounted.

    Args:
        folder: `dataset-metadata.json` (`id` owner/slug, `title`, one licence) and what the data set shall hold;
            sub-folders travel as archives, which Kaggle unpacks. A version replaces all that was there.
        message: the version's notes; a new data set has none.
        wait_seconds, poll_seconds: for Kaggle's processing, which starts after the upload.
    Raises: KaggleError, before anything is sent if the folder or its metadata is at fault.
    """
    folder = Path(folder)
    ref = check_dataset(folder, message)
    former = dataset_version(ref)[1]
    step = ["create"] if former < 0 else ["version", f"--message={message}"]
    text = run_client("datasets", *step, "-p", str(folder), "-r", "zip", seconds=None)
    names = {f"{entry.name}.zip" if entry.is_dir() else entry.name for entry in contents(folder)}
    missing = sorted(name for name in names if f"Upload successful: {name} (" not in text)
    if COMPLAINT.search(text) or missing or "is being created" not in text:
        lost = f"{', '.join(missing)} did not arrive; " if missing else ""
        raise KaggleError(f"data set {ref}: {lost}the client said\n{complaints(text)}")

    def state_of_new() -> str:
        state, version = dataset_version(ref)
        return "in process" if state == "ready" and version <= former else state  # the former one stays ready

    for state in poll(f"data set {ref}", state_of_new, wait_seconds, poll_seconds):
        if state in ("failed", "deleted"):
            raise KaggleError(f"Kaggle could not process {ref} ({state}); see https://www.kaggle.com/datasets/{ref}")
        if state == "ready":
            return
    raise KaggleError(
        f"data set {ref} is uploaded, but not ready after {wait_seconds:g} s; do not upload it again, look at "
        f"`kaggle datasets status {ref}`"
    )


def push_kernel(
    folder: Path, *, allow_internet: bool = False, wait_seconds: float = 60, poll_seconds: float = 5
) -> Pushed:
    """Save a kernel's notebook as a new version, which Kaggle runs at once, and check that it was saved as described.

    Args:
        folder: holds `kernel-metadata.json`, which names the notebook (`code_file`).
        allow_internet: let a kernel with competition sources use the internet; it can then not be submitted.
        wait_seconds, poll_seconds: how long what Kaggle reports may lag behind what was pushed.
    Raises: KaggleError, before anything is sent if the folder is at fault; else the version may be saved and running.
    """
    folder = Path(folder)
    values = check_kernel(folder, allow_internet)
    ref = values["id"]
    text = run_client("kernels", "push", "-p", str(folder))
    saved = re.search(r"Kernel version (\d+) successfully pushed\.\s+Please check progress at (\S+)", text)
    if COMPLAINT.search(text) or not saved:
        number = f"version {saved[1]} was saved and runs all the same; " if saved else ""
        raise KaggleError(f"kernel {ref}: {number}the client said\n{complaints(text)}")
    pushed = Pushed(ref, int(saved[1]), saved[2])
    if not re.search(rf"/{re.escape(ref)}(?:[/?#]|$)", pushed.url, re.I):
        raise KaggleError(f"Kaggle saved {ref} elsewhere, at {pushed.url}: title, id and id_no do not belong together")
    for state in poll(f"kernel {ref}", lambda: differences(values, pull_metadata(ref)), wait_seconds, poll_seconds):
        if state == "saved as described":
            return pushed
    raise KaggleError(
        f"kernel {ref}: version {pushed.version} was saved and runs, but not as described: {state}. Stop it "
        f"at {pushed.url} and see whether you may use these sources and this machine"
    )


def wait_for_run(ref: str, *, wait_seconds: float, poll_seconds: float = 30) -> None:
    """Wait until a kernel has run; prints a line per change of state.

    Args:
        ref: owner/slug for the latest version, owner/slug/N for one of them.
        wait_seconds, poll_seconds: a run lasts up to 12 hours, a scored one 9.
    Raises: KaggleError with Kaggle's own message if the run failed or was stopped, or is not over in time.
    """
    page = f"https://www.kaggle.com/code/{'/'.join(ref.split('/')[:2])}"
    for state in poll(f"kernel {ref}", lambda: run_state(ref), wait_seconds, poll_seconds):
        if state == "complete":
            return
        if state.startswith(("error", "cancel")):
            raise KaggleError(f"the run of {ref} ended: {state}; see the log at {page}")
    raise KaggleError(f"the run of {ref} is not over after {wait_seconds:g} s, and goes on: wait again, or see {page}")


def fetch_output(ref: str, folder: Path) -> list[Path]:
    """Download what a kernel's run has written, and its log.

    Args:
        ref: owner/slug for the latest version, owner/slug/N for one of them.
        folder: where to; appears when all is there. A former one becomes `<name>.bak`, and replaces an earlier one.
    Returns: the files, sorted.
    Raises: KaggleError if there is nothing.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise KaggleError(f"{folder} is a file; name a folder for the output of {ref}")
    with paths.atomic_folder(folder) as partial:
        run_client("kernels", "output", ref, "-p", str(partial), seconds=None)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
        if not names:
            raise KaggleError(f"{ref} has no output: did its run end, and did it write into /kaggle/working?")
        if folder.is_dir() and any(folder.iterdir()):
            former = folder.with_name(f"{folder.name}.bak")
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
    return [folder / name for name in names]


def submit(competition: str, ref: str, version: int, message: str, file_name: str = "submission.csv") -> str:
    """Submit a file that a version of a kernel has written; Kaggle then runs it on the hidden data.

    Returns: what the client says of the submission: its number, how many are left today.
    Raises: KaggleError if the submission was not taken.
    """
    options = ["-k", ref, "-v", str(version), "-f", file_name, f"--message={message}"]
    text = run_client("competitions", "submit", competition, *options)
    lines = [line for line in text.splitlines() if line and not line.startswith("Warning: ")]
    if not re.search(r"^(?:Submission ref: \d|.*successfully submitted)", text, re.M | re.I):
        raise KaggleError(f"{competition} did not take version {version} of {ref}; the client said\n{complaints(text)}")
    return "\n".join(lines)


def run_client(*arguments: str, seconds: float | None = CALL_SECONDS) -> str:
    """Run the client; returns what it said, standard output first.

    Raises: KaggleError naming the command if it failed, did not start or did not end within `seconds`.
    """
    known = known_secrets()
    environment = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
    try:
        done = subprocess.run(
            [*CLIENT, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment | {"PYTHONIOENCODING": "utf-8"},
            timeout=seconds,
        )
        code, text = done.returncode, f"{done.stdout}\n{done.stderr}"
    except subprocess.TimeoutExpired:
        code, text = 1, f"no answer within {seconds:g} s"
    known |= known_secrets()  # the client renews some of them
    text = masked(text, known)
    if not code:
        return text
    if absent := re.search(r"No module named '?([\w.]+)", text):
        raise KaggleError(f"the Kaggle client does not start, {absent[1]} is not installed: pip install -U kaggle six")
    if "Authentication required to call the Kaggle API" in text:
        raise KaggleError(
            "Kaggle knows no account of yours: make a token at https://www.kaggle.com/settings and put it into the "
            "variable KAGGLE_API_TOKEN or the file ~/.kaggle/access_token (or kaggle.json into ~/.kaggle); one that "
            "is there may have expired"
        )
    raise KaggleError(masked(f"kaggle {shlex.join(arguments)} ended with exit code {code}:\n{complaints(text)}", known))


def known_secrets() -> set[str]:
    """Keys and tokens that the client may read from variables and files."""
    found = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    folders.append(os.environ.get("XDG_CONFIG_HOME", "~/.config") + "/kaggle")
    files = [Path(folder).expanduser() / name for folder in folders if folder for name in SECRET_FILES]
    for path in files + [Path(value) for value in found if value]:  # a variable may name a file
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or no JSON
            content = path.read_text(encoding="utf-8").strip()
            found.add(content)
            found.update(
                str(value) for name, value in dict(json.loads(content)).items() if name.endswith(("key", "token"))
            )
    return {secret for secret in found if len(secret) > 3}


def masked(text: str, known: set[str]) -> str:
    """Text without secrets, signatures of addresses and passwords of proxies."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SIGNED.sub(r"\1\2***", text)


def complaints(text: str) -> str:
    """The client's complaints, else its last lines."""
    return "\n".join(COMPLAINT.findall(text) or [line for line in text.splitlines() if line.strip()][-LAST_LINES:])


def poll(what: str, ask: Callable[[], str], wait_seconds: float, poll_seconds: float) -> Iterator[str]:
    """Give the states that `ask` tells until the time is over; prints a line when it tells another one.

    No answer for a while (no network, Kaggle's servers down) ends nothing: a run of hours is worth waiting for.
    """
    deadline, former = time.monotonic() + wait_seconds, None
    while True:
        try:
            state = ask()
        except KaggleError as error:
            if not TRANSIENT.search(str(error)):
                raise
            state = "no answer, asking again"
        if state != former:
            print(f"{what}: {state}", flush=True)
        former = state
        yield state
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(poll_seconds, left))


def dataset_version(ref: str) -> tuple[str, int]:
    """State in lower case and number of the current version; -1 if there is none that this account may see."""
    try:
        text = run_client("datasets", "status", ref, "--format", "json")
    except KaggleError as error:
        if ABSENT.search(str(error)):
            return "absent", -1
        raise
    values = json.loads(re.search(r"\{.*\}", text, re.S)[0])
    return values["status"], values["current_version_number"] or 0


def run_state(ref: str) -> str:
    """State of a run in lower case, and Kaggle's message if it failed."""
    text = run_client("kernels", "status", ref)
    state = re.search(r'has status "(?:\w+\.)?(\w+)"(?:\nFailure message: "(.*)")?', text, re.S)
    if not state:
        raise KaggleError(f"the client tells no state of {ref}:\n{complaints(text)}")
    return state[1].lower() + (f", {state[2]}" if state[2] else "")


def pull_metadata(ref: str) -> dict:
    """The kernel's metadata as Kaggle holds it."""
    with tempfile.TemporaryDirectory() as temporary:
        run_client("kernels", "pull", "-m", "-p", temporary, ref)
        return json.loads(Path(temporary, "kernel-metadata.json").read_text(encoding="utf-8"))

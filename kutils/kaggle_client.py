"""Kaggle's command line client with every refusal an error: data sets, the kernel, its output, the submission.

The client ends with exit code 0 when a push fails, a source is not added or a folder is left out, and ignores a
misspelt key. So each step is checked before it, in what the client prints, and in what Kaggle holds afterwards.
Read in the sources of kaggle 2.2.5, which is needed; that package authenticates when imported, so it runs as a child.
"""

import contextlib
import difflib
import fnmatch
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CLIENT = [sys.executable, "-P", "-m", "kaggle"]  # -P: this file, or a folder `kaggle`, is not taken for the client
CALL_SECONDS = 300  # for a call that moves no data; the client itself would wait for ever
MAX_NOTEBOOK_BYTES = 1_000_000
LAST_LINES = 12  # of what the client said, repeated in an error
KERNEL_KEYS = (
    *("id", "id_no", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu"),
    *("enable_internet", "machine_shape", "dataset_sources", "competition_sources", "kernel_sources", "model_sources"),
    *("keywords", "docker_image", "docker_image_pinning_type"),
)
REQUIRED_KEYS = ("id", "title", "code_file", "language", "kernel_type", "machine_shape")
SOURCES = tuple(key for key in KERNEL_KEYS if key.endswith("_sources"))
FLAGS = {"is_private": True, "enable_gpu": False, "enable_internet": True}  # and what the client takes if one is absent
CREDENTIALS = ("kaggle.json", "access_token*", "credentials*.json", "*.netrc", "_netrc", ".env", ".env.*", "*.pem")
CREDENTIALS += ("id_rsa", "id_ecdsa", "id_ed25519", ".git-credentials", ".pypirc", ".npmrc")
NO_DATA = ("__pycache__", ".git", ".cache", ".huggingface", ".ipynb_checkpoints")  # the client leaves out three of them
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


class KaggleError(ValueError):
    """What Kaggle or its client refused, or would; the message says what to do."""


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
    ref = _check_dataset(folder, message)
    former = _dataset_version(ref)[1]
    step = ["create"] if former < 0 else ["version", f"--message={message}"]
    text = _client("datasets", *step, "-p", str(folder), "-r", "zip", seconds=None)
    names = {f"{entry.name}.zip" if entry.is_dir() else entry.name for entry in _contents(folder)}
    missing = sorted(name for name in names if f"Upload successful: {name} (" not in text)
    if COMPLAINT.search(text) or missing or "is being created" not in text:
        lost = f"{', '.join(missing)} did not arrive; " if missing else ""
        raise KaggleError(f"data set {ref}: {lost}the client said\n{_said(text)}")

    def state_of_new() -> str:
        state, version = _dataset_version(ref)
        return "in process" if state == "ready" and version <= former else state  # the former one stays ready

    for state in _poll(f"data set {ref}", state_of_new, wait_seconds, poll_seconds):
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
    values = _check_kernel(folder, allow_internet)
    ref = values["id"]
    text = _client("kernels", "push", "-p", str(folder))
    saved = re.search(r"Kernel version (\d+) successfully pushed\.\s+Please check progress at (\S+)", text)
    if COMPLAINT.search(text) or not saved:
        number = f"version {saved[1]} was saved and runs all the same; " if saved else ""
        raise KaggleError(f"kernel {ref}: {number}the client said\n{_said(text)}")
    pushed = Pushed(ref, int(saved[1]), saved[2])
    if not re.search(rf"/{re.escape(ref)}(?:[/?#]|$)", pushed.url, re.I):
        raise KaggleError(f"Kaggle saved {ref} elsewhere, at {pushed.url}: title, id and id_no do not belong together")
    for state in _poll(f"kernel {ref}", lambda: _differences(ref, values), wait_seconds, poll_seconds):
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
    for state in _poll(f"kernel {ref}", lambda: _run_state(ref), wait_seconds, poll_seconds):
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        _client("kernels", "output", ref, "-p", str(partial), seconds=None)
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
        if not names:
            raise KaggleError(f"{ref} has no output: did its run end, and did it write into /kaggle/working?")
        if folder.is_dir() and any(folder.iterdir()):
            former = folder.with_name(f"{folder.name}.bak")
            shutil.rmtree(former, ignore_errors=True)
            folder.rename(former)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def submit(competition: str, ref: str, version: int, message: str, file_name: str = "submission.csv") -> str:
    """Submit a file that a version of a kernel has written; Kaggle then runs it on the hidden data.

    Returns: what the client says of the submission: its number, how many are left today.
    Raises: KaggleError if the submission was not taken.
    """
    options = ["-k", ref, "-v", str(version), "-f", file_name, f"--message={message}"]
    text = _client("competitions", "submit", competition, *options)
    lines = [line for line in text.splitlines() if line and not line.startswith("Warning: ")]
    if not re.search(r"^(?:Submission ref: \d|.*successfully submitted)", text, re.M | re.I):
        raise KaggleError(f"{competition} did not take version {version} of {ref}; the client said\n{_said(text)}")
    return "\n".join(lines)


def _client(*arguments: str, seconds: float | None = CALL_SECONDS) -> str:
    """Run the client; returns what it said, standard output first.

    Raises: KaggleError naming the command if it failed, did not start or did not end within `seconds`.
    """
    known = _secrets()
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
    known |= _secrets()  # the client renews some of them
    text = _masked(text, known)
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
    raise KaggleError(_masked(f"kaggle {shlex.join(arguments)} ended with exit code {code}:\n{_said(text)}", known))


def _secrets() -> set[str]:
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


def _masked(text: str, known: set[str]) -> str:
    """Text without secrets, signatures of addresses and passwords of proxies."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SIGNED.sub(r"\1\2***", text)


def _said(text: str) -> str:
    """The client's complaints, else its last lines."""
    return "\n".join(COMPLAINT.findall(text) or [line for line in text.splitlines() if line.strip()][-LAST_LINES:])


def _poll(what: str, ask: Callable[[], str], wait_seconds: float, poll_seconds: float) -> Iterator[str]:
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


def _dataset_version(ref: str) -> tuple[str, int]:
    """State in lower case and number of the current version; -1 if there is none that this account may see."""
    try:
        text = _client("datasets", "status", ref, "--format", "json")
    except KaggleError as error:
        if ABSENT.search(str(error)):
            return "absent", -1
        raise
    values = json.loads(re.search(r"\{.*\}", text, re.S)[0])
    return values["status"], values["current_version_number"] or 0


def _run_state(ref: str) -> str:
    """State of a run in lower case, and Kaggle's message if it failed."""
    text = _client("kernels", "status", ref)
    state = re.search(r'has status "(?:\w+\.)?(\w+)"(?:\nFailure message: "(.*)")?', text, re.S)
    if not state:
        raise KaggleError(f"the client tells no state of {ref}:\n{_said(text)}")
    return state[1].lower() + (f", {state[2]}" if state[2] else "")


def _check_dataset(folder: Path, message: str) -> str:
    """The data set's owner/slug. Raises: KaggleError naming all that the folder has wrong."""
    path = folder / "dataset-metadata.json"
    values = _read_metadata(path)
    ref, title, licences = (values.get(key) or "" for key in ("id", "title", "licenses"))
    inside = [place for entry in _contents(folder) for place in _below(entry)]
    checks = [
        (message.strip(), "the message is empty"),
        (re.fullmatch(r"[\w-]+/[a-z0-9-]{6,50}", ref), f"id {ref!r} is not owner/slug with a slug of 6 to 50 letters"),
        (6 <= len(title) <= 50, f"title {title!r} does not have 6 to 50 characters"),
        (len(licences) == 1 and "name" in licences[0], 'licenses is not one licence, [{"name": "CC0-1.0"}]'),
        ("id_no" not in values, "id_no would be taken instead of id"),
        (any(place.is_file() for place in inside), "there is nothing to upload"),
    ]
    for place in inside:
        unwanted = place.name in NO_DATA or any(fnmatch.fnmatch(place.name.lower(), name) for name in CREDENTIALS)
        checks.append((not unwanted, f"{place} does not belong into a data set"))
        lost = place.is_symlink() and place.is_dir() and place.parent != folder
        checks.append((not lost, f"{place} is a link to a folder, which the client leaves out"))
    _refuse(path, [fault for passed, fault in checks if not passed])
    return ref


def _contents(folder: Path) -> list[Path]:
    """What becomes a file or an archive of the data set."""
    apart = re.compile(r"dataset-metadata\.json|dataset-cover-image\.\w+")
    return sorted(entry for entry in folder.iterdir() if not apart.fullmatch(entry.name))


def _below(entry: Path) -> list[Path]:
    """A file, or a folder and all that the client sees in it: it follows no links to folders."""
    return [entry] + [Path(base, name) for base, folders, files in os.walk(entry) for name in folders + files]


def _read_metadata(path: Path) -> dict:
    """Raise KaggleError if the file is no JSON object, or still holds a placeholder for the user's name."""
    try:
        text = path.read_text(encoding="utf-8")
        values = dict(json.loads(text))
    except OSError as error:
        raise KaggleError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise KaggleError(f"{path} is no JSON object: {error}") from None
    placeholder = re.search(r"INSERT_\w+", text)
    _refuse(path, [f"put your own value in place of {placeholder[0]}"] if placeholder else [])
    return values


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise KaggleError(f"{path}: {'; '.join(faults)}")


def _check_kernel(folder: Path, allow_internet: bool) -> dict:
    """The kernel's metadata. Raises: KaggleError naming all that it, or the notebook, has wrong."""
    path = folder / "kernel-metadata.json"
    values = _read_metadata(path)
    _refuse(path, [f"{key} is missing" for key in REQUIRED_KEYS if not values.get(key)])
    faults = []
    for key in sorted(set(values) - set(KERNEL_KEYS)):
        nearest = difflib.get_close_matches(key, KERNEL_KEYS, 1, cutoff=0)[0]
        faults.append(f"the client ignores {key!r}; did you mean {nearest!r}?")
    ref, slug = values["id"], slugify(values["title"])
    offline = allow_internet or not (values.get("competition_sources") and _described(values)["enable_internet"])
    checks = [
        (re.fullmatch(r"[\w-]+/[\w-]{5,}", ref), f"id {ref!r} is not owner/slug with a slug of 5 letters or more"),
        (slug == ref.rpartition("/")[2].lower(), f"the title gives the slug {slug!r}, unlike the id {ref!r}"),
        (values["language"] == "python", f"language is {values['language']!r}, not 'python'"),
        (values["kernel_type"] == "notebook", f"kernel_type is {values['kernel_type']!r}, not 'notebook'"),
        (offline, 'a version with internet cannot be submitted: write "enable_internet": "false"'),
    ]
    faults += [fault for passed, fault in checks if not passed]
    notebook = folder / values["code_file"]
    try:
        if notebook.stat().st_size >= MAX_NOTEBOOK_BYTES:
            faults.append(f"{notebook} is larger than Kaggle takes, 1 MB: strip its outputs")
        elif not json.loads(notebook.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"]:
            raise KeyError("name")
    except OSError as error:
        faults.append(f"{notebook} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        faults.append(f"{notebook} is no notebook with metadata.kernelspec.name, without which a run ends at once")
    _refuse(path, faults)
    return values


def slugify(title: str) -> str:
    """The slug that the client, and Kaggle, make of a title of ASCII letters."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=\d),(?=\d)", "", title.lower())).strip("-")


def _differences(ref: str, values: dict) -> str:
    """What Kaggle holds otherwise than the metadata says; `saved as described` if there is nothing.

    Kaggle reports the machine of the last session, so that none is no difference.
    """
    with tempfile.TemporaryDirectory() as temporary:
        _client("kernels", "pull", "-m", "-p", temporary, ref)
        held = _described(json.loads(Path(temporary, "kernel-metadata.json").read_text(encoding="utf-8")))
    found = []
    for key, wanted in _described(values).items():
        if isinstance(wanted, set):
            found += [f"{source} is not in {key}" for source in sorted(wanted - held[key])]
            found += [f"{source} is in {key} unasked" for source in sorted(held[key] - wanted)]
        elif held[key] != wanted and held[key] != "":
            found.append(f"{key} is {held[key]}, not {wanted}")
    return "; ".join(found) or "saved as described"


def _described(values: dict) -> dict[str, bool | str | set[str]]:
    """What decides over a run, in one spelling: true or false, the machine, the sources."""
    flags = {key: str(values.get(key, default)).lower() == "true" for key, default in FLAGS.items()}
    sources = {key: {_source(key, name) for name in values.get(key) or []} for key in SOURCES}
    return flags | {"machine_shape": values.get("machine_shape") or ""} | sources


def _source(key: str, name: str) -> str:
    """Kaggle may report `datasets/owner/slug` for `owner/slug`, or leave out a version."""
    parts = name.lower().split("/")
    if key == "competition_sources":
        return parts[-1]
    if key == "model_sources":
        return "/".join(parts[-5:])  # owner/model/framework/variation/version
    prefixed = len(parts) > 2 and parts[0] in ("code", "dataset", "datasets")
    return "/".join(parts[1:3] if prefixed else parts[:2])

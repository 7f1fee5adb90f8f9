"""Runs Kaggle's client and turns the failures that it hides into errors.

The client reports success even if Kaggle does not add a source or a folder is left out, and it ignores misspelt keys.
So each step is checked three times: before it, in the client's answer, and in Kaggle's state afterwards. This relies on
the source code of kaggle 2.2.5, which is required.
"""

import contextlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kutils.kaggle.api import known_secrets, masked, poll, signed_in
from kutils.kaggle.metadata import KaggleError, check_dataset, check_kernel, compare_metadata, contents, refuse
from kutils.system import paths


@dataclass(frozen=True)
class Pushed:
    """A saved version of a kernel, which Kaggle now runs: owner/slug, number, web page."""

    ref: str
    version: int
    url: str


# ---------------------------------------------------------------- data sets and kernels


def upload_dataset(folder: Path, message: str, *, wait_seconds: float = 3600, poll_seconds: float = 10) -> None:
    """Create a private data set, or a new version of it, and wait until it can be mounted.

    Args:
        folder: `dataset-metadata.json` (`id` owner/slug, `title`, one licence) and the content of the data set;
            sub-folders travel as archives, which Kaggle unpacks. A version replaces the whole content.
        message: the version's notes; a new data set has none.
        wait_seconds, poll_seconds: for Kaggle's processing, which starts after the upload.
    Raises: KaggleError, before anything is sent if the folder or its metadata is at fault.
    """
    folder = Path(folder)
    ref = check_dataset(folder, message)
    previous = dataset_version(ref)[1]
    with signed_in(f"data set {ref}") as (api, output):
        if previous < 0:
            answer = api.dataset_create_new(str(folder), dir_mode="zip")
        else:
            answer = api.dataset_create_version(str(folder), message, dir_mode="zip")
        # the answer does not name the uploaded files: the client only prints them, and skips some silently
        text = output.getvalue()
        names = sorted(f"{entry.name}.zip" if entry.is_dir() else entry.name for entry in contents(folder))
        faults = [f"{name} did not arrive" for name in names if f"Upload successful: {name} (" not in text]
        faults += [f"not valid tags: {', '.join(answer.invalid_tags)}"] if answer.invalid_tags else []
        faults += [answer.error or "Kaggle gives no reason"] if answer.status.lower() != "ok" else []
        refuse(f"data set {ref}", faults)

    def state_of_new() -> str:
        state, version = dataset_version(ref)
        return "in process" if state == "ready" and version <= previous else state  # the previous version stays ready

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
        wait_seconds, poll_seconds: how long Kaggle's report may lag behind the push.
    Raises: KaggleError, before anything is sent if the folder is at fault; else the version may be saved and running.
    """
    folder = Path(folder)
    values = check_kernel(folder, allow_internet)
    ref = values["id"]
    with signed_in(f"kernel {ref}") as (api, output):
        saved = api.kernels_push(str(folder))
        # the client only prints a warning if a title gives another slug, or a machine is retired
        faults = [line.strip() for line in output.getvalue().splitlines() if line.strip()]
        for kind in ("tags", "dataset_sources", "competition_sources", "kernel_sources", "model_sources"):
            if invalid := getattr(saved, f"invalid_{kind}"):
                faults.append(f"not valid {kind.replace('_', ' ')}: {', '.join(invalid)}")
        faults += [saved.error] if saved.error else []
        if saved.version_number and faults:
            faults.insert(0, f"version {saved.version_number} was saved and runs all the same")
        elif not saved.version_number and not faults:
            faults = ["Kaggle saved no version and gives no reason"]
        refuse(f"kernel {ref}", faults)
    pushed = Pushed(ref, saved.version_number, saved.url)
    if not re.search(rf"/{re.escape(ref)}(?:[/?#]|$)", pushed.url, re.I):
        raise KaggleError(f"Kaggle saved {ref} elsewhere, at {pushed.url}: title, id and id_no do not belong together")

    def state_of_saved() -> str:
        return compare_metadata(values, pull_metadata(ref))

    for state in poll(f"kernel {ref}", state_of_saved, wait_seconds, poll_seconds):
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
    """Download the files that a kernel's run has written, and its log.

    Args:
        ref: owner/slug for the latest version, owner/slug/N for one of them.
        folder: target, which appears when it is complete. A previous one becomes `<name>.bak`, replacing an older .bak.
    Returns: the files, sorted.
    Raises: KaggleError if there is nothing.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise KaggleError(f"{folder} is a file; name a folder for the output of {ref}")
    with paths.atomic_folder(folder) as partial:
        with signed_in(f"output of {ref}") as (api, _):
            api.kernels_output(ref, str(partial))
        names = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
        if not names:
            raise KaggleError(f"{ref} has no output: did its run end, and did it write into /kaggle/working?")
        if folder.is_dir() and any(folder.iterdir()):
            previous = folder.with_name(f"{folder.name}.bak")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
    return [folder / name for name in names]


def submit(competition: str, ref: str, version: int, message: str, file_name: str = "submission.csv") -> str:
    """Submit a file that a version of a kernel has written; Kaggle then runs it on the hidden data.

    Returns: Kaggle's message, the submission's number, and how many submissions are left today.
    Raises: KaggleError if the submission was not taken.
    """
    with signed_in(f"version {version} of {ref} for {competition}") as (api, _):
        answer = api.competition_submit_code(file_name, message, competition, ref, version, quiet=True)
        if not answer.ref and "successfully submitted" not in answer.message.lower():
            raise KaggleError(f"{competition} did not take version {version} of {ref}: {answer.message}")
        lines = [answer.message, f"submission {answer.ref}"]
        with contextlib.suppress(Exception):  # the submission is valid without this number
            left = api.competition_get_submission_limits(competition).num_allowed_now
            lines.append(f"{left} submissions are left today")
    return masked("\n".join(lines), known_secrets())


# ---------------------------------------------------------------- Kaggle's state


def dataset_version(ref: str) -> tuple[str, int]:
    """State in lower case and number of the current version; -1 if there is none that this account may see."""
    with signed_in(f"data set {ref}") as (api, _):
        from requests import HTTPError

        try:
            values = json.loads(api.dataset_status(ref, format="json"))
        except HTTPError as error:
            if error.response.status_code in (403, 404):
                return "absent", -1
            raise
    return values["status"], values["current_version_number"] or 0


def run_state(ref: str) -> str:
    """State of a run in lower case, and Kaggle's message if it failed."""
    with signed_in(f"kernel {ref}") as (api, _):
        answer = api.kernels_status(ref)
    reason = f", {answer.failure_message}" if answer.failure_message else ""
    return masked(f"{answer.status.name.lower()}{reason}", known_secrets())


def pull_metadata(ref: str) -> dict:
    """The kernel's metadata, downloaded from Kaggle."""
    with signed_in(f"kernel {ref}") as (api, _), tempfile.TemporaryDirectory() as temporary:
        api.kernels_pull(ref, temporary, metadata=True)
        return json.loads(Path(temporary, "kernel-metadata.json").read_text(encoding="utf-8"))

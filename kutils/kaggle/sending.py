"""Uploads code and weights, pushes the kernels, submits: `kutils kaggle code|weights|push|check|submit`.

Everything is first packed into `working/kaggle/<name>/`, where it can be inspected; `--dry-run` stops there.
"""

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kutils.kaggle import client, packing, submission
from kutils.kaggle.client import Pushed
from kutils.kaggle.metadata import KaggleError
from kutils.kaggle.packing import Settings, git, metadata_folder, staging_folder
from kutils.system import paths

KERNELS = ("submission", "train")
RUN_HOURS = 12.5  # a session ends after 12 hours, and may first wait for a machine


def listing(folder: Path, command: str = "") -> str:
    """The content of a folder to send: files with sizes, metadata, and an equivalent command of Kaggle's client."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: not path.name.endswith("-metadata.json"))  # first, so that they are always listed
    total = sum(path.stat().st_size for path in files)
    lines = [f"{folder}: {len(files)} files, {total / 1e6:,.1f} MB"]
    lines += [f"  {path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in files[:40]]
    lines += [f"  ... and {len(files) - 40} more"] if len(files) > 40 else []
    lines += [path.read_text(encoding="utf-8").strip() for path in files if path.name.endswith("-metadata.json")]
    return "\n".join([*lines, *([f"would do the same as: {command}"] if command else [])])


def send_dataset(name: str, folder: Path, dry_run: bool) -> None:
    message = f"commit {git('rev-parse', '--short', 'HEAD').decode().strip()}"
    if dry_run:
        print(listing(folder, f"kaggle datasets create (or version -m '{message}') -p {folder} -r zip"))
        return
    print(listing(folder), flush=True)
    client.upload_dataset(folder, message)
    print(f"{name} is ready: {json.loads((folder / 'dataset-metadata.json').read_text())['id']}", flush=True)


def push(name: str, settings: Settings, dry_run: bool, wait: bool) -> None:
    """Push a kernel and save the number of the new version, which Kaggle runs; with `wait`, check the run
    afterwards."""
    folder = packing.stage_kernel(name, settings)
    if dry_run:
        print(listing(folder, f"kaggle kernels push -p {folder}"))
        return
    pushed = client.push_kernel(folder)
    commit = git("rev-parse", "HEAD").decode().strip()
    paths.write_json(pushed_path(name), {**asdict(pushed), "commit": commit, "checked": False})
    print(f"version {pushed.version} of {pushed.ref} runs: {pushed.url}", flush=True)
    if wait:
        check_run(name)


def check_run(name: str) -> None:
    """Wait for the run of the version pushed last, fetch its output and check it; only then can it be submitted.

    The output of a failed run is downloaded too: an interrupted training continues from it.
    """
    values = read_pushed(name)
    version = f"{values['ref']}/{values['version']}"
    output = staging_folder(f"{name}-output") / f"version{values['version']}"
    try:
        client.wait_for_run(version, wait_seconds=3600 * RUN_HOURS)
    except KaggleError:
        with contextlib.suppress(KaggleError):
            client.fetch_output(version, output)
            print(f"the output of the failed run: {output}", flush=True)
        raise
    files = client.fetch_output(version, output)
    print(f"its output, {len(files)} files: {output}", flush=True)
    if name == "submission":
        print(check_kernel_output(output), flush=True)
    paths.write_json(pushed_path(name), values | {"checked": True})


def pushed_path(name: str) -> Path:
    """The file that records the last version of a kernel pushed from here."""
    return staging_folder(name).with_name(f"{name}-pushed.json")


def read_pushed(name: str) -> dict:
    """Read the last version of a kernel pushed from here; KaggleError if there is none."""
    if not pushed_path(name).is_file():
        raise KaggleError(f"nothing was pushed from here: make kaggle-push KERNEL={name}")
    return json.loads(pushed_path(name).read_text(encoding="utf-8"))


def check_kernel_output(folder: Path) -> str:
    """Check the submission that a kernel has written.

    Returns: rows, images and models in one line.
    Raises: ValueError if the file is not valid; KaggleError if there was no GPU, or a model with weight was left out.
    """
    csv = folder / "submission.csv"
    report_path = submission.submission_report_path(csv)
    if not csv.is_file() or not report_path.is_file():
        raise KaggleError(f"{folder} holds no {csv.name} with its {report_path.name}; see the log there")
    num_rows = submission.check_submission(csv, submission.read_ids(csv))
    report = json.loads(report_path.read_text(encoding="utf-8"))
    if not report["gpus"]:
        raise KaggleError("the kernel ran without a GPU: is one left for this week, and is its machine_shape right?")
    if report["left_out"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report["left_out"].items())
        raise KaggleError(f"the kernel ran and left out {reasons}")
    unreadable = f"; unreadable: {', '.join(report['unreadable'])}" if report["unreadable"] else ""
    return f"{num_rows:,} valid rows of {report['images']:,} images by {len(report['seconds'])} models{unreadable}"


def submit_checked(message: str, dry_run: bool) -> None:
    """Submit the version of the submission kernel that was pushed last, if `check_run` has passed."""
    values = read_pushed("submission")
    pushed = Pushed(values["ref"], values["version"], values["url"])
    if not values["checked"]:
        raise KaggleError(f"the output of version {pushed.version} of {pushed.ref} is not checked: make kaggle-check")
    metadata = json.loads((metadata_folder() / "submission" / "kernel-metadata.json").read_text(encoding="utf-8"))
    competition = metadata["competition_sources"][0]
    message = message or f"commit {values['commit'][:12]}"
    if dry_run:
        options = f"-k {pushed.ref} -v {pushed.version} -f submission.csv -m '{message}'"
        print(f"would do the same as: kaggle competitions submit {competition} {options}")
        return
    print(client.submit(competition, pushed.ref, pushed.version, message), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kutils kaggle", description=__doc__.splitlines()[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dry-run", action="store_true", help="pack and list the files, send nothing")
    common.add_argument("--user", default="", help="Kaggle name (default: that of kernel-metadata/kaggle.yaml)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("code", parents=[common], help="upload the committed package as a data set")
    commands.add_parser("weights", parents=[common], help="upload the fitted ensemble in float16 as a data set")
    options = commands.add_parser("push", parents=[common], help="push a kernel, wait for its run, check its output")
    options.add_argument("kernel", nargs="?", default="submission", choices=KERNELS, help="by default submission")
    options.add_argument("--no-wait", action="store_true", help="return once the kernel runs; use `check` later")
    options = commands.add_parser("check", help="wait for the version pushed last, fetch its output and check it")
    options.add_argument("kernel", nargs="?", default="submission", choices=KERNELS, help="by default submission")
    options = commands.add_parser("submit", parents=[common], help="submit the kernel's checked version")
    options.add_argument("--message", default="", help="message of the submission (default: the commit)")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        check_run(arguments.kernel)
        return 0
    settings = packing.read_settings(user=arguments.user)
    if arguments.command == "push":
        push(arguments.kernel, settings, arguments.dry_run, not arguments.no_wait)
    elif arguments.command == "submit":
        submit_checked(arguments.message, arguments.dry_run)
    else:
        stage = packing.stage_code if arguments.command == "code" else packing.stage_weights
        send_dataset(arguments.command, stage(settings), arguments.dry_run)
    return 0

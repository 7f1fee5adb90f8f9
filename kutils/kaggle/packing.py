"""Packs code and weights, pushes the kernels, submits: `kutils kaggle code|weights|push|check|submit`.

What is sent is first laid out in `working/kaggle/<name>/`, so that it can be looked at; `--dry-run` stops there.
`kernel-metadata/kaggle.yaml` says whose account it is and which ensemble.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kutils.ensemble import fit, weight_files
from kutils.kaggle import client, submission
from kutils.kaggle.client import Pushed
from kutils.kaggle.metadata import KaggleError
from kutils.models import checkpoints
from kutils.runs import folders, recipes
from kutils.system import paths

PLACEHOLDER = "INSERT_KAGGLE_NAME_HERE"
CODE = ("kutils", "conf", "LICENSE")  # of the committed tree: all that the kernels need beside themselves
KERNELS = ("submission", "train")
RUN_HOURS = 12.5  # a session ends after 12, and may wait for a machine first


@dataclass(frozen=True)
class Settings:
    """`kernel-metadata/kaggle.yaml`."""

    user: str
    ensemble: str
    train: dict


def read_settings(path: Path | None = None, user: str = "") -> Settings:
    """Raises: KaggleError for an unknown or missing key, or a name that was not filled in."""
    path = path or metadata_folder() / "kaggle.yaml"
    values = recipes.read_yaml(path)
    values["user"] = user = user or str(values.get("user"))
    keys = {"": ("user", "ensemble", "train"), "train: ": ("data_sets", "kernels", "parameters")}
    for where, known in keys.items():
        found = (values.get("train") or {}) if where else values
        for key in found:
            if key not in known:
                raise KaggleError(f"{path}: {where}no key {key!r}{recipes.nearest(str(key), known)}")
        if missing := [key for key in known if key not in found]:
            raise KaggleError(f"{path}: {where}{', '.join(missing)} is missing")
    if user == PLACEHOLDER or not re.fullmatch(r"[\w-]+", user):
        raise KaggleError(f"{path}: user is {user}; put your Kaggle name there, as in kaggle.com/<user>")
    return Settings(**json.loads(json.dumps(values).replace(PLACEHOLDER, user)))


def metadata_folder() -> Path:
    return paths.repository_path("kernel-metadata")


def staging_folder(name: str) -> Path:
    return paths.working_dir() / "kaggle" / name


# ---------------------------------------------------------------- laying out


@contextmanager
def staged(name: str) -> Iterator[Path]:
    """An empty folder that becomes `working/kaggle/<name>` when the block ends, in place of a former one."""
    with paths.atomic_folder(staging_folder(name)) as partial:
        yield partial
        shutil.rmtree(staging_folder(name), ignore_errors=True)


def write_metadata(template: Path, folder: Path, user: str, **changes) -> None:
    """A metadata file of `kernel-metadata/`, changed and with the user's name in it, under its own name in a folder."""
    values = json.loads(template.read_text(encoding="utf-8")) | changes
    paths.write_json(folder / template.name, json.loads(json.dumps(values).replace(PLACEHOLDER, user)))


def git(*arguments: str) -> bytes:
    """Output of git in the repository. Raises: KaggleError: only what is committed is sent, so it takes a clone."""
    try:
        command = ["git", "-C", str(paths.repository_root()), *arguments]
        return subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise KaggleError(
            f"what is sent is the committed tree, and {paths.repository_root()} has none: {told}"
        ) from None


def warn_of_changes(*places: str) -> None:
    changed = git("status", "--porcelain", "--", *places).decode().splitlines()
    if changed:
        print(f"warning: not committed, and not sent: {', '.join(line[3:] for line in changed[:8])}", flush=True)


def stage_code(settings: Settings) -> Path:
    """The committed package and recipes with their commit's id."""
    warn_of_changes(*CODE)
    with staged("code") as folder:
        archive = folder / "code.tar"
        archive.write_bytes(git("archive", "--format=tar", "HEAD", "--", *CODE))
        with tarfile.open(archive) as stream:
            stream.extractall(folder, filter="data")
        archive.unlink()
        (folder / paths.COMMIT_FILE).write_text(git("rev-parse", "HEAD").decode(), encoding="utf-8")
        write_metadata(metadata_folder() / "code" / "dataset-metadata.json", folder, settings.user)
    return staging_folder("code")


def stage_weights(settings: Settings) -> Path:
    """The fitted ensemble with its checkpoints in float16, their recipes, hashes of all, and banks of prompts.

    Members without weight are left out.

    Raises: KaggleError or EnsembleError for a checkpoint that is missing or is not the one that was fitted.
    """
    source = paths.working_dir() / "models" / f"{Path(settings.ensemble).stem}.json"
    if not source.is_file():
        raise KaggleError(f"{source} is not there: kutils ensemble fit --config {settings.ensemble}")
    fitted = fit.load_ensemble(source).with_weight()
    found = weight_files.find_checkpoints(fitted.files(), [source.parent])
    with staged("weights") as folder:
        packed, manifest = {}, {}
        for family, members in fitted.families.items():
            packed[family] = []
            for member in members:
                name = str(Path(member.checkpoint).with_suffix(".safetensors"))
                if name not in manifest:  # members that differ in their neighbours share it
                    content = checkpoints.read(found[member.checkpoint])
                    checkpoints.save_half(folder / name, content)
                    recipe = checkpoints.recipe_of(content, found[member.checkpoint])
                    (folder / name).with_suffix(".yaml").write_text(recipe.to_yaml(), encoding="utf-8")
                    manifest[name] = facts_of(folder / name) | {"packed_from_sha256": member.sha256}
                packed[family].append(dataclasses.replace(member, checkpoint=name, sha256=manifest[name]["sha256"]))
        fit.write_ensemble(dataclasses.replace(fitted, families=packed), folder / source.name)
        if fitted.neighbours_bank:
            shutil.copyfile(found[fitted.neighbours_bank], folder / fitted.neighbours_bank)
            manifest[fitted.neighbours_bank] = facts_of(folder / fitted.neighbours_bank)
        if fit.bank_path(source).is_file():
            shutil.copyfile(fit.bank_path(source), fit.bank_path(folder / source.name))
        paths.write_json(folder / "manifest.json", {"commit": folders.git_commit(), "files": manifest})
        write_metadata(metadata_folder() / "weights" / "dataset-metadata.json", folder, settings.user)
    return staging_folder("weights")


def facts_of(path: Path) -> dict:
    """Hash and size of a file that is sent, said on the way."""
    size = path.stat().st_size
    print(f"{path.name}: {size / 1e6:,.1f} MB", flush=True)
    return {"sha256": paths.sha256_of(path), "bytes": size}


def stage_kernel(name: str, settings: Settings) -> Path:
    """The committed notebook with its metadata; the parameters of `train` are put into it, since a push takes none."""
    template = metadata_folder() / name / "kernel-metadata.json"
    values = json.loads(template.read_text(encoding="utf-8"))
    notebook = (template.parent / values["code_file"]).resolve().relative_to(paths.repository_root())
    warn_of_changes(str(notebook))
    with staged(name) as folder:
        changes = {"code_file": notebook.name}
        (folder / notebook.name).write_bytes(git("show", f"HEAD:{notebook.as_posix()}"))
        if name == "train":
            changes["dataset_sources"] = [*values["dataset_sources"], *settings.train["data_sets"]]
            changes["kernel_sources"] = list(settings.train["kernels"])
            set_parameters(folder / notebook.name, settings.train["parameters"])
        write_metadata(template, folder, settings.user, **changes)
    return staging_folder(name)


def set_parameters(notebook: Path, parameters: dict) -> None:
    """Put papermill's cell of parameters into a notebook; an unknown one is an error here, not on Kaggle."""
    import papermill  # a second, and the kernels on Kaggle do without

    known = papermill.inspect_notebook(notebook)
    for key in parameters:
        if key not in known:
            raise KaggleError(f"{notebook.name} has no parameter {key!r}{recipes.nearest(key, known)}")
    papermill.execute_notebook(notebook, notebook, parameters, prepare_only=True, progress_bar=False)


# ---------------------------------------------------------------- sending


def describe(folder: Path, *commands: str) -> str:
    """What a folder would send: its files with their sizes, the metadata, and the client's commands."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    lines = [f"{folder}: {len(files)} files, {total / 1e6:,.1f} MB"]
    lines += [f"  {path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in files[:40]]
    lines += [f"  ... and {len(files) - 40} more"] if len(files) > 40 else []
    lines += [path.read_text(encoding="utf-8").strip() for path in files if path.name.endswith("-metadata.json")]
    return "\n".join([*lines, *(f"would run: {command}" for command in commands)])


def send_dataset(name: str, folder: Path, dry_run: bool) -> None:
    message = f"commit {git('rev-parse', '--short', 'HEAD').decode().strip()}"
    if dry_run:
        print(describe(folder, f"kaggle datasets create (or version -m '{message}') -p {folder} -r zip"))
        return
    print(describe(folder), flush=True)
    client.upload_dataset(folder, message)
    print(f"{name} is ready: {json.loads((folder / 'dataset-metadata.json').read_text())['id']}", flush=True)


def push(name: str, settings: Settings, dry_run: bool, wait: bool) -> None:
    """Push a kernel and remember its version, which Kaggle then runs; `check` it unless nobody waits."""
    folder = stage_kernel(name, settings)
    if dry_run:
        print(describe(folder, f"kaggle kernels push -p {folder}"))
        return
    pushed = client.push_kernel(folder)
    commit = git("rev-parse", "HEAD").decode().strip()
    paths.write_json(pushed_path(name), {**asdict(pushed), "commit": commit, "checked": False})
    print(f"version {pushed.version} of {pushed.ref} runs: {pushed.url}", flush=True)
    if wait:
        check(name)


def check(name: str) -> None:
    """Wait for the run of the version pushed last, fetch its output and look at it; `submit` takes what was looked at.

    What a run that failed has left is fetched too: a training that was cut goes on from it.
    """
    values = read_pushed(name)
    version = f"{values['ref']}/{values['version']}"
    output = staging_folder(f"{name}-output") / f"version{values['version']}"
    try:
        client.wait_for_run(version, wait_seconds=3600 * RUN_HOURS)
    except KaggleError:
        with contextlib.suppress(KaggleError):
            client.fetch_output(version, output)
            print(f"what it has left: {output}", flush=True)
        raise
    files = client.fetch_output(version, output)
    print(f"its output, {len(files)} files: {output}", flush=True)
    if name == "submission":
        print(check_output(output), flush=True)
    paths.write_json(pushed_path(name), values | {"checked": True})


def pushed_path(name: str) -> Path:
    return staging_folder(name).with_name(f"{name}-pushed.json")


def read_pushed(name: str) -> dict:
    """The version of a kernel that was pushed last from here; KaggleError if there is none."""
    if not pushed_path(name).is_file():
        raise KaggleError(f"nothing was pushed from here: make kaggle-push KERNEL={name}")
    return json.loads(pushed_path(name).read_text(encoding="utf-8"))


def check_output(folder: Path) -> str:
    """Hold a kernel's output to what the competition scores; what it says of its models in one line.

    Raises: KaggleError or SubmissionError if the file is not valid, or a model with weight was left out.
    """
    csv = folder / "submission.csv"
    told = submission.report_path(csv)
    if not csv.is_file() or not told.is_file():
        raise KaggleError(f"{folder} holds no {csv.name} with its {told.name}; see the log there")
    num_rows = submission.check_submission(csv, submission.read_ids(csv))
    report = json.loads(told.read_text(encoding="utf-8"))
    if not report["gpus"]:
        raise KaggleError("the kernel ran without a GPU: is one left for this week, and is its machine_shape right?")
    if report["left_out"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report["left_out"].items())
        raise KaggleError(f"the kernel ran and left out {reasons}")
    unreadable = f"; unreadable: {', '.join(report['unreadable'])}" if report["unreadable"] else ""
    return f"{num_rows:,} valid rows of {report['images']:,} images by {len(report['seconds'])} models{unreadable}"


def submit(settings: Settings, message: str, dry_run: bool) -> None:
    """Submit the version of the submission kernel that was pushed last and whose output was looked at."""
    values = read_pushed("submission")
    pushed = Pushed(values["ref"], values["version"], values["url"])
    if not values["checked"]:
        raise KaggleError(f"nobody looked at the output of version {pushed.version} of {pushed.ref}: make kaggle-check")
    metadata = json.loads((metadata_folder() / "submission" / "kernel-metadata.json").read_text(encoding="utf-8"))
    competition = metadata["competition_sources"][0]
    message = message or f"commit {values['commit'][:12]}"
    if dry_run:
        options = f"-k {pushed.ref} -v {pushed.version} -f submission.csv -m '{message}'"
        print(f"would run: kaggle competitions submit {competition} {options}")
        return
    print(client.submit(competition, pushed.ref, pushed.version, message), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kutils kaggle", description=__doc__.splitlines()[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dry-run", action="store_true", help="lay out and show what would be sent, send nothing")
    common.add_argument("--user", default="", help="Kaggle name (default: that of kernel-metadata/kaggle.yaml)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("code", parents=[common], help="upload the committed package as a data set")
    commands.add_parser("weights", parents=[common], help="upload the fitted ensemble in float16 as a data set")
    options = commands.add_parser("push", parents=[common], help="push a kernel, wait for its run, check its output")
    options.add_argument("kernel", nargs="?", default="submission", choices=KERNELS, help="(default: submission)")
    options.add_argument("--no-wait", action="store_true", help="return when it runs; `check` comes later")
    options = commands.add_parser("check", help="wait for the version pushed last, fetch its output and check it")
    options.add_argument("kernel", nargs="?", default="submission", choices=KERNELS, help="(default: submission)")
    options = commands.add_parser("submit", parents=[common], help="submit the kernel's checked version")
    options.add_argument("--message", default="", help="of the submission (default: the commit)")
    arguments = parser.parse_args(argv)
    if arguments.command == "check":
        check(arguments.kernel)
        return 0
    settings = read_settings(user=arguments.user)
    if arguments.command == "push":
        push(arguments.kernel, settings, arguments.dry_run, not arguments.no_wait)
    elif arguments.command == "submit":
        submit(settings, arguments.message, arguments.dry_run)
    else:
        stage = stage_code if arguments.command == "code" else stage_weights
        send_dataset(arguments.command, stage(settings), arguments.dry_run)
    return 0

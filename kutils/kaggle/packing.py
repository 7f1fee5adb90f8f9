"""Packs code, weights and kernels for Kaggle into `working/kaggle/<name>/`, where they can be inspected.

`kernel-metadata/kaggle.yaml` names the account and the ensemble. Code and notebooks are sent as committed.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kutils.ensemble import weights
from kutils.kaggle.metadata import USER, KaggleError
from kutils.models import checkpoints
from kutils.runs import folders, recipes
from kutils.system import paths

PLACEHOLDER = "INSERT_KAGGLE_NAME_HERE"
CODE = ("kutils", "conf", "LICENSE")  # parts of the committed tree that the kernels need


@dataclass(frozen=True)
class Settings:
    """`kernel-metadata/kaggle.yaml`."""

    user: str
    ensemble: str
    train: dict


def read_settings(path: Path | None = None, user: str = "") -> Settings:
    """Read `kernel-metadata/kaggle.yaml`.

    Args:
        user: another Kaggle name than the file's.
    Raises: KaggleError for an unknown or missing key, or a name that was not filled in.
    """
    path = path or metadata_folder() / "kaggle.yaml"
    values = recipes.read_yaml(path)
    values["user"] = user = user or str(values.get("user"))
    keys = {"": ("user", "ensemble", "train"), "train: ": ("data_sets", "kernels", "parameters")}
    for where, known in keys.items():
        entries = (values.get("train") or {}) if where else values
        for key in entries:
            if key not in known:
                raise KaggleError(f"{path}: {where}no key {key!r}{recipes.nearest(str(key), known)}")
        if missing := [key for key in known if key not in entries]:
            raise KaggleError(f"{path}: {where}{', '.join(missing)} is missing")
    if user == PLACEHOLDER or not re.fullmatch(USER, user):
        raise KaggleError(
            f"{path}: user is {user}; put your Kaggle name there, letters, digits and dashes as in kaggle.com/<user>"
        )
    return Settings(**json.loads(json.dumps(values).replace(PLACEHOLDER, user)))


def metadata_folder() -> Path:
    return paths.repository_path("kernel-metadata")


def staging_folder(name: str) -> Path:
    return paths.working_dir() / "kaggle" / name


# ---------------------------------------------------------------- packing


@contextmanager
def staged(name: str) -> Iterator[Path]:
    """An empty folder that becomes `working/kaggle/<name>` when the block ends, in place of the previous one."""
    with paths.atomic_folder(staging_folder(name)) as partial:
        yield partial
        shutil.rmtree(staging_folder(name), ignore_errors=True)


def write_metadata(template: Path, folder: Path, user: str, **changes) -> None:
    """Write a metadata file of `kernel-metadata/` into a folder, with changes and the user's name in it."""
    values = json.loads(template.read_text(encoding="utf-8")) | changes
    paths.write_json(folder / template.name, json.loads(json.dumps(values).replace(PLACEHOLDER, user)))


def git(*arguments: str) -> bytes:
    """Run git in the repository and return its output.

    Raises: KaggleError if there is no repository, since only committed files are sent.
    """
    try:
        command = ["git", "-C", str(paths.repository_root()), *arguments]
        return subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise KaggleError(
            f"what is sent is the committed tree, and {paths.repository_root()} has none: {message}"
        ) from None


def warn_of_changes(*places: str) -> None:
    """Print a warning that names files with uncommitted changes."""
    changed = git("status", "--porcelain", "--", *places).decode().splitlines()
    if changed:
        print(f"warning: not committed, and not sent: {', '.join(line[3:] for line in changed[:8])}", flush=True)


def stage_code(settings: Settings) -> Path:
    """Pack the committed package and recipes with the commit's id; returns the folder."""
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
    """Pack the fitted ensemble: checkpoints in float16 with recipes and hashes, and the prompts beside it.

    Members of weight 0 are left out.

    Returns: the folder.
    Raises: KaggleError or ValueError for a checkpoint that is missing or is not the one that was fitted.
    """
    source = paths.working_dir() / "models" / f"{Path(settings.ensemble).stem}.json"
    if not source.is_file():
        raise KaggleError(f"{source} is not there: kutils ensemble fit --config {settings.ensemble}")
    fitted = weights.load_ensemble(source).with_weight()
    files = weights.find_files(fitted.files(), [source.parent])
    if links := [str(path) for path in files.values() if path.is_symlink()]:
        raise KaggleError(f"{', '.join(links)}: a symbolic link is not packed; put the file itself there")
    with staged("weights") as folder:
        packed, manifest = {}, {}
        for family, members in fitted.families.items():
            packed[family] = []
            for member in members:
                name = str(Path(member.checkpoint).with_suffix(".safetensors"))
                if name not in manifest:  # members that differ only in neighbours share a checkpoint
                    content = checkpoints.read(files[member.checkpoint])
                    checkpoints.save_half(folder / name, content)
                    recipe = checkpoints.recipe_of(content, files[member.checkpoint])
                    (folder / name).with_suffix(".yaml").write_text(recipe.to_yaml(), encoding="utf-8")
                    manifest[name] = hash_and_size(folder / name) | {"packed_from_sha256": member.sha256}
                packed[family].append(dataclasses.replace(member, checkpoint=name, sha256=manifest[name]["sha256"]))
        weights.write_ensemble(dataclasses.replace(fitted, families=packed), folder / source.name)
        if fitted.neighbours_bank:
            shutil.copyfile(files[fitted.neighbours_bank], folder / fitted.neighbours_bank)
            manifest[fitted.neighbours_bank] = hash_and_size(folder / fitted.neighbours_bank)
        if weights.bank_path(source).is_file():
            shutil.copyfile(weights.bank_path(source), weights.bank_path(folder / source.name))
        paths.write_json(folder / "manifest.json", {"commit": folders.git_commit(), "files": manifest})
        write_metadata(metadata_folder() / "weights" / "dataset-metadata.json", folder, settings.user)
    return staging_folder("weights")


def hash_and_size(path: Path) -> dict:
    """SHA-256 and bytes of a file that is sent; prints its size."""
    size = path.stat().st_size
    print(f"{path.name}: {size / 1e6:,.1f} MB", flush=True)
    return {"sha256": paths.sha256_of(path), "bytes": size}


def stage_kernel(name: str, settings: Settings) -> Path:
    """Pack the committed notebook with its metadata; returns the folder.

    The parameters of `train` are written into its notebook, since a push cannot pass parameters.
    """
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
    """Put papermill's cell of parameters into a notebook; KaggleError for an unknown one."""
    import papermill  # takes a second to import

    known = papermill.inspect_notebook(notebook)
    for key in parameters:
        if key not in known:
            raise KaggleError(f"{notebook.name} has no parameter {key!r}{recipes.nearest(key, known)}")
    papermill.execute_notebook(notebook, notebook, parameters, prepare_only=True, progress_bar=False)

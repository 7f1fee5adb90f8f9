"""Finds code, weights and images among the inputs of a Kaggle notebook, by their content.

Inputs are mounted at `/kaggle/input/{competitions,datasets,notebooks}/...`, earlier at `/kaggle/input/<slug>`.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kutils.ensemble.weights import LEVELS, tree
from kutils.kaggle import submission
from kutils.runs import folders as runs_folders
from kutils.runs.launch import Run
from kutils.system import paths


def below(root: Path, pattern: str) -> Iterator[Path]:
    """Paths that match a pattern in a folder or up to LEVELS below it, upper levels first.

    A file that is mounted in two places is yielded once.
    """
    seen = set()
    for depth in range(LEVELS + 1):
        for path in sorted(root.glob("*/" * depth + pattern)):
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield path


# ---------------------------------------------------------------- for the submission


def find_images_folder(root: Path) -> Path:
    """The `images/` folder of the competition's data, known by the `sample_submission.csv` beside it.

    Raises: ValueError if there is none, or several.
    """
    folders = []
    for sample in below(root, "sample_submission.csv"):
        with sample.open(encoding="utf-8", errors="replace") as stream:
            header = stream.readline().strip()
        if header == submission.SUBMISSION_HEADER and (sample.parent / "images").is_dir():
            folders.append(sample.parent / "images")
    if len(folders) > 1:
        raise ValueError(f"several folders look like the competition's; name one of {', '.join(map(str, folders))}")
    if not folders:
        raise ValueError(
            f"nothing below {root} holds sample_submission.csv and images/; add the competition's data, or name a "
            f"folder of images. There is:\n{tree(root)}"
        )
    return folders[0]


# ---------------------------------------------------------------- for training


def prepare_training(run: Run) -> Run:
    """On Kaggle, make the inputs look like `input/` and `working/` of a clone; elsewhere do nothing.

    Data sets are linked into one folder, and KUTILS_INPUT is set to it. The output of a previous version is copied, so
    that the run continues from it or starts from the previous stage's checkpoint.

    Returns: the run; `pretrained=true` becomes the folder of a weights file among the inputs, if there is one.
    """
    if not paths.on_kaggle():
        return run
    root = paths.input_dir()
    bring_run(run, root)
    os.environ["KUTILS_INPUT"] = str(link_datasets(run.recipe.datasets, root))
    return with_pretrained(run, root)


def with_pretrained(run: Run, root: Path) -> Run:
    """The run with `pretrained=` a folder that links to `<backbone>.<suffix>` below the inputs: there is no network.

    The folder does not depend on how the input is mounted, since a resumed run must keep its configuration.
    """
    if run.recipe.pretrained is not True:
        return run
    folder = Path(tempfile.gettempdir()) / "kutils-pretrained"
    for path in list(below(root, f"{run.recipe.backbone}.*"))[:1]:
        folder.mkdir(exist_ok=True)
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        recipe = dataclasses.replace(run.recipe, pretrained=str(folder))
        return dataclasses.replace(run, recipe=recipe, overrides=(*run.overrides, f"pretrained={folder}"))
    return run


def link_datasets(names: Sequence[str], root: Path) -> Path:
    """Make a folder with links to the tables, embeddings and images of data sets in several inputs.

    `<name>.tsv` is searched for below the inputs; the other files beside it, and folders `<name>_images`, are linked
    too.

    Returns: the folder. A data set that is not among the inputs is not in it; its reader then raises.
    Raises: ValueError if a table is there several times.
    """
    folder = Path(tempfile.gettempdir()) / "kutils-input"
    folder.mkdir(exist_ok=True)
    for name in names:
        tables = list(below(root, f"{name}.tsv"))
        if len(tables) > 1:
            raise ValueError(f"{name}.tsv is there several times; leave one: {', '.join(map(str, tables))}")
        entries = [entry for table in tables for entry in table.parent.iterdir()]
        for entry in [*entries, *below(root, f"{name}_images")]:
            link = folder / entry.name
            if link.is_dir() and not link.samefile(entry):
                raise ValueError(f"{link.resolve()} and {entry} have the same name: rename one, in its table too")
            if not link.exists():
                link.unlink(missing_ok=True)  # of an input that is gone
                link.symlink_to(entry)
    return folder


def bring_run(run: Run, root: Path) -> None:
    """Copy a run's folder and checkpoints, and its initial checkpoint, from the output of a previous version.

    Of several versions the one with the most progress is used. Existing files in `working/` are kept.
    """
    previous = [path.parent for path in below(root, f"{run.folder.name}/config.yaml")]
    if previous and not run.folder.exists():
        steps = {
            folder: [line["step"] for line in runs_folders.read_metrics(folder / "metrics.jsonl")]
            for folder in previous
        }
        farthest = max(previous, key=lambda folder: max(steps[folder], default=0))
        print(f"going on from {farthest}", flush=True)
        copy(farthest, run.folder)
        for path in below(farthest.parent.parent, f"{run.recipe.save_dir}/{run.recipe.prefix}_fold{run.fold}_*.pth"):
            target = run.recipe.models_folder() / run.recipe.save_dir / path.name
            if not target.exists():
                copy(path, target)
    initial = run.recipe.initial_checkpoint(run.fold)
    if initial and not initial.exists():
        for path in list(below(root, f"{initial.parent.name}/{initial.name}"))[:1]:
            print(f"starting from {path}", flush=True)
            copy(path, initial)


def copy(source: Path, target: Path) -> None:
    """Copy a file or folder atomically, and make the copy writable, since inputs are read-only."""
    if source.is_file():
        with paths.atomic_path(target) as partial:
            shutil.copyfile(source, partial)
        return
    with paths.atomic_folder(target) as partial:
        shutil.copytree(source, partial, copy_function=shutil.copyfile, dirs_exist_ok=True)
        for folder, _, _ in os.walk(partial):
            Path(folder).chmod(0o755)


# ---------------------------------------------------------------- machine and versions


def describe_machine() -> str:
    """Versions, cores, memory and disk, in lines."""
    packages = ("torch", "torchvision", "timm", "numpy", "pandas", "pyarrow")
    versions = ", ".join(f"{name} {runs_folders.version_of(name) or 'absent'}" for name in packages)
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    disks = {folder: shutil.disk_usage(folder).free for folder in (str(paths.working_dir()), tempfile.gettempdir())}
    free = ", ".join(f"{number / 1e9:.0f} GB free in {folder}" for folder, number in disks.items())
    return (
        f"Python {sys.version.split()[0]}, {versions}; commit {runs_folders.git_commit() or 'unknown'}\n"
        f"{os.cpu_count()} cores, {pages * page / 1e9:.0f} GB of memory, {free}"
    )

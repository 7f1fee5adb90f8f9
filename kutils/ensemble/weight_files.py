"""Finds a fitted ensemble and its checkpoints below a folder, whatever the folders in between are called."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kutils.system import paths

ENSEMBLE_KIND = "kutils ensemble"  # in the first lines of a file of fitted weights
LEVELS = 5  # below the inputs: owner, data set, framework, version, folder
CHECKPOINT_SUFFIXES = (".pth", ".safetensors")


class MountError(ValueError):
    """An input that is not there; the message shows the tree of what is."""


def weight_folders(given: str = "") -> list[Path]:
    """Where weights are looked for: the folder given, else working/models and, on Kaggle, all inputs."""
    if given:
        return [Path(given)]
    return [paths.working_dir() / "models"] + ([paths.input_dir()] if paths.on_kaggle() else [])


def find_ensemble(folders: Sequence[Path]) -> Path:
    """The file of fitted weights below the folders, known by its first lines.

    Raises: MountError if there is none, or several that differ.
    """
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.json")) if path.is_file()):
        with path.open("rb") as stream:
            if f'"kind": "{ENSEMBLE_KIND}"'.encode() in stream.read(200):
                found.append(path)
    if not found:
        raise MountError(f"no ensemble is fitted (kutils ensemble fit). There is:\n{trees(folders)}")
    if len({path.read_bytes() for path in found}) > 1:
        raise MountError(f"several ensembles are there; name one of {', '.join(map(str, found))}")
    return found[0]


def find_checkpoints(wanted: Mapping[str, str], folders: Sequence[Path], beside: Path | None = None) -> dict[str, Path]:
    """Checkpoints (and prompts) of an ensemble below the folders, by file names and told apart by their SHA-256.

    Args:
        wanted: path as the ensemble names it -> SHA-256.
        folders: that are searched with all that is below.
        beside: the ensemble's own file, from whose folder the paths may lead too.
    Returns: the same path -> where the file is.
    Raises: MountError naming all that are missing or differ from what the weights were fitted with.
    """
    named: dict[str, list[Path]] = {}
    suffixes = sorted({Path(name).suffix for name in wanted})
    there = [path for folder in folders for suffix in suffixes for path in folder.rglob(f"*{suffix}")]
    there += [beside.parent / name for name in wanted if (beside.parent / name).is_file()] if beside else []
    for path in there:
        named.setdefault(path.name, []).append(path)
    found, missing = {}, []
    for name, sha256 in wanted.items():
        candidates = sorted({*named.get(Path(name).name, [])})
        right = [path for path in candidates if paths.sha256_of(path) == sha256]
        if right:
            found[name] = right[0]
        else:
            differing = f" ({', '.join(map(str, candidates))}: not what was fitted)" if candidates else ""
            missing.append(f"{name}{differing}")
    if missing:
        raise MountError(f"files of the ensemble are missing: {'; '.join(missing)}. There is:\n{trees(folders)}")
    return found


def trees(folders: Sequence[Path]) -> str:
    return "\n".join(tree(folder) for folder in folders)


def tree(root: Path, levels: int = LEVELS, most: int = 8) -> str:
    """What lies below a folder, folders first, as indented lines: the first `most` names of each folder."""
    lines = [f"{root}/"]

    def visit(folder: Path, level: int) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_file(), entry.name))
        except OSError as error:
            lines.append(f"{'  ' * level}({error.strerror})")
            return
        for entry in entries[:most]:
            lines.append(f"{'  ' * level}{entry.name}{'' if entry.is_file() else '/'}")
            if entry.is_dir() and level < levels:
                visit(Path(entry.path), level + 1)
        if len(entries) > most:
            lines.append(f"{'  ' * level}... and {len(entries) - most:,} more")

    visit(root, 1)
    return "\n".join(lines)

"""Where the submission kernel's inputs are mounted: found by what they hold, never by one fixed path."""

import os
from collections.abc import Sequence
from pathlib import Path

from kutils import paths, submission
from kutils.ensemble import KIND, Member, sha256_of


class MountError(ValueError):
    """An input that is not there; the message shows the tree of what is."""


def find_images_folder(root: Path) -> Path:
    """The `images/` folder of the competition's data, known by the `sample_submission.csv` beside it.

    Args:
        root: that data itself, or up to three folders above it (the old mounts are `/kaggle/input/<slug>`, the new
            `/kaggle/input/competitions/<slug>`).
    Raises: MountError if there is none, or several.
    """
    found = []
    for depth in range(4):
        for sample in sorted(root.glob("*/" * depth + "sample_submission.csv")):
            with sample.open(encoding="utf-8", errors="replace") as stream:
                header = stream.readline().strip()
            if header == submission.HEADER and (sample.parent / "images").is_dir():
                found.append(sample.parent / "images")
    if len(found) > 1:
        raise MountError(f"several folders look like the competition's; name one of {', '.join(map(str, found))}")
    if not found:
        raise MountError(
            f"nothing below {root} holds sample_submission.csv and images/; add the competition's data, or name a "
            f"folder of images. There is:\n{tree(root)}"
        )
    return found[0]


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
    for path in (path for folder in folders for path in sorted(folder.rglob("*.json"))):
        with path.open("rb") as stream:
            if f'"kind": "{KIND}"'.encode() in stream.read(200):
                found.append(path)
    if not found:
        raise MountError(f"no ensemble is fitted (python -m kutils.ensemble fit). There is:\n{trees(folders)}")
    if len({path.read_bytes() for path in found}) > 1:
        raise MountError(f"several ensembles are there; name one of {', '.join(map(str, found))}")
    return found[0]


def find_checkpoints(members: Sequence[Member], folders: Sequence[Path]) -> dict[Member, Path]:
    """Every member's checkpoint below the folders, known by its file name and told apart by its SHA-256.

    Raises: MountError naming all that are missing or differ from what the weights were fitted with.
    """
    named: dict[str, list[Path]] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*.pth"))):
        named.setdefault(path.name, []).append(path)
    found, missing = {}, []
    for member in members:
        candidates = named.get(Path(member.checkpoint).name, [])
        right = [path for path in candidates if sha256_of(path) == member.sha256]
        if right:
            found[member] = right[0]
        else:
            differing = f" ({', '.join(map(str, candidates))}: not what was fitted)" if candidates else ""
            missing.append(f"{member.checkpoint}{differing}")
    if missing:
        raise MountError(f"checkpoints of the ensemble are missing: {'; '.join(missing)}. There is:\n{trees(folders)}")
    return found


def trees(folders: Sequence[Path]) -> str:
    return "\n".join(tree(folder) for folder in folders)


def tree(root: Path, levels: int = 5, most: int = 8) -> str:
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

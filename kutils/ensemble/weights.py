"""Finds, reads and writes a fitted ensemble: its JSON file, its members' checkpoints, and its prompts."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending
from kutils.ensemble.members import FIT_FOLD, Member
from kutils.system import checksums, paths
from kutils.system.constants import EMBEDDING_DIM

ENSEMBLE_KIND = "kutils ensemble"  # in the first lines of the JSON file
LEVELS = 5  # depth of the search below Kaggle's inputs: owner, data set, framework, version, folder
CHECKPOINT_SUFFIXES = (".pth", ".safetensors")


@dataclass(frozen=True)
class Ensemble:
    """A fitted ensemble: the content of its JSON file."""

    method: str  # one of blending.METHODS
    families: dict[str, list[Member]]
    weights: dict[str, float | list[float]]  # by family: a number, or 384 of them
    mean_embedding: list[float]  # [384], unit: the mean training embedding, for images without a prediction
    scores: dict  # mean cosine on the half of fold 0 that the fit has not seen: members, methods, chosen, baseline
    over_equal: dict[str, dict[str, float]]  # method -> mean and standard error of its gain over equal weights
    leave_one_out: dict[str, float]
    error_correlations: dict[str, dict[str, float]]
    rows: dict[str, int]  # of fold 0: fit, unseen
    folds_hash: str
    targets_hash: str
    neighbours_bank: str = ""  # file beside the weights with the prompts for members' neighbours
    neighbours_sha256: str = ""

    def files(self) -> dict[str, str]:
        """The files that prediction needs: path below the folder of models -> SHA-256."""
        files = {member.checkpoint: member.sha256 for member in self.members()}
        return files | ({self.neighbours_bank: self.neighbours_sha256} if self.neighbours_bank else {})

    def has_weight(self, family: str) -> bool:
        return bool(np.any(self.weights[family]))

    def with_weight(self) -> "Ensemble":
        """A copy without families of weight 0, and without neighbours' prompts if no other family needs them."""
        families = {name: members for name, members in self.families.items() if self.has_weight(name)}
        used = any(member.neighbours for members in families.values() for member in members)
        return replace(
            self,
            families=families,
            weights={name: self.weights[name] for name in families},
            neighbours_bank=self.neighbours_bank if used else "",
        )

    def mean_weights(self) -> dict[str, float]:
        """One number per family: the mean if every dimension has its own weight."""
        return {family: float(np.mean(weight)) for family, weight in self.weights.items()}

    def members(self) -> list[Member]:
        return [member for members in self.families.values() for member in members]

    def summary(self) -> str:
        """The scores as lines to print."""
        rows, scores, weights = self.rows, self.scores, self.mean_weights()
        lines = [
            f"fitted on {rows['fit']:,} rows of fold {FIT_FOLD}; mean cosine on its {rows['unseen']:,} other rows:"
        ]
        lines.append(f"  {'mean prompt':24} {scores['baseline']:.4f}")
        for family, score in scores["members"].items():
            without = f"   (without it {self.leave_one_out[family]:.4f})" if family in self.leave_one_out else ""
            lines.append(f"  {family:24} {score:.4f}   weight {weights.get(family, 0.0):.3f}{without}")
        for method in blending.METHODS:
            chosen = "   chosen" if method == self.method else ""
            lines.append(f"  {method + ' weights':24} {scores[method]:.4f}{chosen}")
        lines += [f"{method} weights {verdict(gain)}" for method, gain in self.over_equal.items()]
        return "\n".join(lines)


def verdict(gain: Mapping[str, float]) -> str:
    """A sentence on whether weights beat equal ones: a gain counts if it exceeds twice its standard error."""
    mean, error = gain["mean"], gain["error"]
    if error is None:
        return f"cannot be told from equal ones: {mean:+.5f} on rows that the fit has not seen, of too few topics"
    result = "beat" if mean > 2 * error else "are worse than" if mean < -2 * error else "are no different from"
    return f"{result} equal ones on rows that the fit has not seen: {mean:+.5f}, standard error {error:.5f}"


# ---------------------------------------------------------------- the JSON file


def to_json(fitted: Ensemble) -> str:
    """The text of the file, with a checksum."""
    return json.dumps(checksums.with_checksum({"kind": ENSEMBLE_KIND, **asdict(fitted)}), indent=2) + "\n"


def write_ensemble(fitted: Ensemble, path: Path) -> None:
    """Write the JSON file, atomically; an existing file is replaced."""
    with paths.atomic_path(path) as temporary:
        temporary.write_text(to_json(fitted), encoding="utf-8")


def load_ensemble(path: Path | str) -> Ensemble:
    """Read a file that `write_ensemble` wrote; ValueError for other files."""
    try:
        content = paths.read_json(Path(path))
        values = {
            item.name: content[item.name]
            for item in fields(Ensemble)
            if item.name in content or item.default is MISSING
        }
        families = {family: [Member(**member) for member in members] for family, members in values["families"].items()}
        check_family_weights(values["weights"], families)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except checksums.Damaged as error:
        raise ValueError(f"{error}; make it again: kutils ensemble fit") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds no weights ({error!r}); make them: kutils ensemble fit") from error
    return Ensemble(**values | {"families": families})


def check_family_weights(weights: Mapping[str, float | list[float]], families: Mapping[str, Sequence[Member]]) -> None:
    """Raise ValueError or TypeError unless each family has a number, or one per dimension."""
    if set(weights) != set(families):
        raise ValueError(f"weights of {sorted(weights)} for families {sorted(families)}")
    for family, weight in weights.items():
        values = np.asarray(weight, np.float64)
        if values.shape not in ((), (EMBEDDING_DIM,)) or not np.isfinite(values).all():
            raise ValueError(f"the weight of {family} is no number and no {EMBEDDING_DIM} of them")


def bank_path(weights: Path | str) -> Path:
    """The small bank of prompts beside a file of weights."""
    return Path(weights).with_suffix(".prompts.arrow")


def neighbours_path(weights: Path | str, sha256: str = "") -> Path:
    """The file, named by its hash, with the prompts for members' neighbours beside a file of weights."""
    return Path(weights).with_suffix(f"{f'.{sha256[:12]}' if sha256 else ''}.neighbours.arrow")


# ---------------------------------------------------------------- where the files are


def weight_folders(given: str = "") -> list[Path]:
    """Folders to search for weights: the given one, else working/models and, on Kaggle, all inputs."""
    if given:
        return [Path(given)]
    return [paths.working_dir() / "models"] + ([paths.input_dir()] if paths.on_kaggle() else [])


def ensemble_files(folders: Sequence[Path]) -> list[Path]:
    """Files of fitted weights in folders and below, recognised by their first lines; the newest comes first."""
    files = []
    for path in (path for folder in folders for path in sorted(folder.rglob("*.json")) if path.is_file()):
        with path.open("rb") as stream:
            if f'"kind": "{ENSEMBLE_KIND}"'.encode() in stream.read(200):
                files.append(path)
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)


def find_ensemble(folders: Sequence[Path]) -> Path:
    """The file of the ensemble that was fitted last, in folders or below.

    Raises: ValueError if there is none; on Kaggle also for several that differ, since file times of inputs are not
        reliable.
    """
    files = ensemble_files(folders)
    if not files:
        raise ValueError(f"no ensemble is fitted (kutils ensemble fit). There is:\n{trees(folders)}")
    if paths.on_kaggle() and len({path.read_bytes() for path in files}) > 1:
        raise ValueError(f"several ensembles are there; name one of {', '.join(map(str, sorted(files)))}")
    return files[0]


def find_members(
    fitted: Ensemble, folders: Sequence[Path], beside: Path | None = None
) -> tuple[dict[Member, Path], PromptBank | None]:
    """The checkpoint of every member, and the prompts for members' neighbours (None without neighbours).

    Args:
        folders, beside: as for `find_files`.
    Raises: ValueError naming all files that are missing, or that are not those of the fit.
    """
    files = find_files(fitted.files(), folders, beside)
    bank = PromptBank.load(files[fitted.neighbours_bank]) if fitted.neighbours_bank else None
    return {member: files[member.checkpoint] for member in fitted.members()}, bank


def find_files(hashes: Mapping[str, str], folders: Sequence[Path], beside: Path | None = None) -> dict[str, Path]:
    """Find an ensemble's files by name and SHA-256, at any place below folders.

    Args:
        hashes: path as the ensemble names it -> SHA-256.
        folders: searched with their subfolders.
        beside: the ensemble's own file; paths may also be relative to its folder.
    Returns: the same path -> the file found.
    Raises: ValueError naming all files that are missing or differ from those of the fit.
    """
    by_name: dict[str, list[Path]] = {}
    suffixes = sorted({Path(name).suffix for name in hashes})
    available = [path for folder in folders for suffix in suffixes for path in folder.rglob(f"*{suffix}")]
    available += [beside.parent / name for name in hashes if (beside.parent / name).is_file()] if beside else []
    for path in available:
        by_name.setdefault(path.name, []).append(path)
    files, missing = {}, []
    for name, sha256 in hashes.items():
        candidates = sorted({*by_name.get(Path(name).name, [])})
        right = [path for path in candidates if paths.sha256_of(path) == sha256]
        if right:
            files[name] = right[0]
        else:
            differing = f" ({', '.join(map(str, candidates))}: not what was fitted)" if candidates else ""
            missing.append(f"{name}{differing}")
    if missing:
        raise ValueError(f"files of the ensemble are missing: {'; '.join(missing)}. There is:\n{trees(folders)}")
    return files


def trees(folders: Sequence[Path]) -> str:
    return "\n".join(tree(folder) for folder in folders)


def tree(root: Path, levels: int = LEVELS, most: int = 8) -> str:
    """The content of a folder, folders first, as indented lines: the first `most` names of each folder."""
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

"""Reads the members of an ensemble: configuration, checkpoints and out-of-fold predictions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kutils.data import datasets
from kutils.data.prompt_bank import KNN_TEMPERATURE, PromptBank
from kutils.ensemble import blending
from kutils.models import checkpoints
from kutils.runs import recipes
from kutils.system import paths
from kutils.training.out_of_fold import predictions_path, read_predictions

FIT_FOLD = 0  # weights are fitted on this fold, with the member of each family that was validated on it


@dataclass(frozen=True)
class Member:
    """One trained model."""

    recipe: str  # recipe file, as given or below conf/
    fold: int  # validation fold
    checkpoint: str = ""  # relative to the folder of models
    sha256: str = ""  # of the checkpoint
    score: float | None = None  # mean cosine on its own validation fold, from its training
    neighbours: int = 0  # its prediction is replaced by the mean of so many nearest prompts; 0: not replaced
    temperature: float = KNN_TEMPERATURE  # of the softmax weights of these prompts

    @property
    def name(self) -> str:
        neighbours = f" ({self.neighbours} nearest)" if self.neighbours else ""
        return f"{Path(self.recipe).stem} fold {self.fold}{neighbours}"

    @property
    def network(self) -> str:
        """A key that is equal for members which differ only in their neighbours, and so share one forward pass."""
        return self.sha256 or f"{self.recipe} {self.fold}"  # the path of a recipe can be written in several ways

    def apply_neighbours(
        self, rows: np.ndarray, bank: PromptBank | None, device: str = "cpu", exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """Turn the network's predictions, float32 [n, 384], into the member's; NaN rows stay.

        Args:
            rows: returned unchanged if the member has no neighbours; then the other arguments are not needed.
            bank, device, exclude: as `PromptBank.knn` has them.
        """
        if not self.neighbours:
            return rows
        if bank is None:
            raise ValueError(f"{self.name}: the prompts that its neighbours are among are not there")
        finite, means = np.isfinite(rows).all(axis=1), np.full_like(rows, np.nan)
        means[finite] = bank.knn(rows[finite], self.neighbours, self.temperature, device, exclude)
        return means


# ---------------------------------------------------------------- configuration


def read_config(path: str | Path) -> tuple[str, dict[str, list[Member]]]:
    """Method and families of a `conf/ensemble_<name>.yaml`.

    Raises: ValueError for an unknown key (naming the nearest), method, recipe or fold; a family with no or several
        members validated on fold 0; one whose members differ in their neighbours; a member given twice.
    """
    path = recipes.find_config(path)
    values = recipes.read_yaml(path)
    check_keys(path, "an ensemble", values, ("method", "families"))
    if values["method"] not in blending.METHODS:
        raise ValueError(f"{path}: method is {values['method']!r}; it can be {', '.join(blending.METHODS)}")
    if not isinstance(values["families"], dict) or not values["families"]:
        raise ValueError(f"{path}: families holds no `name:` with a list of members")
    families: dict[str, list[Member]] = {}
    for family, entries in values["families"].items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path}: {family} is no list of members like `- {{recipe: conf/x.yaml, fold: 0}}`")
        for entry in entries:
            check_keys(path, f"a member of {family}", entry, ("recipe", "fold"), ("neighbours", "temperature"))
            if type(entry["recipe"]) is not str or type(entry["fold"]) is not int or not 0 <= entry["fold"] <= 9:
                raise ValueError(f"{path}: {family}: {entry} is no recipe file with a fold of 0 to 9")
            if type(count := entry.get("neighbours", 1)) is not int or count < 1:
                raise ValueError(f"{path}: {family}: neighbours is {count!r}; it is a number of prompts, such as 20")
            if "temperature" in entry:
                entry["temperature"] = read_temperature(f"{path}: {family}", entry)
        families[str(family)] = [Member(**entry) for entry in entries]
        fitted = [member.name for member in families[family] if member.fold == FIT_FOLD]
        if len(fitted) != 1:
            raise ValueError(
                f"{path}: {family} has {len(fitted)} members validated on fold {FIT_FOLD}"
                f"{': ' if fitted else ''}{', '.join(fitted)}; the weights are fitted with exactly one per family"
            )
        if len({(member.neighbours, member.temperature) for member in families[family]}) > 1:
            raise ValueError(
                f"{path}: members of {family} differ in neighbours or temperature; the weight is fitted on one kind: "
                "give each kind a family of its own"
            )
    members = [member for entries in families.values() for member in entries]
    if len({(recipes.find_config(each.recipe), each.fold, each.neighbours) for each in members}) < len(members):
        raise ValueError(f"{path} names the same recipe and fold twice, with the same number of neighbours")
    return values["method"], families


def read_temperature(where: str, entry: Mapping) -> float:
    """The temperature of a member with neighbours; ValueError if it is invalid or would be ignored."""
    value = recipes.convert(f"{where}: temperature", entry["temperature"], float)
    if not 0 < value < math.inf:
        raise ValueError(f"{where}: temperature is {value}; it is above 0 and finite, such as {KNN_TEMPERATURE}")
    if "neighbours" not in entry:
        raise ValueError(f"{where}: temperature is {value} without neighbours; give their number or remove it")
    return value


def check_keys(path: Path, what: str, values: Mapping, keys: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise ValueError for a key that is not known, naming the nearest, or for missing keys."""
    known = (*keys, *optional)
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: {what} has no key {key!r}{recipes.nearest(str(key), known)}")
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{path}: {what} lacks {', '.join(missing)}")


def add_checkpoint(member: Member) -> Member:
    """The member with path and hash of its checkpoint; ValueError if the file is missing or of another fold."""
    recipe = recipes.load_recipe(member.recipe)
    path = recipe.checkpoint_path(member.fold)
    if not path.is_file():
        raise ValueError(f"{path} is not there; {how_to_train(member)}")
    content = checkpoints.read(path)
    if content.get("fold") != member.fold:
        raise ValueError(
            f"{path} was validated on fold {content.get('fold')}, not {member.fold}; {how_to_train(member)}"
        )
    name = path.relative_to(recipe.models_folder()).as_posix()
    return replace(member, checkpoint=name, sha256=paths.sha256_of(path), score=content.get("cosine_similarity"))


def how_to_train(member: Member) -> str:
    return f"train it: kutils train --config {member.recipe} --fold {member.fold}"


def load_predictions(families: Mapping[str, Sequence[Member]]) -> tuple[dict[str, np.ndarray], dict]:
    """Out-of-fold predictions of every family's member of fold 0, and the facts that they share.

    Returns: family -> float32 [n, 384]; and dataset [n], row [n], folds_hash, targets_hash.
    Raises: ValueError for a missing or unreadable file, one of another fold, or members validated on different rows,
        targets or folds (naming both files); ValueError for a checkpoint trained on other folds.
    """
    predictions: dict[str, np.ndarray] = {}
    common: dict = {}
    for family, members in families.items():
        member = next(member for member in members if member.fold == FIT_FOLD)
        recipe = recipes.load_recipe(member.recipe)
        folder = recipe.run_folder(FIT_FOLD)
        path, saved = predictions_path(folder, FIT_FOLD), read_predictions(folder, FIT_FOLD, config=member.recipe)
        if saved["fold"] != FIT_FOLD:
            raise ValueError(f"{path} was validated on fold {saved['fold']}; the fit needs fold {FIT_FOLD}")
        common = common or {**saved, "path": path}
        for key, what in (("folds_hash", "folds"), ("dataset", "rows"), ("row", "rows"), ("targets_hash", "targets")):
            if not np.array_equal(common[key], saved[key]):
                raise ValueError(
                    f"{common['path']} and {path} were validated on different {what}; train both on the same data sets "
                    "with the same folds"
                )
        checkpoint = recipe.checkpoint_path(FIT_FOLD)
        checkpoints.check_folds(checkpoints.read(checkpoint), FIT_FOLD, json.loads(saved["folds_hash"]), checkpoint)
        predictions[family] = saved["embeddings"]
    return predictions, common


def load_targets(common: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts' embeddings of the predicted rows, and the mean prompt, from the data sets in `input/`.

    Args:
        common: as `load_predictions` returns it.
    Returns: targets float32 [n, 384]; the index of each row's prompt, int [n]; the mean training embedding, float32
        [384] of unit length.
    Raises: ValueError if the data sets have changed since the members were validated.
    """
    hashes = json.loads(common["folds_hash"])
    names = sorted(hashes)
    data = datasets.load_datasets(names)
    changed = [name for name in names if data.folds_hashes[name] != hashes[name]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: other prompts or folds now than the members were trained on; train them again, or "
            f"put the previous input/{changed[0]}.tsv.bak back"
        )
    rows = data.rows_of(common["dataset"], common["row"])
    if data.hash_targets(rows) != common["targets_hash"]:
        raise ValueError(f"{', '.join(names)}: other rows or embeddings now than the members were validated on")
    return data.targets(rows), data.prompt_codes[rows], data.training_mean(FIT_FOLD)

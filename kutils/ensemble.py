"""The ensemble of a configuration: its members, and weights fitted on the predictions of rows they have not seen.

Members of a family (one recipe, trained on several folds) are averaged; families are added by weights. These are fitted
on fold 0 with exactly one member per family, the one validated on that fold: the others have trained on its rows and
would look better than they are. They inherit the weight of their family.

A member may stand for the known prompts near what its network predicts (`neighbours: 20`): its prediction is then the
weighted mean of the nearest prompts outside of fold 0.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from kutils import blending, checkpoints, config, datasets, mounts, paths
from kutils.prompt_bank import KNN_TEMPERATURE, PromptBank, in_fold

FIT_FOLD = 0
BANK_PROMPTS = 4096  # that travel with the weights: they say in words what a prediction means


class EnsembleError(ValueError):
    """Members, predictions or a file of weights that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Member:
    """One trained model."""

    recipe: str  # recipe file, as given or below conf/
    fold: int  # validation fold
    checkpoint: str = ""  # relative to the folder of models
    sha256: str = ""  # of the checkpoint
    score: float | None = None  # mean cosine on its own validation fold, as its training saw it
    neighbours: int = 0  # nearest prompts that its prediction is replaced by; 0: none
    temperature: float = KNN_TEMPERATURE  # of their weights

    @property
    def name(self) -> str:
        pulled = f" ({self.neighbours} nearest)" if self.neighbours else ""
        return f"{Path(self.recipe).stem} fold {self.fold}{pulled}"

    @property
    def network(self) -> str:
        """What members share that differ in their neighbours alone: one forward pass does for all."""
        return self.sha256 or f"{self.recipe} {self.fold}"  # a recipe may be spelt in several ways

    def pull(
        self, rows: np.ndarray, bank: PromptBank | None, device: str = "cpu", exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """The member's prediction, float32 [n, 384], from its network's; NaN rows stay.

        Args:
            bank, device, exclude: as `PromptBank.knn` has them; of no interest to a member without neighbours.
        """
        if not self.neighbours:
            return rows
        if bank is None:
            raise EnsembleError(f"{self.name}: the prompts that its neighbours are among are not there")
        known, pulled = np.isfinite(rows).all(axis=1), np.full_like(rows, np.nan)
        pulled[known] = bank.knn(rows[known], self.neighbours, self.temperature, device, exclude)
        return pulled


@dataclass(frozen=True)
class Ensemble:
    """A fitted ensemble: what its JSON file holds."""

    method: str  # one of blending.METHODS
    families: dict[str, list[Member]]
    weights: dict[str, float | list[float]]  # by family: a number, or 384 of them
    mean_embedding: list[float]  # [384], unit: the mean training embedding, for images without a prediction
    scores: dict  # mean cosine on the half of fold 0 that the fit has not seen: members, methods, chosen, baseline
    over_equal: dict[str, dict[str, float]]  # method -> mean and standard error of its gain over equal weights, there
    leave_one_out: dict[str, float]
    error_correlations: dict[str, dict[str, float]]
    rows: dict[str, int]  # of fold 0: fit, unseen
    folds_hash: str
    targets_hash: str
    neighbours_bank: str = ""  # file beside the weights with the prompts that members' neighbours are among
    neighbours_sha256: str = ""

    def files(self) -> dict[str, str]:
        """What it takes to predict: path below the folder of models -> SHA-256."""
        wanted = {member.checkpoint: member.sha256 for member in self.members()}
        return wanted | ({self.neighbours_bank: self.neighbours_sha256} if self.neighbours_bank else {})

    def with_weight(self) -> "Ensemble":
        """Itself without the families, and the neighbours, that count for nothing."""
        families = {name: members for name, members in self.families.items() if has_weight(self, name)}
        used = any(member.neighbours for members in families.values() for member in members)
        return replace(
            self,
            families=families,
            weights={name: self.weights[name] for name in families},
            neighbours_bank=self.neighbours_bank if used else "",
        )

    def mean_weights(self) -> dict[str, float]:
        """One number per family, also where every dimension has its own."""
        return {family: float(np.mean(weight)) for family, weight in self.weights.items()}

    def members(self) -> list[Member]:
        return [member for members in self.families.values() for member in members]


# ---------------------------------------------------------------- members and their predictions


def read_config(path: str | Path) -> tuple[str, dict[str, list[Member]]]:
    """Method and families of a `conf/ensemble_<name>.yaml`.

    Raises: ConfigError or EnsembleError for an unknown key (naming the nearest), method, recipe or fold, a family with
        no or several members validated on fold 0 or whose members differ in their neighbours, or a member given twice.
    """
    path = config.find_config(path)
    values = config.read_yaml(path)
    check_keys(path, "an ensemble", values, ("method", "families"))
    if values["method"] not in blending.METHODS:
        raise EnsembleError(f"{path}: method is {values['method']!r}; it can be {', '.join(blending.METHODS)}")
    if not isinstance(values["families"], dict) or not values["families"]:
        raise EnsembleError(f"{path}: families holds no `name:` with a list of members")
    families: dict[str, list[Member]] = {}
    for family, entries in values["families"].items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise EnsembleError(f"{path}: {family} is no list of members like `- {{recipe: conf/x.yaml, fold: 0}}`")
        for entry in entries:
            check_keys(path, f"a member of {family}", entry, ("recipe", "fold"), ("neighbours", "temperature"))
            if type(entry["recipe"]) is not str or type(entry["fold"]) is not int or not 0 <= entry["fold"] <= 9:
                raise EnsembleError(f"{path}: {family}: {entry} is no recipe file with a fold of 0 to 9")
            if type(count := entry.get("neighbours", 1)) is not int or count < 1:
                raise EnsembleError(f"{path}: {family}: neighbours is {count!r}; it is a number of prompts, such as 20")
            if "temperature" in entry:
                entry["temperature"] = read_temperature(f"{path}: {family}", entry)
        families[str(family)] = [Member(**entry) for entry in entries]
        fitted = [member.name for member in families[family] if member.fold == FIT_FOLD]
        if len(fitted) != 1:
            raise EnsembleError(
                f"{path}: {family} has {len(fitted)} members validated on fold {FIT_FOLD}"
                f"{': ' if fitted else ''}{', '.join(fitted)}; the weights are fitted with exactly one per family"
            )
        if len({(member.neighbours, member.temperature) for member in families[family]}) > 1:
            raise EnsembleError(
                f"{path}: members of {family} differ in neighbours or temperature; the weight is fitted on one kind: "
                "give each kind a family of its own"
            )
    members = [member for entries in families.values() for member in entries]
    if len({(config.find_config(each.recipe), each.fold, each.neighbours) for each in members}) < len(members):
        raise EnsembleError(f"{path} names the same recipe and fold twice, with the same number of neighbours")
    return values["method"], families


def read_temperature(where: str, entry: Mapping) -> float:
    """The temperature of a member with neighbours; EnsembleError for one that is none or would be ignored."""
    value = config.convert(f"{where}: temperature", entry["temperature"], float)
    if not 0 < value < math.inf:
        raise EnsembleError(f"{where}: temperature is {value}; it is above 0 and finite, such as {KNN_TEMPERATURE}")
    if "neighbours" not in entry:
        raise EnsembleError(f"{where}: temperature is {value} without neighbours; give their number or remove it")
    return value


def check_keys(path: Path, what: str, values: Mapping, keys: Sequence[str], optional: Sequence[str] = ()) -> None:
    known = (*keys, *optional)
    for key in values:
        if key not in known:
            raise EnsembleError(f"{path}: {what} has no key {key!r}{config.nearest(str(key), known)}")
    missing = [key for key in keys if key not in values]
    if missing:
        raise EnsembleError(f"{path}: {what} lacks {', '.join(missing)}")


def add_checkpoint(member: Member) -> Member:
    """The member with path and hash of its checkpoint; EnsembleError if that is missing or of another fold."""
    recipe = config.load_recipe(member.recipe)
    path = recipe.checkpoint_path(member.fold)
    if not path.is_file():
        raise EnsembleError(f"{path} is not there; {how_to_train(member)}")
    content = checkpoints.read(path)
    if content.get("fold") != member.fold:
        raise EnsembleError(
            f"{path} was validated on fold {content.get('fold')}, not {member.fold}; {how_to_train(member)}"
        )
    name = path.relative_to(recipe.models_folder()).as_posix()
    return replace(member, checkpoint=name, sha256=paths.sha256_of(path), score=content.get("cosine_similarity"))


def how_to_train(member: Member) -> str:
    return f"train it: python -m kutils.train --config {member.recipe} --fold {member.fold}"


def load_predictions(families: Mapping[str, Sequence[Member]]) -> tuple[dict[str, np.ndarray], dict]:
    """Out-of-fold predictions of every family's member of fold 0, and what they have in common.

    Returns: family -> float32 [n, 384]; and dataset [n], row [n], folds_hash, targets_hash.
    Raises: EnsembleError for a missing or unreadable file, one of another fold, or members validated on different rows,
        targets or folds (naming both files); CheckpointError for a checkpoint trained on other folds.
    """
    predictions: dict[str, np.ndarray] = {}
    common: dict = {}
    for family, members in families.items():
        member = next(member for member in members if member.fold == FIT_FOLD)
        recipe = config.load_recipe(member.recipe)
        path = recipe.run_folder(FIT_FOLD) / f"fold{FIT_FOLD}_predictions.npz"
        saved = read_predictions(path, member)
        if saved["fold"] != FIT_FOLD:
            raise EnsembleError(f"{path} was validated on fold {saved['fold']}; the fit needs fold {FIT_FOLD}")
        common = common or {**saved, "path": path}
        for key, what in (("folds_hash", "folds"), ("dataset", "rows"), ("row", "rows"), ("targets_hash", "targets")):
            if not np.array_equal(common[key], saved[key]):
                raise EnsembleError(
                    f"{common['path']} and {path} were validated on different {what}; train both on the same data sets "
                    "with the same folds"
                )
        checkpoint = recipe.checkpoint_path(FIT_FOLD)
        checkpoints.check_folds(checkpoints.read(checkpoint), FIT_FOLD, json.loads(saved["folds_hash"]), checkpoint)
        predictions[family] = saved["embeddings"]
    return predictions, common


def read_predictions(path: Path, member: Member) -> dict:
    """The arrays and texts of a run's out-of-fold predictions; EnsembleError if they are not there or damaged."""
    if not path.is_file():
        raise EnsembleError(f"{path} is not there; {how_to_train(member)}")
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {key: saved[key] for key in ("dataset", "row", "embeddings", "targets_hash", "fold", "folds_hash")}
    except Exception as error:  # NumPy and zipfile raise errors of many kinds
        raise EnsembleError(f"{path} cannot be read ({error}); {how_to_train(member)}") from error
    return {key: value if value.ndim else value.item() for key, value in arrays.items()}


def load_targets(common: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the predicted rows should have been, and the mean prompt, from the data sets in `input/`.

    Returns: targets float32 [n, 384]; the number of each row's prompt, int [n]; the mean training embedding, float32
        [384] of unit length.
    Raises: DataError, or EnsembleError if the data sets are not what they were when the members were validated.
    """
    hashes = json.loads(common["folds_hash"])
    names = sorted(hashes)
    data = datasets.load_datasets(names)
    changed = [name for name in names if data.folds_hashes[name] != hashes[name]]
    if changed:
        raise EnsembleError(
            f"{', '.join(changed)}: other prompts or folds now than the members were trained on; train them again, or "
            f"put the former input/{changed[0]}.tsv.bak back"
        )
    rows = data.starts[[names.index(name) for name in common["dataset"]]] + common["row"]
    if data.hash_targets(rows) != common["targets_hash"]:
        raise EnsembleError(f"{', '.join(names)}: other rows or embeddings now than the members were validated on")
    return data.targets(rows), data.prompt_codes[rows], data.training_mean(FIT_FOLD)


# ---------------------------------------------------------------- fit, write, read


def fit(config_name: str | Path, output: Path | str = "", seed: int = 0) -> tuple[Ensemble, Path]:
    """Fit the ensemble of a configuration and write its JSON file, and a small bank of prompts beside it.

    Where members have neighbours, the prompts outside of fold 0 are written there too, in 0.8 GB per million: only
    among them are neighbours looked for, here and in prediction, so that no prompt of fold 0 gives itself away.

    The weights are those of the half of fold 0 that the fit saw, so that the scores, of the other half, are theirs.

    Args:
        config_name: `conf/ensemble_<name>.yaml`.
        output: the file; empty: `working/models/ensemble_<name>.json`, beside the checkpoints that it goes with. A
            former file that differs is kept as `<output>.bak`, with its neighbours' prompts; those of older ones go.
        seed: of the halves.
    Raises: a ValueError that says what is missing or does not fit, before anything is written.
    """
    method, families = read_config(config_name)
    families = {family: [add_checkpoint(member) for member in members] for family, members in families.items()}
    predictions, common = load_predictions(families)
    targets, prompts, mean = load_targets(common)
    names = sorted(json.loads(common["folds_hash"]))
    bank = training = None
    if any(member.neighbours for members in families.values() for member in members):
        bank = PromptBank.from_datasets(names)
        training = ~in_fold(bank, names, FIT_FOLD)
        for family, members in families.items():
            (member,) = (member for member in members if member.fold == FIT_FOLD)
            predictions[family] = member.pull(predictions[family], bank, "auto", exclude=~training)
    groups = blending.topics(targets, prompts, seed)
    weights, report = blending.fit_and_score(predictions, targets, groups, seed)
    unseen = targets[~blending.split_groups(groups, seed)]
    report["scores"] |= {
        "chosen": report["scores"][method],
        "baseline": blending.mean_cosine(np.broadcast_to(mean, unseen.shape), unseen),
    }
    path = Path(output) if output else paths.working_dir() / "models" / f"{Path(config_name).stem}.json"
    neighbours, sha256 = (None, "") if bank is None else save_neighbours(bank, path, training)
    fitted = Ensemble(
        method=method,
        families=families,
        weights=weights[method],
        mean_embedding=mean.tolist(),
        folds_hash=common["folds_hash"],
        targets_hash=common["targets_hash"],
        neighbours_bank=neighbours.name if neighbours else "",
        neighbours_sha256=sha256,
        **report,
    )
    if path.is_file() and path.read_text(encoding="utf-8") != to_json(fitted):
        shutil.copy2(path, f"{path}.bak")
    PromptBank.from_datasets(names, most=BANK_PROMPTS, seed=seed).save(bank_path(path), np.float16)
    write_ensemble(fitted, path)
    remove_neighbours(path)
    return fitted, path


def save_neighbours(bank: PromptBank, weights: Path, keep: np.ndarray) -> tuple[Path, str]:
    """Write prompts beside a file of weights under a name with their hash: those of a former fit stay.

    Args:
        keep: bool [n]: the prompts to write.
    Returns: the file, and its SHA-256.
    """
    unnamed = neighbours_path(weights, "new")
    bank.save(unnamed, np.float16, keep)
    sha256 = paths.sha256_of(unnamed)
    return unnamed.replace(neighbours_path(weights, sha256)), sha256


def remove_neighbours(weights: Path) -> None:
    """Delete the neighbours' prompts that neither a file of weights nor its .bak names."""
    named = "".join(path.read_text(encoding="utf-8") for path in (weights, Path(f"{weights}.bak")) if path.is_file())
    for path in weights.parent.iterdir():
        ours = re.fullmatch(re.escape(weights.stem) + r"(\.[0-9a-f]{12})?\.neighbours\.arrow", path.name)
        if ours and json.dumps(path.name) not in named:
            path.unlink()


def to_json(fitted: Ensemble) -> str:
    return json.dumps({"kind": mounts.ENSEMBLE_KIND, **asdict(fitted)}, indent=2) + "\n"


def write_ensemble(fitted: Ensemble, path: Path) -> None:
    """Write the JSON file, atomically; replaced if it is there."""
    with paths.atomic_path(path) as temporary:
        temporary.write_text(to_json(fitted), encoding="utf-8")


def has_weight(fitted: Ensemble, family: str) -> bool:
    return bool(np.any(fitted.weights[family]))


def bank_path(weights: Path | str) -> Path:
    """The small bank of prompts beside a file of weights."""
    return Path(weights).with_suffix(".prompts.arrow")


def neighbours_path(weights: Path | str, sha256: str = "") -> Path:
    """The prompts outside of fold 0 beside a file of weights whose members have neighbours, by their hash."""
    return Path(weights).with_suffix(f"{f'.{sha256[:12]}' if sha256 else ''}.neighbours.arrow")


def load_neighbours(fitted: Ensemble, files: Mapping[str, Path]) -> PromptBank | None:
    """The prompts among which members' neighbours are; None where no member has any.

    Args:
        files: where the ensemble's files are, as `mounts.find_checkpoints` returns them.
    """
    return PromptBank.load(files[fitted.neighbours_bank]) if fitted.neighbours_bank else None


def load_ensemble(path: Path | str) -> Ensemble:
    """Read a file that `fit` wrote; EnsembleError for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {
            item.name: content[item.name]
            for item in fields(Ensemble)
            if item.name in content or item.default is MISSING
        }
        families = {family: [Member(**member) for member in members] for family, members in values["families"].items()}
        check_weights(values["weights"], families)
    except OSError as error:
        raise EnsembleError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EnsembleError(f"{path} holds no weights ({error!r}); make them: python -m kutils.ensemble fit") from error
    return Ensemble(**values | {"families": families})


def check_weights(weights: Mapping[str, float | list[float]], families: Mapping[str, Sequence[Member]]) -> None:
    """Raise ValueError or TypeError unless each family has a number, or one per dimension."""
    if set(weights) != set(families):
        raise ValueError(f"weights of {sorted(weights)} for families {sorted(families)}")
    for family, weight in weights.items():
        values = np.asarray(weight, np.float64)
        if values.shape not in ((), (config.EMBEDDING_DIM,)) or not np.isfinite(values).all():
            raise ValueError(f"the weight of {family} is no number and no {config.EMBEDDING_DIM} of them")


def describe(fitted: Ensemble) -> str:
    """The scores as lines for a person."""
    rows, scores, weights = fitted.rows, fitted.scores, fitted.mean_weights()
    lines = [f"fitted on {rows['fit']:,} rows of fold {FIT_FOLD}; mean cosine on its {rows['unseen']:,} other rows:"]
    lines.append(f"  {'mean prompt':24} {scores['baseline']:.4f}")
    for family, score in scores["members"].items():
        without = f"   (without it {fitted.leave_one_out[family]:.4f})" if family in fitted.leave_one_out else ""
        lines.append(f"  {family:24} {score:.4f}   weight {weights.get(family, 0.0):.3f}{without}")
    for method in blending.METHODS:
        lines.append(f"  {method + ' weights':24} {scores[method]:.4f}{'   chosen' if method == fitted.method else ''}")
    lines += [f"{method} weights {verdict(gain)}" for method, gain in fitted.over_equal.items()]
    return "\n".join(lines)


def verdict(gain: Mapping[str, float]) -> str:
    """Whether weights beat equal ones, in words: a gain counts from twice its standard error on."""
    mean, error = gain["mean"], gain["error"]
    if error is None:
        return f"cannot be told from equal ones: {mean:+.5f} on rows that the fit has not seen, of too few topics"
    told = "beat" if mean > 2 * error else "are worse than" if mean < -2 * error else "are no different from"
    return f"{told} equal ones on rows that the fit has not seen: {mean:+.5f}, standard error {error:.5f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kutils.ensemble", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("fit", help="fit the weights on fold 0 and write them to a JSON file")
    options.add_argument("--config", required=True, help="ensemble file, as given or below the repository's conf/")
    options.add_argument("--output", default="", help="JSON file (default: working/models/<config>.json)")
    options.add_argument("--seed", type=int, default=0, help="of the halves of fold 0 (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        fitted, path = fit(arguments.config, arguments.output, arguments.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"{describe(fitted)}\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

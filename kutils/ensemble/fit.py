"""Fits the weights of an ensemble on predictions of rows that its members have not trained on.

Members of a family (one recipe, trained on several folds) are averaged; families are added by weights. These are fitted
on fold 0 with exactly one member per family, the one validated on that fold: the others have trained on its rows and
would look better than they are. They inherit the weight of their family.

A member may stand for the known prompts near what its network predicts (`neighbours: 20`): its prediction is then the
weighted mean of the nearest prompts outside of fold 0.
"""

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank, in_fold
from kutils.ensemble import blending, weight_files
from kutils.ensemble.members import (
    FIT_FOLD,
    EnsembleError,
    Member,
    add_checkpoint,
    load_predictions,
    load_targets,
    read_config,
)
from kutils.system import paths
from kutils.system.embedding_files import EMBEDDING_DIM

BANK_PROMPTS = 4096  # that travel with the weights: they say in words what a prediction means


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
    return json.dumps({"kind": weight_files.ENSEMBLE_KIND, **asdict(fitted)}, indent=2) + "\n"


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
        raise EnsembleError(f"{path} holds no weights ({error!r}); make them: kutils ensemble fit") from error
    return Ensemble(**values | {"families": families})


def check_weights(weights: Mapping[str, float | list[float]], families: Mapping[str, Sequence[Member]]) -> None:
    """Raise ValueError or TypeError unless each family has a number, or one per dimension."""
    if set(weights) != set(families):
        raise ValueError(f"weights of {sorted(weights)} for families {sorted(families)}")
    for family, weight in weights.items():
        values = np.asarray(weight, np.float64)
        if values.shape not in ((), (EMBEDDING_DIM,)) or not np.isfinite(values).all():
            raise ValueError(f"the weight of {family} is no number and no {EMBEDDING_DIM} of them")


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kutils ensemble", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("fit", help="fit the weights on fold 0 and write them to a JSON file")
    options.add_argument("--config", required=True, help="ensemble file, as given or below the repository's conf/")
    options.add_argument("--output", default="", help="JSON file (default: working/models/<config>.json)")
    options.add_argument("--seed", type=int, default=0, help="of the halves of fold 0 (default: 0)")
    arguments = parser.parse_args(argv)
    fitted, path = fit(arguments.config, arguments.output, arguments.seed)
    print(f"{describe(fitted)}\nwrote {path}")
    return 0

"""Fits the weights of an ensemble on predictions of rows that its members have not trained on.

Members of a family (one recipe, trained on several folds) are averaged; the ensemble is a weighted sum of families. The
weights are fitted on fold 0 with exactly one member per family, the one validated on that fold. The other members have
trained on its rows and would seem too good; they only inherit the weight of their family.

A member with `neighbours: 20` predicts the weighted mean of the 20 known prompts outside of fold 0 that are nearest to
its network's prediction.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank, in_fold
from kutils.ensemble import blending
from kutils.ensemble.members import FIT_FOLD, add_checkpoint, load_predictions, load_targets, read_config
from kutils.ensemble.weights import Ensemble, bank_path, neighbours_path, to_json, write_ensemble
from kutils.system import paths

BANK_PROMPTS = 4096  # saved beside the weights, to show predictions as prompts


def fit(config_name: str | Path, output: Path | str = "", seed: int = 0) -> tuple[Ensemble, Path]:
    """Fit the ensemble of a configuration and write its JSON file, and a small bank of prompts beside it.

    If members have neighbours, the prompts outside of fold 0 are written there too, 0.8 GB per million. Neighbours are
    searched for only among these, here and in prediction, so that no prompt of fold 0 finds itself.

    The weights are fitted on one half of fold 0 and scored on the other half.

    Args:
        output: the file; empty: `working/models/ensemble_<name>.json`, beside the checkpoints. A previous file that
            differs becomes `<output>.bak` and keeps its neighbours' prompts; those of older files are deleted.
    Raises: ValueError that says what is missing or does not fit, before anything is written.
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
            predictions[family] = member.apply_neighbours(predictions[family], bank, "auto", exclude=~training)
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
    """Write prompts beside a file of weights under a name with their hash, so that those of a previous fit stay.

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
        of_this_ensemble = re.fullmatch(re.escape(weights.stem) + r"(\.[0-9a-f]{12})?\.neighbours\.arrow", path.name)
        if of_this_ensemble and json.dumps(path.name) not in named:
            path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kutils ensemble", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("fit", help="fit the weights on fold 0 and write them to a JSON file")
    options.add_argument("--config", required=True, help="ensemble file, as given or below the repository's conf/")
    options.add_argument("--output", default="", help="JSON file (default: working/models/<config>.json)")
    options.add_argument("--seed", type=int, default=0, help="random seed of the halves of fold 0 (default: 0)")
    arguments = parser.parse_args(argv)
    fitted, path = fit(arguments.config, arguments.output, arguments.seed)
    print(f"{fitted.summary()}\nwrote {path}")
    return 0

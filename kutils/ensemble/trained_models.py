"""Finds trained models, and prints the prompts nearest to their predictions: `kutils ask IMAGE [IMAGE ...]`."""

import argparse
import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kutils.data import bank_command
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import confidence, predict, weights, within_budget
from kutils.ensemble.blending import unit, weighted_total
from kutils.ensemble.image_cache import PixelCache
from kutils.ensemble.weights import Ensemble
from kutils.models import checkpoints
from kutils.runs import finished, folders, recipes
from kutils.system import devices, paths
from kutils.system.output import as_cell, cut, escape_controls

ENSEMBLE = "ensemble"  # key of its embeddings


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint that carries its recipe."""

    name: str  # of its run, or its file; the file's path where several have that name
    checkpoint: Path
    score: float | None  # mean cosine on its validation fold
    folder: Path | None = None  # of its run, where its predictions of that fold are


# ---------------------------------------------------------------- models


def find_models(names: Sequence[str] = ()) -> list[TrainedModel]:
    """Trained models: of all finished runs in the order in which they finished, or the named ones in the order given.

    Args:
        names: runs as `folders.find_finished` takes them, or checkpoint files; empty: all runs whose checkpoint exists.
    Raises: ValueError for a name that no finished run has, a named run without its checkpoint, or a file that is none.
    """
    if not names:
        return [model_of_run(folder) for folder in folders.find_finished() if checkpoint_of(folder).is_file()]
    by_file: dict[Path, TrainedModel] = {}
    for name in names:
        if (path := Path(name)).suffix in weights.CHECKPOINT_SUFFIXES:
            models = [TrainedModel(path.stem, path, checkpoints.read(path).get("cosine_similarity"))]
        else:
            models = [model_of_run(folder) for folder in folders.find_finished([name])]
        by_file |= {model.checkpoint: model for model in models}
    taken = Counter([ENSEMBLE, *(model.name for model in by_file.values())])
    return [
        replace(model, name=str(path)) if path.stem == model.name and taken[model.name] > 1 else model
        for path, model in by_file.items()
    ]


def model_of_run(folder: Path) -> TrainedModel:
    """The best checkpoint of a finished run."""
    if not (checkpoint := checkpoint_of(folder)).is_file():
        raise ValueError(f"{folder.name} has finished, but {checkpoint} is not there any more; train it again")
    return TrainedModel(folder.name, checkpoint, finished.read_result(folder).cosine_similarity, folder)


def checkpoint_of(folder: Path) -> Path:
    """The path of a finished run's checkpoint; a run that was moved aside has it in its folder."""
    name = finished.read_result(folder).checkpoint
    beside = folder / Path(name).name
    return beside if beside.is_file() else recipes.load_recipe(folder / "config.yaml").models_folder() / name


def embed_images(
    models: Sequence[TrainedModel],
    images: Sequence[Path],
    *,
    ensemble: Ensemble | None = None,
    ensemble_path: Path | None = None,
    device: str = "auto",
    unit_rows: bool = True,
) -> dict[str, np.ndarray]:
    """Predict images with several models, each as in its validation.

    Args:
        models: one in memory at a time, of different names.
        ensemble: predicts too: families averaged and weighted as in a submission. Its members' checkpoints lie below
            `working/models/`.
        ensemble_path: its file, beside which its checkpoints and prompts may be instead.
        unit_rows: False: return the outputs of heads, and the ensemble's weighted sum, of any norm.
    Returns: name of a model -> float32 [n, 384], unit rows; and `ensemble` where there is one.
    Raises: ValueError naming every unreadable image, the members that failed, a name that two models have, or an
        unusable checkpoint.
    """
    taken = Counter([ENSEMBLE, *(model.name for model in models)])
    if twice := [name for name, count in taken.items() if count > 1]:
        raise ValueError(f"several models, or a model and the ensemble, are called {', '.join(twice)}; rename one")
    images, embeddings = [Path(image) for image in images], {}
    for model in models:
        network, recipe, _ = checkpoints.load_model(model.checkpoint)
        pixels = PixelCache(images, recipe.input_size, num_workers=recipe.num_workers)
        places = predict.local_devices(devices.pick_device(device), world_size=1)
        embeddings[model.name] = predict.predict(network, recipe, pixels, places, unit_rows=unit_rows)
        check_readable(list(pixels.bad.values()))
    if ensemble is not None:
        together = blend_by_ensemble(ensemble, images, device, ensemble_path)
        embeddings[ENSEMBLE] = unit(together) if unit_rows else together
    return embeddings


def blend_by_ensemble(ensemble: Ensemble, images: Sequence[Path], device: str, path: Path | None = None) -> np.ndarray:
    """The weighted sum of what an ensemble's families predict: float32 [n, 384]; ValueError for an unreadable image."""
    ensemble = ensemble.with_weight()
    files, bank = weights.find_members(ensemble, weights.weight_folders(), path)
    *_, state = within_budget.predict_ensemble(ensemble, files, images, device=device, bank=bank)
    check_readable(list(state.unreadable.values()))
    if state.dropped:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in state.dropped.items()))
    return weighted_total(state.families, ensemble.weights)


def check_readable(reasons: Sequence[str]) -> None:
    """Raise ValueError if there are reasons why images could not be read."""
    if reasons:
        raise ValueError("; ".join(reasons))


def neighbours_table(embedding: np.ndarray, bank: PromptBank, k: int = 5) -> pd.DataFrame:
    """The k nearest prompts to one embedding, float32 [384], best first: columns rank (from 1), cosine, prompt."""
    (indices,), (cosines,) = bank.nearest(embedding[None], k)
    return pd.DataFrame({"rank": np.arange(len(indices)) + 1, "cosine": cosines, "prompt": bank.texts(indices)})


# ---------------------------------------------------------------- command


def ask(args: argparse.Namespace) -> None:
    """Print tables, and write them to a file if asked.

    Raises: ValueError or OSError naming what cannot be used, before any model is loaded.
    """
    if args.csv and args.csv.exists():
        raise ValueError(f"{args.csv} exists; remove it or give another --csv")
    if args.k < 1:
        raise ValueError(f"-k is {args.k}; ask for at least one prompt")
    if missing := [str(path) for path in args.images if not path.is_file()]:
        raise ValueError(f"no image at {', '.join(missing)}")
    models, fitted = choose_models(args.model, args.ensemble)
    names = dict.fromkeys(name for model in models for name in datasets_of(model))
    if fitted:
        names |= dict.fromkeys(sorted(json.loads(fitted[1].folds_hash)))
    bank, source = bank_command.from_arguments(args, list(names))
    path, ensemble = fitted or (None, None)
    options = {"ensemble": ensemble, "ensemble_path": path, "device": args.device}
    predictions = embed_images(models, args.images, unit_rows=False, **options)
    titles = {model.name: title_of(model) for model in models}
    known = {model.name: confidence.of_run(model.folder) for model in models if model.folder}
    if fitted:
        known[ENSEMBLE] = confidence.of_ensemble(*fitted)
        titles[ENSEMBLE] = f"the ensemble {fitted[0].stem} of {len(fitted[1].with_weight().members())} models"
    tables, lines = [], [f"nearest of {source}"]
    for number, image in enumerate(args.images):
        for name, rows in predictions.items():
            table = neighbours_table(unit(rows[[number]])[0], bank, args.k)
            lines.append(f"\n{image}, by {titles[name]}\n{format_table(table)}")
            if validation := known.get(name):
                lines.append(validation.describe(float(np.linalg.norm(rows[number]))))
            model = fitted[0].stem if name == ENSEMBLE else name
            tables.append(table.assign(image=escape_controls(str(image)), model=model))
    if args.csv:
        with paths.atomic_path(args.csv) as temporary:
            columns = ["image", "model", "rank", "cosine", "prompt"]
            texts = pd.concat(tables)[columns].apply(lambda values: values.map(as_cell))
            texts.to_csv(temporary, index=False, float_format="%.4f", errors="backslashreplace")
    print(*lines, sep="\n")


def choose_models(names: Sequence[str], ensemble: str) -> tuple[list[TrainedModel], tuple[Path, Ensemble] | None]:
    """The models and the ensemble that are named, else the ensemble fitted last, else the run finished last."""
    files = [Path(ensemble)] if ensemble else [] if names else weights.ensemble_files(weights.weight_folders())
    fitted = (files[0], weights.load_ensemble(files[0])) if files else None
    models = find_models(names) if names or not fitted else []
    if not models and not fitted:
        raise ValueError(f"nothing is trained yet in {paths.working_dir()}: make train MODEL=tiny_vit FOLD=0")
    return (models if names else models[-1:]), fitted


def datasets_of(model: TrainedModel) -> tuple[str, ...]:
    return checkpoints.recipe_of(checkpoints.read(model.checkpoint), model.checkpoint).datasets


def title_of(model: TrainedModel) -> str:
    """Name and score of a model."""
    return model.name if model.score is None else f"{model.name} (mean cosine {model.score:.4f} on its fold)"


def format_table(table: pd.DataFrame) -> str:
    """Rank, cosine and prompt in lines for the terminal; long prompts go on below, very long ones are cut."""
    width = shutil.get_terminal_size().columns
    lines = []
    for rank, cosine, prompt in table[["rank", "cosine", "prompt"]].itertuples(index=False):
        head = f"{rank:4d}  {cosine:7.4f}  "
        indent = " " * len(head)
        lines.append(textwrap.fill(cut(prompt), max(40, width), initial_indent=head, subsequent_indent=indent))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kutils ask",
        description="Print, for each image, the prompts nearest to the embedding that a trained model predicts.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="RUN_OR_CHECKPOINT",
        help="a finished run of working/runs/ (it may hold *) or a checkpoint file; once more for a table by each "
        "(default: the ensemble fitted last, else the run finished last)",
    )
    parser.add_argument("--ensemble", default="", metavar="FILE", help="fitted weights, beside models or instead")
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--bank", type=Path, metavar="FILE.arrow", help="prompts by kutils bank")
    sources.add_argument("--datasets", metavar="A,B", help="data sets of input/ (default: those of the models)")
    sources.add_argument("--prompts", type=Path, metavar="FILE.tsv", help="prompts file with its .npy beside it")
    parser.add_argument("-k", type=int, default=5, help="prompts per image (default: 5)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)"
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write image, model, rank, cosine, prompt there too; a quote stands before what would be a formula",
    )
    ask(parser.parse_args(argv))
    return 0

"""Gathers what the notebook `explore` shows: data sets, and the models' predictions of a fold."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from sklearn.manifold import TSNE
from torchvision.transforms.v2.functional import to_pil_image

from kutils.data.datasets import PromptImages, load_datasets
from kutils.data.prompt_bank import PromptBank
from kutils.data.transforms import decode_rgb
from kutils.ensemble import blending, trained_models
from kutils.ensemble.members import EnsembleError
from kutils.ensemble.validated import MEAN, Validated, read_validated
from kutils.prompts import embedding
from kutils.prompts import folds as prompt_folds
from kutils.prompts.encoder import EncoderError, TextEncoder, load_encoder
from kutils.runs import finished, folders, launch, recipes
from kutils.system import paths
from kutils.training import slices

MOST_QUERIES = 4096  # prompts whose nearest others are looked up for near-duplicates
MOST_HOLDING = 100  # prompts that stand for words where there is no text encoder
SORTS = ("worst", "best", "random", "disagreement")


@dataclass
class Exploration:
    """Data sets, their distinct prompts, and runs whose predictions can be compared."""

    data: PromptImages
    bank: PromptBank
    sorts, slicings = SORTS, slices.SLICES  # what views offer to choose from
    run_names: tuple[str, ...] = ()  # finished runs, which may hold `*`; empty: all
    folds: dict[int, Validated] = field(default_factory=dict)  # as far as they were asked for
    labels: dict[int, pd.DataFrame] = field(default_factory=dict)  # of the rows of these folds, by slice
    asked: dict[tuple, np.ndarray] = field(default_factory=dict)  # (image, its time, model) -> float32 [384]

    @classmethod
    def open(cls, names: str = "", models: str = "") -> "Exploration":
        """Open data sets and their prompts.

        Args:
            names: data sets separated by commas; empty: those of the run finished last, or else `shapes`, which is made
                where it is not there.
            models: finished runs separated by commas, which may hold `*`; empty: all.
        Raises: DataError or TableError for data sets that cannot be used, ValueError for a run that is not there.
        """
        run_names = tuple(recipes.split_names(models))
        runs = folders.find_finished(run_names)
        wanted = recipes.split_names(names) or (
            recipes.load_recipe(runs[-1] / "config.yaml").datasets if runs else ["shapes"]
        )
        if list(wanted) == ["shapes"] and not (paths.input_dir() / "shapes.folds.json").is_file():
            launch.run_module("kutils", "generate", "--shapes-dataset", "shapes")
        return cls(load_datasets(wanted, need_folds=False), PromptBank.from_datasets(wanted), run_names)

    # ------------------------------------------------------------ data

    def describe(self) -> str:
        """Rows, prompts and folds in a line."""
        folds = sorted(int(fold) for fold in np.unique(self.data.folds))
        told = f"folds {folds[0]} to {folds[-1]}" if folds[0] >= 0 else "not all rows have a fold"
        return (
            f"{', '.join(self.data.names)}: {len(self.data):,} images of {len(self.bank):,} prompts, {told}; "
            f"{len(folders.find_finished(self.run_names)):,} finished runs"
        )

    def image(self, row: int) -> Path | Image.Image:
        """The image file of a row, or the image itself where it is packed and the file is gone."""
        path = self.data.image_path(row)
        return path if path.is_file() or not self.data.block_rows else to_pil_image(self.data.decode_image(row))

    def sources(self) -> dict[str, int]:
        """Images by the column `source` of the tables, else by data set, most first; those of rare sources last."""
        counts = pd.Series(slices.common_names(self.sources_of(np.arange(len(self.data))))).value_counts()
        return counts.sort_index(key=lambda names: names == slices.OTHERS, kind="stable").to_dict()

    def sources_of(self, rows: np.ndarray) -> np.ndarray:  # object [n]
        return slices.table_columns(self.data, rows, np.full(len(rows), "", object))[0]

    def map_points(self, most: int, seed: int = 0) -> tuple[np.ndarray, dict[str, list[str]]]:
        """Prompts in the plane, near ones near to each other (t-SNE, van der Maaten and Hinton 2008).

        Args:
            most: prompts that are drawn by lot; 2,000 take ten seconds.
        Returns: float32 [m, 2]; and for panels `fold` and `source` the label of each point.
        Raises: ValueError for less than four prompts.
        """
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(len(self.bank))[:most])
        if len(chosen) < 4:
            raise ValueError(f"{len(chosen)} prompts make no map")
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        embeddings = self.bank.vectors(chosen)
        points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
        rows = self.bank.rows[chosen]
        labels = {"fold": [str(fold) for fold in self.data.folds[rows]], "source": list(self.sources_of(rows))}
        return points, labels

    def near_duplicates(self, count: int = 4, seed: int = 0) -> pd.DataFrame:
        """The most similar pairs among prompts drawn by lot and all others: image, prompt (of both), cosine, folds.

        Returns: columns image_a, image_b, prompt_a, prompt_b, cosine, fold_a, fold_b; the most similar first.
        """
        chosen = np.random.default_rng(seed).permutation(len(self.bank))[:MOST_QUERIES]
        indices, cosines = self.bank.nearest(self.bank.vectors(chosen), k=2)
        other = np.where(indices[:, 0] == chosen, indices[:, -1], indices[:, 0])  # a twin may come before oneself
        cosine = np.where(indices[:, 0] == chosen, cosines[:, -1], cosines[:, 0])
        pairs = pd.DataFrame({"a": np.minimum(chosen, other), "b": np.maximum(chosen, other), "cosine": cosine})
        pairs = pairs[pairs["a"] != pairs["b"]].drop_duplicates(["a", "b"]).nlargest(count, "cosine")
        found = {"cosine": pairs["cosine"].to_numpy()}
        for side in "ab":
            index = pairs[side].to_numpy()
            rows = self.bank.rows[index]
            found |= {f"image_{side}": [self.image(int(row)) for row in rows]}
            found |= {f"prompt_{side}": self.bank.texts(index), f"fold_{side}": self.data.folds[rows]}
        return pd.DataFrame(found)

    def fold_report(self) -> dict | None:
        """The report that came with the folds of the first data set; None where there is none or it is outdated."""
        try:
            return prompt_folds.read_report(paths.input_dir() / f"{self.data.names[0]}.tsv")
        except prompt_folds.GroupingError as error:
            print(f"no figure of the folds: {error}")
            return None

    def search(self, words: str, fold: int = -1, count: int = 10) -> pd.DataFrame:
        """The nearest prompts to words, by their embedding, each with an image.

        Where there is no text encoder, the mean of the prompts that hold most of the words stands for them.

        Args:
            words: a prompt.
            fold: look among the prompts of this fold; -1: among all.
        Returns: columns image, prompt, cosine, fold; the nearest first.
        Raises: ValueError for no words, a fold without prompts, or words that nothing can stand for.
        """
        if not words.strip():
            raise ValueError("type some words to look for")
        folds = self.data.folds[self.bank.rows]
        elsewhere = folds != fold if fold >= 0 else None
        if elsewhere is not None and elsewhere.all():
            raise ValueError(f"no prompt is in fold {fold}")
        query = self.embed_words(words)
        indices, cosines = self.bank.nearest(query, count, exclude=elsewhere)
        rows = self.bank.rows[indices[0]]
        images = [self.image(int(row)) for row in rows]
        found = {"image": images, "prompt": self.bank.texts(indices[0]), "cosine": cosines[0]}
        return pd.DataFrame(found | {"fold": folds[indices[0]]})

    def embed_words(self, words: str) -> np.ndarray:
        """float32 [1, 384], a unit row."""
        if self.encoder is not None:
            return embedding.encode_prompts([words], self.encoder, progress=False)
        held = np.zeros(len(self.bank), np.int64)
        for word in words.split():
            held += pc.match_substring(self.bank.prompts, word, ignore_case=True).to_numpy()
        if not held.any():
            raise ValueError(f"no prompt holds one of the words {words!r}")
        return blending.unit(self.bank.vectors(np.flatnonzero(held == held.max())[:MOST_HOLDING]).mean(axis=0)[None])

    @functools.cached_property
    def encoder(self) -> TextEncoder | None:
        """all-MiniLM-L6-v2; None, and a line that says so, where it is not installed."""
        try:
            return load_encoder()
        except (EncoderError, ImportError) as error:
            print(f"words are looked for by the prompts that hold them: no text encoder ({error})")
            return None

    # ------------------------------------------------------------ models

    def has_models(self, fold: int) -> bool:
        """Whether there are predictions of this fold; if not, says how to make them."""
        try:
            print(*self.validated(fold).notes, sep="\n")
        except EnsembleError as error:
            print(error)
            return False
        return True

    def validated_folds(self) -> list[int]:
        """Folds on which a finished run was validated."""
        return sorted({finished.read_result(folder).fold for folder in folders.find_finished(self.run_names)})

    def validated(self, fold: int) -> Validated:
        """The predictions of a fold by all runs that were validated on its rows, and by their ensemble.

        Raises: ValueError where no run has predicted rows of these data sets.
        """
        if fold not in self.folds:
            self.folds[fold] = read_validated(self.data, fold, folders.find_finished(self.run_names))
        return self.folds[fold]

    def examples(self, fold: int, model: str = "", sort: str = "worst", count: int = 8) -> pd.DataFrame:
        """Validation images of different prompts with what a model took them for.

        Args:
            model: empty: the best.
            sort: worst, best, random, or disagreement: those on which the models differ most.
        Returns: columns position (among the rows of the fold), image, prompt, cosine, nearest (prompt to the
            prediction), agreement.
        Raises: ValueError for an unknown model or sort.
        """
        of = self.validated(fold)
        model = model or of.best
        check_choice("model", model, of.predictions)
        check_choice("sort", sort, SORTS)
        cosines, agreement = of.cosines[model].to_numpy(), of.agreement()
        order = {
            "worst": np.argsort(cosines, kind="stable"),
            "best": np.argsort(-cosines, kind="stable"),
            "random": np.random.default_rng(0).permutation(len(cosines)),
            "disagreement": np.argsort(agreement, kind="stable"),
        }[sort]
        chosen = order[first_of_each(self.data.prompt_codes[of.rows[order]])][:count]
        indices, _ = self.bank.nearest(of.predictions[model][chosen], k=1)
        rows = of.rows[chosen]
        found = {
            "position": chosen,
            "image": [self.image(int(row)) for row in rows],
            "prompt": self.data.prompts.take(pa.array(rows)).to_pylist(),
            "cosine": cosines[chosen],
            "nearest": self.bank.texts(indices[:, 0]),
            "agreement": agreement[chosen],
        }
        return pd.DataFrame(found)

    def disagreement(self, fold: int, count: int = 4) -> pd.DataFrame:
        """Images on which the models differ most.

        Returns: as `examples`, and nearest_by_model: model -> the nearest prompt to its prediction.
        Raises: ValueError where there are fewer than two models.
        """
        of = self.validated(fold)
        names = of.single_models
        if len(names) < 2:
            raise ValueError("one model has nobody to disagree with; train another")
        rows = self.examples(fold, sort="disagreement", count=count)
        prompts = {}
        for name in names:
            indices, _ = self.bank.nearest(of.predictions[name][rows["position"]], k=1)
            prompts[name] = self.bank.texts(indices[:, 0])
        return rows.assign(nearest_by_model=pd.DataFrame(prompts).to_dict("records"))

    def slice_scores(self, fold: int, by: str) -> pd.DataFrame:
        """Mean cosine of every model by prompt length (words), source, kind, or similarity to the training prompts."""
        of = self.validated(fold)
        if fold not in self.labels:
            self.labels[fold] = slices.labels(self.data, of.rows, fold)
        check_choice("slice", by, self.labels[fold].columns)
        return slices.mean_scores(of.cosines, self.labels[fold][by])

    def ask(self, image: Path, fold: int, count: int = 8) -> dict[str, pd.DataFrame]:
        """What every model takes an image for, first of all their ensemble.

        A model that cannot be asked any more is left out, and said.

        Returns: model -> columns rank, cosine, prompt of the nearest prompts.
        Raises: ImageError naming a file that cannot be read; ValueError where no model can be asked.
        """
        of = self.validated(fold)
        decode_rgb(image)  # what is wrong with the image is not the models' fault
        told: dict[str, np.ndarray] = {}
        for name in of.predictions:
            if name == MEAN:
                continue
            key = (str(image), Path(image).stat().st_mtime_ns, name)
            try:
                if key not in self.asked:
                    self.asked[key] = embed(image, of.folders.get(name))
                told[name] = self.asked[key]
            except ValueError as error:  # a checkpoint that is gone, or another one than the ensemble was fitted with
                print(f"{name} is left out: {error}")
        single = [told[name] for name in of.folders if name in told]
        if not single:
            raise ValueError("none of the models can be asked; train one again")
        if "ensemble" not in told and len(single) > 1:
            told[MEAN] = blending.average([rows[None] for rows in single])[0]
        order = sorted(told, key=lambda name: name in of.folders)  # ensembles first
        return {name: trained_models.neighbours_table(told[name], self.bank, count) for name in order}


def embed(image: Path, folder: Path | None) -> np.ndarray:
    """What the model of a run, or the ensemble fitted last (None), predicts for an image: float32 [384]."""
    models = trained_models.find_models([str(folder)]) if folder else []
    _, fitted = (None, None) if folder else trained_models.find_ensemble()
    (rows,) = trained_models.embed_images(models, [image], ensemble=fitted).values()
    return rows[0]


def first_of_each(codes: np.ndarray) -> np.ndarray:
    """Positions of the first of each code, in order."""
    return np.sort(np.unique(codes, return_index=True)[1])


def check_choice(what: str, chosen: str, known: Mapping | Sequence) -> None:
    if chosen not in known:
        raise ValueError(f"{what} is {chosen!r}; it can be {', '.join(map(str, known))}")

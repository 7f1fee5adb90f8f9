"""Collects the data that the notebook `explore` shows: data sets, and the models' predictions of a fold."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.manifold import TSNE

from kutils.data.datasets import PromptImages, load_datasets
from kutils.data.prompt_bank import PromptBank
from kutils.data.transforms import decode_rgb
from kutils.ensemble import blending, trained_models, weights
from kutils.ensemble.confidence import Confidence
from kutils.ensemble.validated import MEAN, NoPredictions, Validated, read_validated
from kutils.prompts import embedding
from kutils.prompts import folds as prompt_folds
from kutils.prompts.encoder import TextEncoder, load_encoder
from kutils.runs import finished, folders, launch, recipes
from kutils.system import paths
from kutils.training import slices

MOST_QUERIES = 4096  # prompts whose nearest neighbours are searched for near-duplicates
MOST_MATCHES = 100  # without a text encoder, words are embedded as the mean of so many matching prompts
SORTS = ("worst", "best", "random", "disagreement")


@dataclass
class Exploration:
    """Data sets, their distinct prompts, and the predictions of finished runs."""

    data: PromptImages
    bank: PromptBank
    runs: list[Path]  # folders of finished runs
    # cached results
    folds: dict[int, Validated] = field(default_factory=dict)
    labels: dict[int, pd.DataFrame] = field(default_factory=dict)  # fold -> of `slices.label_rows`
    predicted: dict[tuple, np.ndarray] = field(default_factory=dict)  # (image, its time, model) -> float32 [384]

    @classmethod
    def open(cls, names: str = "", models: str = "") -> "Exploration":
        """Open data sets and their prompts.

        Args:
            names: data sets separated by commas; empty: those of the run finished last, or else `shapes`, which is made
                where it is missing.
            models: finished runs separated by commas, `*` matches any part of a name; empty: all.
        Raises: ValueError for data sets that cannot be used, or a run that is not there.
        """
        runs = folders.find_finished(recipes.split_names(models))
        of_last_run = recipes.load_recipe(runs[-1] / "config.yaml").datasets if runs else ["shapes"]
        datasets = recipes.split_names(names) or of_last_run
        if list(datasets) == ["shapes"] and not (paths.input_dir() / "shapes.folds.json").is_file():
            launch.run_module("kutils", "generate", "--shapes-dataset", "shapes")
        return cls(load_datasets(datasets, need_folds=False), PromptBank.from_datasets(datasets), runs)

    # ------------------------------------------------------------ data

    def summary(self) -> str:
        """Numbers of images, prompts, folds and runs in one line."""
        low, high = self.data.folds.min(), self.data.folds.max()
        folds = f"folds {low} to {high}" if low >= 0 else "not all rows have a fold"
        return (
            f"{', '.join(self.data.names)}: {len(self.data):,} images of {len(self.bank):,} prompts, {folds}; "
            f"{len(self.runs):,} finished runs"
        )

    def sources(self) -> dict[str, int]:
        """Numbers of images by the tables' column `source`, or by data set; the largest first, rare sources last."""
        counts = pd.Series(slices.common_names(self.row_sources(np.arange(len(self.data))))).value_counts()
        return counts.sort_index(key=lambda names: names == slices.OTHERS, kind="stable").to_dict()

    def row_sources(self, rows: np.ndarray) -> np.ndarray:  # object [n]
        return slices.table_columns(self.data, rows, np.full(len(rows), "", object))[0]

    def map_points(self, most: int, seed: int = 0) -> tuple[np.ndarray, dict[str, list[str]]]:
        """Place prompts in the plane, similar ones close together (t-SNE, van der Maaten and Hinton 2008).

        Args:
            most: prompts, drawn at random; 2,000 take ten seconds.
        Returns: float32 [m, 2]; and for panels `fold` and `source` the label of each point.
        Raises: ValueError for less than four prompts.
        """
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.bank))[:most])
        if len(chosen) < 4:
            raise ValueError(f"{len(chosen)} prompts make no map")
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        embeddings = self.bank.vectors(chosen)
        points = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
        rows = self.bank.rows[chosen]
        labels = {"fold": [str(fold) for fold in self.data.folds[rows]], "source": list(self.row_sources(rows))}
        return points, labels

    def near_duplicates(self, count: int = 4, seed: int = 0) -> pd.DataFrame:
        """Find the most similar pairs of a prompt drawn at random and any other prompt.

        Returns: columns cosine, and of both prompts image_a, prompt_a, fold_a, image_b, prompt_b, fold_b; the most
            similar pair first.
        """
        chosen = np.random.default_rng(seed).permutation(len(self.bank))[:MOST_QUERIES]
        indices, cosines = self.bank.nearest(self.bank.vectors(chosen), k=2)
        first_is_itself = indices[:, 0] == chosen  # an equal prompt may come before the prompt itself
        other = np.where(first_is_itself, indices[:, -1], indices[:, 0])
        cosine = np.where(first_is_itself, cosines[:, -1], cosines[:, 0])
        pairs = pd.DataFrame({"a": np.minimum(chosen, other), "b": np.maximum(chosen, other), "cosine": cosine})
        pairs = pairs[pairs["a"] != pairs["b"]].drop_duplicates(["a", "b"]).nlargest(count, "cosine")
        columns = {"cosine": pairs["cosine"].to_numpy()}
        for side in "ab":
            index = pairs[side].to_numpy()
            rows = self.bank.rows[index]
            columns |= {f"image_{side}": [self.data.picture(int(row)) for row in rows]}
            columns |= {f"prompt_{side}": self.bank.texts(index), f"fold_{side}": self.data.folds[rows]}
        return pd.DataFrame(columns)

    def fold_report(self) -> dict | None:
        """Read the report on the folds of the first data set; None where it is missing or outdated."""
        try:
            return prompt_folds.read_fold_report(paths.input_dir() / f"{self.data.names[0]}.tsv")
        except ValueError as error:
            print(f"no figure of the folds: {error}")
            return None

    def search(self, words: str, fold: int = -1, count: int = 10) -> pd.DataFrame:
        """Find the nearest prompts to words, by their embeddings, each with an image.

        Args:
            fold: search among the prompts of this fold; -1: among all.
        Returns: columns image, prompt, cosine, fold; the nearest first.
        Raises: ValueError for no words, a fold without prompts, or words that cannot be embedded.
        """
        if not words.strip():
            raise ValueError("type some words to look for")
        folds = self.data.folds[self.bank.rows]
        other_folds = folds != fold if fold >= 0 else None
        if other_folds is not None and other_folds.all():
            raise ValueError(f"no prompt is in fold {fold}")
        (indices,), (cosines,) = self.bank.nearest(self.embed_words(words), count, exclude=other_folds)
        images = [self.data.picture(int(row)) for row in self.bank.rows[indices]]
        columns = {"image": images, "prompt": self.bank.texts(indices), "cosine": cosines, "fold": folds[indices]}
        return pd.DataFrame(columns)

    def embed_words(self, words: str) -> np.ndarray:
        """Embed words: float32 [1, 384], a unit row.

        Without a text encoder it is the mean embedding of the prompts that contain most of the words.
        """
        if self.encoder is not None:
            return embedding.encode_prompts([words], self.encoder, progress=False)
        matches = np.zeros(len(self.bank), np.int64)
        for word in words.split():
            matches += pc.match_substring(self.bank.prompts, word, ignore_case=True).to_numpy()
        if not matches.any():
            raise ValueError(f"no prompt contains one of the words {words!r}")
        best = np.flatnonzero(matches == matches.max())[:MOST_MATCHES]
        return blending.unit(self.bank.vectors(best).mean(axis=0)[None])

    @functools.cached_property
    def encoder(self) -> TextEncoder | None:
        """all-MiniLM-L6-v2; None, with a printed line, if it is not installed."""
        try:
            return load_encoder()
        except (ValueError, ImportError) as error:
            print(f"words are searched for by the prompts that contain them: no text encoder ({error})")
            return None

    # ------------------------------------------------------------ models

    def has_models(self, fold: int) -> bool:
        """Whether there are predictions of this fold; if not, print how to make them."""
        try:
            print(*self.validated(fold).notes, sep="\n")
        except NoPredictions as error:
            print(error)
            return False
        return True

    def validated_folds(self) -> list[int]:
        """Folds on which a finished run was validated."""
        return sorted({finished.read_result(folder).fold for folder in self.runs})

    def validated(self, fold: int) -> Validated:
        """Read the predictions of a fold by all runs that were validated on its rows, and by their ensemble.

        Raises: NoPredictions where no run has predicted rows of these data sets.
        """
        if fold not in self.folds:
            self.folds[fold] = read_validated(self.data, fold, self.runs)
        return self.folds[fold]

    def examples(self, fold: int, model: str = "", sort: str = "worst", count: int = 8) -> pd.DataFrame:
        """Choose validation images of different prompts, with the prompts nearest to a model's predictions.

        Args:
            sort: worst, best, random, or disagreement: those on which the models differ most.
        Returns: columns position (among the rows of the fold), image, prompt, cosine, nearest (the prompt nearest to
            the prediction), agreement.
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
        return pd.DataFrame(
            {
                "position": chosen,
                "image": [self.data.picture(int(row)) for row in rows],
                "prompt": self.data.prompts.take(pa.array(rows)).to_pylist(),
                "cosine": cosines[chosen],
                "nearest": self.bank.texts(indices[:, 0]),
                "agreement": agreement[chosen],
            }
        )

    def disagreement(self, fold: int, count: int = 4) -> pd.DataFrame:
        """Choose the images on which the models differ most.

        Returns: as `examples`, and nearest_by_model: model -> the nearest prompt to its prediction.
        Raises: ValueError where there are fewer than two models.
        """
        of = self.validated(fold)
        names = of.single_models
        if len(names) < 2:
            raise ValueError("there is one model alone; train another to see where they disagree")
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
            self.labels[fold] = slices.label_rows(self.data, of.rows, fold)
        check_choice("slice", by, self.labels[fold].columns)
        return slices.slice_means(of.cosines, self.labels[fold][by])

    def ask(self, image: Path, fold: int, count: int = 8) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
        """Find the prompts nearest to what the ensemble and each model predict for an image, and how sure they are.

        An unusable model is left out, with a printed line.

        Returns: model -> columns rank, cosine, prompt of the nearest prompts; ensembles first. And columns model,
            confidence (what the length of its prediction says), without models whose lengths were not saved.
        Raises: ImageError naming a file that cannot be read; ValueError where no model can be used.
        """
        of = self.validated(fold)
        decode_rgb(image)  # an unreadable image is an error, not the fault of a model
        rows: dict[str, np.ndarray] = {}
        for name in of.predictions:
            if name == MEAN:
                continue
            key = (str(image), Path(image).stat().st_mtime_ns, name)
            try:
                if key not in self.predicted:
                    self.predicted[key] = predict_image(image, of.folders.get(name))
                rows[name] = self.predicted[key]
            except ValueError as error:  # its checkpoint is gone, or not the one that the ensemble was fitted with
                print(f"{name} is left out: {error}")
        single = [rows[name] for name in of.folders if name in rows]
        if not single:
            raise ValueError("none of the models can be used; train one again")
        if "ensemble" not in rows and len(single) > 1:
            rows[MEAN] = blending.unit(np.stack(single)).mean(axis=0)
        order = sorted(rows, key=lambda name: name in of.folders)  # ensembles first
        units = {name: blending.unit(rows[name][None])[0] for name in order}
        tables = {name: trained_models.neighbours_table(units[name], self.bank, count) for name in order}
        all_there = len(single) == len(of.folders)  # else their mean is not the one that was validated
        known = [name for name in order if name in of.lengths and (name != MEAN or all_there)]
        texts = [
            Confidence.measure(fold, of.lengths[name], of.cosines[name].to_numpy()).describe(
                float(np.linalg.norm(rows[name]))
            )
            for name in known
        ]
        return tables, pd.DataFrame({"model": known, "confidence": texts})


def predict_image(image: Path, folder: Path | None) -> np.ndarray:
    """Predict an image's embedding by the model of a run, or by the ensemble fitted last (None).

    Returns: float32 [384], of any length.
    """
    models = trained_models.find_models([str(folder)]) if folder else []
    fitted = None if folder else weights.load_ensemble(weights.find_ensemble(weights.weight_folders()))
    (rows,) = trained_models.embed_images(models, [image], ensemble=fitted, unit_rows=False).values()
    return rows[0]


def first_of_each(codes: np.ndarray) -> np.ndarray:
    """Positions of the first of each code, in order."""
    return np.sort(np.unique(codes, return_index=True)[1])


def check_choice(what: str, chosen: str, known: Mapping | Sequence) -> None:
    if chosen not in known:
        raise ValueError(f"{what} is {chosen!r}; it can be {', '.join(map(str, known))}")

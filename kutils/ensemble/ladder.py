"""Compares models with simpler and ideal predictions of the same rows: the rungs of a ladder of scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import curve_fit
from torch.utils.data import DataLoader

from kutils.data import datasets
from kutils.data.datasets import PromptImages
from kutils.ensemble import bootstrap, validated
from kutils.ensemble.blending import unit
from kutils.models import networks
from kutils.runs import folders
from kutils.runs.recipes import Recipe
from kutils.system import devices, loaders
from kutils.system.ranks import Ranks
from kutils.training import engine, loading, ridge_head

PIXELS = 8  # side of tiny images, whose score shows how much colours alone tell
MOST_ROWS = 20_000  # of training images, scored images, and prompts to rank; larger sets are sampled by prompt
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the training prompts, for the learning curve
AHEAD = 10  # the curve is extrapolated to so many times the prompts
COVERAGES = np.linspace(0.1, 1, 10)
DIFFERENCE = ("mean", "low", "high")  # difference of two rungs with its 95 % interval
BLOCK = 1000  # predictions that are compared with the bank at a time
SHUFFLED, MEAN_PROMPT = "frozen backbone, shuffled pairs", "mean prompt"
SIMILAR, SMALL = "prompt of the most similar training image", f"ridge on {PIXELS} x {PIXELS} pixels"
FROZEN, CEILING = "frozen backbone, ridge", "prompt of the most similar image of any fold"


@dataclass(frozen=True)
class Ladder:
    """Scores of one fold: of predictions without images, of models, and of other images' prompts."""

    datasets: tuple[str, ...]
    fold: int
    table: pd.DataFrame  # a row per rung, see `score_rungs`
    differences: pd.DataFrame  # a row per pair of rungs, see `compare_rungs`
    bank: int  # prompts among which the true one is ranked
    curve: pd.DataFrame  # prompts, cosine: of the frozen backbone and ridge
    limit: tuple[float, float, float] | None  # a, b, c of cosine = a - b / prompts ** c; None if the fit failed
    coverage: pd.DataFrame  # [COVERAGES, models]: mean cosine of that share of the images, longest predictions first
    notes: list[str]

    def extrapolated(self, prompts: float) -> float | None:
        """The cosine on the fitted curve for a number of training prompts: an extrapolation, not a measurement."""
        if self.limit is None:
            return None
        a, b, c = self.limit
        return float(a - b / prompts**c)


def climb(
    names: Sequence[str], fold: int, runs: Sequence[str], recipe: Recipe, most: int = MOST_ROWS, seed: int = 0
) -> Ladder:
    """Build the ladder of a fold.

    Args:
        names: data sets.
        runs: finished runs, as `folders.find_finished` takes them; empty: all of this fold.
        recipe: its pretrained backbone, input size and precision give the features of the frozen rungs.
        most: images of each kind; larger sets are sampled by prompt.
    Raises: ValueError for a fold without rows, or a recipe that starts from a checkpoint.
    """
    if recipe.initialize_from is not None:
        raise ValueError("the ladder's frozen backbone is that of pretrained weights; give a recipe of stage 1")
    data = datasets.load_datasets(names)
    training, scored = loading.split_rows(data, fold)
    predictions, lengths, notes = {}, {}, []
    try:
        models = validated.read_validated(data, fold, folders.find_finished(runs))
        scored, notes = models.rows, models.notes
        predictions = {name: models.predictions[name] for name in reversed(models.scores())}
        lengths = models.lengths
    except validated.NoPredictions as error:
        notes.append(str(error).splitlines()[0])
    kept = draw_prompts(data.prompt_codes[scored], most, seed)
    scored, predictions = scored[kept], {name: values[kept] for name, values in predictions.items()}
    training = training[draw_prompts(data.prompt_codes[training], most, seed)]
    targets = data.targets(training)
    held = ridge_head.held_out(data, training, fold)
    features, pixels = (
        np.split(values, [len(training)]) for values in see(data, np.concatenate([training, scored]), recipe)
    )
    frozen = features[1] @ ridge_head.regress(features[0], targets, held).T
    twins = np.concatenate([targets, data.targets(scored)])
    rungs = {
        SHUFFLED: features[1] @ ridge_head.regress(features[0], shuffle(data, training, seed), held).T,
        MEAN_PROMPT: np.tile(data.training_mean(fold), (len(scored), 1)),
        SMALL: pixels[1] @ ridge_head.regress(pixels[0], targets, held).T,
        SIMILAR: targets[most_similar(features[1], features[0])],
        FROZEN: frozen,
        **predictions,
        CEILING: twins[most_similar(features[1], np.concatenate(features), first=len(training))],
    }
    bank = bank_of(data, scored, most, seed)
    curve = score_by_prompts(data, training, features, targets, held, data.targets(scored), seed)
    rungs = {name: unit(values) for name, values in rungs.items()}
    true, prompts = data.targets(scored), data.prompt_codes[scored]
    cosines = {name: np.einsum("nd,nd->n", values, true, dtype=np.float64) for name, values in rungs.items()}
    means = {name: bootstrap.resampled_means(values, prompts) for name, values in cosines.items()}
    lengths = {FROZEN: np.linalg.norm(frozen, axis=1)} | {name: values[kept] for name, values in lengths.items()}
    return Ladder(
        datasets=tuple(names),
        fold=fold,
        table=score_rungs(rungs, cosines, means, data, scored, bank),
        differences=compare_rungs(cosines, means),
        bank=len(bank),
        curve=curve,
        limit=fit_curve(curve),
        coverage=pd.DataFrame({name: by_length(values, cosines[name]) for name, values in lengths.items()}, COVERAGES),
        notes=notes,
    )


def draw_prompts(codes: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Positions of at most `most` rows, ascending: all rows of random prompts, at least one prompt."""
    _, numbers, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    count = max(1, int(np.searchsorted(sizes[order].cumsum(), most, side="right")))
    return np.flatnonzero(np.isin(numbers, order[:count]))


def see(data: PromptImages, rows: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Features of the recipe's pretrained backbone, [n, C], and pixels of small pictures with a constant, [n, 193]."""
    ranks = Ranks(0, 1, devices.pick_device(recipe.device))
    network = networks.build_model(recipe).to(ranks.device)
    loader = loading.validation_loader(data, rows, recipe, ranks)
    dtype = devices.autocast_dtype(recipe.amp_dtype, ranks.device)
    seen = engine.evaluate(network, loader, recipe, dtype, ranks, total=len(rows), keep_features=True)
    small = DataLoader(
        datasets.ValidationImages(data, rows, PIXELS), batch_size=256, **loading.loader_options(recipe, ranks)
    )
    images = [batch["image"].flatten(1).numpy() for batch in loaders.batches(small)]
    pixels = np.concatenate(images) / np.float32(255)
    return seen.features.cpu().numpy(), np.concatenate([pixels, np.ones((len(rows), 1), np.float32)], axis=1)


def most_similar(queries: np.ndarray, keys: np.ndarray, first: int | None = None) -> np.ndarray:
    """The key of highest cosine for each query, int64 [q], a block at a time.

    Args:
        queries: float [q, C]; keys: float [k, C].
        first: query i is key first + i, which is left out.
    """
    queries, keys = unit(queries), unit(keys)
    found = []
    for start in range(0, len(queries), BLOCK):
        cosines = queries[start : start + BLOCK] @ keys.T
        if first is not None:
            itself = np.arange(len(cosines))
            cosines[itself, first + start + itself] = -np.inf
        found.append(cosines.argmax(axis=1))
    return np.concatenate(found)


def shuffle(data: PromptImages, rows: np.ndarray, seed: int) -> np.ndarray:
    """Targets of the rows after a permutation of the prompts' embeddings: float32 [n, 384]."""
    codes, first = np.unique(data.prompt_codes[rows], return_index=True)
    other = np.random.default_rng(seed).permutation(len(codes))
    return data.targets(rows[first[other]])[np.searchsorted(codes, data.prompt_codes[rows])]


def bank_of(data: PromptImages, scored: np.ndarray, most: int, seed: int) -> np.ndarray:
    """One row for each prompt to rank: prompts of the scored rows, then random others up to `most`: int64 [prompts]."""
    codes, first = np.unique(data.prompt_codes, return_index=True)
    mine = np.isin(codes, data.prompt_codes[scored])
    others = np.random.default_rng(seed).permutation(first[~mine])[: max(0, most - int(mine.sum()))]
    return np.concatenate([first[mine], others])


def score_rungs(
    rungs: dict[str, np.ndarray],
    cosines: dict[str, np.ndarray],
    means: dict[str, np.ndarray],
    data: PromptImages,
    scored: np.ndarray,
    bank: np.ndarray,
) -> pd.DataFrame:
    """Score predictions of the same rows, in the order given.

    Args:
        rungs: name -> float [n, 384], unit rows.
        cosines: name -> float64 [n], with the true prompts.
        means: name -> those of `cosines` in resampled sets of prompts.
        scored: int [n], their rows.
        bank: rows of the prompts among which the true one is ranked, by cosine with the prediction.
    Returns: per rung cosine, low, high (95 % interval), gain over the rung before with gain_low and gain_high, clean
        (mean over clean rows, NaN without), recall_1, recall_5, recall_10, median_rank.
    """
    clean = np.zeros(len(scored), bool) if data.clean is None else data.clean[scored]
    vectors, lines, previous = data.targets(bank), {}, None
    for name, predicted in rungs.items():
        own, places = cosines[name], []
        for part in np.split(np.arange(len(scored)), range(BLOCK, len(scored), BLOCK)):
            places.append(1 + (predicted[part] @ vectors.T > own[part, None] + 1e-6).sum(axis=1))
        ranks = np.concatenate(places)
        low, high = np.quantile(means[name], bootstrap.LEVELS)
        above = dict.fromkeys(DIFFERENCE, np.nan) if previous is None else difference(cosines, means, name, previous)
        lines[name] = {
            "cosine": own.mean(),
            "low": low,
            "high": high,
            **dict(zip(("gain", "gain_low", "gain_high"), above.values(), strict=True)),
            "clean": own[clean].mean() if clean.any() else np.nan,
            **{f"recall_{k}": (ranks <= k).mean() for k in (1, 5, 10)},
            "median_rank": np.median(ranks),
        }
        previous = name
    return pd.DataFrame(lines).T.rename_axis("rung")


def difference(cosines: dict[str, np.ndarray], means: dict[str, np.ndarray], name: str, other: str) -> dict[str, float]:
    """The gain of a rung over another on the same images, with its 95 % interval: DIFFERENCE -> number."""
    low, high = np.quantile(means[name] - means[other], bootstrap.LEVELS)  # the same prompts were drawn for both
    return dict(zip(DIFFERENCE, ((cosines[name] - cosines[other]).mean(), low, high), strict=True))


def compare_rungs(cosines: dict[str, np.ndarray], means: dict[str, np.ndarray]) -> pd.DataFrame:
    """Every pair of rungs: columns rung, other (an earlier rung), and those of DIFFERENCE; arguments as above."""
    pairs = [(name, other) for number, name in enumerate(cosines) for other in list(cosines)[:number]]
    rows = [{"rung": name, "other": other, **difference(cosines, means, name, other)} for name, other in pairs]
    return pd.DataFrame(rows, columns=["rung", "other", *DIFFERENCE])


def score_by_prompts(
    data: PromptImages,
    training: np.ndarray,
    features: Sequence[np.ndarray],
    targets: np.ndarray,
    held: np.ndarray,
    true: np.ndarray,
    seed: int,
) -> pd.DataFrame:
    """Cosine of ridge on the frozen backbone by the number of training prompts, in nested sets.

    Args:
        features: of the training rows and of the scored rows.
        targets, true: embeddings of their prompts.
        held: bool, training rows that choose the penalty.
    """
    codes = np.unique(data.prompt_codes[training], return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    points = []
    for share in SHARES:
        count = round(share * len(order))
        some = order[codes] < count
        if held[some].any() and not held[some].all():
            weight = ridge_head.regress(features[0][some], targets[some], held[some])
            cosines = np.einsum("nd,nd->n", unit(features[1] @ weight.T), true)
            points.append({"prompts": count, "cosine": cosines.mean()})
    return pd.DataFrame(points)


def fit_curve(curve: pd.DataFrame) -> tuple[float, float, float] | None:
    """a, b and c of cosine = a - b / prompts ** c (Hestness et al. 2017) by least squares; None without a fit."""
    if len(curve) < 4:
        return None
    try:
        found, _ = curve_fit(
            lambda prompts, a, b, c: a - b / prompts**c,
            curve["prompts"].to_numpy(float),
            curve["cosine"].to_numpy(float),
            p0=(np.clip(curve["cosine"].max() + 0.05, 0, 1), 1.0, 0.5),
            bounds=([0, 0, 0.05], [1, np.inf, 2]),
        )
    except RuntimeError:  # no optimum found
        return None
    return tuple(map(float, found))


def by_length(lengths: np.ndarray, cosines: np.ndarray) -> list[float]:
    """Mean cosine of the predictions with the largest norms, for each share of COVERAGES.

    Args:
        lengths: float [n], of the predictions before they are scaled to unit length.
        cosines: float [n].
    """
    longest = cosines[np.argsort(-lengths, kind="stable")]
    counts = np.maximum(1, (COVERAGES * len(longest)).round().astype(int))
    return [longest[:count].mean() for count in counts]

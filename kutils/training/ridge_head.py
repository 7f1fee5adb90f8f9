"""Fits the head in closed form, `head_init: ridge`: ridge regression on the features of the frozen backbone."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kutils.data import datasets
from kutils.data.datasets import PromptImages
from kutils.models.networks import PromptEmbedder
from kutils.runs.recipes import Recipe
from kutils.system import loaders, progress
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.ranks import Ranks
from kutils.training import loading, network_input
from kutils.training.losses import cosine_similarity

PENALTIES = np.logspace(-6, 2, 33)  # times the mean square of a feature and the number of images
KEYS_APART = 1e-4  # added to the likeness of a key to itself, 1: images that are equal may both be keys
MOST_HELD_OUT = 20_000  # rows whose features are kept, over all ranks, to choose the penalty: 0.2 GB for 3,072 features


@dataclass(frozen=True)
class RidgeFit:
    """A head in closed form, and what it was chosen by."""

    weight: Tensor  # float32 [384, C], of the last Linear, on the device, scaled to the size of random weights
    penalty: float  # what was added to the diagonal of X'X
    cosine: float  # mean over held-out training images of a head that was fitted without them
    images: int
    bad: list[tuple[int, str]]  # images that could not be read, over all ranks: row and reason


@dataclass(frozen=True)
class Seen:
    """A batch of images that the backbone has seen."""

    rows: np.ndarray  # int [n]
    features: Tensor  # float32 [n, C], on the device
    targets: Tensor  # float32 [n, 384], likewise
    bad: list[tuple[int, str]]  # images that could not be read: row and reason


class Sums:
    """X'X and X'Y of rows that come in batches, in float64: all that the regression needs of them."""

    def __init__(self, num_features: int, num_targets: int, device: torch.device):
        self.squares = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: [n, C] and [n, D] of any float dtype."""
        features = features.double()
        self.squares += features.T @ features
        self.products += features.T @ targets.double()

    def over_ranks(self, ranks: Ranks) -> "Sums":
        """Add up what all ranks have: every rank then holds the sums over all rows."""
        ranks.add_up(self.squares)
        ranks.add_up(self.products)
        return self


def solve(sums: Sums, penalty: float) -> Tensor:
    """The W, float64 [D, C], of least ||X W' - Y||^2 + penalty ||W||^2 (Hoerl and Kennard 1970, eq. 2.1)."""
    ridge = penalty * torch.eye(len(sums.squares), dtype=torch.float64, device=sums.squares.device)
    return torch.linalg.solve(sums.squares + ridge, sums.products).T


def cosine_sums(sums: Sums, features: Tensor, targets: Tensor) -> tuple[np.ndarray, Tensor]:
    """The penalties to choose from, and for each the sum of the cosines of other rows, float64 [penalties].

    Args:
        features: float32 [n, C]; targets: float32 [n, D]; rows that are not in the sums.
    """
    penalties = PENALTIES * float(sums.squares.diagonal().mean())
    values, vectors = torch.linalg.eigh(sums.squares)  # one decomposition for all penalties
    rotated, products = features @ vectors.float(), vectors.T @ sums.products
    scores = torch.zeros(len(penalties), dtype=torch.float64, device=features.device)
    for number, penalty in enumerate(penalties):
        weight = products / (values.clamp(min=0) + penalty)[:, None]
        scores[number] = cosine_similarity(rotated @ weight.float(), targets).sum(dtype=torch.float64)
    return penalties, scores


def regress(features: np.ndarray, targets: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Fit a head to features that are in memory, with the penalty that suits held-out rows best: float64 [D, C].

    Args:
        features: float [n, C]; targets: float32 [n, D].
        held: bool [n], the rows that choose the penalty; neither none nor all.
    """
    x, y, chosen = torch.from_numpy(features).float(), torch.from_numpy(targets), torch.from_numpy(held)
    sums = Sums(x.shape[1], y.shape[1], x.device)
    sums.add(x[~chosen], y[~chosen])
    penalties, scores = cosine_sums(sums, x[chosen], y[chosen])
    sums.add(x[chosen], y[chosen])
    return solve(sums, float(penalties[int(scores.argmax())])).numpy()


def scaled_as_random(weight: Tensor) -> Tensor:
    """Scale a head to the root mean square of Xavier's random weights; its unit predictions stay what they are.

    An optimiser's first steps are of the size of the rate, whatever the weights' size. The solution's weights can be
    500 times smaller than random ones (EfficientNet-Lite0), and the first steps of AdamW would replace them: after an
    epoch the demo's fold 0 then has 0.6395, below the closed form's 0.6564; scaled, it has 0.6739.

    Args:
        weight: float [D, C], not all 0.
    """
    return weight * ((2 / sum(weight.shape)) ** 0.5 / weight.square().mean().sqrt())


def held_out(data: PromptImages, rows: np.ndarray, fold: int) -> np.ndarray:
    """bool [n]: the training rows that choose the penalty, a tenth of them or so.

    They are those of the next fold, which resemble the others little; prompts at random where there is one fold alone.
    """
    folds = data.folds[rows]
    others = np.unique(folds)
    if len(others) > 1:
        return folds == min(others, key=lambda other: (other - fold) % 10)
    chosen = np.random.default_rng(0).random(data.prompt_codes.max() + 1) < 0.1
    return chosen[data.prompt_codes[rows]]


def run_backbone(
    network: PromptEmbedder,
    data: PromptImages,
    rows: np.ndarray,
    recipe: Recipe,
    dtype: torch.dtype,
    ranks: Ranks,
    title: str = "head in closed form",
) -> Iterator[Seen]:
    """Run the backbone on this rank's share of rows, without augmentation; the network must be in evaluation mode."""
    examples = datasets.TrainingImages(data, rows, dataclasses.replace(recipe, augment="none"))
    mine = rows[ranks.rank :: ranks.world_size]
    size = recipe.max_local_batch_size
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    samples = [[(0, int(row)) for row in batch] for batch in batches]
    loader = DataLoader(examples, batch_sampler=samples, **loading.loader_options(recipe, ranks))
    with progress.progress_bar(len(mine), "image", title, disable=not ranks.is_main) as shown:
        for batch_rows, batch in zip(batches, loaders.batches(loader), strict=True):
            images = network_input.to_network_input({"image": batch["image"]}, recipe, ranks.device)
            with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
                features = network.features(images).float()
            yield Seen(batch_rows, features, batch["target"].to(ranks.device), batch["bad"])
            shown.update(len(batch_rows))


def check_finite(values: Tensor, recipe: Recipe) -> None:
    """Raise ValueError unless the features, or sums of them, are finite."""
    if not torch.isfinite(values).all():
        raise ValueError(f"head_init=ridge: features of {recipe.backbone} are not finite; train with amp_dtype=float32")


def place_keys(network: PromptEmbedder, seen: Sequence[Seen], recipe: Recipe, ranks: Ranks) -> Tensor:
    """Make the images that all ranks have seen the keys of the head, on every rank alike.

    Returns: float64 [keys, keys], lower triangular L: L L' is the likeness of the keys to each other. Regression on
        likeness times the inverse of L' is kernel ridge regression on the keys (Williams and Seeger 2001).
    Raises: ValueError for features that are not finite.
    """
    mine = [(batch.rows, batch.features.cpu()) for batch in seen]
    rows, features = zip(*(batch for batches in ranks.gather_objects(mine) for batch in batches), strict=True)
    ordered = torch.cat(features)[np.argsort(np.concatenate(rows))].to(ranks.device)
    check_finite(ordered, recipe)
    network.fc.set_keys(ordered)
    likeness = network.fc.likeness(ordered).double()
    return torch.linalg.cholesky(likeness + KEYS_APART * torch.eye(len(likeness), device=ranks.device))


@torch.inference_mode()
def fit_head(
    network: PromptEmbedder,
    data: PromptImages,
    rows: np.ndarray,
    fold: int,
    recipe: Recipe,
    dtype: torch.dtype,
    ranks: Ranks,
) -> RidgeFit:
    """Regress the prompts' embeddings on what the head sees, over all images once, without augmentation.

    The head has no bias, as published, and so neither features nor targets are centred: a constant part must come from
    features that hardly vary. On the demo's fold 0 that costs 0.0002 (cosine 0.6359, and 0.6361 with a bias). The
    penalty is the one whose head has the highest cosine on held-out prompts; the head is then fitted on all rows. Every
    rank takes its share of the images and gets the whole result.

    With `head_keys`, images drawn at random are seen first and made the keys, in the network. The regression is then on
    the likeness to them.

    Args:
        network: on the device; its backbone is run in evaluation mode.
        rows: int [n], the training rows, ascending.
        fold: the validation fold, whose rows are not among them.
        dtype: of autocast.
    Raises: ValueError if features are not finite, or for fewer images than keys.
    """
    if recipe.head_keys > len(rows):
        raise ValueError(f"head_keys={recipe.head_keys} is more than the {len(rows):,} training images; lower it")
    held = held_out(data, rows, fold)
    step = -(-int(held.sum()) // MOST_HELD_OUT)
    parts = {part: Sums(network.last_linear.in_features, EMBEDDING_DIM, ranks.device) for part in (False, True)}
    kept: list[tuple[Tensor, Tensor]] = []
    bad: list[tuple[int, str]] = []
    network.eval()
    see = partial(run_backbone, network, data, recipe=recipe, dtype=dtype, ranks=ranks)
    factor, seen = None, see(rows=rows)
    if recipe.head_keys:
        key_rows = np.sort(np.random.default_rng(recipe.seed).permutation(rows)[: recipe.head_keys])
        of_keys = list(see(rows=key_rows, title="keys of the head"))
        factor = place_keys(network, of_keys, recipe, ranks)
        seen = chain(of_keys, see(rows=np.setdiff1d(rows, key_rows)))
    for batch in seen:
        features, is_held = batch.features, held[np.searchsorted(rows, batch.rows)]
        if factor is not None:
            likeness = network.fc.likeness(features).double()
            features = torch.linalg.solve_triangular(factor.T, likeness, upper=True, left=False).float()
        for part, sums in parts.items():
            chosen = torch.from_numpy(np.flatnonzero(is_held == part)).to(ranks.device)
            sums.add(features[chosen], batch.targets[chosen])
        some = torch.from_numpy(np.flatnonzero(is_held)[::step]).to(ranks.device)
        kept.append((features[some], batch.targets[some]))
        bad += batch.bad
    network.train()
    fitted, chosen = parts[False].over_ranks(ranks), parts[True].over_ranks(ranks)
    check_finite(fitted.squares + chosen.squares, recipe)
    features, targets = (torch.cat(tensors) for tensors in zip(*kept, strict=True))
    penalties, scores = cosine_sums(fitted, features, targets)
    scores = torch.cat([scores, scores.new_tensor([len(features)])])
    ranks.add_up(scores)
    best = int(scores[:-1].argmax())
    fitted.squares += chosen.squares
    fitted.products += chosen.products
    weight = solve(fitted, float(penalties[best]))
    if factor is not None:
        weight = torch.linalg.solve_triangular(factor, weight, upper=False, left=False)
    return RidgeFit(
        weight=scaled_as_random(weight).float(),
        penalty=float(penalties[best]),
        cosine=float(scores[best] / scores[-1]),
        images=len(rows),
        bad=[item for items in ranks.gather_objects(bad) for item in items],
    )

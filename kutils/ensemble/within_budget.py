"""Predicts with all models of an ensemble, one after the other, within a time budget.

What a model costs is measured before the first one runs, on this machine. What does not fit is left out in the order in
which the ensemble loses least by it.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kutils.data.prompt_bank import BLOCK_QUERIES, PromptBank
from kutils.ensemble import blending, predict
from kutils.ensemble.fit import Ensemble, has_weight
from kutils.ensemble.image_cache import PixelCache, SquareImages
from kutils.ensemble.members import Member
from kutils.models import checkpoints
from kutils.runs.recipes import Recipe
from kutils.system import devices

SLACK = 1.1  # of an estimate; the budget is for more than the models
PROBE_SECONDS = 0.5  # of forward passes that are timed
PROBE_IMAGES = 32  # that are decoded to time the decoder


@dataclass(frozen=True)
class Cost:
    """What a model takes, measured."""

    load: float  # seconds
    image: float  # seconds per image, on all devices together
    decode: float  # seconds per image, which is decoded once per input size
    input_size: int
    lookup: float = 0.0  # seconds per image for a member's neighbours, which no network shares

    def describe(self) -> str:
        rate = f"{1 / self.image:,.1f} images/s" if self.image else "no image"
        return f"{rate} at {self.input_size} px, loaded in {self.load:.1f} s"


@dataclass
class EnsemblePrediction:
    """The state of a submission while its models run."""

    embeddings: np.ndarray  # float32 [n, 384], unit rows: the best so far
    families: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [n, 384], NaN for an unreadable image
    weights: dict[str, float] = field(default_factory=dict)  # of those families, summing to 1
    seconds: dict[str, float] = field(default_factory=dict)  # by member
    dropped: dict[str, str] = field(default_factory=dict)  # member -> reason
    unreadable: dict[Path, str] = field(default_factory=dict)  # image -> reason


# ---------------------------------------------------------------- what fits


def losses(fitted: Ensemble, members: Sequence[Member]) -> dict[Member, float]:
    """What the mean cosine loses, about, by leaving out one of the members.

    A family's loss was measured when the weights were fitted (leave_one_out). That of one of its k members could not,
    since each has trained on what the others are validated on: the variance that averaging takes away goes with 1 / k,
    so that a share of 1 / (k - 1) - 1 / k of the family's loss is taken for it.
    """
    found = {}
    families = {name: [member for member in members if member in of] for name, of in fitted.families.items()}
    present = [name for name, kept in families.items() if kept]
    for name in present:
        count = len(families[name])
        whole = max(0.0, fitted.scores["family"] - fitted.leave_one_out.get(name, 0.0))
        share = 1.0 if count == 1 else 1 / (count - 1) - 1 / count
        loss = math.inf if len(present) == 1 and count == 1 else share * whole
        found |= dict.fromkeys(families[name], loss)
    return found


def choose(
    fitted: Ensemble,
    members: Sequence[Member],
    costs: Mapping[Member, Cost],
    seconds: float,
    num_images: int,
    done: Sequence[Member] = (),
) -> tuple[list[Member], dict[Member, float]]:
    """The members that fit the time, by leaving out those by which least is lost, of equals the slower one.

    Args:
        members: still to run.
        costs: of each.
        seconds: left for them.
        num_images: to predict.
        done: members that have run.
    Returns: members in their order; and those left out, in that order, with the loss of each.
    """
    kept, left_out = list(members), {}
    while kept and estimate(kept, costs, num_images) > seconds:
        loss = losses(fitted, [*kept, *done])
        worst = min(kept, key=lambda member: (loss[member], -estimate([member], costs, num_images)))
        kept.remove(worst)
        left_out[worst] = loss[worst]
    for member in reversed(list(left_out)):  # what was left out before a slow one may still fit beside the rest
        if estimate([*kept, member], costs, num_images) <= seconds:
            kept.append(member)
            del left_out[member]
    return sorted(kept, key=members.index), left_out


def estimate(members: Sequence[Member], costs: Mapping[Member, Cost], num_images: int) -> float:
    """Seconds for every network's loading and running, the decoding per input size and the look-ups per member."""
    decoding = {costs[member].input_size: costs[member].decode for member in members}
    networks = {member.network: costs[member] for member in members}
    running = sum(cost.load + num_images * cost.image for cost in networks.values())
    lookups = sum(costs[member].lookup for member in members)
    return SLACK * (running + num_images * (sum(decoding.values()) + lookups))


def measure(path: Path, images: Sequence[Path], device_list: Sequence[torch.device], batch_size: int) -> Cost:
    """Load a model, decode a few images, time forward passes over growing batches: a second or two and the loading."""
    began = time.monotonic()
    model, recipe, _ = checkpoints.load_model(path)
    predictor = predict.Predictor(model, recipe, device_list[0], batch_size, "none")
    load = time.monotonic() - began
    probe = range(0, len(images), max(1, len(images) // PROBE_IMAGES))
    squares = SquareImages(images, recipe.input_size)
    began = time.monotonic()
    for position in probe:
        squares[position]
    processes = max(1, min(recipe.num_workers, torch.get_num_threads()))
    decode = (time.monotonic() - began) / max(1, len(probe)) / processes
    pixels = torch.zeros(batch_size, 3, recipe.input_size, recipe.input_size, dtype=torch.uint8)
    predictor(pixels[:1])  # the first pass pays for what later ones find ready
    size = 1
    while True:
        began = time.monotonic()
        predictor(pixels[:size])
        seconds = time.monotonic() - began
        if seconds > PROBE_SECONDS or size == batch_size:
            return Cost(load, seconds / size / len(device_list), decode, recipe.input_size)
        size = min(2 * size, batch_size)


def measure_lookup(members: Sequence[Member], bank: PromptBank | None, device: str) -> float:
    """Seconds per image that a member's neighbours take: those of the most of them, for a block of images."""
    member = max(members, key=lambda member: member.neighbours)
    if bank is None or not member.neighbours:
        return 0.0
    rows = bank.vectors(np.arange(min(BLOCK_QUERIES, len(bank))))
    member.pull(rows[:1], bank, device)  # the first look-up reads the file
    began = time.monotonic()
    member.pull(rows, bank, device)
    return (time.monotonic() - began) / len(rows)


# ---------------------------------------------------------------- all models


class Runner:
    """What all models of an ensemble share: images, devices, decoded pixels, the end of the time.

    Args:
        deadline: by time.monotonic(); the others as `predict_ensemble` has them.
    """

    def __init__(
        self,
        checkpoint_files: Mapping[Member, Path],
        images: Sequence[Path],
        *,
        deadline: float,
        batch_size: int,
        tta: str,
        cache_gb: float,
        device: str,
    ):
        self.checkpoint_files, self.images, self.deadline = checkpoint_files, images, deadline
        self.batch_size, self.tta, self.cache_gb = batch_size, tta, cache_gb
        self.device_list = predict.local_devices(devices.pick_device(device), world_size=1)
        self.caches: dict[int, PixelCache] = {}

    def run(self, member: Member) -> tuple[np.ndarray, PixelCache]:
        """One model's predictions as `predict.predict` returns them, and the images it looked at."""
        if time.monotonic() > self.deadline:
            raise predict.OutOfTime("not started")
        model, recipe, _ = checkpoints.load_model(self.checkpoint_files[member])
        pixels = self.caches.get(recipe.input_size) or self.open_cache(recipe)
        options = {"batch_size": self.batch_size, "tta": self.tta, "deadline": self.deadline}
        return predict.predict(model, recipe, pixels, self.device_list, **options), pixels

    def open_cache(self, recipe: Recipe) -> PixelCache:
        """A cache for the recipe's input size, in what the others leave of the budget."""
        left = 1e9 * self.cache_gb - sum(cache.num_bytes for cache in self.caches.values())
        options = {"budget_bytes": max(0.0, left), "num_workers": recipe.num_workers}
        self.caches[recipe.input_size] = PixelCache(self.images, recipe.input_size, **options)
        return self.caches[recipe.input_size]

    def keep_caches(self, input_sizes: Collection[int]) -> None:
        self.caches = {size: cache for size, cache in self.caches.items() if size in input_sizes}

    def measure(self, members: Sequence[Member], bank: PromptBank | None) -> dict[Member, Cost]:
        """Every member's cost, measured once per recipe; one that cannot be measured is free: it fails when it runs."""
        by_recipe: dict[str, Cost] = {}
        num_views = len(list(predict.views(torch.zeros(1, 3, 8, 8), self.tta)))
        for member in members:
            if member.recipe in by_recipe:
                continue
            try:
                cost = measure(self.checkpoint_files[member], self.images, self.device_list, self.batch_size)
                by_recipe[member.recipe] = dataclasses.replace(cost, image=cost.image * num_views)
                print(f"{Path(member.recipe).stem}: {by_recipe[member.recipe].describe()}", flush=True)
            except Exception:
                by_recipe[member.recipe] = Cost(0, 0, 0, 0)
        try:
            lookup = measure_lookup(members, bank, self.device_list[0].type)
        except Exception:  # prompts that cannot be read: what needs them is left out when its turn comes, and said
            lookup = 0.0
        return {
            member: dataclasses.replace(by_recipe[member.recipe], lookup=lookup if member.neighbours else 0.0)
            for member in members
        }


def predict_ensemble(
    fitted: Ensemble,
    checkpoint_files: Mapping[Member, Path],
    images: Sequence[Path],
    *,
    hours: float = math.inf,
    batch_size: int = predict.BATCH_SIZE,
    tta: str = "none",
    cache_gb: float = 24.0,
    device: str = "auto",
    bank: PromptBank | None = None,
) -> Iterator[EnsemblePrediction]:
    """Predict with one model in memory at a time; gives a complete result at the start and after every model.

    The first result is the mean training embedding for every image, which an unreadable image keeps. Families of the
    largest weights come first. A model for which there is no time, or that fails, is left out, and the weights of the
    others count for more. What is left out is said as it happens.

    Args:
        fitted: weights, members and the mean training embedding.
        checkpoint_files: of every member.
        images: files.
        hours: time for all models, from the first call on; infinite: nothing is measured first.
        batch_size: per device.
        tta: one of predict.TTA.
        cache_gb: of decoded images, in files of the temporary folder.
        device: auto (all GPUs, else the CPU), cuda or cpu.
        bank: in which members' neighbours are looked up, as `ensemble.load_neighbours` returns it.
    """
    options = {"batch_size": batch_size, "tta": tta, "cache_gb": cache_gb, "device": device}
    runner = Runner(checkpoint_files, images, deadline=time.monotonic() + 3600 * hours, **options)
    weights = fitted.mean_weights()
    state = EnsemblePrediction(embeddings=mean_embeddings(fitted, len(images)))
    yield state

    order = sorted(weights, key=weights.get, reverse=True)
    members = [member for family in order for member in fitted.families[family]]
    family_of = {member: family for family, of in fitted.families.items() for member in of}
    for member in [member for member in members if not has_weight(fitted, family_of[member])]:
        leave_out(state, member, "its weight is 0")
        members.remove(member)
    costs = runner.measure(members, bank) if members and hours < math.inf else {}
    predicted: dict[str, list[np.ndarray]] = {}
    took = estimated = 0.0
    planned: list[Member] = members
    while members:
        left_out: dict[Member, float] = {}
        if costs:
            slower = took / estimated if estimated else 1.0  # than measured, now that models have run
            left = (runner.deadline - time.monotonic()) / slower
            done = [member for member in family_of if member.name in state.seconds]
            former, (planned, left_out) = planned, choose(fitted, members, costs, left, len(images), done)
            if set(planned) != set(former) & set(members):
                print(f"there is time for {', '.join(member.name for member in planned) or 'no model'}", flush=True)
            runner.keep_caches({costs[member].input_size for member in members})
        if not planned:
            for member, loss in left_out.items():
                leave_out(state, member, no_time(slower * estimate([member], costs, len(images)), loss))
            break
        member = planned[0]
        sharing = [other for other in planned if other.network == member.network]
        members, planned = ([other for other in some if other not in sharing] for some in (members, planned))
        began = time.monotonic()
        try:
            rows, pixels = runner.run(member)
        except Exception as error:  # one broken model must not cost the others
            for other in sharing:
                leave_out(state, other, why(error))
            continue
        pulled: dict[Member, np.ndarray] = {}
        for other in sharing:
            try:
                pulled[other] = other.pull(rows, bank, runner.device_list[0].type)
            except Exception as error:  # nor must neighbours that cannot be looked up
                leave_out(state, other, why(error))
        seconds = time.monotonic() - began
        state.seconds |= {other.name: seconds / len(pulled) for other in pulled}
        if costs:
            took += seconds
            estimated += estimate(sharing, costs, len(images)) / SLACK
            costs = decoded(costs, pixels)
        state.unreadable |= {images[position]: reason for position, reason in sorted(pixels.bad.items())}
        if not pulled:
            continue
        for other, rows in pulled.items():
            predicted.setdefault(family_of[other], []).append(rows)
        state.families = {family: blending.average(of) for family, of in predicted.items()}
        state.embeddings = blending.combine(state.families, fitted.weights, fallback=fitted.mean_embedding)
        total = sum(weights[family] for family in state.families)
        state.weights = {family: weights[family] / total for family in state.families}
        yield state


def decoded(costs: Mapping[Member, Cost], pixels: PixelCache) -> dict[Member, Cost]:
    """The costs once the images were decoded at one size: of that size, each model decodes what is not kept."""
    again = 1 - float(pixels.stored.mean()) if len(pixels.stored) else 0.0
    return {
        member: dataclasses.replace(cost, decode=0.0, image=cost.image + again * cost.decode)
        if cost.input_size == pixels.input_size
        else cost
        for member, cost in costs.items()
    }


def mean_embeddings(fitted: Ensemble, count: int) -> np.ndarray:
    """The mean training embedding for so many images, float32 [count, 384]: what is predicted without a model."""
    return np.tile(np.asarray(fitted.mean_embedding, np.float32), (count, 1))


def no_time(seconds: float, loss: float) -> str:
    """Why a model is left out: what it takes, and what is lost by it."""
    lost = f"a loss of about {loss:.4f}" if loss < math.inf else "the last of all"
    return f"no time left: it takes {seconds / 60:,.1f} minutes ({lost})"


def why(error: Exception) -> str:
    """Why a model is left out that has not come to its end: the first line of what was raised."""
    reason = "no time left ({})" if isinstance(error, predict.OutOfTime) else "it failed: {}"
    return reason.format(next(iter(str(error).splitlines()), repr(error)))


def leave_out(state: EnsemblePrediction, member: Member, reason: str) -> None:
    state.dropped[member.name] = reason
    print(f"left out: {member.name}: {reason}", flush=True)

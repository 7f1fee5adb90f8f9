"""Predicts with all models of an ensemble, one after the other, within a time budget.

A complete result exists at any time. Before the first model runs, the cost of each is measured on this machine. If
there is not enough time for all, the models with the least effect on the ensemble are left out.
"""

import dataclasses
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending, costs, predict
from kutils.ensemble.costs import Cost
from kutils.ensemble.image_cache import PixelCache
from kutils.ensemble.members import Member
from kutils.ensemble.weights import Ensemble
from kutils.models import checkpoints
from kutils.system import devices


@dataclass
class EnsemblePrediction:
    """The state of a submission while its models run."""

    embeddings: np.ndarray  # float32 [n, 384], unit rows: the best so far
    families: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [n, 384], NaN for an unreadable image
    weights: dict[str, float] = field(default_factory=dict)  # of these families; they sum to 1
    seconds: dict[str, float] = field(default_factory=dict)  # by member
    dropped: dict[str, str] = field(default_factory=dict)  # member -> reason
    unreadable: dict[Path, str] = field(default_factory=dict)  # image -> reason


class Runner:
    """Resources that all models of an ensemble share: images, devices, decoded pixels, the deadline.

    Args:
        deadline: by time.monotonic(); the others as for `predict_ensemble`.
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
        predict.check_tta(tta)
        self.checkpoint_files, self.images, self.deadline = checkpoint_files, images, deadline
        self.batch_size, self.tta, self.cache_gb = batch_size, tta, cache_gb
        self.device_list = predict.local_devices(devices.pick_device(device), world_size=1)
        self.caches: dict[int, PixelCache] = {}

    def run(self, member: Member) -> tuple[np.ndarray, list[PixelCache]]:
        """One model's predictions, as `predict.predict` returns them, and the caches of images that it used."""
        if time.monotonic() > self.deadline:
            raise predict.OutOfTime("not started")
        model, recipe, _ = checkpoints.load_model(self.checkpoint_files[member])
        sizes = predict.sizes_of_member(model, recipe, self.tta)
        if self.tta != "none" and len(sizes) == 1:
            print(f"{member.name}: its network takes one size, and predicts at {sizes[0]} px alone", flush=True)
        caches = [self.caches.get(size) or self.open_cache(size, recipe.num_workers) for size in sizes]
        options = {"batch_size": self.batch_size, "deadline": self.deadline}
        return predict.predict_at_sizes(model, recipe, caches, self.device_list, **options), caches

    def open_cache(self, size: int, num_workers: int) -> PixelCache:
        """A cache of images of a size, within what other caches leave of the budget."""
        left = 1e9 * self.cache_gb - sum(cache.num_bytes for cache in self.caches.values())
        self.caches[size] = PixelCache(self.images, size, budget_bytes=max(0.0, left), num_workers=num_workers)
        return self.caches[size]

    def drop_caches(self, needed: Collection[int]) -> None:
        """Free the caches of sizes that are no longer needed."""
        self.caches = {size: cache for size, cache in self.caches.items() if size in needed}

    def measure(self, members: Sequence[Member], bank: PromptBank | None) -> dict[Member, Cost]:
        """Every member's cost, measured once per recipe; 0 for one that cannot be measured, since it fails when it
        runs."""
        by_recipe: dict[str, Cost] = {}
        for member in members:
            if member.recipe in by_recipe:
                continue
            try:
                by_recipe[member.recipe] = costs.measure_cost(
                    self.checkpoint_files[member], self.images, self.device_list, self.batch_size, self.tta
                )
                print(f"{Path(member.recipe).stem}: {by_recipe[member.recipe]}", flush=True)
            except Exception:
                by_recipe[member.recipe] = Cost(0, 0, {})
        try:
            lookup = costs.measure_lookup(members, bank, self.device_list[0].type)
        except Exception:  # prompts cannot be read: members that need them are left out later
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

    The first result is the mean training embedding for every image; unreadable images keep it. Families with large
    weights run first. A model that fails, or for which there is no time, is left out; a line says so, and the weights
    of the others are scaled to sum to 1.

    Args:
        fitted: weights, members and the mean training embedding.
        hours: time for all models, from the first call on; infinite: nothing is measured first.
        tta: one of predict.TTA; with `two_resolutions`, networks that take only one size use that.
        cache_gb: size of the cache of decoded images, in temporary files.
        device: auto (all GPUs, else the CPU), cuda or cpu.
        bank: prompts for members' neighbours, as `weights.find_members` returns it.
    """
    options = {"batch_size": batch_size, "tta": tta, "cache_gb": cache_gb, "device": device}
    runner = Runner(checkpoint_files, images, deadline=time.monotonic() + 3600 * hours, **options)
    weights = fitted.mean_weights()
    state = EnsemblePrediction(embeddings=mean_embeddings(fitted, len(images)))
    yield state

    order = sorted(weights, key=weights.get, reverse=True)
    members = [member for family in order for member in fitted.families[family]]
    family_of = {member: family for family, of in fitted.families.items() for member in of}
    for member in [member for member in members if not fitted.has_weight(family_of[member])]:
        leave_out(state, member, "its weight is 0")
        members.remove(member)
    measured = runner.measure(members, bank) if members and hours < math.inf else {}
    predicted: dict[str, list[np.ndarray]] = {}
    took = estimated = 0.0
    planned: list[Member] = members
    while members:
        left_out: dict[Member, float] = {}
        if measured:
            slower = took / estimated if estimated else 1.0  # than estimated, by the models that have run
            left = (runner.deadline - time.monotonic()) / slower
            done = [member for member in family_of if member.name in state.seconds]
            previous = planned
            planned, left_out = costs.choose_members(fitted, members, measured, left, len(images), done)
            if set(planned) != set(previous) & set(members):
                print(f"there is time for {', '.join(member.name for member in planned) or 'no model'}", flush=True)
            runner.drop_caches({size for member in members for size in measured[member].decode})
        if not planned:
            for member, loss in left_out.items():
                leave_out(state, member, no_time(slower * costs.estimate([member], measured, len(images)), loss))
            break
        member = planned[0]
        sharing = [other for other in planned if other.network == member.network]
        members, planned = ([other for other in some if other not in sharing] for some in (members, planned))
        began = time.monotonic()
        try:
            rows, caches = runner.run(member)
        except Exception as error:  # one broken model must not cost the others
            for other in sharing:
                leave_out(state, other, why(error))
            continue
        rows_of: dict[Member, np.ndarray] = {}
        for other in sharing:
            try:
                rows_of[other] = other.apply_neighbours(rows, bank, runner.device_list[0].type)
            except Exception as error:  # nor must neighbours that cannot be looked up
                leave_out(state, other, why(error))
        seconds = time.monotonic() - began
        state.seconds |= {other.name: seconds / len(rows_of) for other in rows_of}
        if measured:
            took += seconds
            estimated += costs.estimate(sharing, measured, len(images)) / costs.SLACK
            measured = costs.after_decoding(measured, caches)
        bad = {position: reason for pixels in caches for position, reason in pixels.bad.items()}
        state.unreadable |= {images[position]: reason for position, reason in sorted(bad.items())}
        if not rows_of:
            continue
        for other, rows in rows_of.items():
            predicted.setdefault(family_of[other], []).append(rows)
        state.families = {family: blending.average(of) for family, of in predicted.items()}
        state.embeddings = blending.combine(state.families, fitted.weights, fallback=fitted.mean_embedding)
        total = sum(weights[family] for family in state.families)
        state.weights = {family: weights[family] / total for family in state.families}
        yield state


def mean_embeddings(fitted: Ensemble, count: int) -> np.ndarray:
    """The mean training embedding for `count` images, float32 [count, 384]: the prediction without a model."""
    return np.tile(np.asarray(fitted.mean_embedding, np.float32), (count, 1))


def no_time(seconds: float, loss: float) -> str:
    """Why a model is left out: its seconds, and the estimated loss of cosine."""
    lost = f"a loss of about {loss:.4f}" if loss < math.inf else "the last of all"
    return f"no time left: it takes {seconds / 60:,.1f} minutes ({lost})"


def why(error: Exception) -> str:
    """Why a model that did not finish is left out: the first line of its error."""
    reason = "no time left ({})" if isinstance(error, predict.OutOfTime) else "it failed: {}"
    return reason.format(next(iter(str(error).splitlines()), repr(error)))


def leave_out(state: EnsemblePrediction, member: Member, reason: str) -> None:
    """Note that a member is left out, and print it."""
    state.dropped[member.name] = reason
    print(f"left out: {member.name}: {reason}", flush=True)

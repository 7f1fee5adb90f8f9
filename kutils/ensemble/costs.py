"""Measures the seconds that each member of an ensemble takes, and chooses the members that fit into a time."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kutils.data.prompt_bank import BLOCK_QUERIES, PromptBank
from kutils.ensemble import predict
from kutils.ensemble.image_cache import PixelCache, SquareImages
from kutils.ensemble.members import Member
from kutils.ensemble.weights import Ensemble
from kutils.models import checkpoints

SLACK = 1.1  # safety factor on estimates
PROBE_SECONDS = 0.5  # least duration of a timed forward pass
PROBE_IMAGES = 32  # decoded to time the decoder


@dataclass(frozen=True)
class Cost:
    """What a model takes, measured."""

    load: float  # seconds
    image: float  # seconds per image, on all devices together
    decode: dict[int, float]  # side of the square in px -> seconds to decode an image, once for all models of this side
    lookup: float = 0.0  # seconds per image to look up a member's neighbours

    def __str__(self) -> str:
        rate = f"{1 / self.image:,.1f} images/s" if self.image else "no image"
        return f"{rate} at {' and '.join(map(str, self.decode))} px, loaded in {self.load:.1f} s"


# ---------------------------------------------------------------- measuring


def measure_cost(
    path: Path, images: Sequence[Path], device_list: Sequence[torch.device], batch_size: int, tta: str
) -> Cost:
    """Load a model, decode a few images, and time forward passes over growing batches: one or two seconds plus loading.

    Args:
        images: the files to predict; some are decoded.
        device_list, batch_size: as `predict.predict` has them.
        tta: with `two_resolutions`, both sizes are measured, if the network takes both.
    """
    began = time.monotonic()
    model, recipe, _ = checkpoints.load_model(path)
    predictor = predict.Predictor(model, recipe, device_list[0], batch_size)
    load = time.monotonic() - began
    probe = range(0, len(images), max(1, len(images) // PROBE_IMAGES))
    processes = max(1, min(recipe.num_workers, torch.get_num_threads()))
    decode, seconds = {}, 0.0
    for size in predict.sizes_of_member(model, recipe, tta):
        squares = SquareImages(images, size)
        began = time.monotonic()
        for position in probe:
            squares[position]
        decode[size] = (time.monotonic() - began) / max(1, len(probe)) / processes
        seconds += seconds_per_image(predictor, size, batch_size)
    return Cost(load, seconds / len(device_list), decode)


def seconds_per_image(predictor: predict.Predictor, size: int, batch_size: int) -> float:
    """Seconds per image of `size` px in a forward pass, by the first batch that takes PROBE_SECONDS or is full."""
    pixels = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)
    predictor(pixels[:1])  # the first pass is slower: libraries and memory are prepared in it
    count = 1
    while True:
        began = time.monotonic()
        predictor(pixels[:count])
        seconds = time.monotonic() - began
        if seconds > PROBE_SECONDS or count == batch_size:
            return seconds / count
        count = min(2 * count, batch_size)


def measure_lookup(members: Sequence[Member], bank: PromptBank | None, device: str) -> float:
    """Seconds per image to look up a member's neighbours, measured with the largest number of them on a block of
    images."""
    member = max(members, key=lambda member: member.neighbours)
    if bank is None or not member.neighbours:
        return 0.0
    rows = bank.vectors(np.arange(min(BLOCK_QUERIES, len(bank))))
    member.apply_neighbours(rows[:1], bank, device)  # the first look-up reads the file
    began = time.monotonic()
    member.apply_neighbours(rows, bank, device)
    return (time.monotonic() - began) / len(rows)


def after_decoding(costs: Mapping[Member, Cost], caches: Sequence[PixelCache]) -> dict[Member, Cost]:
    """The costs after images were decoded at some sizes: models then decode only images that are not cached."""
    again = {pixels.input_size: 1 - float(pixels.stored.mean()) if len(pixels.stored) else 0.0 for pixels in caches}
    updated = {}
    for member, cost in costs.items():
        more = sum(again.get(size, 0.0) * seconds for size, seconds in cost.decode.items())
        decode = {size: 0.0 if size in again else seconds for size, seconds in cost.decode.items()}
        updated[member] = dataclasses.replace(cost, decode=decode, image=cost.image + more)
    return updated


def estimate(members: Sequence[Member], costs: Mapping[Member, Cost], num_images: int) -> float:
    """Seconds to load and run every network, decode images once per size, and look up neighbours for every member."""
    decoding: dict[int, float] = {}
    for member in members:
        decoding |= costs[member].decode
    networks = {member.network: costs[member] for member in members}
    running = sum(cost.load + num_images * cost.image for cost in networks.values())
    lookups = sum(costs[member].lookup for member in members)
    return SLACK * (running + num_images * (sum(decoding.values()) + lookups))


# ---------------------------------------------------------------- choosing


def losses(fitted: Ensemble, members: Sequence[Member]) -> dict[Member, float]:
    """An estimate, for each member, of the mean cosine that is lost by leaving it out.

    The loss of a whole family was measured when the weights were fitted (leave_one_out). That of one of its k members
    cannot be measured, since each has trained on the rows that the others are validated on. The variance of a mean is
    proportional to 1 / k, so a member's loss is estimated as 1 / (k - 1) - 1 / k of the family's.
    """
    result = {}
    families = {name: [member for member in members if member in of] for name, of in fitted.families.items()}
    present = [name for name, available in families.items() if available]
    for name in present:
        count = len(families[name])
        whole = max(0.0, fitted.scores["family"] - fitted.leave_one_out.get(name, 0.0))
        share = 1.0 if count == 1 else 1 / (count - 1) - 1 / count
        loss = math.inf if len(present) == 1 and count == 1 else share * whole
        result |= dict.fromkeys(families[name], loss)
    return result


def choose_members(
    fitted: Ensemble,
    members: Sequence[Member],
    costs: Mapping[Member, Cost],
    seconds: float,
    num_images: int,
    done: Sequence[Member] = (),
) -> tuple[list[Member], dict[Member, float]]:
    """Choose the members that fit into the time. The one with the least loss is left out first; of equals, the slower.

    Args:
        seconds: time left.
        done: members that have run.
        Returns: the chosen members in their order; and those left out, in the order of leaving out, with the loss of
            each.
    """
    chosen, left_out = list(members), {}
    while chosen and estimate(chosen, costs, num_images) > seconds:
        loss = losses(fitted, [*chosen, *done])
        worst = min(chosen, key=lambda member: (loss[member], -estimate([member], costs, num_images)))
        chosen.remove(worst)
        left_out[worst] = loss[worst]
    for member in reversed(list(left_out)):  # a member left out before a slow one may fit after all
        if estimate([*chosen, member], costs, num_images) <= seconds:
            chosen.append(member)
            del left_out[member]
    return sorted(chosen, key=members.index), left_out

"""Does one optimiser update, and one pass over the validation rows."""

import functools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel

from kutils.models.networks import PromptEmbedder
from kutils.runs.recipes import Recipe
from kutils.system import loaders
from kutils.system.constants import EMBEDDING_DIM
from kutils.system.devices import is_out_of_memory
from kutils.system.ranks import Ranks
from kutils.training import network_input
from kutils.training.losses import LOSSES, cosine_similarity
from kutils.training.sam import frozen_batch_statistics, gradient_norm, perturbed


def distribute(network: PromptEmbedder, ranks: Ranks) -> nn.Module:
    """Wrap in DDP if there are several ranks; to be called again whenever the backbone was frozen or unfrozen."""
    if ranks.world_size == 1:
        return network
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def compile_network(model: nn.Module, batch_size: int, recipe: Recipe, dtype: torch.dtype, ranks: Ranks) -> bool:
    """Compile the network's forward and backward pass in place, if that works on every rank; else leave it uncompiled.

    A trial pass on a batch of training's shape changes no weights, statistics or random numbers; rank 0 prints how long
    it took, or why it failed. To be called again when the backbone was unfrozen, which changes the graph. The keys of
    the state dict do not change, and evaluation stays uncompiled, since it calls parts of the network.

    Args:
        model: the network, wrapped by `distribute`, in training mode.
    Returns: whether the network is compiled now.
    Raises: RuntimeError out of memory.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    image = torch.zeros(batch_size, 3, recipe.input_size, recipe.input_size, dtype=torch.uint8)
    batch = {"image": image, "target": torch.ones(batch_size, EMBEDDING_DIM)}
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=False)
    gpus = [ranks.device] if ranks.device.type == "cuda" else []
    started, failure = time.monotonic(), ""
    # shapes never change; random numbers come from torch's generators: drop path drops the same paths as in eager mode
    network.compile(dynamic=False, options={"fallback_random": True})
    try:
        with torch.random.fork_rng(gpus), frozen_batch_statistics(network):
            # not averaged: the others would wait for a rank on which it fails
            backward(model, scaler, recipe, dtype, batch, share=1.0, average=False)
    except Exception as error:  # compilers raise errors of many classes
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    network.zero_grad(set_to_none=True)
    failures = [text for text in ranks.gather_objects(failure) if text]
    if failures:
        network._compiled_call_impl = None
        torch._dynamo.reset()
    if ranks.is_main:
        done = f"compiled the network in {time.monotonic() - started:.0f} s"
        warning = "warning: the network could not be compiled, and trains as with compile=false"
        print(f"{warning} ({failures[0]})" if failures else done, flush=True)
    return not failures


def update(
    model: nn.Module,
    batches: Sequence[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    dtype: torch.dtype,
) -> Tensor:
    """One optimiser update from the local batches of a global batch (more than one: gradient accumulation).

    SAM with `sam_gradient: local` perturbs the weights by each local batch's own gradient (m-sharpness, Foret et al.
    2021, section 4.1): 8 ranks of 16 images give the same result as one rank that accumulates 8 x 16 images. `averaged`
    perturbs by the gradient of the global batch, and needs memory for one set of gradients less.

    Args:
        model: the network, wrapped by `distribute`.
        batches: from the training loader.
        scaler: enabled only for float16; skips the update if a gradient of either pass is not finite, and then lowers
            its scale.
    Returns: scalar float32, the mean loss at the unperturbed weights, on the device (not synchronised); NaN if a
        gradient was not finite and no scaler skipped the update.
    """
    groups = optimizer.param_groups  # a list: iterating over modules took a tenth of a small network's update
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    add_gradient = functools.partial(backward, model, scaler, recipe, dtype, share=1 / len(batches))
    total, last = torch.zeros((), device=parameters[0].device), len(batches) - 1
    if recipe.sam_rho == 0:
        for number, batch in enumerate(batches):
            total += add_gradient(batch, average=number == last)
    elif recipe.sam_gradient == "averaged":
        for number, batch in enumerate(batches):
            total += add_gradient(batch, average=number == last)
        with perturbed(parameters, recipe.sam_rho) as finite, frozen_batch_statistics(model):
            for number, batch in enumerate(batches):
                add_gradient(batch, average=number == last, valid=finite)
    else:
        for number, batch in enumerate(batches):
            earlier = [parameter.grad for parameter in parameters]
            optimizer.zero_grad(set_to_none=True)
            total += add_gradient(batch, average=False)
            with perturbed(parameters, recipe.sam_rho) as finite, frozen_batch_statistics(model):
                for parameter, gradient in zip(parameters, earlier, strict=True):
                    parameter.grad = gradient
                add_gradient(batch, average=number == last, valid=finite)
    if recipe.clip_grad:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)  # a non-finite gradient makes all of them NaN
    if not scaler.is_enabled():  # broken weights must not be saved before the next loss shows them
        total = torch.where(torch.isfinite(gradient_norm(parameters)), total, torch.nan)
    with record_function("optimiser"):
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def backward(
    model: nn.Module,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    dtype: torch.dtype,
    batch: dict,
    *,
    share: float,
    average: bool,
    valid: Tensor | None = None,
) -> Tensor:
    """Add one local batch's gradient to the parameters'; returns its share of the loss, detached.

    Args:
        share: weight of the batch in the update's loss.
        average: average all gradients added so far over ranks.
        valid: bool scalar; False makes every gradient NaN, on every rank that averages.
    """
    device = next(model.parameters()).device
    with record_function("augmentation and copy"):
        images = network_input.to_network_input(batch, recipe, device)
        targets = batch["target"].to(device, non_blocking=True)
    # forward and backward inside: with the forward outside of no_sync, DDP would average this gradient too
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not average else nullcontext():
        with (
            record_function("forward"),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            loss = LOSSES[recipe.loss](model(images), targets) * share
        if valid is not None:
            loss = loss * torch.where(valid, 1.0, torch.nan)
        with record_function("backward"):
            scaler.scale(loss).backward()
    return loss.detach()


@dataclass(frozen=True)
class Evaluation:
    """Results of a pass over the validation rows."""

    cosines: np.ndarray  # float32 [n], of every row with its own prompt, in order, on every rank
    embeddings: Tensor  # float32 [n of this rank, 384], on the device
    lengths: Tensor  # float32 [n of this rank], on the device: of predictions before they were scaled to unit length
    features: Tensor | None  # [n of this rank, C], on the device: inputs of the head


@torch.inference_mode()
def evaluate(
    network: PromptEmbedder,
    loader,
    recipe: Recipe,
    dtype: torch.dtype,
    ranks: Ranks,
    *,
    total: int,
    keep_features: bool = False,
) -> Evaluation:
    """Predict this rank's share of the validation rows, and compare each with its target.

    Args:
        network: not wrapped in DDP.
        loader: over rows rank, rank + world_size, ... of all.
        total: rows over all ranks; every one is predicted exactly once, whatever the number of ranks.
    """
    network.eval()
    empty = torch.zeros(0, EMBEDDING_DIM, device=ranks.device)
    embeddings, cosines, lengths = [empty], [empty[:, 0]], [empty[:, 0]]
    features = [torch.zeros(0, network.num_features, device=ranks.device)]
    for batch in loaders.batches(loader):
        images = network_input.to_network_input(batch, recipe, ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            seen = network.features(images)
            projected = network.project(seen)
        predicted = F.normalize(projected, dim=-1)
        embeddings.append(predicted)
        lengths.append(projected.norm(dim=-1))
        cosines.append(cosine_similarity(predicted, batch["target"].to(ranks.device, non_blocking=True)))
        if keep_features:
            features.append(seen.float())
    network.train()
    ordered = ranks.gather_interleaved(torch.cat(cosines)[:, None], total)[:, 0]
    seen = torch.cat(features) if keep_features else None
    return Evaluation(ordered, torch.cat(embeddings), torch.cat(lengths), seen)


def mean(cosines: np.ndarray, chosen: np.ndarray | None = None) -> float | None:
    """Mean over rows, or over the chosen ones (bool [n]), in float64; None if there are none."""
    values = cosines if chosen is None else cosines[chosen]
    return float(values.mean(dtype=np.float64)) if len(values) else None

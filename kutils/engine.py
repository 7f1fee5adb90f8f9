"""One optimiser update, and one pass over the validation rows."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kutils import transforms
from kutils.config import Recipe
from kutils.devices import Ranks
from kutils.losses import cosine_embedding_loss
from kutils.models import PromptEmbedder
from kutils.sam import frozen_batch_statistics, perturbed


def distribute(network: PromptEmbedder, ranks: Ranks) -> nn.Module:
    """Wrap for gradient averaging over ranks; anew whenever the backbone was frozen or unfrozen."""
    if ranks.world_size == 1:
        return network
    return DistributedDataParallel(network, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def to_network_input(batch: dict, recipe: Recipe, device: torch.device) -> torch.Tensor:
    """The batch's uint8 images, augmented and normalised on the device: float32 [B, 3, S, S]."""
    images = batch["image"].to(device, non_blocking=True)
    jitter = batch["jitter"] if recipe.augment and "jitter" in batch else None
    images = transforms.normalize(images, recipe.mean, recipe.std, jitter)
    return images.contiguous(memory_format=torch.channels_last)


def update(
    model: nn.Module,
    batches: Sequence[dict],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One optimiser update from the local batches of a global batch (more than one: gradient accumulation).

    With SAM each local batch perturbs the weights by its own gradient (m-sharpness, Foret et al. 2021, section 4.1), so
    that 8 ranks of 16 images and one rank accumulating 8 times 16 images do the same.

    Args:
        model: the network, wrapped by `distribute`.
        batches: from the training loader.
        scaler: enabled for float16 alone; skips the update when a gradient is not finite, and scales less from then on.
    Returns: scalar float32, the mean loss at the unperturbed weights, on the device (not synchronised).
    """
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    average = isinstance(model, DistributedDataParallel)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        images = to_network_input(batch, recipe, device)
        targets = batch["target"].to(device, non_blocking=True)
        local = model.no_sync if average else nullcontext
        last = local if number < len(batches) else nullcontext

        def backward(images=images, targets=targets):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = cosine_embedding_loss(model(images), targets) / len(batches)
            scaler.scale(loss).backward()
            return loss.detach()

        if recipe.sam_rho == 0:
            with last():
                total += backward()
            continue
        earlier = [parameter.grad for parameter in parameters]
        optimizer.zero_grad(set_to_none=True)
        with local():  # forward and backward: with the forward outside, DDP would average this gradient too
            total += backward()
        with perturbed(parameters, recipe.sam_rho), frozen_batch_statistics(model):
            for parameter, gradient in zip(parameters, earlier, strict=True):
                parameter.grad = gradient
            with last():
                backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.inference_mode()
def predict_rows(network: PromptEmbedder, loader, recipe: Recipe, dtype: torch.dtype, ranks: Ranks, total: int):
    """Predict this rank's share of the validation rows and gather all: float32 [total, 384] on every rank.

    Args:
        network: not wrapped.
        loader: over rows rank, rank + world_size, ... of the fold.
        total: rows of the fold; every one is predicted exactly once, whatever the number of ranks.
    """
    network.eval()
    local = [torch.zeros(0, network.fc.out_features, device=ranks.device)]
    for batch in loader:
        images = to_network_input(batch, recipe, ranks.device)
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            local.append(network(images))
    network.train()
    return ranks.gather_interleaved(torch.cat(local), total)


def mean_cosine(predicted: np.ndarray, target: np.ndarray, chosen: np.ndarray | None = None) -> float | None:
    """Mean cosine similarity over rows, or over the chosen ones, in float64; None where there are none.

    Args:
        predicted, target: float32 [n, 384].
        chosen: bool [n] or None for all rows.
    """
    if chosen is not None:
        predicted, target = predicted[chosen], target[chosen]
    if not len(predicted):
        return None
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(target, axis=1)
    return float(np.mean(np.einsum("nd,nd->n", predicted, target) / lengths))

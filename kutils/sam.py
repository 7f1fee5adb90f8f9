"""Sharpness-aware minimisation (Foret et al. 2021): take the gradient where the loss is worst nearby."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm over all gradients together: scalar float32 on their device, not finite if any of them is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], rho: float) -> Iterator[Tensor]:
    """Hold the weights at w + rho * g / ||g|| inside the block, then restore w exactly (Foret et al. 2021, eq. 2).

    Takes g from the gradients and clears them on entry, so that the block's backward alone is what the optimiser sees;
    restores in `finally`, from a copy (w + e - e would round). A gradient scaled by a loss scaler gives the same
    direction. A gradient that is zero or not finite moves nothing.

    Args:
        parameters: those without a gradient are left alone.
        rho: radius, in the Euclidean norm over all parameters together.
    Yields: bool scalar on the device: whether g was finite. Where it was not, the whole update must be given up: the
        block's own gradient may well be finite (drop path draws anew), but it is none of SAM.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm(parameters)
    finite = torch.isfinite(norm)
    scale = torch.where(finite & (norm > 0), rho / norm, 0.0)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                step = torch.nan_to_num(parameter.grad, 0.0, 0.0, 0.0) * scale
                parameter.add_(step.to(parameter.dtype))
                parameter.grad = None
        yield finite
    finally:
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in parameters], kept)


@contextmanager
def frozen_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are inside the block: perturbed weights must leave no trace."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    counts = [layer.num_batches_tracked.clone() if layer.num_batches_tracked is not None else None for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            if count is not None:
                layer.num_batches_tracked.copy_(count)

"""Perturbs the weights for sharpness-aware minimisation (SAM, Foret et al. 2021)."""

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

    Takes g from the gradients and clears them on entry, so that the optimiser sees only the block's backward pass;
    restores in `finally`, from a copy (w + e - e would round). A loss scaler does not change the direction of g. If g
    is zero or not finite, the weights do not move.

    Args:
        parameters: of one dtype and device; those without a gradient are left alone.
        rho: radius, in the Euclidean norm over all parameters together.
    Yields: bool scalar on the device: whether g was finite. If it was not, the whole update must be skipped: the
        block's own gradient may be finite (drop path draws new random numbers), but it is not one at perturbed weights.
    Raises: ValueError for a gradient with another memory layout than its weights, which the kernel would mix up.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    for number, parameter in enumerate(parameters):
        if not lies_alike(parameter, parameter.grad):
            raise ValueError(
                f"the gradient of parameter {number}, {list(parameter.shape)}, has another layout or dtype than its "
                "weights; backward() gives theirs, and what is set by hand needs torch.empty_like(parameter).copy_(...)"
            )
    norm = gradient_norm(parameters)
    finite = torch.isfinite(norm)
    copies = [torch.empty_like(parameter) for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(copies, parameters)
    try:
        with torch.no_grad():
            ascend(parameters, torch.where(norm > 0, rho / norm, 0.0), finite)
        for parameter in parameters:
            parameter.grad = None
        yield finite
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, copies)


def lies_alike(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether two tensors have the same memory layout, dtype and device."""
    if (parameter.layout, parameter.dtype, parameter.device) != (gradient.layout, gradient.dtype, gradient.device):
        return False
    if parameter.layout != torch.strided or parameter.shape != gradient.shape:
        return False
    if parameter.stride() == gradient.stride():
        return True
    return all(
        size == 1 or one == other
        for size, one, other in zip(parameter.shape, parameter.stride(), gradient.stride(), strict=True)
    )


def ascend(parameters: list[nn.Parameter], rate: Tensor, valid: Tensor) -> None:
    """w += rate * g for all parameters in one kernel without a temporary copy; no change if not `valid` (bool
    scalar)."""
    torch._fused_sgd_(
        parameters,
        [parameter.grad for parameter in parameters],
        momentum_buffer_list=[],
        weight_decay=0.0,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~valid).float(),
    )


@contextmanager
def frozen_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Restore BatchNorm's running statistics after the block, so that perturbed weights do not change them.

    They are copied: setting the momentum to 0 would keep NaN, and would make torch.compile run again.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [buffer for layer in layers for buffer in layer.buffers()]
    copies = [buffer.clone() for buffer in statistics]
    try:
        yield
    finally:
        for buffer, value in zip(statistics, copies, strict=True):
            buffer.copy_(value)

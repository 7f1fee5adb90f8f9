"""Builds the optimiser (MADGRAD or AdamW), its parameter groups and the learning-rate schedule."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from kutils.models.layers import number_layers
from kutils.runs.recipes import Recipe

# elements per operation on many tensors, or one tensor if it is larger: a GPU has a temporary copy of 134 MB, a CPU
# works within its caches (a step of 3.5 million parameters takes 10 ms; in one piece 15, tensor by tensor 13)
CHUNK = {"cuda": 2**25, "cpu": 2**18}


class PerParameterMADGRAD(torch.optim.Optimizer):
    """MADGRAD (Defazio and Jelassi 2021, algorithm 1) with a step count per parameter and decoupled weight decay.

    `madgrad.MADGRAD` has one count for the whole optimiser, and its step grows with the square root of the count: a
    backbone unfrozen after 6,777 updates of the head would start with a step 19 times too large. Here a parameter's
    first step is that of a fresh optimiser. Otherwise results equal those of `madgrad` with `decouple_decay=True` up to
    rounding; they are computed by foreach operations.

    It is implemented here because Kaggle's image has no `madgrad` package. On two CPU cores a step of ConvNeXt-L takes
    5.1 s (5.8 s with `madgrad`); the gradient of one image takes 37 s.

    Args:
        params: dense parameters, or parameter groups, which can set the following values for themselves.
        lr: 0 or more; eps is added to it unless it is 0.
        momentum: above 0 and below 1.
        weight_decay: 0 or more; a step subtracts lr * weight_decay * weights.
        eps: 0 or more; added to the cube root in the denominator.
    Raises: ValueError for a value out of its range, in a group too.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 1e-6):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})
        for group in self.param_groups:
            for name in ("lr", "weight_decay", "eps"):
                if not group[name] >= 0:
                    raise ValueError(f"{name} is {group[name]}; it must be 0 or more")
            if not 0 < group["momentum"] < 1:
                raise ValueError(f"momentum is {group['momentum']}; it must be above 0 and below 1")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_count = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_count[self.state_of(parameter)["step"]].append(parameter)
            for count, parameters in by_count.items():
                for chunk in chunks(parameters):
                    self.update(chunk, group, count)
        return loss

    def state_of(self, parameter: nn.Parameter) -> dict:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["grad_sum_sq"] = torch.zeros_like(parameter)
            state["s"] = torch.zeros_like(parameter)
            state["x0"] = parameter.detach().clone()
        return state

    def update(self, parameters: list[nn.Parameter], group: dict, count: int) -> None:
        states = [self.state[parameter] for parameter in parameters]
        grad_sum_sq, s, x0 = ([state[name] for state in states] for name in ("grad_sum_sq", "s", "x0"))
        gradients = [parameter.grad for parameter in parameters]
        lr = group["lr"] + group["eps"] if group["lr"] else 0.0
        momentum, decay = group["momentum"], lr * group["weight_decay"]
        lamb = lr * (count + 1) ** 0.5
        torch._foreach_addcmul_(grad_sum_sq, gradients, gradients, value=lamb)
        rms = torch._foreach_pow(grad_sum_sq, 1 / 3)
        torch._foreach_add_(rms, group["eps"])
        if not group["eps"]:
            for tensor in rms:
                tensor.masked_fill_(tensor == 0, torch.inf)  # elements without any gradient so far: no step, not 0 / 0
        torch._foreach_add_(s, gradients, alpha=lamb)
        # w = momentum * w + (1 - momentum) * (x0 - s / rms) - decay * w, in place: on a GPU the time is memory traffic
        if decay:  # added: the factor 1 - 5e-8 would be rounded to 1 - 6e-8
            torch._foreach_add_(parameters, parameters, alpha=-decay / momentum)
        torch._foreach_lerp_(parameters, x0, 1 - momentum)
        torch._foreach_addcdiv_(parameters, s, rms, value=momentum - 1)
        for state in states:
            state["step"] += 1


def chunks(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters with at most CHUNK elements together; a larger one alone."""
    chunk, size = [], 0
    for parameter in parameters:
        if chunk and size + parameter.numel() > CHUNK[parameter.device.type]:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.numel()
    yield chunk


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: with weight decay, and without (1-D parameters: norms, biases, layer scale; class and position
    embeddings).

    These embeddings are named by the backbone (timm's `no_weight_decay`), not by a list of substrings.
    """
    exempt = {f"backbone.{name}" for name in embeddings(model.backbone)}
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def embeddings(backbone: nn.Module) -> set[str]:
    """Names of the backbone's parameters that timm exempts from weight decay."""
    return set(backbone.no_weight_decay()) if hasattr(backbone, "no_weight_decay") else set()


def groups_by_layer(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """The head's groups, then timm's groups of the backbone's layers, with and without decay as in `parameter_groups`.

    The schedule multiplies the rate by a group's `lr_scale`: 1 for the head, layer_decay for the backbone's last layer,
    layer_decay ** 2 for the layer below, and so on (Clark et al. 2020, section 3.2; Bao et al. 2022).

    Args:
        model: a `PromptEmbedder`. Frozen layers are counted too, and have groups.
        Raises: ValueError for a backbone for which timm defines no layer groups.
    """
    try:
        number_layers(model.backbone)
    except ValueError as error:
        raise ValueError(f"layer_decay={layer_decay} {error}") from error
    head = [
        {"params": parameters, "weight_decay": decay, "lr_scale": 1.0}
        for decay, parameters in (
            (weight_decay, [parameter for parameter in model.fc.parameters() if parameter.ndim > 1]),
            (0.0, [parameter for parameter in model.fc.parameters() if parameter.ndim <= 1]),  # a wide head's
        )
        if parameters
    ]
    frozen = [parameter for parameter in model.backbone.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)  # timm leaves frozen parameters out
    exempt = embeddings(model.backbone)
    groups = param_groups_layer_decay(model.backbone, weight_decay, exempt, layer_decay=layer_decay)
    for parameter in frozen:
        parameter.requires_grad_(False)
    for group in groups:
        group["lr_scale"] *= layer_decay  # without a classifier, timm takes the last block for the head
    return [*head, *groups]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters; frozen ones have no gradient, so their state starts when unfrozen."""
    if recipe.layer_decay == 1:
        groups = parameter_groups(model, recipe.weight_decay)
    else:
        groups = groups_by_layer(model, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    return PerParameterMADGRAD(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from warmup_lr to lr, then the cosine to min_lr: call `step_update(n)` before update n.

    The cosine starts at update 0, not at the end of the warm-up (timm's `warmup_prefix=False`, as published): after 3
    warm-up epochs of 15 the rate is 9.05e-5, not 1e-4.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup_epochs * steps_per_epoch,
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=False,
    )

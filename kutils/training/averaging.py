"""Keeps an exponential moving average of the weights beside them, key `ema_decay`."""

from timm.utils import ModelEmaV3

from kutils.models.networks import PromptEmbedder
from kutils.runs.recipes import Recipe

WARMUP_POWER = 0.75  # of timm's warm-up, for runs of up to 100,000 updates: the decay at update n is <= 1 - n ** -0.75


def start_average(network: PromptEmbedder, recipe: Recipe) -> ModelEmaV3 | None:
    """The average of a network's weights, which begins with the first update; None if the recipe has none.

    BatchNorm's running statistics are averaged too, and integers are copied. The decay grows from 0 at the first update
    (0.97 at the 100th), so that the random head does not dominate the average of a short run.

    Args:
        network: on its device, neither wrapped nor compiled.
    """
    if not recipe.ema_decay:
        return None
    return ModelEmaV3(network, recipe.ema_decay, use_warmup=True, warmup_power=WARMUP_POWER)


def validated_models(network: PromptEmbedder, average: ModelEmaV3 | None) -> dict[str, PromptEmbedder]:
    """The networks that are validated after an epoch: `raw` and, if there is an average, `ema`."""
    return {"raw": network} | ({"ema": average.module} if average else {})

"""Keeps an exponential moving average of the weights beside them, key `ema_decay`."""

from timm.utils import ModelEmaV3

from kutils.models.networks import PromptEmbedder
from kutils.runs.recipes import Recipe

WARMUP_POWER = 0.75  # of timm's, for runs of up to 100,000 updates or so: update n keeps at most 1 - n ** -0.75


def start_average(network: PromptEmbedder, recipe: Recipe) -> ModelEmaV3 | None:
    """The average of a network's weights, which begins with the first update; None where the recipe has none.

    BatchNorm's running statistics are averaged too, and whole numbers copied. In the first updates the average keeps
    less of itself, so that a short run is not that of its random head: of the first update nothing, of the 100th 0.97.

    Args:
        network: on its device, neither wrapped nor compiled.
    """
    if not recipe.ema_decay:
        return None
    return ModelEmaV3(network, recipe.ema_decay, use_warmup=True, warmup_power=WARMUP_POWER)


def validated_models(network: PromptEmbedder, average: ModelEmaV3 | None) -> dict[str, PromptEmbedder]:
    """The networks that an epoch validates: `raw` and, where there is an average, `ema`."""
    return {"raw": network} | ({"ema": average.module} if average else {})

"""Numbers the layers of a backbone from its input upwards, and finds the parameters of its lowest blocks."""

from timm.models import group_parameters
from torch import nn


def number_layers(backbone: nn.Module) -> dict[str, int]:
    """Parameter name -> number of its layer, as timm groups them: 0 for everything before the first block.

    Raises: ValueError for a backbone for which timm defines no layer groups.
    """
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(f"needs a backbone of known layers; {type(backbone).__name__} has none, leave it out")
    return group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)


def lowest_parameters(backbone: nn.Module, blocks: int) -> list[nn.Parameter]:
    """The parameters of the lowest blocks and of everything before them.

    Raises: ValueError if the backbone has fewer blocks, or if timm defines none for it.
    """
    try:
        numbers = number_layers(backbone)
    except ValueError as error:
        raise ValueError(f"freeze_blocks={blocks} {error}") from error
    most = max(number for name, number in numbers.items() if "blocks." in name)  # a final norm may follow
    if blocks > most:
        raise ValueError(f"freeze_blocks={blocks}: backbone {type(backbone).__name__} has {most} blocks; lower it")
    return [parameter for name, parameter in backbone.named_parameters() if numbers[name] <= blocks]

"""Resamples the position embeddings of a checkpoint to the input size of the stage that starts from it."""

import math

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from kutils.models import published
from kutils.models.networks import PromptEmbedder


def resample_positions(model: PromptEmbedder, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Fit weights of the published layout to the model's token grid: bicubic, with antialiasing, by timm.

    Returns: the weights, and what was done ("16 x 16 to 24 x 24 tokens"). If the grid has the same size, or the
        network has no position embeddings: the same weights, and an empty text.
    """
    name = published.published_names(model).get("backbone.pos_embed")
    own, value = getattr(model.backbone, "pos_embed", None), weights.get(name)
    if name is None or value is None or value.ndim not in (2, 3) or value.shape[-2:] == own.shape[-2:]:
        return weights, ""
    rows, columns = model.backbone.patch_embed.grid_size
    others = own.shape[1] - rows * columns  # class and register tokens, which stand first
    side = math.isqrt(max(value.shape[-2] - others, 0))
    if value.shape[-1] != own.shape[-1] or side < 1 or side * side + others != value.shape[-2]:
        return weights, ""  # of another network: loading raises the error
    tokens = value.reshape(1, *value.shape[-2:])
    tokens = resample_abs_pos_embed(tokens, (rows, columns), (side, side), num_prefix_tokens=others)
    done = f"{side} x {side} to {rows} x {columns} tokens"
    return weights | {name: tokens.reshape(*value.shape[:-2], *tokens.shape[-2:])}, done

"""Converts weights to and from the published layout, which uses open_clip's names for the backbone.

The 5th-place solution trained open_clip's networks and saved them under open_clip's names; timm builds the same
networks under other names. Checkpoints here use the published names, so that both codes read each other's files. EVA02,
which the published code took from timm, and unpublished networks keep timm's names.
"""

import re

import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

VISION_TRANSFORMER = (
    (r"cls_token", "class_embedding"),
    (r"pos_embed", "positional_embedding"),
    (r"patch_embed\.proj\.(\w+)", r"conv1.\1"),
    (r"norm_pre\.(\w+)", r"ln_pre.\1"),
    (r"norm\.(\w+)", r"ln_post.\1"),
    (r"head\.weight", "proj"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)
CONVNEXT = (
    (r"head\.pre_logits\.fc\.(\w+)", r"head.mlp.fc1.\1"),
    (r"head\.fc\.(\w+)", r"head.proj.\1"),
    (r"(.+)", r"trunk.\1"),
)
CONVNEXT_MLP = (CONVNEXT[0], (r"head\.fc\.(\w+)", r"head.mlp.fc2.\1"), CONVNEXT[2])


def published_names(model: nn.Module) -> dict[str, str]:
    """Own name -> published name of every tensor in the model's state_dict."""
    backbone, table = model.backbone, ()
    if model.head == "clip_projection" and isinstance(backbone, VisionTransformer):
        table = VISION_TRANSFORMER
    elif model.head == "clip_projection" and isinstance(backbone, ConvNeXt):
        table = CONVNEXT_MLP if hasattr(backbone.head.pre_logits, "fc") else CONVNEXT
    return {name: translate(name, table) for name in model.state_dict()}


def translate(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """`backbone.<timm name>` to `backbone.<published name>`; a name that no pattern matches stays."""
    prefix, dot, rest = name.partition("backbone.")
    for pattern, replacement in table if dot else ():
        if match := re.fullmatch(pattern, rest):
            return prefix + dot + match.expand(replacement)
    return name


def to_published_shape(name: str, value: Tensor) -> Tensor:
    """A tensor in the shape that it has under its published name: a view of `value`."""
    match name.removeprefix("backbone."):
        case "class_embedding":
            return value[0, 0]  # timm [1, 1, C]
        case "positional_embedding":
            return value[0]  # timm [1, tokens, C]
        case "proj":
            return value.T  # timm's Linear [out, in]; open_clip multiplies from the right
    return value


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights in the published layout, float32 on the CPU, which the published code loads strictly.

    BatchNorm's counts stay whole numbers: as float16 of a packed file they could not be above 65,504.

    Args:
        model: a `PromptEmbedder`, on any device.
    """
    names = published_names(model)
    return {
        names[name]: to_published_shape(names[name], value.float() if value.is_floating_point() else value)
        .detach()
        .cpu()
        .contiguous()
        for name, value in model.state_dict().items()
    }


def differences(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """How published weights differ from the model's: missing, unexpected or of another shape; empty if they fit."""
    names = published_names(model)
    shapes = {names[name]: to_published_shape(names[name], value).shape for name, value in model.state_dict().items()}
    mismatches = [f"lacks {name}" for name in shapes if name not in weights]
    mismatches += [f"has {name} too" for name in weights if name not in shapes]
    return mismatches + [
        f"{name} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]


@torch.no_grad()
def load_published(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights of the published layout, without `differences`, into the model."""
    names = published_names(model)
    for name, value in model.state_dict().items():
        to_published_shape(names[name], value).copy_(weights[names[name]])

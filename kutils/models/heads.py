"""Selects the features of a backbone that the head gets, and builds that head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kutils.system.constants import EMBEDDING_DIM

STAGES = 2  # last stages that `pooled_stages` sees
SHARPNESS = 3.0  # of `KeyedHead`; on held-out prompts of 1,015 real pairs better than 2 and 4.5


def num_features(backbone: nn.Module, head: str) -> int:
    """Length of the vector that `features` gives."""
    if head == "pooled_stages":
        return backbone.num_features + sum(stage["num_chs"] for stage in backbone.feature_info[-STAGES:])
    return {
        "pooled": backbone.num_features,
        "clip_projection": backbone.num_classes,
        "cls_only": backbone.num_features,
        "cls_avg": 2 * backbone.num_features,
    }[head]


def keeps_projection(backbone_name: str, head: str) -> bool:
    """True if the head gets the output of CLIP's projection, the backbone's own last layer, and not its input.

    Raises: ValueError if the backbone has no such layer.
    """
    if head == "clip_projection" and not ("clip" in backbone_name and "." in backbone_name):
        raise ValueError(f"head=clip_projection needs a CLIP backbone with a weights tag, not {backbone_name!r}")
    return head == "clip_projection"


def features(backbone: nn.Module, images: Tensor, head: str) -> Tensor:
    """Run the backbone: float32 [B, 3, S, S] -> [B, num_features].

    `pooled` and `clip_projection` are timm's own output; `pooled_stages` puts the means of the last two stages' feature
    maps beside it. The other two take tokens of the last block, before any final norm: the class token, alone or
    beside the mean patch token.
    """
    if head in ("pooled", "clip_projection"):
        return backbone(images)
    if head == "pooled_stages":
        last, maps = backbone.forward_intermediates(images, indices=STAGES)
        pooled = [feature_map.mean(dim=(2, 3)) for feature_map in maps]
        return torch.cat([backbone.forward_head(last, pre_logits=True), *pooled], dim=-1)
    tokens = backbone.forward_features(images)  # [B, 1 + patches, C]
    class_token = tokens[:, 0]
    if head == "cls_only":
        return class_token
    return torch.cat([class_token, tokens[:, backbone.num_prefix_tokens :].mean(dim=1)], dim=-1)


def strip_unused(backbone: nn.Module, head: str) -> None:
    """Remove layers of the backbone that the head does not use: DDP would wait for their gradients."""
    if head == "clip_projection":  # timm gives the projection a bias of zeros; CLIP has none
        backbone.get_classifier().register_parameter("bias", None)
    elif head in ("cls_only", "cls_avg"):  # tokens are taken before any final norm
        for name in ("norm", "fc_norm"):
            setattr(backbone, name, nn.Identity())


def wide_head(in_features: int, width: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear to 384 (1st-place solution); Xavier normal, no biases but BatchNorm's shift."""
    hidden = nn.Linear(in_features, width, bias=False)
    nn.init.xavier_normal_(hidden.weight)
    return nn.Sequential(hidden, nn.BatchNorm1d(width), nn.ReLU(), linear_head(width))


def linear_head(in_features: int) -> nn.Linear:
    """Linear to 384 without bias, Xavier normal (Glorot and Bengio 2010, eq. 12)."""
    layer = nn.Linear(in_features, EMBEDDING_DIM, bias=False)
    nn.init.xavier_normal_(layer.weight)
    return layer


class KeyedHead(nn.Module):
    """Predicts by likeness to some training images: exp(3 (cosine - 1)) with each one's features, then Linear to 384.

    This is the cache of Tip-Adapter (Zhang et al. 2022, eq. 5 and 6), with features that are centred first. Fitted in
    closed form, it is regression with that kernel.

    Attributes:
        centre: float32 [C], what is subtracted from features.
        keys: Linear to `num_keys` without bias; its rows are the images' features, centred and of unit length.
        values: Linear to 384 without bias.
    """

    def __init__(self, in_features: int, num_keys: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(in_features))
        self.keys = nn.Linear(in_features, num_keys, bias=False)
        self.values = linear_head(num_keys)

    @torch.no_grad()
    def set_keys(self, features: Tensor) -> None:
        """Make images the keys, by their features: float [num_keys, C]."""
        self.centre.copy_(features.mean(dim=0))
        self.keys.weight.copy_(F.normalize(features - features.mean(dim=0), dim=-1))

    def likeness(self, features: Tensor) -> Tensor:
        """[B, C] -> float32 [B, num_keys], in (0, 1]: of features and keys; float32 under autocast too."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = self.keys(F.normalize(features.float() - self.centre, dim=-1))
            return torch.exp(SHARPNESS * (cosines - 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.values(self.likeness(features))

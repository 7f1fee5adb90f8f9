"""What of a backbone the head sees, and the head itself."""

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from kutils.config import EMBEDDING_DIM


def num_features(backbone: nn.Module, head: str) -> int:
    """Length of the vector that `features` gives."""
    return {
        "pooled": backbone.num_features,
        "clip_projection": backbone.num_classes,
        "cls_only": backbone.num_features,
        "cls_avg": 2 * backbone.num_features,
    }[head]


def num_classes(backbone_name: str, head: str) -> int:
    """Size of timm's own last layer: the CLIP projection (without its bias, which CLIP has not), or none (0)."""
    if head != "clip_projection":
        return 0
    config = get_pretrained_cfg(backbone_name)
    if config is None or "clip" not in backbone_name:
        raise ValueError(f"head=clip_projection needs a CLIP backbone with a weights tag, not {backbone_name!r}")
    return config.num_classes


def features(backbone: nn.Module, images: Tensor, head: str) -> Tensor:
    """Run the backbone: float32 [B, 3, S, S] -> [B, num_features].

    `pooled` and `clip_projection` are timm's own output. The other two take tokens of the last block, before any final
    norm: the class token, alone or beside the mean patch token.
    """
    if head in ("pooled", "clip_projection"):
        return backbone(images)
    tokens = backbone.forward_features(images)  # [B, 1 + patches, C]
    class_token = tokens[:, 0]
    if head == "cls_only":
        return class_token
    return torch.cat([class_token, tokens[:, backbone.num_prefix_tokens :].mean(dim=1)], dim=-1)


def unused_parameters(backbone: nn.Module, head: str) -> list[nn.Parameter]:
    """Parameters that no gradient reaches, or that must stay as they are: DDP must not wait for them."""
    if head == "clip_projection":  # timm gives the projection a bias; CLIP has none, so it stays at zero
        return [layer.bias for layer in [backbone.get_classifier()] if layer.bias is not None]
    if head in ("cls_only", "cls_avg"):
        return [parameter for name in ("norm", "fc_norm") for parameter in getattr(backbone, name).parameters()]
    return []


def linear_head(in_features: int) -> nn.Linear:
    """Linear to 384 without bias, Xavier normal (Glorot and Bengio 2010, eq. 12)."""
    layer = nn.Linear(in_features, EMBEDDING_DIM, bias=False)
    nn.init.xavier_normal_(layer.weight)
    return layer

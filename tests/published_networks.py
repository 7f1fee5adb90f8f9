"""The networks as the 5th-place solution built them, on open_clip and timm alone: an independent reference."""

import open_clip.model
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPEN_CLIP = {"convnext_large": "convnext_large_d_320", "convnext_xxlarge": "convnext_xxlarge", "vit_large": "ViT-L-14"}
EVA02 = "eva02_large_patch14_448.mim_m38m_ft_in22k"


class PublishedNetwork(nn.Module):
    """open_clip's visual tower, or timm's EVA02 without its final norm and head; then `fc` and unit length.

    Args:
        backbone: gives [B, C] (a tower) or, with `tokens`, [B, 1 + patches, C].
        features: what `fc` takes in.
        tokens: "" for a tower; "avg": class token beside the mean patch token; "only": class token alone.
    """

    def __init__(self, backbone: nn.Module, features: int, tokens: str = ""):
        super().__init__()
        self.backbone, self.tokens = backbone, tokens
        self.fc = nn.Linear(features, 384, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        if not self.tokens:
            return F.normalize(self.fc(self.backbone(images)))
        tokens = self.backbone.forward_features(images)
        features = tokens[:, 0]
        if self.tokens == "avg":
            features = torch.cat([features, tokens[:, 1:].mean(dim=1)], dim=1)
        return F.normalize(self.fc(features))


def visual_tower(name: str, **changes) -> nn.Module:
    """open_clip's image encoder of a named model, with random weights; changes: of its vision_cfg."""
    settings = open_clip.get_model_config(name)
    settings["vision_cfg"] |= changes
    return open_clip.model._build_vision_tower(settings["embed_dim"], settings["vision_cfg"])


def published_network(model: str, input_size: int | None = None, **changes) -> PublishedNetwork:
    """The network of one of the five models; a ViT at another input_size than its own gets strided patches."""
    if model in OPEN_CLIP:
        tower = visual_tower(OPEN_CLIP[model], **changes)
        if model == "vit_large" and input_size is not None:
            rows, columns = tower.grid_size
            tower.conv1.stride = (input_size // rows, input_size // columns)
        return PublishedNetwork(tower, {"convnext_large": 768, "convnext_xxlarge": 1024, "vit_large": 768}[model])
    backbone = timm.create_model(EVA02, pretrained=False, num_classes=0)
    backbone.fc_norm = nn.Identity()
    average = model == "eva02_large_clsavg"
    return PublishedNetwork(backbone, 2048 if average else 1024, "avg" if average else "only")

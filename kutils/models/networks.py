"""Builds the network of a recipe: timm backbone and head, whose output of unit length is the prompt's embedding."""

from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kutils.models import heads, layers
from kutils.models.pretrained import check_backbone, create_backbone
from kutils.runs.recipes import Recipe


class PromptEmbedder(nn.Module):
    """Image -> predicted prompt embedding of unit length.

    Attributes:
        backbone: the timm model.
        fc: Linear to 384 without bias, a wide head, or one with keys; the published checkpoints have the names
            `backbone` and `fc`.
        head: key of the recipe that selects the features for `fc`, `num_features` values.
        held: BatchNorm layers that stay in evaluation mode.
        lowest: parameters of the `freeze_blocks` lowest blocks, which are never trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: str,
        hold_batch_statistics: bool = False,
        *,
        head_width: int = 0,
        head_keys: int = 0,
        freeze_blocks: int = 0,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.num_features = heads.num_features(backbone, head)
        self.lowest = layers.lowest_parameters(backbone, freeze_blocks) if freeze_blocks else []
        normalising = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if hold_batch_statistics and not normalising:
            raise ValueError(f"hold_batch_statistics=true: {type(backbone).__name__} has no BatchNorm; leave it out")
        frozen = {id(parameter) for parameter in self.lowest}
        self.held = [layer for layer in normalising if hold_batch_statistics or id(layer.weight) in frozen]
        if head_width:
            self.fc = heads.wide_head(self.num_features, head_width)
        elif head_keys:
            self.fc = heads.KeyedHead(self.num_features, head_keys)
        else:
            self.fc = heads.linear_head(self.num_features)
        self.unfreeze()

    def forward(self, images: Tensor, unit_rows: bool = True) -> Tensor:
        """float32 [B, 3, S, S], normalised -> float32 [B, 384] (also under autocast), scaled to length 1 if
        `unit_rows`."""
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.features(images)
        return self.embed(features) if unit_rows else self.project(features)

    def features(self, images: Tensor) -> Tensor:
        """float32 [B, 3, S, S], normalised -> [B, C]: the features that the head gets."""
        return heads.features(self.backbone, images, self.head)

    def project(self, features: Tensor) -> Tensor:
        """[B, C] features -> float32 [B, 384]: predictions before they are scaled to unit length."""
        return self.fc(features).float()

    def embed(self, features: Tensor) -> Tensor:
        """[B, C] features -> float32 [B, 384], unit rows."""
        return F.normalize(self.project(features), dim=-1)

    @property
    def last_linear(self) -> nn.Linear:
        """The layer that gives the 384 values."""
        return self.fc if isinstance(self.fc, nn.Linear) else list(self.fc.children())[-1]

    def freeze_backbone(self) -> None:
        """Train only the head: the backbone has no gradients, and stays in evaluation mode even after `train()`."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()

    def unfreeze(self) -> None:
        """Train the backbone too, except its `freeze_blocks` lowest blocks."""
        self.frozen = False
        self.backbone.requires_grad_(True)
        for parameter in self.lowest:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.frozen:
            self.backbone.eval()
        for layer in self.held:
            layer.eval()
        return self


def build_model(recipe: Recipe, pretrained: bool = True) -> PromptEmbedder:
    """The network of a recipe, in float32 on the CPU.

    Args:
        recipe: its keys for backbone, head, input size, drop path, patch mode, pretrained weights and frozen blocks are
            used.
        pretrained: False skips the pretrained weights, if a checkpoint is loaded next.
    Raises: ValueError for a backbone that timm does not have, or pretrained weights that cannot be loaded.
    """
    check_backbone(recipe.backbone)
    options, strided = {"drop_path_rate": recipe.drop_path_rate}, recipe.patch_mode == "strided"
    if timm.get_pretrained_cfg(recipe.backbone).fixed_input_size and not strided:
        options["img_size"] = recipe.input_size  # timm resamples the position embeddings of loaded weights
    options["keep_projection"] = heads.keeps_projection(recipe.backbone, recipe.head)
    backbone = create_backbone(recipe.backbone, recipe.pretrained if pretrained else False, **options)
    heads.strip_unused(backbone, recipe.head)
    if strided:
        stride_patches(backbone, recipe.input_size)
    if recipe.gradient_checkpointing:
        backbone.set_grad_checkpointing(True)
    return PromptEmbedder(
        backbone,
        recipe.head,
        recipe.hold_batch_statistics,
        head_width=recipe.head_width,
        head_keys=recipe.head_keys,
        freeze_blocks=recipe.freeze_blocks,
    )


def stride_patches(vit: nn.Module, input_size: int) -> None:
    """Keep a ViT's token grid at a larger input by moving its patch window in larger steps, as published.

    At 336 px a 14 px window moves by 21 px, so that 16 x 16 tokens cover 44 % of the pixels. Needed for weights that
    were trained so; `interpolated` covers all pixels.

    Raises: ValueError if the input is no multiple of the grid, or smaller than the ViT's own.
    """
    rows, columns = vit.patch_embed.grid_size
    if input_size % rows or input_size % columns:
        raise ValueError(f"patch_mode=strided: input_size={input_size} is no multiple of the {rows} x {columns} tokens")
    own = vit.patch_embed.img_size[0]
    if input_size < own:
        raise ValueError(f"patch_mode=strided: input_size={input_size} is below the ViT's own {own}")
    vit.patch_embed.proj.stride = (input_size // rows, input_size // columns)
    vit.patch_embed.img_size = (input_size, input_size)

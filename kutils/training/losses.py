"""Computes the cosine similarity of the leaderboard as a metric, and the losses of a recipe."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Cosine of the angle between each prediction and its target, in float32 even under autocast.

    Args:
        predicted: [B, 384] any float dtype, any length but zero.
        target: [B, 384] prompt embeddings.
    Returns: float32 [B] in [-1, 1].
    Raises: ValueError if the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted is {list(predicted.shape)}, target is {list(target.shape)}")
    return F.cosine_similarity(predicted.float(), target.float(), dim=-1)


def cosine_embedding_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity, averaged over the batch: `CosineEmbeddingLoss` with target 1 (5th-place solution).

    Args:
        predicted: [B, 384] any float dtype, any length but zero.
        target: [B, 384] prompt embeddings.
    Returns: scalar float32 in [0, 2].
    Raises: ValueError if the shapes differ.
    """
    return 1 - cosine_similarity(predicted, target).mean()


def angular_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The angle between prediction and target, averaged over the batch: small angles have as large gradients as large
    ones.

    The gradient of the cosine vanishes at angle 0. That of acos would be infinite there, so it is cut off below 1.4e-3
    rad.

    Args:
        predicted: [B, 384] any float dtype, any length but zero.
        target: [B, 384] prompt embeddings.
    Returns: scalar float32 in [0, pi], radians.
    Raises: ValueError if the shapes differ.
    """
    most = 1 - 1e-6
    return torch.acos(cosine_similarity(predicted, target).clamp(-most, most)).mean()


LOSSES = {"cosine": cosine_embedding_loss, "angular": angular_loss}  # values of the key `loss`

"""Computes the cosine similarity of the leaderboard, as a metric and as a loss."""

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

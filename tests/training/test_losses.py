"""The loss is the metric, in float32 whatever comes in."""

import pytest
import torch

from kutils.training.losses import cosine_embedding_loss, cosine_similarity


def test_by_hand():
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert cosine_similarity(predicted, target).tolist() == pytest.approx([0.6, 0.0, -1.0])
    assert cosine_embedding_loss(predicted, target).item() == pytest.approx(1 + 0.4 / 3)


def test_it_is_torchs_cosine_embedding_loss():
    random = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(16, 384, generator=random), torch.randn(16, 384, generator=random)
    expected = torch.nn.CosineEmbeddingLoss()(predicted, target, torch.ones(16))
    torch.testing.assert_close(cosine_embedding_loss(predicted, target), expected)


def test_half_precision_is_widened_first():
    target = torch.nn.functional.normalize(torch.randn(4, 384, generator=torch.Generator().manual_seed(1)), dim=1)
    exact = cosine_similarity(target.bfloat16().float(), target)
    assert torch.equal(cosine_similarity(target.bfloat16(), target), exact)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[2, 384\], target is \[3, 384\]"):
        cosine_embedding_loss(torch.zeros(2, 384), torch.zeros(3, 384))

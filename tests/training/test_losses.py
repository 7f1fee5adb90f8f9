"""The loss is the metric, in float32 whatever comes in."""

import pytest
import torch

from kutils.training.losses import angular_loss, cosine_embedding_loss, cosine_similarity


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


def test_the_angular_loss_by_hand():
    predicted = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    angles = [0.92729522, torch.pi / 2, torch.pi, torch.pi / 4]  # atan2(4, 3)
    assert angular_loss(predicted, target).item() == pytest.approx(sum(angles) / 4, abs=1e-3)


def test_the_angular_loss_pulls_evenly_at_any_angle_and_is_finite_at_none():
    """On the unit circle its slope along the circle is 1 everywhere; where the vectors agree it is 0, not infinite."""
    for angle in (0.1, 1.0, 2.5):
        predicted = torch.tensor([[torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))]], requires_grad=True)
        angular_loss(predicted, torch.tensor([[1.0, 0.0]])).backward()
        assert predicted.grad.norm().item() == pytest.approx(1, abs=1e-3)
    same = torch.tensor([[0.6, 0.8]], requires_grad=True)
    angular_loss(same, torch.tensor([[0.6, 0.8]])).backward()
    assert same.grad.norm() == 0

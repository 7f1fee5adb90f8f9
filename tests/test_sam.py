"""SAM: along the gradient and back, exactly, whatever happens in between."""

import pytest
import torch

from kutils import engine
from kutils.sam import frozen_batch_statistics, perturbed


def test_it_moves_along_the_gradient_and_comes_back():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    (0.5 * w.pow(2).sum()).backward()  # gradient = w, length 5
    with perturbed([w], rho=0.5):
        assert w.grad is None
        torch.testing.assert_close(w.detach(), torch.tensor([3.3, 4.4]))
    assert torch.equal(w.detach(), torch.tensor([3.0, 4.0]))


def test_the_radius_is_over_all_parameters_together():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([-4.0])
    with perturbed([a, b], rho=1.0):
        torch.testing.assert_close(a.item(), 0.6)
        torch.testing.assert_close(b.item(), -0.8)


def test_weights_come_back_to_the_last_bit_even_after_an_error():
    w = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-3)
    before = w.detach().clone()
    w.grad = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e4
    with pytest.raises(RuntimeError, match="out of memory"), perturbed([w], rho=0.05):
        assert not torch.equal(w, before)
        raise RuntimeError("out of memory")
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("gradient", [[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
def test_a_gradient_without_direction_moves_nothing(gradient):
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    w.grad = torch.tensor(gradient)
    with perturbed([w], rho=0.05):
        assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))


def test_batch_statistics_see_the_unperturbed_pass_alone():
    layer = torch.nn.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with frozen_batch_statistics(layer):
        layer(torch.randn(8, 3) + 5)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer(torch.randn(8, 3) + 5)
    assert layer.num_batches_tracked == 2 and not torch.equal(before["running_mean"], layer.running_mean)


class Toy(torch.nn.Module):
    """Two weights on the mean of each image: small enough to redo by hand."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3]]))

    def forward(self, images):
        return images.mean(dim=(2, 3)) @ self.a.T


def toy_batch(seed: int) -> dict:
    random = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(90, 256, (4, 3, 4, 4), dtype=torch.uint8, generator=random),
        "jitter": torch.zeros(4, 8),
        "target": torch.nn.functional.normalize(torch.randn(4, 2, generator=random), dim=1),
        "row": torch.arange(4),
        "bad": [],
    }


def loss_of(weights: torch.Tensor, batch: dict) -> torch.Tensor:
    features = (batch["image"].double() / 255 - 0.5).div(0.5).mean(dim=(2, 3))
    return 1 - torch.nn.functional.cosine_similarity(features @ weights.T, batch["target"].double(), dim=1).mean()


def test_fifty_updates_are_those_of_an_independent_sam(tiny_recipe):
    """The reference: float64, autograd.grad, no in-place moves, accumulation over two local batches, plain SGD."""
    recipe = tiny_recipe(augment=False, sam_rho=0.05)
    model, reference = Toy(), Toy().a.detach().double().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(50):
        batches = [toy_batch(2 * step), toy_batch(2 * step + 1)]
        loss = engine.update(model, batches, optimizer, scaler, recipe, torch.float32)
        total, losses = torch.zeros_like(reference), []
        for batch in batches:
            w = reference.clone().requires_grad_(True)
            losses.append(loss_of(w, batch))
            gradient = torch.autograd.grad(losses[-1], w)[0]
            there = (reference + 0.05 * gradient / gradient.norm()).requires_grad_(True)
            total += torch.autograd.grad(loss_of(there, batch), there)[0] / 2
        reference -= 0.3 * total
        assert loss.item() == pytest.approx(sum(item.item() for item in losses) / 2, abs=1e-5)
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.a.detach().double(), reference, rtol=1e-4, atol=1e-5)

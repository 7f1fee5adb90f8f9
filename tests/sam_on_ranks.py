"""SAM on two ranks against gradients worked out in float64; test_sam.py runs this file by torchrun.

Two weights and their loss are small enough that each rank can work out what every rank should do.
"""

import sys

import torch
import torch.distributed as dist

from kutils.runs.recipes import Recipe
from kutils.system.devices import Ranks
from kutils.training import engine

RHO, RATE = 0.3, 0.5


class Toy(torch.nn.Module):
    """Six weights on the mean of each image: small enough to redo by hand."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3]]))

    def forward(self, images):
        return images.mean(dim=(2, 3)) @ self.a.T


def toy_batch(seed: int, size: int = 4, dimension: int = 2) -> dict:
    random = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(90, 256, (4, 3, size, size), dtype=torch.uint8, generator=random),
        "jitter": torch.zeros(4, 8),
        "target": torch.nn.functional.normalize(torch.randn(4, dimension, generator=random), dim=1),
        "row": torch.arange(4),
        "bad": [],
    }


def loss_of(weights: torch.Tensor, batch: dict) -> torch.Tensor:
    features = (batch["image"].double() / 255 - 0.5).div(0.5).mean(dim=(2, 3))
    return 1 - torch.nn.functional.cosine_similarity(features @ weights.T, batch["target"].double(), dim=1).mean()


def gradient_at(weights: torch.Tensor, batch: dict) -> torch.Tensor:
    weights = weights.clone().requires_grad_(True)
    return torch.autograd.grad(loss_of(weights, batch), weights)[0]


def expected_weights(start: torch.Tensor, batches: list[dict], sam_gradient: str) -> torch.Tensor:
    """After one step of plain SGD; `batches`: of all ranks and accumulations, of one size."""
    first = [gradient_at(start, batch) for batch in batches]
    if sam_gradient == "averaged":
        first = [sum(first) / len(first)] * len(first)
    second = [gradient_at(start + RHO * g / g.norm(), batch) for g, batch in zip(first, batches, strict=True)]
    return start - RATE * sum(second) / len(second)


def check(ranks: Ranks, recipe: Recipe, accumulation: int) -> torch.Tensor:
    network = Toy()
    start = network.a.detach().double().clone()
    every = [[toy_batch(10 * rank + number) for number in range(accumulation)] for rank in range(ranks.world_size)]
    model = engine.distribute(network, ranks)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    engine.update(model, every[ranks.rank], optimizer, scaler, recipe, torch.float32)
    expected = expected_weights(start, [batch for batches in every for batch in batches], recipe.sam_gradient)
    torch.testing.assert_close(network.a.detach().double(), expected, rtol=1e-5, atol=1e-6)
    return network.a.detach()


def check_overflow_on_one_rank(ranks: Ranks, recipe: Recipe) -> None:
    """The first pass of rank 1 alone overflows: every rank must skip the update."""
    network = Toy()
    before, passes = network.a.detach().clone(), []
    model = engine.distribute(network, ranks)

    def overflow(gradient):
        passes.append(1)
        return gradient * (float("inf") if len(passes) == 1 and ranks.rank == 1 else 1.0)

    network.a.register_hook(overflow)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine.update(model, [toy_batch(ranks.rank)], optimizer, scaler, recipe, torch.float16)
    assert torch.equal(network.a.detach(), before), "a rank made a step"
    assert scaler.get_scale() == 512.0


def main() -> None:
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    common = {"prefix": "x", "save_dir": "x", "model": "x", "stage": 1, "train_folds": (0,), "datasets": ("x",)}
    common |= {"backbone": "x", "input_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3, "augment": False, "epochs": 1}
    common |= {"lr": RATE, "min_lr": 0.0, "global_batch_size": 8, "max_local_batch_size": 4, "sam_rho": RHO}
    outcomes = [
        check(ranks, Recipe(**common, sam_gradient=kind), accumulation)
        for kind in ("local", "averaged")
        for accumulation in (1, 2)
    ]
    assert not torch.allclose(outcomes[0], outcomes[2], atol=1e-4), "local and averaged cannot be told apart here"
    for kind in ("local", "averaged"):
        check_overflow_on_one_rank(ranks, Recipe(**common, sam_gradient=kind))
    sys.stdout.write("all cases agree\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

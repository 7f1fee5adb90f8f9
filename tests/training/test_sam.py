"""SAM: along the gradient and back, exactly, whatever happens in between."""

from pathlib import Path

import pytest
import torch
from fixtures import sam_on_ranks
from fixtures.sam_on_ranks import Toy, loss_of, toy_batch

from kutils.models.networks import build_model
from kutils.training import engine, loading, network_input
from kutils.training.sam import frozen_batch_statistics, perturbed


def test_it_moves_along_the_gradient_and_comes_back():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    (0.5 * w.pow(2).sum()).backward()  # gradient = w, length 5
    with perturbed([w], rho=0.5):
        assert w.grad is None
        torch.testing.assert_close(w.detach(), torch.tensor([3.3, 4.4]))
    assert torch.equal(w.detach(), torch.tensor([3.0, 4.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("first", [3.0, float("inf")])
def test_it_moves_and_comes_back_on_a_gpu_too(first):
    """Three layouts of parameters, as a network in channels_last has them."""
    weights = [torch.zeros(2), torch.zeros(2, 1, 3, 3), torch.zeros(2, 4, 1, 1)]
    parameters = [
        torch.nn.Parameter(value.cuda().contiguous(memory_format=layout))
        for value, layout in zip(
            weights, [torch.contiguous_format, torch.channels_last, torch.channels_last], strict=True
        )
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    parameters[0].grad.copy_(torch.tensor([first, 4.0]))
    expected = [0.3, 0.4] if first == 3.0 else [0.0, 0.0]
    with perturbed(parameters, rho=0.5) as finite:
        torch.testing.assert_close(parameters[0].tolist(), expected)
        assert finite.item() == (first == 3.0)
    assert all(not parameter.any() for parameter in parameters)


def test_the_radius_is_over_all_parameters_together():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([-4.0])
    with perturbed([a, b], rho=1.0):
        torch.testing.assert_close(a.item(), 0.6)
        torch.testing.assert_close(b.item(), -0.8)


LAYOUTS = {
    "channels last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "transposed": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda grad: grad[:1, :1].expand(4, 4, 2, 2),
    "sparse": lambda grad: grad.to_sparse(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_another_layout_is_refused_and_moves_nothing(layout):
    w, grad = torch.nn.Parameter(torch.randn(4, 4, 2, 2)), torch.randn(4, 4, 2, 2)
    before = w.detach().clone()
    w.grad = LAYOUTS[layout](grad)
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    message = r"gradient of parameter 1, \[4, 4, 2, 2\], has another layout"
    with pytest.raises(ValueError, match=message), perturbed([other, w], rho=0.5):
        pass
    assert torch.equal(w.detach(), before) and torch.equal(other.detach(), torch.ones(2))


def test_strides_of_dimensions_of_one_do_not_matter():
    w = torch.nn.Parameter(torch.zeros(2, 3, 1, 1))
    w.grad = torch.arange(6.0).reshape(2, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    direction = torch.arange(6.0) / torch.arange(6.0).norm()
    with perturbed([w], rho=0.5):
        torch.testing.assert_close(w.detach().flatten(), 0.5 * direction)


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
    with perturbed([w], rho=0.05) as finite:
        assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))
        assert finite.item() == (gradient == [0.0, 0.0])


@pytest.mark.parametrize("shift", [5.0, float("nan")])
def test_batch_statistics_see_the_unperturbed_pass_alone(shift):
    layer = torch.nn.BatchNorm1d(3)
    layer(torch.randn(8, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with frozen_batch_statistics(layer):
        layer(torch.randn(8, 3) + shift)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer(torch.randn(8, 3) + 5)
    assert layer.num_batches_tracked == 2 and not torch.equal(before["running_mean"], layer.running_mean)


@pytest.mark.parametrize("sam_gradient", ["local", "averaged"])
def test_fifty_updates_are_those_of_an_independent_sam(tiny_recipe, sam_gradient):
    """The reference: float64, autograd.grad, no in-place moves, accumulation over two local batches, plain SGD."""
    recipe = tiny_recipe(augment=False, sam_rho=0.05, sam_gradient=sam_gradient)
    model, reference = Toy(), Toy().a.detach().double().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(50):
        batches = [toy_batch(2 * step), toy_batch(2 * step + 1)]
        loss = engine.update(model, batches, optimizer, scaler, recipe, torch.float32)
        w = reference.clone().requires_grad_(True)
        losses = [loss_of(w, batch) for batch in batches]
        directions = [torch.autograd.grad(item, w, retain_graph=True)[0] for item in losses]
        if sam_gradient == "averaged":
            directions = [sum(directions)] * 2
        total = torch.zeros_like(reference)
        for batch, direction in zip(batches, directions, strict=True):
            there = (reference + 0.05 * direction / direction.norm()).requires_grad_(True)
            total += torch.autograd.grad(loss_of(there, batch), there)[0] / 2
        reference -= 0.3 * total
        assert loss.item() == pytest.approx(sum(item.item() for item in losses) / 2, abs=1e-5)
        assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.a.detach().double(), reference, rtol=1e-4, atol=1e-5)


class Normalised(Toy):
    """The toy with a BatchNorm on the means of the images."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, images):
        return self.norm(images.mean(dim=(2, 3))) @ self.a.T


@pytest.mark.parametrize("sam_gradient", ["local", "averaged"])
def test_an_update_counts_each_batch_once_in_batch_statistics(tiny_recipe, sam_gradient):
    recipe = tiny_recipe(augment=False, sam_rho=0.5, sam_gradient=sam_gradient)
    batches = [toy_batch(0), toy_batch(1)]
    model, plain = Normalised().train(), Normalised().train()
    for batch in batches:
        plain(network_input.to_network_input(batch, recipe, torch.device("cpu")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    engine.update(model, batches, optimizer, torch.amp.GradScaler("cpu", enabled=False), recipe, torch.float32)
    for name, value in plain.norm.named_buffers():
        torch.testing.assert_close(dict(model.norm.named_buffers())[name], value)


@pytest.mark.slow
def test_two_ranks_perturb_by_their_own_gradient_or_by_the_average(start_ranks):
    """The ranks check their weights against gradients worked out in float64: tests/fixtures/sam_on_ranks.py."""
    said = start_ranks(Path(sam_on_ranks.__file__), num_ranks=2).run()
    assert said.splitlines().count("all cases agree") == 2


@pytest.mark.parametrize("sam_gradient", ["local", "averaged"])
@pytest.mark.parametrize("broken_pass", [1, 2])
def test_in_float16_an_overflow_of_either_pass_skips_the_update_and_scales_less(tiny_recipe, sam_gradient, broken_pass):
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    passes = []

    def overflow(gradient):
        passes.append(1)
        return gradient * (float("inf") if len(passes) == broken_pass else 1.0)

    model.a.register_hook(overflow)
    before = model.a.detach().clone()
    recipe = tiny_recipe(augment=False, sam_rho=0.05, sam_gradient=sam_gradient)
    loss = engine.update(model, [toy_batch(0)], optimizer, scaler, recipe, torch.float16)
    assert len(passes) == 2 and torch.equal(model.a.detach(), before)
    assert scaler.get_scale() == 512.0 and torch.isfinite(loss)
    engine.update(model, [toy_batch(0)], optimizer, scaler, recipe, torch.float16)
    assert not torch.equal(model.a.detach(), before) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_without_a_scaler_an_overflow_makes_the_loss_nan(tiny_recipe, sam_rho):
    """Training stops at a loss that is not finite, before anything is saved."""
    model = Toy()
    model.a.register_hook(lambda gradient: gradient * float("inf"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    recipe = tiny_recipe(augment=False, sam_rho=sam_rho)
    assert engine.update(model, [toy_batch(0)], optimizer, scaler, recipe, torch.bfloat16).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone", ["test_convnext", "test_vit", "eva02_tiny_patch14_224"])
def test_gradient_checkpointing_changes_no_number(tiny_recipe, backbone, dtype):
    """With drop path, whose random numbers the second forward pass of a checkpoint must repeat, and accumulation."""
    outcomes = []
    for checkpointing in (False, True):
        recipe = tiny_recipe(
            backbone=backbone,
            input_size=56 if "eva" in backbone else 32,
            head="cls_avg" if "eva" in backbone else "pooled",
            drop_path_rate=0.3,
            gradient_checkpointing=checkpointing,
            augment=False,
            sam_rho=0.05,
        )
        torch.manual_seed(0)
        model = build_model(recipe).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        batches = [toy_batch(number, size=recipe.input_size, dimension=384) for number in range(2)]
        loss = engine.update(model, batches, optimizer, torch.amp.GradScaler("cpu", enabled=False), recipe, dtype)
        outcomes.append([loss, *(parameter.detach() for parameter in model.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_run_says_where_the_split_of_the_batch_changes_sam(tiny_recipe):
    said = loading.describe_sam(tiny_recipe(sam_rho=0.05), 4)
    assert "each 4 images (sam_gradient=local)" in said and "max_local_batch_size" in said
    assert not loading.describe_sam(tiny_recipe(sam_rho=0.05, sam_gradient="averaged"), 4)
    assert not loading.describe_sam(tiny_recipe(), 4)

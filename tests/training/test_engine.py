"""An update does not wait for the device, and a compiled network trains as an eager one does, or is given up."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from fixtures.sam_on_ranks import toy_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kutils.models.networks import PromptEmbedder, build_model
from kutils.system.ranks import Ranks
from kutils.training import engine, network_input, optimizers

ALONE = Ranks(0, 1, torch.device("cpu"))
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask they count what it chooses


class NoWaiting(TorchDispatchMode):
    """Refuse what makes the host wait for a GPU: operations whose outcome it must know to go on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert name not in WAITING and not masked, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def test_what_waits_is_noticed():
    values = torch.ones(3)
    for wait in (values.sum().item, values.nonzero, lambda: values[values > 0], lambda: bool(values.any())):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            wait()


SAM = [{"sam_rho": 0.0}, {"sam_rho": 0.05}, {"sam_rho": 0.05, "sam_gradient": "averaged"}]


@pytest.mark.parametrize("sam", SAM, ids=["plain", "local", "averaged"])
def test_an_update_does_not_wait_for_the_device(tiny_recipe, sam):
    recipe = tiny_recipe(augment=True, drop_path_rate=0.2, **sam)
    network = build_model(recipe).train()
    optimizer, scaler = optimizers.build_optimizer(network, recipe), torch.amp.GradScaler("cpu", enabled=False)
    batches = [toy_batch(number, size=32, dimension=384) for number in range(2)]
    for batch in batches:
        batch["jitter"] = torch.tensor([1.02, 0.98, 1.01, 0.01, 0, 1, 2, 3]).repeat(4, 1)
    before = network.fc.weight.detach().clone()
    with NoWaiting():
        loss = engine.update(network, batches, optimizer, scaler, recipe, torch.bfloat16)
    assert loss.isfinite() and not torch.equal(network.fc.weight, before)


@pytest.mark.parametrize("sam", SAM, ids=["plain", "local", "averaged"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_long_gradient_is_cut_to_its_length_and_a_short_one_stays(tiny_recipe, sam, scaled):
    """By the step of plain gradient descent, which is the gradient: its direction stays, in float64 by NumPy."""
    batches = [toy_batch(number, size=32, dimension=384) for number in range(2)]
    steps = {}
    for limit in (0.0, 0.05, 1e3):
        torch.manual_seed(0)
        network = build_model(tiny_recipe(augment="none")).train()
        recipe = tiny_recipe(augment="none", clip_grad=limit, **sam)
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().double()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        with NoWaiting() if not scaled else nullcontext():
            engine.update(
                network, batches, optimizer, torch.amp.GradScaler("cpu", enabled=scaled), recipe, torch.float32
            )
        steps[limit] = torch.nn.utils.parameters_to_vector(network.parameters()).detach().double() - before
    length = steps[0.0].norm()
    assert length > 0.1
    torch.testing.assert_close(steps[0.05], steps[0.0] * 0.05 / length, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(steps[1e3], steps[0.0], atol=1e-7, rtol=1e-5)


def test_a_gradient_that_is_not_finite_is_seen_though_it_is_cut(tiny_recipe):
    network = build_model(tiny_recipe()).train()
    network.fc.weight.register_hook(lambda gradient: gradient * torch.inf)
    recipe = tiny_recipe(augment="none", clip_grad=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = engine.update(
        network, [toy_batch(0, size=32, dimension=384)], torch.optim.SGD(network.parameters()), scaler, recipe,
        torch.float32,
    )  # fmt: skip
    assert loss.isnan()


def test_the_loss_of_the_recipe_is_what_is_trained(tiny_recipe):
    network, batch = build_model(tiny_recipe()).train(), toy_batch(0, size=32, dimension=384)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    cosines = None
    for loss in ("cosine", "angular"):
        recipe = tiny_recipe(augment="none", loss=loss)
        with torch.no_grad():
            cosines = (network(network_input.to_network_input(batch, recipe, ALONE.device)) * batch["target"]).sum(1)
            cosines = (cosines / batch["target"].norm(dim=1)).double()
        expected = {"cosine": 1 - cosines.mean(), "angular": cosines.arccos().mean()}[loss]
        value = engine.update(network, [batch], optimizer, scaler, recipe, torch.float32)
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("sam", SAM, ids=["plain", "local", "averaged"])
def test_an_update_does_not_wait_for_a_gpu(tiny_recipe, sam, augment):
    recipe = tiny_recipe(augment=augment, device="cuda", **sam)
    network = build_model(recipe).train().to("cuda", memory_format=torch.channels_last)
    optimizer, scaler = optimizers.build_optimizer(network, recipe), torch.amp.GradScaler("cuda", enabled=False)
    batches = [toy_batch(number, size=32, dimension=384) for number in range(2)]
    for batch in batches:
        batch["jitter"] = torch.tensor([1.02, 0.98, 1.01, 0.01, 0, 1, 2, 3]).repeat(4, 1)
        batch.update({name: batch[name].pin_memory() for name in ("image", "jitter", "target")})
    engine.update(network, batches, optimizer, scaler, recipe, torch.float32)  # libraries wait when they are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = engine.update(network, batches, optimizer, scaler, recipe, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


class Backbone(nn.Module):
    """Quick to compile: a convolution, BatchNorm, and stochastic depth that drops half of the images."""

    num_features, num_classes = 8, 0

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, images):
        x = self.norm(self.stem(images))
        kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5) if self.training else 1.0
        return (x + nn.functional.gelu(self.block(x)) * kept).mean(dim=(2, 3))


def small_network() -> PromptEmbedder:
    torch.manual_seed(0)
    return PromptEmbedder(Backbone(), "pooled").train()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_a_compiled_network_trains_as_an_eager_one_and_the_trial_leaves_no_trace(tiny_recipe, capsys):
    """SAM, drop path, BatchNorm, and two phases: the head alone, then all."""
    recipe = tiny_recipe(augment=False, sam_rho=0.05, global_batch_size=4, max_local_batch_size=4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    outcomes = []
    for compiled in (False, True):
        network, losses = small_network(), []
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        torch.manual_seed(1)
        for phase in (network.freeze_backbone, network.unfreeze):
            phase()
            network.train()
            if compiled:
                before = {name: value.clone() for name, value in network.state_dict().items()}
                random = torch.get_rng_state()
                assert engine.compile_network(network, 4, recipe, torch.float32, ALONE)
                assert torch.equal(torch.get_rng_state(), random)
                assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
                assert all(parameter.grad is None for parameter in network.parameters())
                assert network._compiled_call_impl is not None and "compiled the network in" in capsys.readouterr().out
            with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
                batches = [toy_batch(number, size=32, dimension=384) for number in range(4)]
                losses += [
                    engine.update(network, [batch], optimizer, scaler, recipe, torch.float32) for batch in batches
                ]
        outcomes.append([*losses, *network.state_dict().values()])
    for eager, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, eager, rtol=0, atol=1e-5)


def pretend_to_compile(network, **options):
    network._compiled_call_impl = network._call_impl


def test_where_one_rank_cannot_compile_none_does(tiny_recipe, monkeypatch, capsys):
    class OtherFails(Ranks):
        def gather_objects(self, value):
            return [value, "InductorError: no compiler on rank 1"]

    monkeypatch.setattr(nn.Module, "compile", pretend_to_compile)
    network, recipe = small_network(), tiny_recipe(augment=False)
    assert not engine.compile_network(network, 4, recipe, torch.float32, OtherFails(0, 1, torch.device("cpu")))
    assert network._compiled_call_impl is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: ") and "no compiler on rank 1" in said[0]


def test_out_of_memory_is_not_taken_for_a_failure_to_compile(tiny_recipe, monkeypatch):
    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "compile", pretend_to_compile)
    monkeypatch.setattr(engine, "backward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.compile_network(small_network(), 4, tiny_recipe(augment=False), torch.float32, ALONE)

"""MADGRAD with a count per parameter, parameter groups, and the schedule of the recipes."""

import math
import re

import madgrad
import pytest
import timm.optim
import torch

from kutils.models.networks import build_model
from kutils.runs import recipes
from kutils.training import optimizers


def weights_and_gradients(steps: int, shapes=((5, 3), (7,), (2, 2, 2))):
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(steps)]
    return start, gradients


def run(optimizer_of, start, gradients, rates):
    parameters = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = optimizer_of(parameters)
    for step_gradients, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return parameters


@pytest.mark.parametrize("chunk", [1, 30, optimizers.CHUNK["cpu"]])
@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_numbers_are_those_of_madgrad(monkeypatch, momentum, chunk):
    """Over 300 steps, some of rate 0, for two groups and any shape and layout."""
    monkeypatch.setitem(optimizers.CHUNK, "cpu", chunk)
    start, gradients = weights_and_gradients(300, ((5, 3), (7,), (2, 2, 2), (), (0, 4), (1, 1), (4, 3, 2, 2), (64,)))
    start[6] = start[6].to(memory_format=torch.channels_last)
    rates = [1e-2 * (1 - step / 400) if step % 50 else 0.0 for step in range(300)]
    groups = lambda p: [{"params": p[::2], "weight_decay": 0.05}, {"params": p[1::2], "weight_decay": 0.0}]  # noqa: E731
    ours = run(lambda p: optimizers.PerParameterMADGRAD(groups(p), lr=1e-2, momentum=momentum), start, gradients, rates)
    theirs = run(
        lambda p: madgrad.MADGRAD(groups(p), lr=1e-2, momentum=momentum, decouple_decay=True), start, gradients, rates
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_without_eps_what_has_no_gradient_stays():
    start = [torch.tensor([2.0, 3.0])]
    gradients = [[torch.tensor([0.0, 1.0])]] * 3
    ours = run(lambda p: optimizers.PerParameterMADGRAD(p, lr=0.1, eps=0.0), start, gradients, [0.1] * 3)
    theirs = run(lambda p: madgrad.MADGRAD(p, lr=0.1, eps=0.0, decouple_decay=True), start, gradients, [0.1] * 3)
    assert ours[0][0] == 2
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1e-4), ("lr", math.nan), ("weight_decay", -0.1), ("eps", -1e-6), ("momentum", 0.0), ("momentum", 1.0)],
)
def test_values_out_of_range_are_refused(name, value):
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        optimizers.PerParameterMADGRAD([parameter], **{"lr": 0.1, name: value})
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        optimizers.PerParameterMADGRAD([{"params": [parameter], name: value}], lr=0.1)


def test_a_parameter_that_joins_late_starts_like_a_fresh_optimizer():
    """timm's MADGRAD counts per parameter too; madgrad's own would step 10 times too far here."""
    start, gradients = weights_and_gradients(100 + 5)
    late = [[g[0], None, None] for g in gradients[:100]] + gradients[100:]
    rates = [1e-3] * len(late)
    ours = run(lambda p: optimizers.PerParameterMADGRAD(p, lr=1e-3), start, late, rates)
    fresh = run(lambda p: optimizers.PerParameterMADGRAD(p, lr=1e-3), start, gradients[100:], rates[100:])
    timms = run(lambda p: timm.optim.MADGRAD(p, lr=1e-3, momentum=0.9, eps=1e-6), start, late, rates)
    shared = run(lambda p: madgrad.MADGRAD(p, lr=1e-3, momentum=0.9), start, late, rates)
    for number in (1, 2):
        torch.testing.assert_close(ours[number], fresh[number])
        torch.testing.assert_close(ours[number], timms[number], rtol=1e-4, atol=1e-6)
        ratio = (shared[number] - start[number]).norm() / (ours[number] - start[number]).norm()
        assert ratio > 2


def test_first_step_by_hand():
    """p0 = 2, g = 3, lr = 0.1: nu = lr g^2, s = lr g, z = p0 - s / cbrt(nu), p = 0.9 p0 + 0.1 z - lr * decay * p0."""
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = optimizers.PerParameterMADGRAD([parameter], lr=0.1, weight_decay=0.5, eps=0.0)
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    z = 2 - 0.3 / (0.1 * 9) ** (1 / 3)
    assert parameter.item() == pytest.approx(0.9 * 2 + 0.1 * z - 0.1 * 0.5 * 2, rel=1e-6)


def test_weights_decay_by_lr_plus_eps():
    """As in madgrad, where the rate itself is lr + eps: at 1e-6 they decay twice as fast as by lr alone."""
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    parameter.grad = torch.zeros(1, dtype=torch.float64)
    optimizers.PerParameterMADGRAD([parameter], lr=1e-6, weight_decay=0.5, eps=1e-6).step()
    assert 2 - parameter.item() == pytest.approx(2e-6 * 0.5 * 2, rel=1e-6)


@pytest.mark.parametrize("former", [{}, {"decouple_decay": True}], ids=["now", "of a run cut under madgrad's class"])
def test_state_survives_saving(tmp_path, former):
    start, gradients = weights_and_gradients(6)
    whole = run(lambda p: optimizers.PerParameterMADGRAD(p, lr=1e-2), start, gradients, [1e-2] * 6)
    parameters = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = optimizers.PerParameterMADGRAD(parameters, lr=1e-2)
    for step, step_gradients in enumerate(gradients):
        if step == 3:
            state = optimizer.state_dict()
            assert set(state["state"][0]) == {"step", "grad_sum_sq", "s", "x0"}
            state["param_groups"][0] |= former
            torch.save(state, tmp_path / "o.pt")
            optimizer = optimizers.PerParameterMADGRAD(parameters, lr=1e-2)
            optimizer.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for one, other in zip(parameters, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backbone", ["test_convnext", "test_vit", "eva02_tiny_patch14_224"])
def test_no_decay_on_vectors_and_embeddings(tiny_recipe, backbone):
    size = 28 if "eva" in backbone else 32
    model = build_model(tiny_recipe(backbone=backbone, input_size=size))
    with_decay, without = optimizers.parameter_groups(model, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[parameter] for parameter in with_decay["params"]}
    spared = {names[parameter] for parameter in without["params"]}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.05, 0.0)
    assert "fc.weight" in decayed
    for name, parameter in model.named_parameters():
        embedding = name in ("backbone.pos_embed", "backbone.cls_token")
        assert (name in spared) == (parameter.ndim <= 1 or embedding), name


def scales_by_hand(backbone: str, name: str, decay: float) -> float:
    """The factor on a parameter's rate: 1 for the head, for each layer below `decay` times that of the one above."""
    if name.startswith("fc."):
        return 1.0
    if backbone == "test_vit":  # a stem, and six blocks, to the last of which the last norm belongs
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        return decay ** (6 - int(block[1])) if block else decay if "norm" in name else decay**7
    stages = {
        "0": 1,
        "1": 2,
        "2": 2,
        "3": 3,
        "4": 3,
        "5": 4,
        "6": 1,
    }  # of EfficientNet-Lite0; then conv_head, as of the last
    block = re.match(r"backbone\.blocks\.(\d)\.(\d)\.", name)
    if block:
        below = sum(count for stage, count in stages.items() if stage < block[1])
        return decay ** (16 - below - int(block[2]))
    return decay**17 if name.startswith(("backbone.conv_stem", "backbone.bn1")) else decay


@pytest.mark.parametrize("backbone", ["test_vit", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("kind", ["madgrad", "adamw"])
@pytest.mark.parametrize("changes", [{}, {"freeze_blocks": 3, "head_width": 8}], ids=["plain", "frozen and wide"])
def test_lower_layers_learn_more_slowly(tiny_recipe, backbone, kind, changes):
    """Layers counted by hand; rates as the schedule sets them, in the middle of a warm-up too. Frozen blocks have the
    rates that they would have, and are as they were afterwards."""
    recipe = tiny_recipe(
        backbone=backbone, optimizer=kind, layer_decay=0.7, warmup_epochs=1, lr=1e-2, weight_decay=0.05, **changes
    )
    model = build_model(recipe)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(trained.values()) == (not changes)
    optimizer = optimizers.build_optimizer(model, recipe)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert type(optimizer) is {"madgrad": optimizers.PerParameterMADGRAD, "adamw": torch.optim.AdamW}[kind]
    schedule = optimizers.build_schedule(optimizer, recipe, 10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for update in (0, 5, 15):
        schedule.step_update(update)
        rates = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[names.pop(parameter) if update == 15 else names[parameter]] = group["lr"]
                spared = parameter.ndim <= 1 or names.get(parameter) in ("backbone.pos_embed", "backbone.cls_token")
                assert update == 15 or group["weight_decay"] == (0.0 if spared else 0.05)
        top = published_rate(update, recipe, 10)
        expected = {name: top * scales_by_hand(backbone, name, 0.7) for name in rates}
        assert rates == pytest.approx(expected, rel=1e-9)
    assert not names and optimizer.param_groups[0]["lr"] == pytest.approx(top)  # the head's, which is logged


def test_adamw_by_hand(tiny_recipe):
    """First step: w (1 - lr decay) - lr g / (|g| + eps); each weight moves by the rate, whatever its gradient."""
    model = build_model(tiny_recipe())
    optimizer = optimizers.build_optimizer(model, tiny_recipe(optimizer="adamw", lr=0.01, weight_decay=0.5))
    before = model.fc.weight.detach().clone()
    gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    model.fc.weight.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.fc.weight.detach(), expected)
    untouched = [value for name, value in model.named_parameters() if name != "fc.weight"]
    assert all(parameter not in optimizer.state for parameter in untouched)  # as while the backbone is frozen


def test_layer_decay_needs_layers(tiny_recipe):
    model = build_model(tiny_recipe())
    model.backbone = torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs a backbone of known layers; Conv2d has none"):
        optimizers.build_optimizer(model, tiny_recipe(layer_decay=0.5))


def published_rate(update: int, recipe, steps_per_epoch: int) -> float:
    """The schedule in closed form: linear warm-up, then a cosine whose clock started at 0."""
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    if update < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * update / warmup
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * update / total))


@pytest.mark.parametrize(("model", "stage", "steps"), [(m, s, n) for (m, s), n in {
    ("convnext_large", 1): 2259, ("convnext_xxlarge", 1): 2259, ("convnext_large", 2): 23755,
    ("convnext_xxlarge", 2): 23755, ("convnext_xxlarge", 3): 23755}.items()])  # fmt: skip
def test_schedule_over_a_recipes_real_length(model, stage, steps):
    recipe = recipes.load_recipe(recipes.find_recipe(model, stage))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = optimizers.build_schedule(optimizer, recipe, steps)
    total, warmup = recipe.epochs * steps, recipe.warmup_epochs * steps
    for update in {0, 1, warmup - 1, warmup, warmup + 1, total // 2, total - 1} - {-1}:
        schedule.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(published_rate(update, recipe, steps), rel=1e-9)
    if warmup:
        schedule.step_update(0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
        schedule.step_update(warmup)  # falls from 1e-4, as published
        expected = {15: 9.05e-5, 10: 9.76e-5}[recipe.epochs]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)

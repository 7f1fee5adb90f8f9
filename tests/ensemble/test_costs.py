"""What a member costs, measured; which members fit into a time, and which are left out in which order."""

import math

import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import write_ensemble

from kutils.data import transforms
from kutils.ensemble import costs, image_cache, predict
from kutils.ensemble.costs import Cost
from kutils.ensemble.members import Member
from kutils.ensemble.weights import load_ensemble
from kutils.models import checkpoints, networks


def make_fitted(folder, members, leave_one_out, weights=None):
    """An ensemble with so many members by family, and what each family's absence costs."""
    families = {
        name: [Member(f"{name}.yaml", fold, f"{name}{fold}.pth", "") for fold in range(count)]
        for name, count in members.items()
    }
    weights = weights or dict.fromkeys(members, 1 / len(members))
    path = write_ensemble(
        folder, families, weights, unit_rows(1)[0], scores={"family": 0.60}, leave_one_out=leave_one_out
    )
    return load_ensemble(path)


# ---------------------------------------------------------------- what fits


def test_losses_are_those_of_the_fit_and_shares_of_them(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 4, "b": 1}, {"a": 0.588, "b": 0.597})
    a, b = fitted.families["a"], fitted.families["b"][0]
    losses = costs.losses(fitted, fitted.members())
    assert losses[b] == pytest.approx(0.003) and losses[a[0]] == pytest.approx(0.012 * (1 / 3 - 1 / 4))
    losses = costs.losses(fitted, [a[2], b])  # one of four is left
    assert losses[a[2]] == pytest.approx(0.012)
    assert costs.losses(fitted, [b]) == {b: math.inf}  # nothing would be left


def test_a_member_counts_less_where_another_of_its_family_has_run(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 2, "b": 1}, {"a": 0.588, "b": 0.59})
    (first, second), (b,) = fitted.families.values()
    measured = dict.fromkeys((first, second, b), Cost(1, 0, {8: 0}))
    assert costs.choose_members(fitted, [second, b], measured, 1.5, 10)[0] == [second]  # 0.012 against 0.010
    assert costs.choose_members(fitted, [second, b], measured, 1.5, 10, done=[first])[0] == [b]  # 0.006


def test_what_does_not_fit_is_left_out_in_order_of_least_loss(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 2, "b": 1, "c": 1}, {"a": 0.59, "b": 0.596, "c": 0.599})
    a, b, c = (fitted.families[name] for name in "abc")
    measured = {member: Cost(load=0, image=1 / costs.SLACK, decode={}) for member in fitted.members()}
    for seconds, kept in [
        (40, [*a, *b, *c]),
        (39, [*a, *b]),  # c costs 0.001
        (29, a),  # then b with 0.004, before a second a with 0.005
        (19, a[1:]),
        (9, []),
    ]:
        chosen, left_out = costs.choose_members(fitted, fitted.members(), measured, seconds, num_images=10)
        assert chosen == kept and set(left_out) == set(fitted.members()) - set(kept)
    _, left_out = costs.choose_members(fitted, fitted.members(), measured, 19, 10)
    assert list(left_out.values()) == pytest.approx([0.001, 0.004, 0.005])


def test_of_equal_losses_the_slower_goes_and_what_still_fits_comes_back(tmp_path):
    fitted = make_fitted(tmp_path, {"slow": 1, "fast": 1, "best": 1}, {"slow": 0.599, "fast": 0.599, "best": 0.5})
    slow, fast, best = fitted.members()
    seconds = {slow: 30, fast: 3, best: 10}
    measured = {member: Cost(seconds[member] / costs.SLACK, 0, {8: 0}) for member in seconds}
    assert costs.choose_members(fitted, fitted.members(), measured, 14, 1)[0] == [fast, best]
    fitted = make_fitted(tmp_path, {"slow": 1, "fast": 1, "best": 1}, {"slow": 0.598, "fast": 0.599, "best": 0.5})
    slow, fast, best = fitted.members()
    measured = {member: Cost(seconds[member] / costs.SLACK, 0, {8: 0}) for member in seconds}
    assert costs.choose_members(fitted, [slow, fast, best], measured, 14, 1) == (
        [fast, best],
        {slow: pytest.approx(0.002)},
    )


def test_an_estimate_decodes_once_per_size():
    x, y, z = (Member("r.yaml", fold) for fold in range(3))
    measured = {x: Cost(1, 0.1, {8: 0.5}), y: Cost(2, 0.2, {8: 0.5}), z: Cost(3, 0.3, {16: 0.7})}
    expected = 1 + 2 + 3 + 10 * (0.1 + 0.2 + 0.3) + 10 * (0.5 + 0.7)
    assert costs.estimate([x, y, z], measured, 10) == pytest.approx(costs.SLACK * expected)


# ---------------------------------------------------------------- measuring


def test_a_measured_cost_is_what_a_pass_takes(tmp_path, images, tiny_recipe, monkeypatch, clock):
    recipe = tiny_recipe(amp_dtype="float32")
    checkpoints.save_checkpoint(tmp_path / "m.pth", networks.build_model(recipe), recipe, fold=0)
    sizes, whole = [], transforms.decode_rgb

    def slow(self, inputs):
        sizes.append(len(inputs))
        clock.now += 0.05 * len(inputs)
        return torch.ones(len(inputs), 384)

    def slow_decoder(path):
        clock.now += 0.25
        return whole(path)

    monkeypatch.setattr(predict.Predictor, "forward", slow)
    monkeypatch.setattr(transforms, "decode_rgb", slow_decoder)
    cost = costs.measure_cost(tmp_path / "m.pth", images, [torch.device("cpu")] * 2, batch_size=64, tta="none")
    assert sizes == [1, 1, 2, 4, 8, 16] and set(cost.decode) == {32}
    assert cost.image == pytest.approx(0.025) and cost.decode[32] == pytest.approx(0.25)  # two devices, one process
    assert str(cost) == "40.0 images/s at 32 px, loaded in 0.0 s"


def test_after_a_pass_what_is_kept_costs_nothing(images):
    x, y = (Member("r.yaml", fold) for fold in range(2))
    measured = {x: Cost(1, 0.1, {32: 0.4}), y: Cost(1, 0.1, {48: 0.4})}
    cache = image_cache.PixelCache(images[:10], 32, budget_bytes=5 * 3 * 32 * 32)
    list(cache.batches(range(10), 4))
    measured = costs.after_decoding(measured, [cache])
    assert measured[y] == Cost(1, 0.1, {48: 0.4})
    assert measured[x] == Cost(1, pytest.approx(0.3), {32: 0.0})  # half is decoded anew


def test_both_resolutions_are_in_the_cost(tmp_path, images, tiny_recipe, monkeypatch, clock):
    """A pass of 1 ms per px of the side, decoding of 2 ms per px: at 32 and 64 px, 96 ms and 64 ms with 128 ms."""
    recipe = tiny_recipe(amp_dtype="float32")
    checkpoints.save_checkpoint(tmp_path / "m.pth", networks.build_model(recipe), recipe, fold=0)

    def slow(self, inputs):
        clock.now += 0.001 * inputs.shape[-1] * len(inputs)
        return torch.ones(len(inputs), 384)

    def slow_resize(image, size):
        clock.now += 0.002 * size
        return torch.zeros(3, size, size, dtype=torch.uint8)

    monkeypatch.setattr(predict.Predictor, "forward", slow)
    monkeypatch.setattr(transforms, "resize_square", slow_resize)
    cost = costs.measure_cost(tmp_path / "m.pth", images[:12], [torch.device("cpu")], 64, "two_resolutions")
    assert cost.image == pytest.approx(0.096)
    assert cost.decode == {32: pytest.approx(0.064), 64: pytest.approx(0.128)}
    assert "at 32 and 64 px" in str(cost)
    member, other = Member("r.yaml", 0), Member("r.yaml", 1)
    measured = {member: cost, other: Cost(0, 0, {64: cost.decode[64]})}  # shares the larger size
    assert costs.estimate([member, other], measured, 10) == pytest.approx(costs.SLACK * (cost.load + 10 * 0.288))
    caches = [image_cache.PixelCache(images[:12], size) for size in (32, 64)]  # which keep nothing
    measured = costs.after_decoding(measured, caches)
    assert measured[member].image == pytest.approx(0.288) and measured[member].decode == {32: 0.0, 64: 0.0}
    assert measured[other].image == pytest.approx(0.128)

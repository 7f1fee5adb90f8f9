"""An ensemble within its time: what fits, what is left out and in which order; and every result on the way."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import by_hand, save_images, write_ensemble

from kutils.data import transforms
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending, fit, image_cache, predict, within_budget
from kutils.ensemble.members import Member
from kutils.ensemble.within_budget import Cost
from kutils.models import checkpoints, networks

SCORES = {"family": 0.60}


def make_fitted(folder, members, leave_one_out, weights=None):
    """An ensemble with so many members by family, and what each family's absence costs."""
    families = {
        name: [Member(f"{name}.yaml", fold, f"{name}{fold}.pth", "") for fold in range(count)]
        for name, count in members.items()
    }
    weights = weights or dict.fromkeys(members, 1 / len(members))
    path = write_ensemble(folder, families, weights, unit_rows(1)[0], scores=SCORES, leave_one_out=leave_one_out)
    return fit.load_ensemble(path)


# ---------------------------------------------------------------- what fits


def test_losses_are_those_of_the_fit_and_shares_of_them(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 4, "b": 1}, {"a": 0.588, "b": 0.597})
    a, b = fitted.families["a"], fitted.families["b"][0]
    losses = within_budget.losses(fitted, fitted.members())
    assert losses[b] == pytest.approx(0.003) and losses[a[0]] == pytest.approx(0.012 * (1 / 3 - 1 / 4))
    losses = within_budget.losses(fitted, [a[2], b])  # one of four is left
    assert losses[a[2]] == pytest.approx(0.012)
    assert within_budget.losses(fitted, [b]) == {b: math.inf}  # nothing would be left


def test_a_member_counts_less_where_another_of_its_family_has_run(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 2, "b": 1}, {"a": 0.588, "b": 0.59})
    (first, second), (b,) = fitted.families.values()
    costs = dict.fromkeys((first, second, b), Cost(1, 0, 0, 8))
    assert within_budget.choose(fitted, [second, b], costs, 1.5, 10)[0] == [second]  # 0.012 against 0.010
    assert within_budget.choose(fitted, [second, b], costs, 1.5, 10, done=[first])[0] == [b]  # 0.006


def test_what_does_not_fit_is_left_out_in_order_of_least_loss(tmp_path):
    fitted = make_fitted(tmp_path, {"a": 2, "b": 1, "c": 1}, {"a": 0.59, "b": 0.596, "c": 0.599})
    a, b, c = (fitted.families[name] for name in "abc")
    costs = {member: Cost(load=0, image=1 / within_budget.SLACK, decode=0, input_size=8) for member in fitted.members()}
    for seconds, kept in [
        (40, [*a, *b, *c]),
        (39, [*a, *b]),  # c costs 0.001
        (29, a),  # then b with 0.004, before a second a with 0.005
        (19, a[1:]),
        (9, []),
    ]:
        chosen, left_out = within_budget.choose(fitted, fitted.members(), costs, seconds, num_images=10)
        assert chosen == kept and set(left_out) == set(fitted.members()) - set(kept)
    _, left_out = within_budget.choose(fitted, fitted.members(), costs, 19, 10)
    assert list(left_out.values()) == pytest.approx([0.001, 0.004, 0.005])


def test_of_equal_losses_the_slower_goes_and_what_still_fits_comes_back(tmp_path):
    fitted = make_fitted(tmp_path, {"slow": 1, "fast": 1, "best": 1}, {"slow": 0.599, "fast": 0.599, "best": 0.5})
    slow, fast, best = fitted.members()
    seconds = {slow: 30, fast: 3, best: 10}
    costs = {member: Cost(seconds[member] / within_budget.SLACK, 0, 0, 8) for member in seconds}
    assert within_budget.choose(fitted, fitted.members(), costs, 14, 1)[0] == [fast, best]
    fitted = make_fitted(tmp_path, {"slow": 1, "fast": 1, "best": 1}, {"slow": 0.598, "fast": 0.599, "best": 0.5})
    slow, fast, best = fitted.members()
    costs = {member: Cost(seconds[member] / within_budget.SLACK, 0, 0, 8) for member in seconds}
    assert within_budget.choose(fitted, [slow, fast, best], costs, 14, 1) == (
        [fast, best],
        {slow: pytest.approx(0.002)},
    )


def test_an_estimate_decodes_once_per_size():
    x, y, z = (Member("r.yaml", fold) for fold in range(3))
    costs = {x: Cost(1, 0.1, 0.5, 8), y: Cost(2, 0.2, 0.5, 8), z: Cost(3, 0.3, 0.7, 16)}
    expected = 1 + 2 + 3 + 10 * (0.1 + 0.2 + 0.3) + 10 * (0.5 + 0.7)
    assert within_budget.estimate([x, y, z], costs, 10) == pytest.approx(within_budget.SLACK * expected)


# ---------------------------------------------------------------- all models


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path / "images")
    return image_cache.find_images(tmp_path / "images")


@pytest.fixture
def members(tmp_path, tiny_recipe):
    """Two families, a of two members and b of one, and c without weight: the fitted ensemble, files and models."""
    families, files, built = {}, {}, {}
    for seed, (family, fold) in enumerate([("a", 0), ("a", 1), ("b", 0), ("c", 0)]):
        torch.manual_seed(seed)
        recipe = tiny_recipe(prefix=family, input_size=32 if family == "a" else 48, amp_dtype="float32", device="cuda")
        member = Member(f"{family}.yaml", fold, f"{family}_{fold}.pth", str(seed))
        built[member.name] = (networks.build_model(recipe).eval(), recipe)
        files[member] = tmp_path / f"{family}_{fold}.pth"
        checkpoints.save_checkpoint(files[member], *built[member.name], fold=fold)
        families.setdefault(family, []).append(member)
    weights, without = {"b": 0.3, "a": 0.7, "c": 0.0}, {"a": 0.55, "b": 0.59, "c": 0.6}
    path = write_ensemble(tmp_path, families, weights, unit_rows(1, seed=8)[0], scores=SCORES, leave_one_out=without)
    return fit.load_ensemble(path), files, built


def states(*arguments, **options):
    """(members run, weights, embeddings) of every state, copied, and the last state."""
    seen = []
    for state in within_budget.predict_ensemble(*arguments, **options):
        seen.append((list(state.seconds), dict(state.weights), state.embeddings.copy()))
    return seen, state


@pytest.mark.parametrize("hours", [math.inf, 1.0])
def test_an_ensemble_gets_better_model_by_model(images, members, hours):
    fitted, files, built = members
    seen, state = states(fitted, files, images, hours=hours)
    assert [run for run, _, _ in seen] == [[], ["a fold 0"], ["a fold 0", "a fold 1"], [*built][:3]]  # a counts most
    assert seen[2][1] == {"a": 1.0} and seen[3][1] == pytest.approx({"a": 0.7, "b": 0.3})
    mean = np.array(fitted.mean_embedding, np.float32)
    np.testing.assert_array_equal(seen[0][2], np.tile(mean, (14, 1)))
    rows = {name: by_hand(*model, images[:12]) for name, model in built.items()}
    np.testing.assert_allclose(seen[1][2][:12], rows["a fold 0"], atol=1e-6)
    a = rows["a fold 0"] + rows["a fold 1"]
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[2][2][:12], a, atol=1e-6)
    total = 0.7 * a + 0.3 * rows["b fold 0"]
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(seen[3][2][:12], total, atol=1e-6)
    np.testing.assert_array_equal(seen[3][2][12:], np.tile(mean, (2, 1)))
    assert [path.name for path in state.unreadable] == ["m.png", "n.jpg"]
    assert state.dropped == {"c fold 0": "its weight is 0"}


def test_members_that_share_a_network_take_one_pass(images, members, monkeypatch):
    """b also as the nearest of three prompts: by hand, and in one pass with b itself."""
    fitted, files, built = members
    (b,) = fitted.families["b"]
    nearest = dataclasses.replace(b, neighbours=2, temperature=0.1)
    families = {"b": [b], "b_nearest": [nearest]}
    fitted = dataclasses.replace(fitted, families=families, weights={"b": 0.4, "b_nearest": 0.6})
    bank = PromptBank(["x", "y", "z"], unit_rows(3, seed=4))
    whole, passes = predict.predict, []
    monkeypatch.setattr(predict, "predict", lambda *args, **options: passes.append(1) or whole(*args, **options))
    cost = Cost(1, 0.1, 0, 8)
    assert within_budget.estimate([b, nearest], {b: cost, nearest: cost}, 10) == pytest.approx(within_budget.SLACK * 2)
    for hours in (math.inf, 1.0):
        del passes[:]
        seen, state = states(fitted, {b: files[b], nearest: files[b]}, images, bank=bank, hours=hours)
        assert len(passes) == 1 and [run for run, _, _ in seen] == [[], ["b fold 0 (2 nearest)", "b fold 0"]]
        rows = by_hand(*built["b fold 0"], images[:12])
        expected = 0.4 * rows + 0.6 * bank.knn(rows, 2, 0.1)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(state.embeddings[:12], expected, atol=1e-5)
        np.testing.assert_array_equal(state.embeddings[12:], np.tile(np.float32(fitted.mean_embedding), (2, 1)))
    _, state = states(fitted, {b: files[b], nearest: files[b]}, images)  # without its prompts b itself counts
    assert list(state.dropped) == ["b fold 0 (2 nearest)"] and list(state.seconds) == ["b fold 0"]
    np.testing.assert_allclose(state.embeddings[:12], rows, atol=1e-6)
    alone = dataclasses.replace(fitted, families={"b_nearest": [nearest]}, weights={"b_nearest": 1.0})
    seen, state = states(alone, {nearest: files[b]}, images)
    assert len(seen) == 1 and list(state.dropped) == ["b fold 0 (2 nearest)"] and not state.weights


def test_a_look_up_has_its_cost(images, members, monkeypatch, clock):
    """0.5 s per image for neighbours: b and 14 look-ups take 8 s, with a tenth more 8.8; b alone takes 1 s."""
    fitted, files, _ = members
    (b,) = fitted.families["b"]
    nearest = dataclasses.replace(b, neighbours=2)
    whole = PromptBank.knn

    def slow(self, queries, *arguments):
        clock.now += 0.5 * len(queries)
        return whole(self, queries, *arguments)

    monkeypatch.setattr(PromptBank, "knn", slow)
    monkeypatch.setattr(within_budget, "measure", lambda *_: Cost(1, 0, 0, 48))
    run_for(monkeypatch, clock, {files[b].name: 1.0})
    bank = PromptBank(["x", "y", "z"], unit_rows(3, seed=4))
    assert within_budget.measure_lookup([b, nearest], bank, "cpu") == pytest.approx(0.5)
    assert within_budget.measure_lookup([b], bank, "cpu") == within_budget.measure_lookup([nearest], None, "cpu") == 0
    costs = {b: Cost(1, 0.1, 0.2, 8), nearest: Cost(1, 0.1, 0.2, 8, lookup=0.5)}
    assert within_budget.estimate([b, nearest], costs, 10) == pytest.approx(within_budget.SLACK * (1 + 1 + 2 + 5))
    families, without = {"b": [b], "b_nearest": [nearest]}, {"b": 0.5, "b_nearest": 0.55}
    fitted = dataclasses.replace(fitted, families=families, weights=dict.fromkeys(families, 0.5), leave_one_out=without)
    for seconds, left_out in ((11, []), (10.5, ["b fold 0 (2 nearest)"])):  # 2 s of them measure the look-up
        _, state = states(fitted, {b: files[b], nearest: files[b]}, images, bank=bank, hours=seconds / 3600)
        assert list(state.dropped) == left_out and "b fold 0" in state.seconds


def test_images_are_decoded_once_per_input_size(images, members, monkeypatch):
    fitted, files, _ = members
    whole, decoded = transforms.decode_rgb, []
    monkeypatch.setattr(transforms, "decode_rgb", lambda path: decoded.append(path) or whole(path))
    states(fitted, files, images)
    assert len(decoded) == 2 * 14 + 2  # three models of two sizes; what cannot be read is tried again
    del decoded[:]
    states(fitted, files, images, cache_gb=0)
    assert len(decoded) == 3 * 14
    del decoded[:]
    states(fitted, files, images, cache_gb=14 * 3 * 32 * 32 / 1e9)  # the first size alone fits
    assert len(decoded) == 2 * 14 + 2


def test_no_time_leaves_the_mean_embedding(images, members, capsys):
    fitted, files, _ = members
    seen, state = states(fitted, files, images, hours=0)
    assert len(seen) == 1 and set(state.dropped) == {"a fold 0", "a fold 1", "b fold 0", "c fold 0"}
    np.testing.assert_allclose(np.linalg.norm(seen[0][2], axis=1), 1, atol=1e-6)
    assert "left out: a fold 0: no time left" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on only where a test says so: `clock.now += seconds`."""
    state = SimpleNamespace(now=1000.0)
    for module in (within_budget, predict):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: state.now))
    return state


def run_for(monkeypatch, clock, seconds):
    """Let each model take so many seconds of the clock, by its checkpoint's name."""
    whole = within_budget.Runner.run

    def run(self, member):
        clock.now += seconds[self.checkpoint_files[member].name]
        return whole(self, member)

    monkeypatch.setattr(within_budget.Runner, "run", run)


def test_measured_costs_leave_out_what_does_not_fit(images, members, monkeypatch, clock, capsys):
    fitted, files, built = members
    run_for(monkeypatch, clock, {"a_0.pth": 1000.0, "a_1.pth": 1000.0})
    cost = {"a_0.pth": Cost(1000, 0, 0, 32), "b_0.pth": Cost(5000, 0, 0, 48)}
    monkeypatch.setattr(within_budget, "measure", lambda path, *_: cost[path.name])
    _, state = states(fitted, files, images[:12], hours=1)
    assert list(state.seconds) == ["a fold 0", "a fold 1"] and state.weights == {"a": 1.0}
    said = capsys.readouterr().out
    assert "left out: b fold 0: no time left: it takes 91.7 minutes (a loss of about 0.0100)" in said
    assert "there is time for a fold 0, a fold 1\n" in said
    a = sum(by_hand(*built[f"a fold {fold}"], images[:12]) for fold in (0, 1))
    np.testing.assert_allclose(state.embeddings, a / np.linalg.norm(a, axis=1, keepdims=True), atol=1e-6)


def test_models_that_turn_out_slower_leave_no_time_for_the_last(images, members, monkeypatch, clock, capsys):
    """Each is said to take 1 s and takes 2: of 5 s there is time for two, and b adds least (0.01 of 0.035)."""
    fitted, files, _ = members
    monkeypatch.setattr(within_budget, "measure", lambda *_: Cost(1, 0, 0, 32))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 2.0))
    _, state = states(fitted, files, images, hours=5 / 3600)
    assert list(state.seconds) == ["a fold 0", "a fold 1"]
    assert "no time left: it takes 0.0 minutes (a loss of about 0.0100)" in state.dropped["b fold 0"]
    assert "there is time for a fold 1\n" in capsys.readouterr().out  # said once it is known, not before


def test_models_that_turn_out_faster_leave_time_for_one_that_was_left_out(images, members, monkeypatch, clock, capsys):
    fitted, files, _ = members
    monkeypatch.setattr(within_budget, "measure", lambda *_: Cost(3, 0, 0, 32))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 1.0))
    _, state = states(fitted, files, images, hours=7 / 3600)
    assert len(state.seconds) == 3 and "a fold 1" in state.seconds and list(state.dropped) == ["c fold 0"]
    said = capsys.readouterr().out
    assert "there is time for a fold 1, b fold 0\n" in said  # two of three at first; then all that are left


def test_what_was_measured_right_keeps_its_slack(images, members, monkeypatch, clock):
    """3 s of 3.4 are planned with a tenth more; the last model is still started with that tenth in hand, or not."""
    fitted, files, _ = members
    monkeypatch.setattr(within_budget, "measure", lambda *_: Cost(1, 0, 0, 32))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 1.0))
    assert len(states(fitted, files, images, hours=3.31 / 3600)[1].seconds) == 3
    assert len(states(fitted, files, images, hours=3.05 / 3600)[1].seconds) == 2


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
    cost = within_budget.measure(tmp_path / "m.pth", images, [torch.device("cpu")] * 2, batch_size=64)
    assert sizes == [1, 1, 2, 4, 8, 16] and cost.input_size == 32
    assert cost.image == pytest.approx(0.025) and cost.decode == pytest.approx(0.25)  # two devices, one process
    assert cost.describe() == "40.0 images/s at 32 px, loaded in 0.0 s"


def test_after_a_pass_what_is_kept_costs_nothing(images):
    x, y = (Member("r.yaml", fold) for fold in range(2))
    costs = {x: Cost(1, 0.1, 0.4, 32), y: Cost(1, 0.1, 0.4, 48)}
    cache = image_cache.PixelCache(images[:10], 32, budget_bytes=5 * 3 * 32 * 32)
    list(cache.batches(range(10), 4))
    costs = within_budget.decoded(costs, cache)
    assert costs[y] == Cost(1, 0.1, 0.4, 48) and costs[x] == Cost(1, pytest.approx(0.3), 0, 32)  # half is decoded anew


@pytest.mark.parametrize("error", [predict.OutOfTime("3 of 14"), torch.OutOfMemoryError("full"), TypeError("broken")])
def test_a_model_that_does_not_finish_is_left_out_and_the_others_count(images, members, monkeypatch, error):
    fitted, files, built = members
    whole, calls = predict.predict, itertools.count(1)

    def failing(*arguments, **options):
        if next(calls) == 2:  # the second member of a
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(predict, "predict", failing)
    _, state = states(fitted, files, images[:12])
    assert "a fold 1" in state.dropped and list(state.families) == ["a", "b"]
    rows = {name: by_hand(*model, images[:12]) for name, model in built.items()}
    expected = blending.combine({"a": rows["a fold 0"], "b": rows["b fold 0"]}, fitted.weights)
    np.testing.assert_allclose(state.embeddings, expected, atol=1e-6)


def test_a_broken_file_costs_only_itself(images, members):
    fitted, files, _ = members
    files[fitted.families["a"][0]].write_bytes(b"half a file")
    _, state = states(fitted, files, images, hours=1)
    assert "no readable checkpoint" in state.dropped["a fold 0"] and list(state.seconds) == ["a fold 1", "b fold 0"]


def test_an_empty_folder_is_predicted(members):
    fitted, files, _ = members
    seen, _ = states(fitted, files, [], hours=1)
    assert len(seen[-1][0]) == 3 and seen[-1][2].shape == (0, 384)

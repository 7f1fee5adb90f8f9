"""An ensemble within its time: every result on the way, and what is left out."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.ensembles import by_hand, write_ensemble

from kutils.data import transforms
from kutils.data.prompt_bank import PromptBank
from kutils.ensemble import blending, costs, predict, within_budget
from kutils.ensemble.costs import Cost
from kutils.ensemble.members import Member
from kutils.ensemble.weights import load_ensemble
from kutils.models import checkpoints, networks

SCORES = {"family": 0.60}


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
    return load_ensemble(path), files, built


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
    cost = Cost(1, 0.1, {8: 0})
    assert costs.estimate([b, nearest], {b: cost, nearest: cost}, 10) == pytest.approx(costs.SLACK * 2)
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
    monkeypatch.setattr(costs, "measure_cost", lambda *_: Cost(1, 0, {48: 0}))
    run_for(monkeypatch, clock, {files[b].name: 1.0})
    bank = PromptBank(["x", "y", "z"], unit_rows(3, seed=4))
    assert costs.measure_lookup([b, nearest], bank, "cpu") == pytest.approx(0.5)
    assert costs.measure_lookup([b], bank, "cpu") == costs.measure_lookup([nearest], None, "cpu") == 0
    measured = {b: Cost(1, 0.1, {8: 0.2}), nearest: Cost(1, 0.1, {8: 0.2}, lookup=0.5)}
    assert costs.estimate([b, nearest], measured, 10) == pytest.approx(costs.SLACK * (1 + 1 + 2 + 5))
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
    cost = {"a_0.pth": Cost(1000, 0, {32: 0}), "b_0.pth": Cost(5000, 0, {48: 0})}
    monkeypatch.setattr(costs, "measure_cost", lambda path, *_: cost[path.name])
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
    monkeypatch.setattr(costs, "measure_cost", lambda *_: Cost(1, 0, {32: 0}))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 2.0))
    _, state = states(fitted, files, images, hours=5 / 3600)
    assert list(state.seconds) == ["a fold 0", "a fold 1"]
    assert "no time left: it takes 0.0 minutes (a loss of about 0.0100)" in state.dropped["b fold 0"]
    assert "there is time for a fold 1\n" in capsys.readouterr().out  # said once it is known, not before


def test_models_that_turn_out_faster_leave_time_for_one_that_was_left_out(images, members, monkeypatch, clock, capsys):
    fitted, files, _ = members
    monkeypatch.setattr(costs, "measure_cost", lambda *_: Cost(3, 0, {32: 0}))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 1.0))
    _, state = states(fitted, files, images, hours=7 / 3600)
    assert len(state.seconds) == 3 and "a fold 1" in state.seconds and list(state.dropped) == ["c fold 0"]
    said = capsys.readouterr().out
    assert "there is time for a fold 1, b fold 0\n" in said  # two of three at first; then all that are left


def test_what_was_measured_right_keeps_its_slack(images, members, monkeypatch, clock):
    """3 s of 3.4 are planned with a tenth more; the last model is still started with that tenth in hand, or not."""
    fitted, files, _ = members
    monkeypatch.setattr(costs, "measure_cost", lambda *_: Cost(1, 0, {32: 0}))
    run_for(monkeypatch, clock, dict.fromkeys((path.name for path in files.values()), 1.0))
    assert len(states(fitted, files, images, hours=3.31 / 3600)[1].seconds) == 3
    assert len(states(fitted, files, images, hours=3.05 / 3600)[1].seconds) == 2


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


@pytest.mark.parametrize("hours", [math.inf, 1.0])
def test_two_resolutions_where_a_network_takes_both(images, members, tmp_path, tiny_recipe, capsys, hours):
    """a at 32 and 64 px; b is a ViT of one size."""
    fitted, files, built = members
    recipe = tiny_recipe(backbone="vit_tiny_patch16_224", input_size=48, amp_dtype="float32", device="cuda")
    (b,) = fitted.families["b"]
    vit = networks.build_model(recipe).eval()
    checkpoints.save_checkpoint(files[b], vit, recipe, fold=0)
    _, state = states(fitted, files, images, tta="two_resolutions", hours=hours)
    a = []
    for fold in (0, 1):
        model, own = built[f"a fold {fold}"]
        sides = (own, dataclasses.replace(own, input_size=64))
        total = sum(by_hand(model, at, images[:12]) for at in sides)
        a.append(total / np.linalg.norm(total, axis=1, keepdims=True))
    rows = {"a": blending.average(a), "b": by_hand(vit, recipe, images[:12])}
    np.testing.assert_allclose(state.embeddings[:12], blending.combine(rows, fitted.weights), atol=1e-6)
    assert [path.name for path in state.unreadable] == ["m.png", "n.jpg"]
    printed = capsys.readouterr().out
    assert "b fold 0: its network takes one size, and predicts at 48 px alone" in printed
    assert ("at 32 and 64 px" in printed) == (hours < math.inf)


def test_an_unknown_tta_is_an_error_before_any_model_runs(images, members):
    fitted, files, _ = members
    with pytest.raises(ValueError, match="tta is 'flip'; it can be none, two_resolutions"):
        states(fitted, files, images, tta="flip")

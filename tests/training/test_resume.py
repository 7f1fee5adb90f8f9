"""The file from which a cut run goes on: its layout does not change, so that runs that are under way can go on."""

import time
from types import SimpleNamespace

import pytest
import torch
from fixtures.datasets import TINY

from kutils.runs.recipes import Recipe
from kutils.system.ranks import Ranks
from kutils.training.optimizers import PerParameterMADGRAD
from kutils.training.resume import ResumeFile, State

ALONE = Ranks(0, 1, torch.device("cpu"))
RECIPE = Recipe(**TINY)


def data_of(block_rows):
    return SimpleNamespace(block_rows=block_rows, content_hashes={})


def parts():
    """A network after one update, its optimiser and a loss scaler."""
    network = torch.nn.Linear(2, 2)
    optimizer = PerParameterMADGRAD(network.parameters(), lr=0.1)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return network, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def earlier_file(path, **changes):
    """Write what versions of November 2026 wrote; returns the network's weights, and the next random number."""
    network, optimizer, scaler = parts()
    random = [{"cpu": torch.get_rng_state()}]
    state = {"epoch": 1, "step": 5, "best": 0.25, "best_epoch": 1, "best_clean": None, "seen": 40}
    state |= {"bad": [(3, "cut"), (3, "cut")], "seconds": 12.5, "block_rows": 0}
    held = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "model": network.state_dict()}
    torch.save({**state, **held, "random": random, "world_size": 1, **changes}, path)
    return network.state_dict(), torch.rand(1)


def test_a_file_of_an_earlier_version_is_read_and_written_alike(tmp_path):
    weights, drawn = earlier_file(tmp_path / "resume.pt")
    torch.manual_seed(5)
    network, optimizer, scaler = parts()
    file, state = ResumeFile(tmp_path, network, optimizer, scaler, ALONE), State()
    file.load(state, data_of(0), RECIPE)
    assert torch.rand(1) == drawn and all(torch.equal(network.state_dict()[name], weights[name]) for name in weights)
    assert (state.epoch, state.step, state.best, state.best_epoch, state.best_clean) == (1, 5, 0.25, 1, None)
    assert state.seen == 40 and state.bad == [(3, "cut"), (3, "cut")] and 12.5 <= state.seconds < 60
    before = torch.load(tmp_path / "resume.pt")
    file.save(state)
    after = torch.load(tmp_path / "resume.pt")
    assert set(after) == {*before, "work"} and after["seconds"] >= 12.5
    for name in ("epoch", "step", "best", "best_epoch", "best_clean", "seen", "bad", "block_rows", "world_size"):
        assert after[name] == before[name] and type(after[name]) is type(before[name])
    for own, other in zip(after["optimizer"]["state"].values(), before["optimizer"]["state"].values(), strict=True):
        assert set(own) == set(other) == {"step", "grad_sum_sq", "s", "x0"}
        assert all(torch.equal(torch.as_tensor(own[key]), torch.as_tensor(other[key])) for key in own)
    file.remove()
    assert not file.exists()


@pytest.mark.parametrize(("saved", "now"), [(0, 2048), (2048, 0), (None, 2048)])
def test_another_order_of_images_is_said(tmp_path, capsys, saved, now):
    earlier_file(tmp_path / "resume.pt", block_rows=saved)
    if saved is None:  # of a version that did not know of packed images
        content = torch.load(tmp_path / "resume.pt")
        del content["block_rows"]
        torch.save(content, tmp_path / "resume.pt")
    state = State()
    ResumeFile(tmp_path, *parts(), ALONE).load(state, data_of(now), RECIPE)
    assert "warning: images were packed or unpacked since the run was cut" in capsys.readouterr().out
    assert state.block_rows == now


def test_without_a_file_a_run_begins(tmp_path):
    state = State()
    ResumeFile(tmp_path, *parts(), ALONE).load(state, data_of(7), RECIPE)
    assert (state.epoch, state.step, state.best, state.block_rows) == (0, 0, -1.0, 7)
    began = time.monotonic()
    assert State(started=began - 3).seconds >= 3

"""Images of many kinds, and a clock that a test sets."""

from types import SimpleNamespace

import pytest
from fixtures.ensembles import save_images

from kutils.ensemble import costs, image_cache, predict, within_budget


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path / "images")
    return image_cache.find_images(tmp_path / "images")


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on only where a test says so: `clock.now += seconds`."""
    state = SimpleNamespace(now=1000.0)
    for module in (costs, within_budget, predict):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: state.now))
    return state

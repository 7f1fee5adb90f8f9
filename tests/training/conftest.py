"""Runs are trained without drawing the figures of their reports; tests/views looks at those."""

import pytest
from fixtures.forked_python import save_blank
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", save_blank)
    monkeypatch.setenv("BLANK_FIGURES", "1")  # for processes that are forked

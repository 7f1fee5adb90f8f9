"""Progress where every line stays, as in an executed notebook: now and then, with the time left, and little of it."""

import io
import re
import sys

import pytest

from kutils.system import progress

HOUR, PER_SECOND = 3600, 5
VALUES = {"loss": 0.41234, "lr": 1e-4, "images_per_second": 1234.5, "data_wait": 0.034}


@pytest.fixture
def clock(monkeypatch):
    """A clock of our own: [seconds]."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_an_hour_of_training_is_a_line_per_30_seconds_with_the_time_left(clock, capsys):
    total = HOUR * PER_SECOND
    shown = progress.Progress(total)
    for step in range(1, total + 1):
        clock[0] += 1 / PER_SECOND
        shown.show(step, "epoch 1/1", VALUES)
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert 115 <= len(lines) <= 120 and sum(map(len, lines)) < 20_000
    done, left = re.fullmatch(
        r"epoch 1/1, update ([0-9,]+)/18,000: loss 0.4123, lr 1.00e-04, 1234 images/s, 3% waiting for data, "
        r"(..):.. left",
        lines[58],
    ).groups()
    assert abs(int(done.replace(",", "")) / PER_SECOND + 60 * int(left) - HOUR) <= 90


def test_a_line_tells_the_memory_of_a_gpu(clock, capsys):
    shown = progress.Progress(10, gpu_gb=79.6)
    clock[0] += 31
    shown.show(1, "epoch 1/1", VALUES | {"gpu_memory_gb": 61.23})
    assert ", 3% waiting for data, 61.2 of 80 GB, 04:39 left" in capsys.readouterr().out


def test_an_hour_of_other_work_is_a_state_of_the_bar_per_30_seconds(clock, monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    with progress.progress_bar(HOUR * PER_SECOND, "image", "checking") as bar:
        for _ in range(HOUR * PER_SECOND):
            clock[0] += 1 / PER_SECOND
            bar.update(1)
    states = told.getvalue().split("\r")
    assert 100 <= len(states) <= 130 and len(told.getvalue()) < 20_000
    assert "checking:  50%" in told.getvalue() and "[29:34<30:25" in states[60]

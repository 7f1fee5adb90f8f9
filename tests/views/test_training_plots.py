"""Figures of training: what is drawn is what was logged."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from fixtures.figures import texts
from fixtures.finished_runs import RESULT

from kutils.runs.finished import FinishedRun
from kutils.views import training_plots


@pytest.fixture
def metrics(tmp_path):
    """Write metrics.jsonl: 4 updates, 2 epochs; `cut` adds an unfinished last line."""

    def write(scored=True, clean=0.4, cut=False):
        lines = []
        for step, loss, lr in ((1, 0.8, 1e-3), (2, 0.6, 8e-4), (3, 0.5, 4e-4), (4, 0.45, 1e-4)):
            lines.append({"epoch": 1 + (step - 1) // 2, "step": step, "loss": loss, "lr": lr})
            if scored and step % 2 == 0:
                score = {"cosine_similarity": 0.5 + step / 100, "cosine_similarity_clean": clean}
                lines.append({"epoch": step // 2, "step": step, **score})
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + ('{"epoch": 3, "st' if cut else ""))
        return path

    return write


def points(line):
    return [tuple(point) for point in line.get_xydata().tolist()]


@pytest.fixture
def make_run(tiny_recipe, tmp_path):
    """A run of `updates` updates whose loss falls from 1 and whose score rises to `score`."""

    def make(name, updates=20, score=0.6):
        steps = range(1, updates + 1)
        metrics = [{"step": step, "loss": 1 / step, "images_per_second": 100.0, "data_wait": 0.1} for step in steps]
        metrics.insert(updates // 2, {"step": updates // 2, "cosine_similarity": score / 2})
        metrics.append({"step": updates, "cosine_similarity": score})
        return FinishedRun(tmp_path / name, tiny_recipe(), replace(RESULT, updates=updates), {}, metrics)

    return make


def test_a_learning_curve_shows_the_lines_of_the_file(metrics):
    figure = training_plots.learning_curve(metrics(cut=True), baseline=0.3)
    loss, rate, score = figure.axes
    assert points(loss.lines[0]) == [(1, 0.8), (2, 0.6), (3, 0.5), (4, 0.45)]
    assert points(rate.lines[0])[-1] == (4, 1e-4) and rate.get_yscale() == "log"
    assert points(score.lines[0]) == [(2, 0.52), (4, 0.54)]
    assert points(score.lines[1]) == [(2, 0.4), (4, 0.4)]
    assert score.lines[2].get_ydata() == [0.3, 0.3]
    labels = [text.get_text() for text in score.get_legend().get_texts()]
    assert labels == [
        "all rows: best 0.5400 (epoch 2)",
        "rows without a similar training prompt: best 0.4000 (epoch 1)",
        "mean prompt: 0.3000",
    ]
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_a_learning_curve_without_clean_rows_or_before_the_first_epoch_ends(metrics):
    assert len(training_plots.learning_curve(metrics(clean=None)).axes[2].lines) == 1
    assert "no epoch is finished yet" in texts(training_plots.learning_curve(metrics(scored=False)))


def test_many_log_intervals_are_smoothed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"epoch": 1, "step": step, "loss": float(step % 2), "lr": 1e-3} for step in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    smooth = training_plots.learning_curve(path).axes[0].lines[1]
    assert points(smooth)[:2] == [(1, 0.5), (2, 0.5)]  # the mean of an interval and the one before it


def test_curves_lie_on_each_other_however_long_a_run_is(make_run):
    figure = training_plots.run_curves([make_run("vit_fold0", 20, 0.6), make_run("vit_fold1", 200, 0.7)])
    losses, scores = figure.axes
    short, long = scores.lines
    np.testing.assert_allclose(short.get_xydata(), [[0.5, 0.3], [1, 0.6]])
    np.testing.assert_allclose(long.get_xydata(), [[0.5, 0.35], [1, 0.7]])
    assert [line.get_label() for line in losses.lines] == ["vit_fold0", "vit_fold1"]
    np.testing.assert_allclose(losses.lines[0].get_ydata(), 1 / np.arange(1, 21))
    assert losses.lines[1].get_ydata()[-1] == pytest.approx(np.mean(1 / np.arange(195, 201)))  # of six log lines
    assert short.get_color() == long.get_color() and short.get_linestyle() != long.get_linestyle()
    with pytest.raises(ValueError, match="no runs"):
        training_plots.run_curves([])


def test_throughput_of_a_run(make_run):
    figure = training_plots.throughput(make_run("vit_fold0"))
    speed, waiting = figure.axes
    assert speed.lines[0].get_ydata().tolist() == [100] * 20 and waiting.lines[0].get_ydata().tolist() == [0.1] * 20
    assert speed.get_ylabel() == "images per second" and speed.get_ylim()[0] == 0
    assert waiting.get_legend().get_texts()[0].get_text() == "mean: 10.0%"
    run = make_run("vit_fold0")
    run.metrics.clear()
    with pytest.raises(ValueError, match="no log_lines"):
        training_plots.throughput(run)


def test_nothing_to_draw_leaves_no_figure():
    with pytest.raises(ValueError, match=r"/no/metrics\.jsonl has no logged update"):
        training_plots.learning_curve("/no/metrics.jsonl")
    assert plt.get_fignums() == []

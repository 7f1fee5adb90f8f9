"""Figures of several models: what is drawn is what was measured."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fixtures.finished_runs import RESULT

from kutils.runs.finished import FinishedRun
from kutils.views import figures, score_plots, training_plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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
    with pytest.raises(figures.PlotError, match="no runs"):
        training_plots.run_curves([])


def test_slices_are_dots_beside_the_mean():
    words = pd.DataFrame({"images": [1000, 20], "a": [0.5, 0.7], "b": [0.4, 0.8]}, index=["1 to 5", "6 or more"])
    one = pd.DataFrame({"images": [1020], "a": [0.6], "b": [0.5]}, index=["shapes"])
    figure = score_plots.slice_scores({"words": words, "source": one}, {"a": 0.6, "b": 0.5})
    (axes,) = figure.axes  # one slice tells nothing apart
    assert axes.get_title() == "by words"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 to 5 (1,000)", "6 or more (20)"]
    lines = {line.get_label(): line for line in axes.lines}
    dots = lines["a: 0.6000 over all rows (line)"]
    assert dots.get_xdata().tolist() == [0.5, 0.7] and dots.get_ydata().tolist() == pytest.approx([-0.125, 0.875])
    assert [
        line.get_xdata()[0] for line in axes.lines if line not in (dots, lines["b: 0.5000 over all rows (line)"])
    ] == [
        0.6,
        0.5,
    ]
    with pytest.raises(figures.PlotError, match="all rows into one slice"):
        score_plots.slice_scores({"source": one}, {"a": 0.6, "b": 0.5})


def test_throughput_of_a_run(make_run):
    figure = training_plots.throughput(make_run("vit_fold0"))
    speed, waiting = figure.axes
    assert speed.lines[0].get_ydata().tolist() == [100] * 20 and waiting.lines[0].get_ydata().tolist() == [0.1] * 20
    assert speed.get_ylabel() == "images per second" and speed.get_ylim()[0] == 0
    assert waiting.get_legend().get_texts()[0].get_text() == "mean: 10.0%"
    run = make_run("vit_fold0")
    run.metrics.clear()
    with pytest.raises(figures.PlotError, match="no log_lines"):
        training_plots.throughput(run)


def test_dots_of_two_stages_of_a_model_look_different():
    names = ["tiny_vit_stage1_fold0", "tiny_vit_stage2_fold0"]
    words = pd.DataFrame({"images": [9, 9]} | {name: [0.5, 0.7] for name in names}, index=["1 to 5", "6 or more"])
    (axes,) = score_plots.slice_scores({"words": words}, dict.fromkeys(names, 0.6)).axes
    dots = [line for line in axes.lines if line.get_marker() != "None"]
    assert [line.get_fillstyle() for line in dots] == ["full", "none"]
    assert len({line.get_color() for line in dots}) == 1

"""Figures of numbers: bars, dots and histograms are what was measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fixtures.figures import texts
from matplotlib.colors import to_hex

from kutils.views import figures, model_style, score_plots


def test_a_histogram_says_shares_and_what_lies_above_the_threshold():
    sets = {"random pairs": [0.0, 0.1, 0.2, 0.9], "nearest": [0.7, 0.8]}
    axes = score_plots.similarity_histogram(sets, threshold=0.7).axes[0]
    assert [patch.get_data().values.sum() for patch in axes.patches] == pytest.approx([1, 1])
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "--"]  # the sets, the threshold
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "random pairs (4): mean 0.300, 25.0% at or above 0.7",
        "nearest (2): mean 0.750, 100.0% at or above 0.7",
    ]
    assert score_plots.similarity_histogram([0.5, 0.5]).axes[0].get_legend().get_texts()[0].get_text() == "mean 0.500"


def test_score_bars_begin_at_the_baseline():
    axes = score_plots.bar_scores({"a": 0.7, "b": 0.5}, baseline=0.55, title="Scores").axes[0]
    assert [patch.get_x() for patch in axes.patches] == [0.55, 0.55]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.15, -0.05])
    assert [text.get_text() for text in axes.texts] == ["0.7000 (+0.1500)", "0.5000 (-0.0500)"]
    assert axes.get_title() == "Scores" and [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_weights_and_timing_bars_begin_at_zero():
    for axes in (
        score_plots.bar_weights({"a": 0.6, "b": -0.1}).axes[0],
        score_plots.bar_times({"a": 0.6, "b": -0.1}, "T").axes[0],
    ):
        assert [patch.get_width() for patch in axes.patches] == [0.6, -0.1]
        assert {patch.get_x() for patch in axes.patches} == {0}


def test_counts_are_drawn_in_order():
    figure = score_plots.bar_counts({"kept": 12345, "too short": 7}, title="What was read", unit="entries")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [12345, 7]
    assert {"12,345", "7", "kept", "too short", "entries"} <= set(texts(figure))
    with pytest.raises(ValueError, match="no values"):
        score_plots.bar_counts({}, title="", unit="")


def test_bars_and_sets_that_are_models_have_their_colors():
    names = ["tiny_vit", "eva02_large_clsonly", "mean prompt"]
    for figure in (
        score_plots.bar_weights(dict.fromkeys(names, 0.5)),
        score_plots.bar_times(dict.fromkeys(names, 1234.5), "T"),
    ):
        assert [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches] == list(
            map(model_style.model_color, names)
        )
    assert "1,234" in texts(figure)
    lines = score_plots.similarity_histogram({name: [0.1, 0.2] for name in names}, threshold=0.15).axes[0].lines
    assert [line.get_color() for line in lines[:3]] == list(map(model_style.model_color, names))


def test_benchmark_ratios_are_drawn_by_their_logarithm():
    entries = [
        {"name": "fast", "unit": "s", "ours": 0.1, "reference": 10.0, "ratio": 100.0},
        {"name": "slow", "unit": "images/s", "ours": 5.0, "reference": 10.0, "ratio": 0.5},
        {"name": "alone", "unit": "MB", "ours": 5.0, "reference": None, "ratio": None},
    ]
    figure = score_plots.benchmark_ratios(entries)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([2, np.log10(0.5)])
    assert "fast: 100 (0.1, 10 s)" in figures.alt_text(figure) and "alone" not in figures.alt_text(figure)
    with pytest.raises(ValueError):
        score_plots.benchmark_ratios(entries[2:])


def test_slices_are_dots_beside_the_mean():
    words = pd.DataFrame({"images": [1000, 20], "a": [0.5, 0.7], "b": [0.4, 0.8]}, index=["1 to 5", "6 or more"])
    one = pd.DataFrame({"images": [1020], "a": [0.6], "b": [0.5]}, index=["shapes"])
    figure = score_plots.slice_scores({"words": words, "source": one}, {"a": 0.6, "b": 0.5})
    (axes,) = figure.axes  # one slice tells nothing apart
    assert axes.get_title() == "by words"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 to 5 (1,000)", "6 or more (20)"]
    assert figures.alt_text(figure) == (
        "by words: mean cosine similarity (in brackets: images). "
        "a: 0.6000 over all rows (line); b: 0.5000 over all rows (line)."
    )
    lines = {line.get_label(): line for line in axes.lines}
    dots = lines["a: 0.6000 over all rows (line)"]
    assert dots.get_xdata().tolist() == [0.5, 0.7] and dots.get_ydata().tolist() == pytest.approx([-0.125, 0.875])
    assert [
        line.get_xdata()[0] for line in axes.lines if line not in (dots, lines["b: 0.5000 over all rows (line)"])
    ] == [
        0.6,
        0.5,
    ]
    with pytest.raises(ValueError, match="all rows into one slice"):
        score_plots.slice_scores({"source": one}, {"a": 0.6, "b": 0.5})


def test_dots_of_two_stages_of_a_model_look_different():
    names = ["tiny_vit_stage1_fold0", "tiny_vit_stage2_fold0"]
    words = pd.DataFrame({"images": [9, 9]} | {name: [0.5, 0.7] for name in names}, index=["1 to 5", "6 or more"])
    (axes,) = score_plots.slice_scores({"words": words}, dict.fromkeys(names, 0.6)).axes
    dots = [line for line in axes.lines if line.get_marker() != "None"]
    assert [line.get_fillstyle() for line in dots] == ["full", "none"]
    assert len({line.get_color() for line in dots}) == 1


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: score_plots.similarity_histogram([]), "no cosines"),
        (lambda: score_plots.similarity_histogram({}), "no cosines"),
        (lambda: score_plots.similarity_histogram([0.1, float("nan")]), "cosines number 1 is not finite"),
        (lambda: score_plots.bar_scores({}), "no values"),
        (lambda: score_plots.bar_weights({"a": float("inf")}), "values number 0 is not finite"),
        (lambda: score_plots.bar_times({}, "T"), "no values"),
    ],
)
def test_nothing_to_draw_is_said_and_leaves_no_figure(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
    assert plt.get_fignums() == []

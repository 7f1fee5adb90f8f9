"""Figures of data sets: what is drawn is what was counted."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from fixtures.figures import texts
from PIL import Image

from kutils.views import data_plots


def test_prompt_lengths_counts_words():
    figure = data_plots.prompt_lengths(["one", "two words", "two  words", "now three words"])
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights[:3] == [1, 2, 1] and sum(heights) == 4
    assert figure.axes[0].get_title() == "4 prompts, the longest of 3 words"


def test_image_statistics_are_those_of_the_gray_levels(tmp_path):
    halves = np.zeros((10, 10, 3), np.uint8)
    halves[:5] = 200  # mean 100, standard deviation 100
    for name, pixels in (("a", halves), ("b", np.full((10, 10, 3), 40, np.uint8))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    brightness, contrast = data_plots.image_statistics(sorted(tmp_path.glob("*.png"))).axes
    assert [axes.get_legend().get_texts()[0].get_text() for axes in (brightness, contrast)] == ["mean: 70", "mean: 50"]
    filled = [patch.get_x() for patch in contrast.patches if patch.get_height() == 1]
    assert filled == [0.0, 100.0]  # bins of 4 levels
    with pytest.raises(ValueError, match="no images"):
        data_plots.image_statistics([])


def test_a_fold_report_is_drawn():
    folds = [{"fold": fold, "rows": 10 * fold, "leaked_share": fold / 10} for fold in range(1, 4)]
    sizes, leaks = data_plots.fold_report({"rows": 60, "threshold": 0.7, "leaked_share": 0.2, "folds": folds}).axes
    assert [patch.get_height() for patch in sizes.patches] == [10, 20, 30]
    assert [patch.get_height() for patch in leaks.patches] == [0.1, 0.2, 0.3]
    assert sizes.lines[0].get_ydata()[0] == 20 and leaks.lines[0].get_ydata()[0] == 0.2


def test_images_are_counted_over_all_data_sets():
    reports = [
        {"images_per_prompt": {"1": 5, "3": 2}, "images": {"sizes": {"512 x 512": 9, "8 x 9": 2}}},
        {"images_per_prompt": {"1": 1, "8": 3, "40": 4}, "images": {"sizes": {"512 x 512": 100}}},
    ]
    prompts, sizes = data_plots.image_counts(reports).axes
    assert [bar.get_height() for bar in prompts.patches] == [6, 2, 7]
    assert [bar.get_width() for bar in sizes.patches] == [109, 2]
    assert {"1", "3", "8 or more", "512 x 512", "8 x 9", "15 prompts", "111 images"} <= set(texts(prompts.figure))
    for none in ([], [{"images_per_prompt": {"1": 5}, "images": {"sizes": {}}}]):
        with pytest.raises(ValueError, match="nothing to draw"):
            data_plots.image_counts(none)


def test_a_map_tells_ten_labels_apart():
    points = np.random.default_rng(0).normal(size=(200, 2))
    folds = [str(number % 10) for number in range(200)]
    sources = [f"source {min(number, 11)}" for number in range(200)]  # eleven of one, and one of 189
    figure = data_plots.prompt_map(points, {"fold": folds, "source": sources}, "Prompts, $x$")
    by_fold, by_source = figure.axes
    assert figure.get_suptitle() == "Prompts, $x$" and by_fold.get_title() == "fold"
    told = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert told[0] == [f"{fold} (20)" for fold in range(10)]
    assert told[1][0] == "source 11 (189)" and told[1][-1] == "other (2)" and len(told[1]) == 11
    np.testing.assert_array_equal(by_fold.collections[3].get_offsets(), points[3::10])
    looks = {(tuple(each.get_facecolor()[0]), len(each.get_paths()[0].vertices)) for each in by_fold.collections}
    assert len(looks) == 10  # by colour and marker
    assert by_source.collections[-1].get_zorder() < by_source.collections[0].get_zorder()
    assert len(by_fold.get_xticks()) == 0 and "axes have no" in figure.get_supxlabel()
    one = data_plots.prompt_map(
        points, {"$y": ["$\\frac"] * 9 + ["-1"] * 191}, "One"
    )  # drawn as a formula, it would raise
    assert "_a (9)" in texts(data_plots.prompt_map(points, {"fold": ["_a"] * 9 + ["b"] * 191}, "Two"))
    assert one.axes[0].get_title() == "$y" and {"$\\frac (9)", "-1 (191)"} <= set(texts(one))


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: data_plots.prompt_lengths([]), "no prompts"),
        (lambda: data_plots.fold_report({}), "no folds"),
        (lambda: data_plots.prompt_map(np.zeros((0, 2)), {"fold": []}, ""), "no points"),
        (lambda: data_plots.prompt_map(np.zeros((3, 2)), {}, ""), "no labels"),
        (lambda: data_plots.prompt_map(np.zeros((3, 2)), {"fold": ["0"]}, ""), "3 points, 1 labels fold"),
        (
            lambda: data_plots.prompt_map(np.full((3, 2), np.nan), {"fold": list("abc")}, ""),
            "coordinates number 0 is not finite",
        ),
    ],
)
def test_nothing_to_draw_is_said_and_leaves_no_figure(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
    assert plt.get_fignums() == []

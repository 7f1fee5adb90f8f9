"""Figures: what they draw is what they were given, prompts are text and not formulas, nothing to draw is said."""

import io
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from kutils.views import data_plots, figures, image_plots, model_style, score_plots, training_plots
from kutils.views.figures import PlotError


@pytest.fixture(autouse=True)
def no_figure_left_open():
    yield
    plt.close("all")


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


def texts(figure):
    """Every text of a figure, as it is drawn."""
    figure.canvas.draw()
    return [item.get_text() for item in figure.findobj(lambda artist: hasattr(artist, "get_text")) if item.get_text()]


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


def test_prompts_are_text_not_formulas(tmp_path):
    prompt = r"a sign: $x_1^2$ and $\frac{1}{2}, 100 % of \alpha"  # a wrong formula would raise when it is drawn
    Image.new("RGB", (60, 20), "red").save(tmp_path / "a_$b$.png")
    drawn = [tmp_path / "a_$b$.png"]
    assert figures.wrap(prompt) in texts(image_plots.image_grid(drawn, [prompt]))
    shown = texts(image_plots.best_and_worst(drawn, [prompt], [prompt], [0.5]))
    assert any(f"nearest: {prompt}" in text.replace("\n", " ") for text in shown)
    assert prompt in " ".join(texts(score_plots.bar_scores({prompt: 0.5}))).replace("\n", " ")


def test_long_prompts_are_wrapped_and_cut():
    figure = image_plots.image_grid([np.zeros((8, 8, 3), np.uint8)], ["word " * 300])
    lines = figure.axes[0].get_title().split("\n")
    assert len(lines) == 5 and max(map(len, lines)) <= figures.LINE_CHARACTERS and lines[-1].endswith(" ...")


def test_a_grid_takes_arrays_pictures_and_paths_of_any_mode(tmp_path):
    rgba = Image.new("RGBA", (900, 300), (0, 0, 255, 255))
    rgba.convert("RGB").convert("P").save(tmp_path / "palette.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [np.full((4, 4, 3), 7, np.uint8), rgba, tmp_path / "palette.png", tmp_path / "broken.png", "/no/where.png"]
    figure = image_plots.image_grid(images, list("abcde"), columns=3)
    assert len(figure.axes) == 6
    shown = [axes.images[0].get_array() for axes in figure.axes[:3]]
    assert shown[0].shape == (4, 4, 3) and (shown[0] == 7).all()
    assert shown[1].shape == shown[2].shape == (image_plots.TILE_PX // 3, image_plots.TILE_PX, 3)
    assert tuple(shown[2][64, 192]) == (0, 0, 255)
    wide = figure.axes[1]  # in a square: what is above and below the image is the page
    assert wide.get_xlim() == (-0.5, 383.5) and wide.get_ylim() == (255.5, -128.5)
    assert not figure.axes[3].images and not figure.axes[4].images
    told = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert told == ["broken.png: UnidentifiedImageError", "where.png: FileNotFoundError"]


def test_an_image_of_too_many_pixels_is_told(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "huge.png: DecompressionBombError" in texts(image_plots.image_grid([tmp_path / "huge.png"], ["a"]))


def test_best_and_worst_are_found_in_any_order():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(6)]
    names = list("abcdef")
    figure = image_plots.best_and_worst(images, names, names, [0.3, 0.9, 0.1, 0.5, 0.8, 0.2], count=2)
    drawn = [(axes.get_title(), int(axes.images[0].get_array()[0, 0, 0])) for axes in figure.axes]
    assert drawn == [
        ("best: cosine 0.900", 1),
        ("best: cosine 0.800", 4),
        ("worst: cosine 0.100", 2),
        ("worst: cosine 0.200", 5),
    ]
    assert figure.axes[2].texts[0].get_text() == "true: c\nnearest: c"
    few = image_plots.best_and_worst(images[:3], names[:3], names[:3], [0.3, 0.9, 0.1], count=4)  # none is shown twice
    assert [axes.get_title() for axes in few.axes] == [
        "best: cosine 0.900",
        "best: cosine 0.300",
        "worst: cosine 0.100",
        "",
    ]


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
    with pytest.raises(PlotError, match="no images"):
        data_plots.image_statistics([])


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


def test_a_fold_report_is_drawn():
    folds = [{"fold": fold, "rows": 10 * fold, "leaked_share": fold / 10} for fold in range(1, 4)]
    sizes, leaks = data_plots.fold_report({"rows": 60, "threshold": 0.7, "leaked_share": 0.2, "folds": folds}).axes
    assert [patch.get_height() for patch in sizes.patches] == [10, 20, 30]
    assert [patch.get_height() for patch in leaks.patches] == [0.1, 0.2, 0.3]
    assert sizes.lines[0].get_ydata()[0] == 20 and leaks.lines[0].get_ydata()[0] == 0.2


def test_score_bars_begin_at_the_baseline():
    axes = score_plots.bar_scores({"a": 0.7, "b": 0.5}, baseline=0.55, title="Scores").axes[0]
    assert [patch.get_x() for patch in axes.patches] == [0.55, 0.55]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([0.15, -0.05])
    assert [text.get_text() for text in axes.texts] == ["0.7000 (+0.1500)", "0.5000 (-0.0500)"]
    assert axes.get_title() == "Scores" and [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_weights_and_timing_bars_begin_at_zero():
    for axes in (
        score_plots.weights({"a": 0.6, "b": -0.1}).axes[0],
        score_plots.timing({"a": 0.6, "b": -0.1}, "T").axes[0],
    ):
        assert [patch.get_width() for patch in axes.patches] == [0.6, -0.1]
        assert {patch.get_x() for patch in axes.patches} == {0}


def test_saving_closes(tmp_path):
    before = len(plt.get_fignums())
    figures.save(score_plots.weights({"a": 1.0}), tmp_path / "new" / "w.png")
    assert Image.open(tmp_path / "new" / "w.png").width > 400 and len(plt.get_fignums()) == before


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: training_plots.learning_curve("/no/metrics.jsonl"), "/no/metrics.jsonl has no logged update"),
        (lambda: image_plots.image_grid([], []), "no images and no titles"),
        (lambda: image_plots.image_grid([np.zeros((2, 2, 3), np.uint8)], []), "1 images, 0 titles"),
        (lambda: image_plots.best_and_worst([], [], [], []), "nothing to draw"),
        (lambda: data_plots.prompt_lengths([]), "no prompts"),
        (lambda: score_plots.similarity_histogram([]), "no cosines"),
        (lambda: score_plots.similarity_histogram({}), "no cosines"),
        (lambda: score_plots.similarity_histogram([0.1, float("nan")]), "cosines number 1 is not finite"),
        (lambda: data_plots.fold_report({}), "no folds"),
        (lambda: score_plots.bar_scores({}), "no values"),
        (lambda: score_plots.weights({"a": float("inf")}), "values number 0 is not finite"),
        (lambda: score_plots.timing({}), "no values"),
        (lambda: data_plots.prompt_map(np.zeros((0, 2)), [], ""), "no points"),
        (lambda: data_plots.prompt_map(np.zeros((3, 2)), {}, ""), "no labels"),
        (lambda: data_plots.prompt_map(np.zeros((3, 2)), {"fold": ["0"]}, ""), "3 points, 1 labels fold"),
        (lambda: data_plots.prompt_map(np.zeros((3, 3)), list("abc"), ""), r"points are \[n, 2\], not \[3, 3\]"),
        (lambda: data_plots.prompt_map(np.full((3, 2), np.nan), list("abc"), ""), "coordinates number 0 is not finite"),
        (lambda: image_plots.ranked_images([], [], []), "no images and no prompts"),
        (lambda: image_plots.pairs([], [], []), "no images and no prompts"),
        (lambda: image_plots.disagreement([], [], []), "no images and no texts"),
        (lambda: image_plots.disagreement(["a.png"], [{}], [0.5]), "image number 0 has no model's text"),
        (lambda: image_plots.neighbours("a.png", {}), "no models"),
        (
            lambda: image_plots.neighbours("a.png", {"vit": pd.DataFrame({"cosine": [], "prompt": []})}),
            "no cosines of vit",
        ),
    ],
)
def test_nothing_to_draw_is_said_and_leaves_no_figure(draw, said):
    with pytest.raises(PlotError, match=said):
        draw()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("text", ["short", "a long prompt of many words " * 20])
@pytest.mark.parametrize("count", [1, 4])
def test_no_text_of_best_and_worst_lies_on_the_row_below(text, count):
    images = [np.zeros((8, 8, 3), np.uint8)] * 8
    figure = image_plots.best_and_worst(images, [text] * 8, [text] * 8, np.linspace(0, 1, 8), count=count)
    figure.canvas.draw()
    above, below = figure.axes[:count], figure.axes[count:]
    lowest = min(axes.texts[0].get_window_extent().y0 for axes in above)
    assert lowest > max(axes.title.get_window_extent().y1 for axes in below)
    assert min(axes.texts[0].get_window_extent().y0 for axes in below) >= 0


def test_an_error_of_a_figure_is_shown_and_costs_nothing(capsys):
    with figures.errors_shown():
        score_plots.timing({})
    assert "PlotError" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), figures.errors_shown():
        raise KeyboardInterrupt


def test_counts_are_drawn_in_order():
    figure = score_plots.counts({"kept": 12345, "too short": 7}, title="What was read", unit="entries")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [12345, 7]
    assert {"12,345", "7", "kept", "too short", "entries"} <= set(texts(figure))
    with pytest.raises(PlotError, match="no values"):
        score_plots.counts({}, title="", unit="")


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
        with pytest.raises(PlotError, match="nothing to draw"):
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
    one = data_plots.prompt_map(points, ["$\\frac"] * 9 + ["-1"] * 191, "One")  # drawn as a formula, it would raise
    assert "_a (9)" in texts(data_plots.prompt_map(points, ["_a"] * 9 + ["b"] * 191, "Two"))
    assert one.axes[0].get_title() == "One" and {"$\\frac (9)", "-1 (191)"} <= set(texts(one))


def test_search_results_are_best_first():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(3)]
    figure = image_plots.ranked_images(images, ["a", "b $x", "c"], [0.2, 0.9, 0.5], columns=2, title="cost: $5 or $6")
    assert [axes.get_title() for axes in figure.axes] == ["1: cosine 0.900", "2: cosine 0.500", "3: cosine 0.200", ""]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes[:3]] == [1, 2, 0]
    assert [axes.texts[0].get_text() for axes in figure.axes[:3]] == ["b $x", "c", "a"]
    assert "cost: $5 or $6" in texts(figure)
    long = image_plots.ranked_images(images, list("abc"), [0.2, 0.9, 0.5], title="a long question " * 20)
    assert long.get_suptitle().count("\n") == 1 and long.get_suptitle().endswith(" ...")
    assert Image.open(io.BytesIO(figures.png(long, 100))).width < 1.2 * 100 * long.get_size_inches()[0]


def test_pairs_lie_side_by_side():
    tile = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    figure = image_plots.pairs([(tile[0], tile[1]), (tile[2], tile[3])], [("a", "A"), ("b", "B")], [0.95, 0.9])
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes] == [0, 1, 2, 3]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["a", "A", "b", "B"]
    assert [axes.get_title() for axes in figure.axes] == [
        "pair 1: cosine 0.950",
        "pair 1",
        "pair 2: cosine 0.900",
        "pair 2",
    ]
    assert len({axes.get_subplotspec().rowspan.start for axes in figure.axes}) == 1


@pytest.mark.parametrize("prompt", ["short", "a long prompt of many words " * 20])
def test_models_disagree_in_their_colors(prompt):
    images = [np.full((8, 8, 3), number, np.uint8) for number in range(8)]
    said = [{"tiny_vit": f"{number} {prompt}", "ensemble": "a cat for $5"} for number in range(8)]
    figure = image_plots.disagreement(images, said, [0.8, 0.1, 0.5, 0.6, 0.7, 0.75, 0.9, 0.95])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["agreement 0.100", "agreement 0.500"]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes[:2]] == [1, 2]
    drawn = [(text.get_text(), text.get_color()) for text in figure.axes[0].texts if text.get_text()]
    assert drawn[0] == ("tiny_vit", model_style.model_color("tiny_vit")) and drawn[1][0].startswith(f"1 {prompt[:5]}")
    assert drawn[2:] == [("ensemble", model_style.model_color("ensemble")), ("a cat for $5", figures.TEXT)]
    figure.canvas.draw()
    extents = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(extents))
    assert extents[-1].y0 > max(axes.title.get_window_extent().y1 for axes in figure.axes[4:])


def test_neighbours_are_bars_in_the_colors_of_the_models():
    tables = {
        model: pd.DataFrame({"rank": [1, 2], "cosine": cosines, "prompt": ["a cat for $5", "a dog for $6"]})
        for model, cosines in (("tiny_vit", [0.8, 0.5]), ("tiny_convnext", [0.7, -0.1]))
    }
    image, first, second = image_plots.neighbours(np.zeros((4, 4, 3), np.uint8), tables).axes
    assert len(image.images) == 1 and (first.get_title(), second.get_title()) == ("tiny_vit", "tiny_convnext")
    assert [bar.get_width() for bar in (*first.patches, *second.patches)] == [0.8, 0.5, 0.7, -0.1]
    assert {to_hex(bar.get_facecolor()) for bar in second.patches} == {model_style.model_color("tiny_convnext")}
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[0] == -0.1
    assert {"a cat for $5", "a dog for $6", "0.800", "-0.100"} <= set(texts(first.figure))


def test_names_of_models_are_text_not_formulas():
    name, image = "run_$\\frac_fold0", np.zeros((4, 4, 3), np.uint8)  # a wrong formula would raise
    assert name in texts(image_plots.neighbours(image, {name: pd.DataFrame({"cosine": [0.5], "prompt": ["a"]})}))
    assert name in texts(image_plots.disagreement([image], [{name: "a"}], [0.5]))


def test_bars_and_sets_that_are_models_have_their_colors():
    names = ["tiny_vit", "eva02_large_clsonly", "mean prompt"]
    for figure in (
        score_plots.weights(dict.fromkeys(names, 0.5)),
        score_plots.timing(dict.fromkeys(names, 1234.5)),
    ):
        assert [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches] == list(
            map(model_style.model_color, names)
        )
    assert "1,234" in texts(figure)
    lines = score_plots.similarity_histogram({name: [0.1, 0.2] for name in names}, threshold=0.15).axes[0].lines
    assert [line.get_color() for line in lines[:3]] == list(map(model_style.model_color, names))


def test_predictions_stay_in_the_order_given(tmp_path):
    images = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    figure = image_plots.predictions(
        images, ["a cat", "a dog", "a cow"], ["a lion", "a wolf", "a bull"], [0.1, 0.9, 0.5]
    )
    assert [axes.get_title() for axes in figure.axes] == ["cosine 0.100", "cosine 0.900", "cosine 0.500"]
    assert figure.axes[1].texts[0].get_text() == "true: a dog\nnearest: a wolf"
    with pytest.raises(figures.PlotError, match="3 images, 2 prompts"):
        image_plots.predictions(images, ["a", "b"], ["a", "b", "c"], [0.1, 0.2, 0.3])


def test_benchmark_ratios_are_drawn_by_their_logarithm():
    entries = [
        {"name": "fast", "unit": "s", "ours": 0.1, "reference": 10.0, "ratio": 100.0},
        {"name": "slow", "unit": "images/s", "ours": 5.0, "reference": 10.0, "ratio": 0.5},
        {"name": "alone", "unit": "MB", "ours": 5.0, "reference": None, "ratio": None},
    ]
    figure = score_plots.benchmark_ratios(entries)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([2, np.log10(0.5)])
    assert "fast: 100 (0.1, 10 s)" in figures.alt_text(figure) and "alone" not in figures.alt_text(figure)
    with pytest.raises(PlotError):
        score_plots.benchmark_ratios(entries[2:])

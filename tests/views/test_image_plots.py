"""Figures of images: each where it belongs, prompts are text and not formulas."""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fixtures.figures import texts
from matplotlib.colors import to_hex
from PIL import Image

from kutils.views import figures, image_plots, model_style, score_plots


def predictions(images, prompts, nearest, cosines):
    return pd.DataFrame({"image": images, "prompt": prompts, "nearest": nearest, "cosine": cosines})


def test_prompts_are_text_not_formulas(tmp_path):
    prompt = r"a sign: $x_1^2$ and $\frac{1}{2}, 100 % of \alpha"  # a wrong formula would raise when it is drawn
    Image.new("RGB", (60, 20), "red").save(tmp_path / "a_$b$.png")
    drawn = [tmp_path / "a_$b$.png"]
    assert figures.wrap(prompt) in texts(image_plots.image_grid(drawn, [prompt]))
    shown = texts(image_plots.predictions(predictions(drawn, [prompt], [prompt], [0.5])))
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


def test_the_best_stand_above_the_worst():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(5)]
    rows = predictions(images, list("abcde"), list("ABCDE"), [0.9, 0.8, 0.7, 0.1, 0.2])
    figure = image_plots.best_and_worst(rows.assign(best=[True, True, True, False, False]))
    drawn = [(axes.get_title(), int(axes.images[0].get_array()[0, 0, 0])) for axes in figure.axes if axes.images]
    assert drawn == [
        ("best: cosine 0.900", 0),
        ("best: cosine 0.800", 1),
        ("best: cosine 0.700", 2),
        ("worst: cosine 0.100", 3),
        ("worst: cosine 0.200", 4),
    ]
    assert figure.axes[3].texts[0].get_text() == "true: d\nnearest: D" and not figure.axes[5].images
    rows_of_axes = [axes.get_subplotspec().rowspan.start for axes in figure.axes]
    assert rows_of_axes == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("text", ["short", "a long prompt of many words " * 20])
@pytest.mark.parametrize("count", [1, 4])
def test_no_text_of_best_and_worst_lies_on_the_row_below(text, count):
    number = 2 * count
    rows = predictions([np.zeros((8, 8, 3), np.uint8)] * number, [text] * number, [text] * number, [0.5] * number)
    figure = image_plots.best_and_worst(rows.assign(best=[True] * count + [False] * count))
    figure.canvas.draw()
    above, below = figure.axes[:count], figure.axes[count:]
    lowest = min(axes.texts[0].get_window_extent().y0 for axes in above)
    assert lowest > max(axes.title.get_window_extent().y1 for axes in below)
    assert min(axes.texts[0].get_window_extent().y0 for axes in below) >= 0


def test_search_results_have_ranks():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(3)]
    rows = pd.DataFrame({"image": images, "prompt": ["b $x", "c", "a"], "cosine": [0.9, 0.5, 0.2]})
    figure = image_plots.ranked_images(rows, columns=2, title="cost: $5 or $6")
    assert [axes.get_title() for axes in figure.axes] == ["1: cosine 0.900", "2: cosine 0.500", "3: cosine 0.200", ""]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes[:3]] == [0, 1, 2]
    assert [axes.texts[0].get_text() for axes in figure.axes[:3]] == ["b $x", "c", "a"]
    assert "cost: $5 or $6" in texts(figure)
    long = image_plots.ranked_images(rows, title="a long question " * 20)
    assert long.get_suptitle().count("\n") == 1 and long.get_suptitle().endswith(" ...")
    assert Image.open(io.BytesIO(figures.png(long, 100))).width < 1.2 * 100 * long.get_size_inches()[0]


def test_pairs_lie_side_by_side():
    tile = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    rows = {"image_a": tile[::2], "image_b": tile[1::2], "prompt_a": ["a", "b"], "prompt_b": ["A", "B"]}
    figure = image_plots.pairs(pd.DataFrame(rows | {"cosine": [0.95, 0.9]}))
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
    nearest = [{"tiny_vit": f"{number} {prompt}", "ensemble": "a cat for $5"} for number in range(8)]
    agreement = [0.1, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95]
    figure = image_plots.disagreement(
        pd.DataFrame({"image": images, "nearest_by_model": nearest, "agreement": agreement})
    )
    assert [axes.get_title() for axes in figure.axes[:2]] == ["agreement 0.100", "agreement 0.500"]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes[:2]] == [0, 1]
    drawn = [(text.get_text(), text.get_color()) for text in figure.axes[0].texts if text.get_text()]
    assert drawn[0] == ("tiny_vit", model_style.model_color("tiny_vit")) and drawn[1][0].startswith(f"0 {prompt[:5]}")
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
    assert name in texts(
        image_plots.disagreement(
            pd.DataFrame({"image": [image], "nearest_by_model": [{name: "a"}], "agreement": [0.5]})
        )
    )


def test_predictions_stay_in_the_order_given(tmp_path):
    images = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    rows = predictions(images, ["a cat", "a dog", "a cow"], ["a lion", "a wolf", "a bull"], [0.1, 0.9, 0.5])
    figure = image_plots.predictions(rows)
    assert [axes.get_title() for axes in figure.axes] == ["cosine 0.100", "cosine 0.900", "cosine 0.500"]
    assert figure.axes[1].texts[0].get_text() == "true: a dog\nnearest: a wolf"
    with pytest.raises(ValueError, match="cosines number 1 is not finite"):
        image_plots.predictions(rows.assign(cosine=[0.1, np.nan, 0.5]))


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: image_plots.image_grid([], []), "no images and no titles"),
        (lambda: image_plots.image_grid([np.zeros((2, 2, 3), np.uint8)], []), "1 images, 0 titles"),
        (lambda: image_plots.predictions(pd.DataFrame({"cosine": []})), "no cosines"),
        (lambda: image_plots.best_and_worst(pd.DataFrame({"cosine": []})), "no cosines"),
        (lambda: image_plots.ranked_images(pd.DataFrame({"cosine": []})), "no cosines"),
        (lambda: image_plots.pairs(pd.DataFrame({"cosine": []})), "no cosines"),
        (lambda: image_plots.disagreement(pd.DataFrame({"agreement": []})), "no agreements"),
        (lambda: image_plots.neighbours("a.png", {}), "no models"),
        (
            lambda: image_plots.neighbours("a.png", {"vit": pd.DataFrame({"cosine": [], "prompt": []})}),
            "no cosines of vit",
        ),
    ],
)
def test_nothing_to_draw_is_said_and_leaves_no_figure(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
    assert plt.get_fignums() == []

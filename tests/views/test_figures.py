"""What figures are made of: colours for every eye and page, models that keep theirs, and a text in every figure."""

import base64
import io
import json
import subprocess
import warnings

import matplotlib.pyplot as plt
import nbclient
import nbconvert
import nbformat
import numpy as np
import pytest
from fixtures.forked_python import REAL_PYTHON
from matplotlib import colors
from PIL import Image

from kutils.views import data_plots, figures, image_plots, model_style, score_plots

ALL = [*figures.COLORS, figures.GREY]
# Machado, Oliveira, Fernandes 2009, for the whole loss of one kind of cones, on linear RGB
EYES = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])


def linear(color: str) -> np.ndarray:
    rgb = np.array(colors.to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """WCAG 2: 21 for black on white, 1 for the same color."""
    low, high = sorted(float(XYZ[1] @ linear(color)) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB under D65."""
    x, y, z = np.cbrt(XYZ @ rgb.clip(0, 1) / XYZ.sum(1))  # none is so dark that the cube root does not hold
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_and_lab_are_the_known_ones():
    assert contrast("white", "black") == pytest.approx(21) and contrast("red", "red") == 1
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)  # as WebAIM's checker says
    np.testing.assert_allclose(lab(linear("red")), [53.24, 80.09, 67.2], atol=0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#111111", "#0d1117"])
def test_colors_read_on_light_and_dark_pages(page):
    assert contrast(figures.TEXT, page) >= 4
    assert {color for color in ALL if contrast(color, page) < 3} == set()


@pytest.mark.parametrize("eye", EYES)
def test_colors_stay_apart_for_every_eye(eye):
    seen = [lab(np.array(EYES[eye]) @ linear(color)) for color in ALL]
    distances = [np.linalg.norm(a - b) for number, a in enumerate(seen) for b in seen[:number]]
    assert min(distances) > 17 and len(distances) == 21


def test_a_model_keeps_its_color_from_recipe_to_run():
    for family, names in {
        "convnext_large": ("convnext_large_24gb_stage2", "convnext_large_3data_input384_bs32_lr1e-4_fold3"),
        "eva02_large_clsonly": ("eva02_large_clsonly_24gb_stage1_fold0",),
        "tiny_vit": ("tiny_vit_stage2_fold0", "tiny_vit fold 0"),
        "ensemble": ("ensemble_tiny", "family weights"),
        "mine": ("mine_stage2_fold1", "mine_24gb_stage1"),
    }.items():
        assert {model_style.model_color(name) for name in names} == {model_style.model_color(family)}
        assert {model_style.model_style(name).marker for name in names} == {model_style.model_style(family).marker}
    together = ("convnext_large", "convnext_xxlarge", "vit_large", "eva02_large_clsavg", "eva02_large_clsonly")
    looks = [model_style.model_style(name) for name in (*together, "ensemble", "mean prompt")]
    assert len({look.color for look in looks}) == len({look.marker for look in looks}) == 7
    assert model_style.model_color("tiny_vit") != model_style.model_color("tiny_convnext")
    assert (
        model_style.model_style("vit_larger").marker != model_style.model_style("vit_large").marker
    )  # not of that family


def test_models_of_one_figure_look_different():
    names = [f"tiny_vit_stage1_fold{fold}" for fold in range(10)] + [
        "tiny_vit_stage2_fold0",
        "tiny_convnext_stage1_fold0",
    ]
    styles = model_style.model_styles(names)
    assert list(styles) == names and len(set(styles.values())) == len(names)
    assert styles["tiny_vit_stage1_fold0"] == model_style.model_style("tiny_vit_stage1_fold0")
    assert {styles[name].color for name in names[:-1]} == {model_style.model_color("tiny_vit")}


def test_a_stage_is_a_line_style():
    names = ("tiny_vit", "tiny_vit_stage1_fold0", "vit_large_8data_noaug_5epoch_fold1", "x_8data_noaug_1epoch_fold6")
    assert [model_style.model_style(name).linestyle for name in names] == ["-", "-", "--", "-."]
    assert [model_style.model_style(f"m_stage{stage}").linestyle for stage in (1, 2, 3, 4)] == ["-", "--", "-.", "-"]


def test_an_unknown_model_has_the_same_color_in_another_session():
    code = "from kutils.views.model_style import model_color; print(model_color('swin_base'), model_color('beit'))"
    told = {subprocess.run([REAL_PYTHON, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert told == {f"{model_style.model_color('swin_base')} {model_style.model_color('beit')}\n"}


def test_importing_and_drawing_change_no_setting():
    before = dict(plt.rcParams)
    figure = score_plots.bar_weights({"a": 1.0})
    figure.canvas.draw()
    assert dict(plt.rcParams) == before
    axes = figure.axes[0]
    drawn = [axes.title, axes.xaxis.label, *axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert {text.get_color() for text in drawn} == {figures.TEXT}
    assert figure.get_facecolor()[3] == axes.get_facecolor()[3] == 0


def test_a_character_without_a_font_gives_no_warning(monkeypatch, caplog):
    known = {name for name in figures.CJK_FONTS if name in figures.INSTALLED}
    assert figures.STYLE["font.family"][0] == "sans-serif" and set(figures.STYLE["font.family"][1:]) == known
    monkeypatch.setitem(figures.STYLE, "font.family", ["DejaVu Sans"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = image_plots.image_grid([np.zeros((8, 8, 3), np.uint8)], ["\u732b \u72ac"])
        figure.canvas.draw()
        figures.png(figure)
    assert "findfont" not in caplog.text


def test_the_text_of_a_figure_holds_its_numbers():
    text = figures.alt_text(score_plots.bar_scores({"tiny_vit": 0.7, "ensemble": 0.75}, baseline=0.55, title="Fold 0"))
    assert text == (
        "Fold 0: mean cosine similarity; bars begin at the mean prompt's 0.5500; "
        "tiny_vit: 0.7000 (+0.1500); ensemble: 0.7500 (+0.2000)."
    )
    text = figures.alt_text(data_plots.prompt_lengths(["one", "two words", "two words", "three words here"]))
    assert text == (
        "4 prompts, the longest of 3 words: prompts against words per prompt; median: 2; 95% have at most 3."
    )
    grid = image_plots.image_grid([np.zeros((8, 8, 3), np.uint8)] * 2, ["a cat", "a long prompt " * 200])
    text = figures.alt_text(grid)
    assert text.startswith("2 images. a cat. a long prompt ") and len(text) <= figures.MOST_ALT_CHARACTERS
    assert figures.alt_text(figures.new_axes()[0]) == "An empty figure."


def test_a_png_holds_its_text_and_is_transparent():
    picture = Image.open(io.BytesIO(figures.png(score_plots.bar_weights({"tiny_vit": 1.0}))))
    assert picture.info["Description"] == "Ensemble weights: weight; tiny_vit: 1.000."
    assert picture.convert("RGBA").getpixel((1, 1))[3] == 0


def test_a_large_grid_becomes_a_small_file():
    noise = np.random.default_rng(0).integers(0, 255, (384, 384, 3), np.uint8)
    large = figures.png(image_plots.image_grid([noise] * 8, ["noise"] * 8))
    assert len(large) <= figures.MOST_BYTES
    sharp = Image.open(io.BytesIO(figures.png(score_plots.bar_weights({"a": 1.0}))))
    assert round(sharp.info["dpi"][0]) == figures.DPI and Image.open(io.BytesIO(large)).info["dpi"][0] < figures.DPI


def test_an_error_of_a_figure_is_shown_and_costs_nothing(capsys):
    with figures.print_errors():
        score_plots.bar_times({}, "T")
    assert "ValueError" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), figures.print_errors():
        raise KeyboardInterrupt


SHOWN = {
    "at the end of a cell": "score_plots.bar_weights({'tiny_vit': 1.0})",
    "silenced": "score_plots.bar_weights({'tiny_vit': 1.0});",
    "open": "with figures.print_errors():\n    figure = score_plots.bar_weights({'tiny_vit': 1.0})",
    "displayed": "display(score_plots.bar_weights({'tiny_vit': 1.0}))",
    "displayed and more": "display(score_plots.bar_weights({'tiny_vit': 1.0}))\n1",
}


def test_a_notebook_shows_a_figure_once_and_with_its_text():
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in ("from kutils.views import figures, score_plots", *SHOWN.values())
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    told = "Ensemble weights: weight; tiny_vit: 1.000."
    for how, cell in zip(SHOWN, notebook.cells[1:], strict=True):
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == 1, how
        assert pictures[0].metadata == {"image/png": {"alt": told, "width": pictures[0].metadata["image/png"].width}}
        picture = Image.open(io.BytesIO(base64.b64decode(pictures[0].data["image/png"])))
        assert picture.width == pytest.approx(pictures[0].metadata["image/png"].width * 1.6, abs=2)
    page, _ = nbconvert.HTMLExporter(template_name="classic").from_notebook_node(notebook)
    assert page.count(f'alt="{told}"') == len(SHOWN)
    assert "needs_background" not in json.dumps(notebook)

"""Gives the views of `explore` their controls, and draws them again when a control changes.

Results are plain outputs of the notebook, which the controls replace: an executed notebook shows them anywhere, also
where no kernel runs.
"""

import contextlib
import html
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Markdown, display
from PIL import ExifTags, Image, ImageOps

from kutils.views import html_tables, image_plots, score_plots
from kutils.views.figures import DescribedFigure

STATIC = "The controls of this view ({}) work where a kernel runs; its parameters choose what is shown here."


def live(show: Callable[..., Sequence], *others: ipywidgets.Widget, **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Show what `show` returns for the controls' values, now and whenever one of them changes.

    Args:
        show: called with the value of each control; returns figures, tables or texts, always as many. What it raises
            for the first values is raised here; later an error is told beside the controls, which stay usable.
        others: controls that stand beside and have callbacks of their own.
        controls: by the name of the argument.
    Returns: what holds the controls, and below them what the last change took or what was wrong with it.
    """
    told = ipywidgets.HTML()
    box = ipywidgets.VBox([ipywidgets.HBox([*controls.values(), *others], layout={"flex_flow": "row wrap"}), told])
    view = {
        "application/vnd.jupyter.widget-view+json": {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
    }
    labels = ", ".join(control.description or name for name, control in controls.items())
    display(view | {"text/plain": STATIC.format(labels)}, raw=True)
    handles = [display(data, metadata=metadata, raw=True, display_id=True) for data, metadata in drawn(show, controls)]

    def update(change) -> None:
        began = time.monotonic()
        told.value = "<em>working ...</em>"
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                items = drawn(show, controls)
            told.value = f"<em>{time.monotonic() - began:.1f} s</em> {escape(printed.getvalue())}"
        except Exception as error:  # any: a callback's traceback would be lost, and the view stay at "working ..."
            plt.close("all")
            items = [({"text/plain": ""}, {})] * len(handles)
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            told.value = f"<strong>{escape(f'{kind}{error}')}</strong>"
        for handle, (data, metadata) in zip(handles, items, strict=True):
            handle.update(data, metadata=metadata, raw=True)

    for control in controls.values():
        control.observe(update, names="value")
    return box


def drawn(show: Callable[..., Sequence], controls: Mapping[str, ipywidgets.Widget]) -> list[tuple[dict, dict]]:
    """Data and metadata, by MIME type, of what is shown for the controls' values; figures are closed."""
    bundles = []
    for item in show(**{name: control.value for name, control in controls.items()}):
        if isinstance(item, DescribedFigure):  # which would display itself, and could not be replaced
            bundles.append(item._repr_mimebundle_())
            plt.close(item)
        else:
            bundles.append(get_ipython().display_formatter.format(item))
    return bundles


def escape(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


# ---------------------------------------------------------------- controls


def text(label: str, value: str, hint: str = "") -> ipywidgets.Text:
    """A line of text that takes effect by Enter, or when it is left."""
    return ipywidgets.Text(
        value, description=label, placeholder=hint, continuous_update=False, layout={"width": "28em"}
    )


def choice(label: str, options: Sequence, value) -> ipywidgets.Dropdown:
    """One of several; options are values or (shown text, value). ValueError for a value that is none of them."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    if value not in values:
        raise ValueError(f"{label} is {value!r}; it can be {', '.join(map(str, values))}")
    return ipywidgets.Dropdown(options=options, value=value, description=label)


def number(label: str, value: int, most: int) -> ipywidgets.IntSlider:
    """1 to `most`; takes effect when the handle is released."""
    return ipywidgets.IntSlider(value, 1, max(value, most), description=label, continuous_update=False)


# ---------------------------------------------------------------- views


def search(explored, words: str, fold: int = -1, count: int = 10) -> None:
    """Words, and the images of the nearest prompts; `explored` is an `exploration.Exploration`, here and below.

    Args:
        words: looked for first.
        fold: whose prompts; -1: of all.
        count: prompts that are shown.
    """

    def show(words: str, fold: int, count: int) -> Sequence:
        title = f"nearest prompts to {words!r}" + (f" in fold {fold}" if fold >= 0 else "")
        return [image_plots.ranked_images(explored.search(words, fold, count), title=title)]

    folds = [("all", -1), *((str(fold), fold) for fold in range(10))]
    live(
        show,
        words=text("search", words, "words, then Enter"),
        fold=choice("fold", folds, fold),
        count=number("images", count, 30),
    )


def examples(explored, fold: int, model: str = "", sort: str = "worst", count: int = 8) -> None:
    """Validation images with their prompts and what a model took them for, in a chosen order."""

    def show(fold: int, model: str, sort: str, count: int) -> Sequence:
        shown = explored.examples(fold, model, sort, count)
        return [image_plots.predictions(shown), html_tables.show(shown[["prompt", "nearest", "cosine", "agreement"]])]

    def offer(change) -> None:
        """The models of another fold are others; none where its runs are of other data, which the view then says."""
        with contextlib.suppress(ValueError):
            models.options = model_options(change["new"])

    def model_options(fold: int) -> list[tuple[str, str]]:
        return [("the best", ""), *((name, name) for name in explored.validated(fold).predictions)]

    folds, models = choice("fold", explored.validated_folds(), fold), choice("model", model_options(fold), model)
    folds.observe(offer, names="value")
    orders, counts = choice("sort", explored.sorts, sort), number("images", count, 24)
    live(show, fold=folds, model=models, sort=orders, count=counts)


def slice_scores(explored, fold: int, by: str = "words") -> None:
    """Mean cosine of every model over parts of the validation images."""

    def show(by: str) -> Sequence:
        scores, means = explored.slice_scores(fold, by), explored.validated(fold).mean_scores().to_dict()
        if len(scores) == 1:
            return [Markdown(f"All images are of one slice by {by}."), html_tables.show(scores)]
        return [score_plots.slice_scores({by: scores}, means), html_tables.show(scores)]

    live(show, by=choice("slice", explored.slicings, by))


def own_image(explored, fold: int, image: str = "", count: int = 8) -> None:
    """An image of one's own, by its path or uploaded: the nearest prompts to what each model and the ensemble see.

    Args:
        fold: whose models are asked.
        image: a file; empty: the validation image of fold `fold` that the models agree on least.
        count: prompts per model.
    """
    folder = Path(tempfile.mkdtemp(prefix="kutils_"))
    shown = Path(image) if image else explored.examples(fold, sort="disagreement", count=1)["image"][0]
    if not isinstance(shown, Path):  # packed, and not a file
        shown.save(folder / "example.png")
        shown = folder / "example.png"
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="upload")
    path = text("path", str(shown), "an image file")

    def show(path: str, count: int) -> Sequence:
        seen = upright(Path(path), folder)
        return [image_plots.neighbours(seen, explored.ask(seen, fold, count))]

    def take(change) -> None:
        """An upload becomes a file, whose path is asked about."""
        for file in change["new"]:
            target = Path(tempfile.mkdtemp(dir=folder)) / Path(file["name"]).name  # the name of a former one, maybe
            target.write_bytes(file["content"])
            path.value = str(target)

    upload.observe(take, names="value")
    live(show, upload, path=path, count=number("prompts", count, 20))


def upright(path: Path, folder: Path) -> Path:
    """The image file, or a copy in `folder` that is turned as its EXIF record asks: a photo may lie on its side.

    Data sets are read without that, as the competition's were.
    """
    with Image.open(path) as image:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return path
        target = Path(tempfile.mkdtemp(dir=folder)) / f"{path.stem}.png"
        ImageOps.exif_transpose(image).save(target)
        return target

"""Gives the views of `explore` their controls, and draws them again when a control changes.

Results are plain outputs of the notebook, and a control replaces them. So an executed notebook shows them where no
kernel runs, too.
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

from kutils.training import slices
from kutils.views import html_tables, image_plots, score_plots
from kutils.views.exploration import SORTS, Exploration
from kutils.views.figures import DescribedFigure

STATIC = "The controls of this view ({}) work where a kernel runs; its parameters choose what is shown here."


def live(show: Callable[..., Sequence], *others: ipywidgets.Widget, **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Show what `show` returns for the controls' values, now and whenever one of them changes.

    Args:
        show: called with the value of each control; returns figures, tables or texts, the same number at each call. An
            error at the first call is raised; a later one is shown below the controls, which stay usable.
        others: controls beside these, with callbacks of their own.
        controls: by the name of the argument of `show`.
    Returns: a box of the controls and a line below them, with the time that the last change took, or its error.
    """
    message = ipywidgets.HTML()
    box = ipywidgets.VBox([ipywidgets.HBox([*controls.values(), *others], layout={"flex_flow": "row wrap"}), message])
    view = {
        "application/vnd.jupyter.widget-view+json": {"model_id": box.model_id, "version_major": 2, "version_minor": 0}
    }
    labels = ", ".join(control.description or name for name, control in controls.items())
    display(view | {"text/plain": STATIC.format(labels)}, raw=True)
    handles = [
        display(data, metadata=metadata, raw=True, display_id=True) for data, metadata in bundles(show, controls)
    ]

    def update(change) -> None:
        started = time.monotonic()
        message.value = "<em>working ...</em>"
        try:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                items = bundles(show, controls)
            message.value = f"<em>{time.monotonic() - started:.1f} s</em> {escape(printed.getvalue())}"
        except Exception as error:  # any: a callback's traceback would be lost, and the view stay at "working ..."
            plt.close("all")
            items = [({"text/plain": ""}, {})] * len(handles)
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            message.value = f"<strong>{escape(f'{kind}{error}')}</strong>"
        for handle, (data, metadata) in zip(handles, items, strict=True):
            handle.update(data, metadata=metadata, raw=True)

    for control in controls.values():
        control.observe(update, names="value")
    return box


def bundles(show: Callable[..., Sequence], controls: Mapping[str, ipywidgets.Widget]) -> list[tuple[dict, dict]]:
    """Data and metadata, by MIME type, of each item that `show` returns for the controls' values; closes figures."""
    items = []
    for item in show(**{name: control.value for name, control in controls.items()}):
        if isinstance(item, DescribedFigure):  # it would display itself, and a control could not replace it
            items.append(item._repr_mimebundle_())
            plt.close(item)
        else:
            items.append(get_ipython().display_formatter.format(item))
    return items


def escape(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


# ---------------------------------------------------------------- controls


def text_field(label: str, value: str, hint: str = "") -> ipywidgets.Text:
    """A line of text; it takes effect by Enter, or when the focus leaves it."""
    return ipywidgets.Text(
        value, description=label, placeholder=hint, continuous_update=False, layout={"width": "28em"}
    )


def dropdown(label: str, options: Sequence, value) -> ipywidgets.Dropdown:
    """One of several options, each a value or (text, value). Raises ValueError for a value that is none of them."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    if value not in values:
        raise ValueError(f"{label} is {value!r}; it can be {', '.join(map(str, values))}")
    return ipywidgets.Dropdown(options=options, value=value, description=label)


def slider(label: str, value: int, most: int) -> ipywidgets.IntSlider:
    """A number from 1 to `most`; it takes effect when the handle is released."""
    return ipywidgets.IntSlider(value, 1, max(value, most), description=label, continuous_update=False)


# ---------------------------------------------------------------- views


def search(explored: Exploration, words: str, fold: int = -1, count: int = 10) -> None:
    """Search prompts by words: images of the nearest prompts.

    Args:
        fold: search among the prompts of this fold; -1: among all.
    """

    def show(words: str, fold: int, count: int) -> Sequence:
        title = f"nearest prompts to {words!r}" + (f" in fold {fold}" if fold >= 0 else "")
        return [image_plots.ranked_images(explored.search(words, fold, count), title=title)]

    folds = [("all", -1), *((str(fold), fold) for fold in range(10))]
    live(
        show,
        words=text_field("search", words, "words, then Enter"),
        fold=dropdown("fold", folds, fold),
        count=slider("images", count, 30),
    )


def examples(explored: Exploration, fold: int, model: str = "", sort: str = "worst", count: int = 8) -> None:
    """Show validation images with their prompts and the prompts nearest to a model's predictions, sorted."""

    def show(fold: int, model: str, sort: str, count: int) -> Sequence:
        rows = explored.examples(fold, model, sort, count)
        return [image_plots.predictions(rows), html_tables.show(rows[["prompt", "nearest", "cosine", "agreement"]])]

    def update_models(change) -> None:
        """Offer the models of another fold; where its runs are of other data, `show` raises the error."""
        with contextlib.suppress(ValueError):
            models.options = model_options(change["new"])

    def model_options(fold: int) -> list[tuple[str, str]]:
        return [("the best", ""), *((name, name) for name in explored.validated(fold).predictions)]

    folds, models = dropdown("fold", explored.validated_folds(), fold), dropdown("model", model_options(fold), model)
    folds.observe(update_models, names="value")
    live(show, fold=folds, model=models, sort=dropdown("sort", SORTS, sort), count=slider("images", count, 24))


def browse_slices(explored: Exploration, fold: int, by: str = "words") -> None:
    """Show the mean cosine of every model over parts of the validation images."""

    def show(by: str) -> Sequence:
        scores, means = explored.slice_scores(fold, by), explored.validated(fold).scores()
        if len(scores) == 1:
            return [Markdown(f"All images are of one slice by {by}."), html_tables.show(scores)]
        return [score_plots.slice_scores({by: scores}, means), html_tables.show(scores)]

    live(show, by=dropdown("slice", slices.slicings(explored.data), by))


def own_image(explored: Exploration, fold: int, image: str = "", count: int = 8) -> None:
    """Show the prompts nearest to what each model and the ensemble predict for an image, and how sure each is.

    Args:
        image: a file; empty: the validation image of fold `fold` that the models agree on least.
    """
    folder = Path(tempfile.mkdtemp(prefix="kutils_"))
    first = Path(image) if image else explored.examples(fold, sort="disagreement", count=1)["image"][0]
    if not isinstance(first, Path):  # a packed image is no file
        first.save(folder / "example.png")
        first = folder / "example.png"
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="upload")
    path = text_field("path", str(first), "an image file")

    def show(path: str, count: int) -> Sequence:
        turned = upright(Path(path), folder)
        tables, sure = explored.ask(turned, fold, count)
        return [image_plots.neighbours(turned, tables), html_tables.show(sure)]

    def save_upload(change) -> None:
        """Write an uploaded file into a folder of its own, since two may have one name; its path starts `show`."""
        for file in change["new"]:
            target = Path(tempfile.mkdtemp(dir=folder)) / Path(file["name"]).name
            target.write_bytes(file["content"])
            path.value = str(target)

    upload.observe(save_upload, names="value")
    live(show, upload, path=path, count=slider("prompts", count, 20))


def upright(path: Path, folder: Path) -> Path:
    """The path itself, or that of a copy in `folder`, turned as the photo's EXIF record asks.

    Images of data sets are read without turning, as the competition's were.
    """
    with Image.open(path) as image:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return path
        target = Path(tempfile.mkdtemp(dir=folder)) / f"{path.stem}.png"
        ImageOps.exif_transpose(image).save(target)
        return target

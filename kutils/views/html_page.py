"""Fills the HTML templates of `views/templates/`: texts are escaped, and pictures are embedded in the page."""

import base64
import functools
import hashlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib.pyplot as plt
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from kutils.views import figures

CSS_PX, DPI = 80, 140  # of an inch of a figure: its size in the page, and its pixels, for screens with more of them
THUMBNAIL_PX = 320
TEMPLATES = Path(__file__).with_name("templates")


class Picture(NamedTuple):
    """A picture for a page."""

    uri: str  # with all of its content
    width: int  # in CSS pixels


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, and the filters that they use."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = jinja2.Environment(loader=loader, **options)
    templates.filters |= {
        "number": "{:,}".format,
        "score": "{:.4f}".format,
        "short_score": "{:.3f}".format,
        "duration": duration,
        "no_math": no_math,
        "one_line": lambda text: Markup(" ".join(escape(text).split())),
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    templates.globals |= {"source": source, "picture": picture}
    return templates


def fill_template(template: str, **values) -> Markup:
    """Fill a template; every text among the values is escaped, unless it is HTML by its type, Markup."""
    return Markup(environment().get_template(template).render(values).strip() + "\n")


def source(name: str) -> Markup:
    """A style sheet or a script of templates/, as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def no_math(text: str) -> Markup:
    """Escape a text so that JupyterLab does not typeset parts between $ and $, or \\( and \\), as formulas."""
    return Markup(re.sub(r"[$\\]", r"<span>\g<0></span>", str(escape(text))))


def picture(figure: Figure) -> Picture:
    """A figure as a PNG; it is closed."""
    content, width = figures.png(figure, DPI), round(CSS_PX * figure.get_size_inches()[0])
    plt.close(figure)
    return Picture(data_uri(content, "png"), width)


def thumbnail(image: Image.Image) -> str:
    """A photo as a small WebP file: its data URI."""
    image, content = image.convert("RGB"), io.BytesIO()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    image.save(content, "WEBP", quality=80)
    return data_uri(content.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

"""Writes one HTML page with its figures and images inside, readable in light and dark, on any screen."""

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from kutils.views import figures, html_tables

CSS_PX, DPI = 80, 140  # of an inch of a figure: shown, and drawn, for screens of more pixels
THUMBNAIL_PX = 320
STYLE = """<style>
:root { color-scheme: light dark; --text: light-dark(#1c1e21, #e4e6e9); --page: light-dark(#fff, #16181c);
  --faint: color-mix(in srgb, var(--text) 65%, transparent); --line: color-mix(in srgb, var(--text) 18%, transparent);
  --good: #1e8550; --bad: #d55e00; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  background: var(--page); color: var(--text); }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 0.6rem; }
p { max-width: 48rem; }
a { color: inherit; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; padding: 0; }
summary { cursor: pointer; }
.faint, figcaption { color: var(--faint); }
.note { border-left: 4px solid var(--bad); padding: 0.1rem 0 0.1rem 0.8rem; overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.8rem; margin: 1.4rem 0; }
.numbers div { border: 1px solid var(--line); border-radius: 0.6rem; padding: 0.7rem 1rem; }
.numbers dt { color: var(--faint); font-size: 0.875rem; }
.numbers dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.tables { display: flex; flex-wrap: wrap; gap: 0.8rem 3rem; }
.tables .scroll { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { font-size: 0.9rem; }
img { display: block; height: auto; border-radius: 0.4rem; }
.plot img { max-width: 100%; min-width: min(36rem, var(--width)); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 44%), 1fr)); gap: 1.4rem; }
.gallery figure { margin: 0; }
.gallery img { width: 100%; }
.gallery figcaption { margin-top: 0.4rem; overflow-wrap: anywhere; }
.gallery p { margin: 0.15rem 0; color: var(--text); }
.gallery .lost { aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 0.4rem; padding: 1rem; }
.good, .bad { color: var(--text); border-left: 4px solid var(--good); padding-left: 0.5rem; }
.bad { border-color: var(--bad); }
pre { overflow-x: auto; padding: 0.8rem 1rem; border: 1px solid var(--line); border-radius: 0.6rem; }
pre, table.sortable { font-size: 0.9rem; }
@media print { nav { display: none; } }
</style>"""


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """The whole file.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: title (plain text) -> HTML; an empty one is left out.
    """
    script = html_tables.SCRIPT
    digest = hashlib.sha256(script.removeprefix("<script>").removesuffix("</script>").encode()).digest()
    # a prompt could not load or run anything even if it were not escaped
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{base64.b64encode(digest).decode()}'; base-uri 'none'; form-action 'none'"
    )
    shown = {name: content for name, content in sections.items() if content}
    entries = "".join(f"<li><a href='#{anchor(name)}'>{html.escape(name)}</a></li>" for name in shown)
    body = "\n".join(
        f"<section id='{anchor(name)}' aria-labelledby='{anchor(name)}-title'>\n"
        f"<h2 id='{anchor(name)}-title'>{html.escape(name)}</h2>\n{content}\n</section>"
        for name, content in shown.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
{html_tables.STYLE}
{STYLE}
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
{lead}
<nav aria-label="Contents"><ul>{entries}</ul></nav>
</header>
<main>
{body}
</main>
{script}
</body>
</html>
"""


def anchor(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower()).strip("-")


def paragraph(text: str, kind: str = "") -> str:
    """Plain text; kind: "note" for what a reader must not miss, "faint"."""
    return f"<p{f' class={kind!r}' if kind else ''}>{html.escape(text)}</p>"


def numbers(values: Mapping[str, str]) -> str:
    """Name -> value, large."""
    items = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in values.items())
    return f"<dl class='numbers'>{''.join(items)}</dl>"


def commands(lines: Sequence[str]) -> str:
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def scrolling(*tables: str) -> str:
    """Tables that a narrow screen moves sideways instead of the page; reached with the keyboard too."""
    return "".join(
        f"<div class='scroll' role='region' aria-label='Table' tabindex='0'>{table}</div>" for table in tables
    )


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(drawn: Figure, alt: str, caption: str = "") -> str:
    """A figure as a PNG, closed afterwards; `alt` says in words what it shows."""
    content, width_inches = figures.png(drawn, DPI), drawn.get_size_inches()[0]
    plt.close(drawn)
    told = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    width = round(CSS_PX * width_inches)
    image = f"<img src='{data_uri(content, 'png')}' alt='{html.escape(alt)}' width='{width}'>"
    shown = f"<div class='scroll' role='region' aria-label='Figure' tabindex='0'>{image}</div>"
    return f"<figure class='plot' style='--width: {width}px'>{shown}{told}</figure>"


def picture(image: Image.Image | str, alt: str, kind: str, title: str, texts: Sequence[str]) -> str:
    """An image, made small, or what is to be said in its place; kind: "good" or "bad"."""
    if isinstance(image, str):
        shown = f"<div class='lost'>{html.escape(image)}</div>"
    else:
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=80)
        shown = f"<img src='{data_uri(content.getvalue(), 'webp')}' alt='{html.escape(alt)}'>"
    told = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
    return (
        f"<figure>{shown}<figcaption><strong class='{kind}'>{html.escape(title)}</strong>{told}</figcaption></figure>"
    )

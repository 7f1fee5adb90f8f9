"""Writes tables as HTML, which a click on a column's head sorts.

Without scripts, as on a page that shows a notebook and runs nothing, they are plain tables.
"""

import html
import re
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

Format = str | Callable[[object], str]

# the class is named twice to outweigh what JupyterLab says of all tables
STYLE = """<style>
table.sortable { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5em 0; }
table.sortable caption { text-align: left; font-weight: 600; padding: 0.3em 0; }
table.sortable.sortable :is(th, td) { padding: 0.3em 0.8em; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
table.sortable thead th { border-bottom-color: currentColor; white-space: nowrap; }
table.sortable tbody th { font-weight: inherit; }
table.sortable.sortable .number { text-align: right; }
table.sortable th[aria-sort] { cursor: pointer; }
table.sortable th[aria-sort]::after { content: "\\2195"; opacity: 0.4; padding-left: 0.3em; }
table.sortable th[aria-sort="ascending"]::after { content: "\\2191"; opacity: 1; }
table.sortable th[aria-sort="descending"]::after { content: "\\2193"; opacity: 1; }
</style>"""
# one listener for all tables of a page, however often a notebook brings it along; a cell without a value stays last
SCRIPT = """<script>
(() => {
  if (window.sortableTables) return;
  window.sortableTables = true;
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const sort = (header) => {
    const body = header.closest("table").tBodies[0], column = header.cellIndex;
    const number = header.classList.contains("number");
    const was = header.getAttribute("aria-sort");
    const now = was === "ascending" || (was === "none" && number) ? "descending" : "ascending";  // high scores first
    const sign = now === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isFinite(x) && isFinite(y) ? x - y : x.localeCompare(y));
    };
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", now);
    body.append(...[...body.rows].sort(compare));
  };
  const found = (event) => event.target.closest?.("table.sortable thead th[aria-sort]");
  document.addEventListener("click", (event) => found(event) && sort(found(event)));
  document.addEventListener("keydown", (event) => {
    if (!found(event) || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    sort(found(event));
  });
})();
</script>"""


def sortable(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, caption: str = "") -> str:
    """A table with all that it needs to be sorted, for `IPython.display.HTML`; see `table`."""
    return f"{STYLE}\n{table(frame, formats, caption)}\n{SCRIPT}"


def show(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, caption: str = ""):
    """The sortable table as an object that a notebook displays."""
    from IPython.display import HTML  # not needed by what is not a notebook

    return HTML(sortable(frame, formats, caption))


def table(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, caption: str = "") -> str:
    """An HTML table alone, for a page that holds STYLE and SCRIPT once.

    A click on a column's head, or Enter on it, sorts by that column: numbers and dates by size, ordered categories in
    their order, all else as text, missing values last.

    Args:
        frame: one row of the table per row; the index is the first column unless it only counts.
        formats: column -> a format such as "{:.4f}", or a function of a value; else integers get separators of
            thousands, floats four decimals, and all other values are taken as text.
        caption: above the table.
    Raises: ValueError for a format of a column that is not there, or columns of one name.
    """
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.rename_axis(frame.index.name or "").reset_index()
        first = "th scope='row'"
    else:
        first = "td"
    formats = dict(formats or {})
    unknown = [name for name in formats if name not in frame.columns]
    if unknown or not frame.columns.is_unique:
        told = f"no column {unknown[0]!r}" if unknown else "two columns of one name"
        raise ValueError(f"{told} in a table of {', '.join(map(str, frame.columns))}")
    columns = [
        cells(frame[name], formats.get(name), first if number == 0 else "td")
        for number, name in enumerate(frame.columns)
    ]
    heads = "".join(
        # the attribute keeps JupyterLab's own keys away from a head that has the focus
        f"<th scope='col' aria-sort='none' tabindex='0' data-lm-suppress-shortcuts='true'{kind(frame[name])}>"
        f"{escape(str(name))}</th>"
        for name in frame.columns
    )
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table class='sortable'>{told}\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>"


def escape(text: str) -> str:
    """Text as HTML in which JupyterLab finds no formula: it typesets what lies between $ and $, or \\( and \\)."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(text))


def is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def kind(values: pd.Series) -> str:
    """The attribute of a cell that aligns numbers."""
    return " class='number'" if is_number(values) else ""


def sort_keys(values: pd.Series) -> np.ndarray | None:
    """A number per value to sort by, None where the text says it."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return values.cat.codes.to_numpy() if values.cat.ordered else None
    if pd.api.types.is_datetime64_any_dtype(values):
        return values.astype("int64").to_numpy()
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(np.float64, na_value=np.nan)
    return None


def cells(values: pd.Series, format: Format | None, tag: str) -> list[str]:
    """The cells of one column, escaped."""
    if format is None:
        format = "{:,}" if pd.api.types.is_integer_dtype(values) else "{:.4f}" if is_number(values) else "{}"
    tell = format if callable(format) else format.format
    keys, end = sort_keys(values), tag.split()[0]
    told = []
    for number, value in enumerate(values):
        missing = pd.isna(value)
        key = "" if keys is None else f" data-value='{'' if missing else f'{keys[number]:.17g}'}'"
        told.append(f"<{tag}{kind(values)}{key}>{'' if missing else escape(str(tell(value)))}</{end}>")
    return told

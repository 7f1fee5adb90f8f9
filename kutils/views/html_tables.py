"""Writes HTML tables that are sorted by a click on a column's head.

Without scripts, as in a notebook on GitHub, they are plain tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from kutils.views import html_page

Format = str | Callable[[object], str]
RUN_FORMATS = {"gain": "{:+.4f}", "seconds": "{:,.0f}", "images/s": "{:,.0f}", "waiting": "{:.1%}"}  # of `runs_table`
DIFFERENCE_FORMATS = dict.fromkeys(("difference", "low", "high"), "{:+.4f}") | {"wins": "{:.1%}"}  # of `against_best`


@dataclass(frozen=True)
class Column:
    """A column in the form that the template `table.html` needs."""

    name: str
    tag: str  # of its cells: td, or th for the names of the rows
    is_number: bool
    texts: list[str]
    keys: list[str] | None  # numbers to sort by, "" for a missing value; None: sort by the texts


def show(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, caption: str = ""):
    """A sortable table, with its style and script, as an object that a notebook displays; see `html_table`."""
    from IPython.display import HTML  # not needed by what is not a notebook

    return HTML(str(html_page.fill_template("sortable.html", table=html_table(frame, formats, caption))))


def html_table(frame: pd.DataFrame, formats: Mapping[str, Format] | None = None, caption: str = "") -> Markup:
    """A table alone, for a page that holds `tables.css` and `tables.js` once.

    A click on a column's head, or Enter on it, sorts by that column: numbers and dates by size, ordered categories in
    their order, all else as text, missing values last.

    Args:
        frame: one row of the table per row; the index is the first column unless it only counts.
        formats: column -> a format such as "{:.4f}", or a function of a value; else integers get separators of
            thousands, floats four decimals, and all other values are taken as text.
    Raises: ValueError for a format of a column that is not there, or columns of one name.
    """
    first = "td"
    if not isinstance(frame.index, pd.RangeIndex):
        frame, first = frame.rename_axis(frame.index.name or "").reset_index(), "th"
    formats = formats or {}
    unknown = [name for name in formats if name not in frame.columns]
    if unknown or not frame.columns.is_unique:
        problem = f"no column {unknown[0]!r}" if unknown else "two columns of one name"
        raise ValueError(f"{problem} in a table of {', '.join(map(str, frame.columns))}")
    columns = [
        make_column(frame[name], formats.get(name), "td" if number else first)
        for number, name in enumerate(frame.columns)
    ]
    return html_page.fill_template("table.html", columns=columns, num_rows=len(frame), caption=caption)


def make_column(values: pd.Series, form: Format | None, tag: str) -> Column:
    """Format the values of a column; a missing one becomes an empty cell."""
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if form is None:
        form = "{:,}" if pd.api.types.is_integer_dtype(values) else "{:.4f}" if is_number else "{}"
    as_text = form if callable(form) else form.format
    missing, keys = values.isna(), sort_keys(values)
    return Column(
        str(values.name),
        tag,
        is_number,
        ["" if empty else str(as_text(value)) for value, empty in zip(values, missing, strict=True)],
        keys if keys is None else ["" if empty else f"{k:.17g}" for k, empty in zip(keys, missing, strict=True)],
    )


def sort_keys(values: pd.Series) -> np.ndarray | None:
    """A number per value to sort by; None where the texts are sorted."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return values.cat.codes.to_numpy() if values.cat.ordered else None
    if pd.api.types.is_datetime64_any_dtype(values):
        return values.astype("int64").to_numpy()
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(np.float64, na_value=np.nan)
    return None

"""Sortable tables: what they say, that it is escaped, and that a browser's clicks sort them."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from kutils.views import html_page, html_tables

FRAME = pd.DataFrame(
    {
        "run": ["b <script>alert(1)</script>", "a & b", "c"],
        "score": [0.5, np.nan, 0.61234],
        "rows": [9, 1200, 30],
        "size": pd.Categorical(["large", "small", "small"], ["small", "large"], ordered=True),
    }
)


class Cells(HTMLParser):
    """Texts and attributes of the cells, row by row."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", dict(attributes)])

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th") and data.strip():
            self.rows[-1][-1][0] += data


def texts(row):
    return [text for text, _ in row]


def test_a_table_says_what_the_frame_holds():
    parsed = Cells(html_tables.html_table(FRAME, {"score": "{:.2f}"}, caption="<runs>"))
    head, *rows = parsed.rows
    assert texts(head) == ["run", "score", "rows", "size"]
    assert all(attributes["aria-sort"] == "none" and attributes["tabindex"] == "0" for _, attributes in head)
    assert [texts(row) for row in rows] == [
        ["b <script>alert(1)</script>", "0.50", "9", "large"],
        ["a & b", "", "1,200", "small"],
        ["c", "0.61", "30", "small"],
    ]
    assert [float(row[1][1]["data-value"] or "nan") for row in rows] == pytest.approx(
        [0.5, np.nan, 0.61234], nan_ok=True
    )
    assert [row[3][1]["data-value"] for row in rows] == ["1", "0", "0"]
    assert "script" not in parsed.tags and parsed.tags.count("caption") == 1


def test_an_index_with_names_is_the_first_column():
    frame = FRAME.set_index("run")
    head, *rows = Cells(html_tables.html_table(frame, {"rows": lambda count: f"{count} rows"})).rows
    assert texts(head) == ["run", "score", "rows", "size"]
    assert rows[0][0][1] == {"scope": "row"} and texts(rows[1]) == ["a & b", "", "1200 rows", "small"]
    assert texts(Cells(html_tables.html_table(frame.rename_axis(None))).rows[0]) == ["", "score", "rows", "size"]


def test_a_prompt_is_no_formula():
    """What JupyterLab's MathJax looks for are delimiters within one text, and a tag ends a text."""
    frame = pd.DataFrame({"$a$": [r"$5 or $6, \(x\) & \begin{b}"]})
    page = html_tables.html_table(frame, caption="$c$")
    within = "".join(part.partition(">")[2] + "\n" for part in page.split("<")).splitlines()
    assert "5 or " in within and not any(len(text) > 1 for text in within if "$" in text or "\\" in text)
    assert page.count("<span>$</span>") == 6 and page.count("<span>\\</span>") == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no column 'scores' in a table of run, score, rows, size"):
        html_tables.html_table(FRAME, {"scores": "{:.2f}"})
    with pytest.raises(ValueError, match="two columns of one name in a table of a, a"):
        html_tables.html_table(pd.DataFrame([[1, 2]], columns=["a", "a"]))


def test_a_notebook_shows_it():
    page = html_tables.show(FRAME, caption="runs")._repr_html_()
    assert str(html_tables.html_table(FRAME, caption="runs")) in page
    assert "http" not in page and page.count("<script>") == page.count("<style>") == 1 and "table.sortable" in page


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_clicks_and_keys_sort(tmp_path):
    """Every click's order of the rows is written to the title, which chromium prints with the page."""
    script = """
const order = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[2].textContent).join(" ");
const heads = document.querySelectorAll("thead th");
const told = [];
for (const column of [1, 1, 2, 2, 0, 3]) { heads[column].click(); told.push(order()); }
heads[2].dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
told.push(order(), [...heads].map((head) => head.getAttribute("aria-sort")).join(" "));
document.title = told.join("|");"""
    again = f"<script>{html_page.source('tables.js')}</script>"  # as every table of a notebook brings it along
    page = f"{html_tables.show(FRAME).data}{again}<script>{script}</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset='utf-8'>{page}", encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=300
    )
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title.split("|") == [
        "30 9 1,200",  # scores, highest first, the missing one last
        "9 30 1,200",
        "1,200 30 9",
        "9 30 1,200",
        "1,200 9 30",  # names
        "1,200 30 9",  # sizes, those of one size as they were
        "1,200 30 9",
        "none none descending none",
    ]

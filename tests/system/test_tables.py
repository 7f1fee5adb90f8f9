"""TSV files: quotes are data, bad lines are named, nothing is half-written."""

import gzip
import hashlib

import numpy as np
import pyarrow as pa
import pytest

from kutils.system.tables import folds_hash, holds, read_table, write_table

COLUMNS = ["image", "prompt", "fold"]


def test_quotes_commas_and_accents_survive_a_round_trip(tmp_path):
    prompts = ['a sign that says "open', '"', 'x, y; "z"', "caf\u00e9 \u96ea", " spaces ", "NA", "'"]
    write_table(tmp_path / "a.tsv", {"image": ["a/b.png"] * 7, "prompt": prompts, "fold": [0, -1, 9, 1, 2, 3, 4]})
    table = read_table(tmp_path / "a.tsv", COLUMNS)
    assert table["prompt"].to_pylist() == prompts
    assert table["fold"].to_pylist() == [0, -1, 9, 1, 2, 3, 4]
    assert (tmp_path / "a.tsv").read_text().splitlines()[1] == 'a/b.png\ta sign that says "open\t0'


def test_further_columns_come_along(tmp_path):
    (tmp_path / "a.tsv").write_text("source\tprompt\nme\thello\n")
    assert read_table(tmp_path / "a.tsv", ["prompt"]).to_pylist() == [{"source": "me", "prompt": "hello"}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("image\tprompt\nx\ty\n", "lacks the column fold"),
        ("image\tprompt\tfold\nx\ty\t1\nx\ty\n", "line 3 has 2 columns, the header has 3"),
        ("image\tprompt\tfold\nx\ty\t1\n\nx\ty\t1\n", "line 3 is empty"),
        ("image\tprompt\tfold\nx\ty\t10\n", "line 2 has fold '10'"),
        ("image\tprompt\tfold\nx\ty\t1\nx\ty\tone\n", "line 3 has fold 'one'"),
        ("image\tprompt\tfold\nx\ty\r0\t1\n", "line 2 holds a carriage return"),
        ("image\tprompt\tprompt\tfold\nx\ty\tz\t1\n", "names a column twice"),
        ("", "lacks the columns image, prompt, fold"),
    ],
)
def test_a_bad_table_is_refused_with_file_and_line(tmp_path, body, said):
    path = tmp_path / "bad.tsv"
    path.write_text(body, newline="")
    with pytest.raises(ValueError, match=said) as caught:
        read_table(path, COLUMNS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("image\tprompt\tfold\nx\ty\t1\n".encode("utf-16"), "text in UTF-16; save it as UTF-8"),
        ("image\tprompt\tfold\nx\ty\t1\n".encode("utf-16-le"), "text in UTF-16-LE; save it as UTF-8"),
        (b"image\tprompt\tfold\rx\ty\t1\r", "text with carriage returns alone"),
        (b"PK\x03\x04" + bytes(40), "a zip file"),
        (gzip.compress(b"image\tprompt\tfold\n", mtime=0), "a gzip file"),  # a time would give each worker other tests
        (b"image\tprompt\tfold\nx\ty\0z\t1\n", "no text"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, content, what):
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.tsv is no table: it is {what}"):
        read_table(tmp_path / "a.tsv", COLUMNS)


def test_a_folder_in_place_of_a_table_and_a_huge_header_are_named(tmp_path):
    (tmp_path / "b.tsv").mkdir()
    with pytest.raises(ValueError, match=r"b.tsv is a folder, not a table"):
        read_table(tmp_path / "b.tsv", COLUMNS)
    (tmp_path / "c.tsv").write_text("x" * 100_000 + "\n")
    with pytest.raises(ValueError, match="lacks the columns image, prompt, fold") as caught:
        read_table(tmp_path / "c.tsv", COLUMNS)
    assert len(str(caught.value)) < 1000


def test_a_value_of_megabytes_is_read(tmp_path):
    prompts = ["short", "x" * 3_000_000, "last"]
    write_table(tmp_path / "a.tsv", {"image": ["a.png"] * 3, "prompt": prompts, "fold": [0, 1, 2]})
    assert read_table(tmp_path / "a.tsv", COLUMNS)["prompt"].to_pylist() == prompts


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"image\tprompt\tfold\na\tok\t1\na\tcaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"line 3 is not UTF-8 \(byte 5"):
        read_table(tmp_path / "a.tsv", COLUMNS)


def test_a_value_that_would_break_the_table_is_refused_and_the_former_file_stays(tmp_path):
    path = tmp_path / "a.tsv"
    write_table(path, {"prompt": ["good"]})
    with pytest.raises(ValueError, match="row 1 holds a tab or line break: 'b\\\\tc'"):
        write_table(path, {"prompt": ["a", "b\tc"]})
    assert path.read_text() == "prompt\ngood\n"
    assert list(tmp_path.iterdir()) == [path]


def test_folds_hash_is_of_the_assignment_not_of_the_rows():
    prompts, folds = ["b", "a", "a", "c"], np.array([1, 0, 0, 2])
    same = folds_hash(["a", "c", "b"], np.array([0, 2, 1]))  # other order, one image fewer
    assert folds_hash(prompts, folds) == same
    assert folds_hash(prompts, np.array([1, 0, 0, 3])) != same
    assert same == hashlib.sha256(b"a\t0\nb\t1\nc\t2\n").hexdigest()


def test_a_file_holds_rows_whatever_other_columns_it_has(tmp_path):
    write_table(tmp_path / "t.tsv", {"prompt": ["a", "b"], "source": ["x", "y"], "fold": [0, 1]})
    wanted = pa.table({"prompt": ["a", "b"], "source": ["x", "y"]})
    assert holds(tmp_path / "t.tsv", wanted) and holds(tmp_path / "t.tsv", wanted.select(["source"]))
    assert not holds(tmp_path / "t.tsv", wanted.take([1, 0])) and not holds(tmp_path / "t.tsv", wanted.slice(0, 1))
    assert not holds(tmp_path / "t.tsv", wanted.append_column("kind", pa.array(["k", "k"])))

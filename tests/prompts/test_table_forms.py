"""Tables and lists are recognised by what they hold, whatever they are called."""

import bz2
import gzip
import io
import lzma
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from kutils.data import pair_tables
from kutils.data.pair_tables import list_items
from kutils.data.pairs import Fault, Keys
from kutils.prompts import collection
from kutils.prompts.formats import read_source, recognise_format

PROMPTS = ['a sign that says "open, now"', "caf\u00e9 in the snow", "a cat, a dog; and a | 'bird'"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def texts(path, **options):
    return [entry.text for entry in read_source(path, **options)]


def quoted(prompt):
    return '"' + prompt.replace('"', '""') + '"'


def table(separator, end="\n", header=("id", "caption"), prompts=PROMPTS):
    rows = [separator.join(header), *(f"{number}{separator}{quoted(text)}" for number, text in enumerate(prompts))]
    return "".join(row + end for row in rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.token", "a"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_a_table_is_read_by_any_name_separator_and_line_end(tmp_path, name, end, separator):
    (tmp_path / name).write_bytes(table(separator, end).encode())
    assert texts(tmp_path / name) == PROMPTS
    assert texts(tmp_path / name, column="caption") == PROMPTS


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_a_text_is_read_in_any_unicode_encoding(tmp_path, name, encoding):
    content = {
        "a.txt": "".join(f"{prompt}\n" for prompt in PROMPTS),
        "a.csv": table(","),
        "a.tsv": "prompt\tn\n" + "".join(f"{prompt}\t1\n" for prompt in PROMPTS),
        "a.jsonl": "".join(
            f'{{"prompt": {quoted(prompt).replace(chr(34) * 2, chr(92) + chr(34))}}}\n' for prompt in PROMPTS
        ),
    }[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert texts(tmp_path / name) == PROMPTS


def test_a_text_that_is_cut_within_a_character_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("a cat\na dog\n".encode("utf-16-le")[:-1])
    with pytest.raises(ValueError, match=r"a.txt is no whole text in UTF-16-LE.*behind entry"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_text_is_read_by_any_name(tmp_path, pack):
    (tmp_path / "a.csv").write_bytes(pack(table(";").encode()))
    assert texts(tmp_path / "a.csv") == PROMPTS
    whole = pack("".join(f"prompt {number * number}\n" for number in range(50_000)).encode())
    (tmp_path / "a.txt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.txt is damaged or cut off"):
        texts(tmp_path / "a.txt")


def zipped(*names):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, table(","))
    return stream.getvalue()


def test_a_zip_file_of_one_text_is_read_and_one_of_several_is_named(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(zipped("captions.csv"))
    assert texts(path) == PROMPTS
    path.write_bytes(zipped("a.csv", "b.csv"))
    with pytest.raises(ValueError, match=r"captions.csv is a zip file; unpack it first \(it holds 'a.csv', 'b.csv'\)"):
        texts(path)
    path.write_bytes(zipped("[Content_Types].xml", "xl/workbook.xml"))
    with pytest.raises(ValueError, match=r"captions.csv is an Excel workbook; save it as CSV"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"SQLite format 3\0" + bytes(99), "an SQLite database"),
        (b"%PDF-1.7\n1 0 obj", "a PDF"),
        (b"\n <!DOCTYPE HTML>\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"ARROW1\0\0" + bytes(99), "an Arrow file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (b"some\x01\x02\0bytes" * 9, "no text"),
        (bytes(4096), "no text"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.tsv", "a.jsonl", "a.json"])
def test_what_is_no_text_is_named(tmp_path, content, what, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is {what}"):
        texts(tmp_path / name)


def test_the_files_of_flickr8k(tmp_path):
    captions = ["A child in a pink dress .", 'A sign says " open "']
    (tmp_path / "captions.txt").write_text(table(",", header=("image", "caption"), prompts=captions))
    assert texts(tmp_path / "captions.txt") == captions
    lines = [f"1000268201_693b08cb0e.jpg#{number}\t{text}\n" for number, text in enumerate(captions)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    assert recognise_format(tmp_path / "Flickr8k.token.txt") == "captions"
    assert texts(tmp_path / "Flickr8k.token.txt") == captions
    for name, content in {
        "Flickr_8k.trainImages.txt": "2513260012_03d33305cf.jpg\n2903617548_d3e38d7f88.jpg\n",
        "ExpertAnnotations.txt": "a.jpg\tb.jpg#2\t1\t1\t1\na.jpg\tc.jpg#2\t1\t1\t2\n",
        "names.txt": "image_name,comment\na.jpg,a dog\nb.jpg,a cat\n",
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} looks like a .*--format text"):
            texts(tmp_path / name)
        assert texts(tmp_path / name, source_format="text") == content.splitlines()
    assert texts(tmp_path / "names.txt", column="comment") == ["a dog", "a cat"]
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\na.jpg| 0| Two men, one hat .\n")
    assert texts(tmp_path / "results.csv", column="comment") == [" Two men, one hat ."]


@pytest.mark.parametrize(
    "lines",
    [
        ["a red house, blue sky", "a cat, a dog", "text, sentence"],
        ["[anime girl], masterpiece", "{red|blue} car"],
        ["{red|blue} car", "x"],
        ['"a quoted prompt"', "another"],
        ["prompt", "caption"],
        ["a house; a tree", "one | two"],
    ],
)
def test_prompts_on_lines_stay_prompts(tmp_path, lines):
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    assert texts(tmp_path / "a.txt") == lines


def test_a_quote_in_a_tsv_is_a_character_unless_all_says_otherwise(tmp_path):
    cells = ['"The Kiss" by Klimt', '"a whole quoted prompt"', 'say "hi"']
    (tmp_path / "a.tsv").write_text("prompt\tn\n" + "".join(f"{cell}\t1\n" for cell in cells))
    assert texts(tmp_path / "a.tsv") == cells


def test_a_cell_of_a_megabyte_is_read(tmp_path):
    long = "x" * 1_000_000
    (tmp_path / "a.csv").write_text(table(",", prompts=[long, "a cat"]))
    assert texts(tmp_path / "a.csv") == [long, "a cat"]
    rows = list(list_items(tmp_path / "a.csv"))
    assert rows == [{"id": "0", "caption": long}, {"id": "1", "caption": "a cat"}]


@pytest.mark.parametrize(
    "content", ["a\u00e9 b\n".encode("cp1252") * 9, "caf\u00e9\n".encode("latin-1") * 9 + b"good\n"]
)
def test_leaving_out_is_not_advised_where_most_would_go(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"9 of \d+ entries have a flaw when .* text: .*iconv") as caught:
        texts(tmp_path / "a.txt")
    assert "--skip-bad-lines" not in str(caught.value)
    (tmp_path / "a.csv").write_text("id,prompt\n" + "".join(f'1,"a "red" car {n}"\n' for n in range(9)) + "1,good\n")
    with pytest.raises(ValueError, match=r"line 2: broken quoting .*9 of 10 entries have a flaw") as caught:
        texts(tmp_path / "a.csv")
    assert "--skip-bad-lines" not in str(caught.value)


KINDS = [
    pa.string_view(),
    pa.large_string(),
    pa.dictionary(pa.int8(), pa.large_string()),
    pa.binary(),
    pa.large_binary(),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_type_that_arrow_has_for_texts(tmp_path, kind):
    column = pa.array([*PROMPTS, "x"])
    if pa.types.is_dictionary(kind):
        column = column.cast(pa.large_string()).dictionary_encode().cast(kind)
    else:
        column = column.cast(kind)
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == [*PROMPTS, "x"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"])]
    parquet.write_table(pa.Table.from_arrays(columns, names=["prompt", "prompt"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,prompt\na,b\n")
    (tmp_path / "a.tsv").write_text("prompt\tprompt\na\tb\n")
    for name in ("a.parquet", "a.csv", "a.tsv"):
        with pytest.raises(ValueError, match=rf"{name} has the column 'prompt' twice"):
            texts(tmp_path / name)
    for name in ("a.csv", "a.tsv"):
        with pytest.raises(ValueError, match=rf"{name} has the column 'prompt' twice"):
            list(list_items(tmp_path / name))
    with pytest.raises(ValueError, match=r"a.parquet has the column 'prompt' twice"):
        pair_tables.find_layout(tmp_path / "a.parquet", pair_tables.row_groups(tmp_path / "a.parquet")[1], Keys())


def test_the_importer_recognises_the_same_tables(tmp_path):
    rows = [{"file_name": f"{number}.png", "prompt": prompt} for number, prompt in enumerate(PROMPTS)]
    for separator in ",;|\t":
        content = table(separator, "\r", header=("file_name", "prompt")).replace(
            separator + '"', ".png" + separator + '"'
        )
        (tmp_path / "pairs.txt").write_bytes(content.encode("utf-16-le"))
        assert list(list_items(tmp_path / "pairs.txt")) == rows
    (tmp_path / "a.csv").write_text('file_name,prompt\na.png,fine\nb.png,"never closed\nc.png,x\n')
    good, fault = list_items(tmp_path / "a.csv")
    assert good == {"file_name": "a.png", "prompt": "fine"}
    assert isinstance(fault, Fault) and fault.key == "lines 3 to 4" and "quoting" in fault.reason


def test_the_command_says_what_was_recognised(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(table(";", prompts=["a red cat runs"]).encode("utf-16"))
    (tmp_path / "b.txt").write_text("a blue cat runs\n")
    collection.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--output", str(tmp_path / "out.tsv")])
    lines = capsys.readouterr().out.splitlines()
    assert "a.txt: read as a table separated by semicolons, in UTF-16" in lines
    assert not any(line.startswith("b.txt: ") for line in lines)

"""Every format that prompts come in, with what is wrong in real files, and the command that makes a prompts file."""

import gzip
import json
import re
import shlex

import pyarrow as pa
import pytest
from pyarrow import parquet

from kutils.prompts import collection
from kutils.prompts.cleaning import Cleaner, CleaningSettings
from kutils.prompts.formats import read_source, recognise_format
from kutils.system import paths
from kutils.system.tables import read_table, write_table

ROOT = paths.repository_root()
PAGES = [path.read_text(encoding="utf-8") for path in (*ROOT.glob("README.md"), *ROOT.glob("*/README.md"))]
PROMPTS = ['a sign that says "open, now"', "caf\u00e9 \u96ea in the snow", "a cat, a dog; and a 'bird'"]


def texts(path, **options):
    return [entry.text for entry in read_source(path, **options)]


def write(path, content):
    """Bytes or text, gzipped where the name says so; gives the path."""
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_columns_and_values_arrive_as_they_are(tmp_path, suffix, bom, end):
    def file(name, *lines):
        return write(tmp_path / f"{name}{suffix}", bom + "".join(line + end for line in lines))

    quoted = ['"' + prompt.replace('"', '""') + '"' for prompt in PROMPTS]
    found = {
        "text": file("a.txt", *PROMPTS),
        "csv": file("a.csv", "id,Caption", *(f"{number},{value}" for number, value in enumerate(quoted))),
        "tsv": file("a.tsv", "id\tprompt\tsource", *(f"1\t{prompt}\tme" for prompt in PROMPTS)),
        "conceptual": file("Train_GCC-training.tsv", *(f"{prompt}\thttp://x.com/a.jpg" for prompt in PROMPTS)),
        "jsonl": file("a.jsonl", *(json.dumps({"n": 1, "prompt": prompt}) for prompt in PROMPTS)),
        "json": file(
            "captions.json", json.dumps({"annotations": [{"id": 1, "caption": prompt} for prompt in PROMPTS]})
        ),
    }
    for source_format, path in found.items():
        assert recognise_format(path) == source_format
        assert texts(path) == PROMPTS, source_format


def test_a_json_list_of_texts_or_objects_and_json_lines_by_another_name(tmp_path):
    assert texts(write(tmp_path / "a.json", json.dumps(PROMPTS, indent=1))) == PROMPTS
    objects = [{"text": prompt} for prompt in PROMPTS]
    assert texts(write(tmp_path / "b.json", json.dumps(objects))) == PROMPTS
    assert texts(write(tmp_path / "c.json", "\n".join(map(json.dumps, objects)))) == PROMPTS
    assert texts(write(tmp_path / "d", "\n".join(map(json.dumps, PROMPTS))), source_format="jsonl") == PROMPTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_comes_in_batches(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("kutils.prompts.formats.PARQUET_ROWS", 2)
    column = pa.array(PROMPTS * 3).cast(kind)
    parquet.write_table(pa.table({"seed": list(range(9)), "Prompt": column}), tmp_path / "metadata.parquet")
    entries = list(read_source(tmp_path / "metadata.parquet"))
    assert [entry.text for entry in entries] == PROMPTS * 3
    assert [entry.number for entry in entries] == list(range(1, 10))


def test_a_csv_value_with_a_line_break_keeps_the_lines_right(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,x\n"two\nlines",1\nthree,2\n')
    assert [(entry.number, entry.text) for entry in read_source(path)] == [(3, "two\nlines"), (4, "three")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\ncaf\xe9 noir\n", r"a.txt, line 2: not UTF-8 \('caf\\\\udce9 noir"),
        ("a.csv", "id,prompt\n1,a\n2,b,c\n", r"a.csv, line 3: wrong number of columns \('2,b,c'\)"),
        ("a.csv", "id,prompt\n1,\n", r"a.csv, line 2: no value"),
        ("a.csv", 'prompt,id\n"a"b,1\n', r"a.csv, line 2: broken quoting"),
        ("a.csv", 'prompt,id\na,1\n"b,2', r"a.csv, line 3: broken quoting \('unexpected end of data'\)"),
        ("a.csv", b"prompt,id\na,1\n\xff\xfe,2\n", r"a.csv, line 3: not UTF-8"),
        ("a.tsv", "prompt\tid\na\t1\nb\n", r"a.tsv, line 3: wrong number of columns \('b"),
        ("a.tsv", "prompt\tid\n\t1\n", r"a.tsv, line 2: no value"),
        ("c.tsv", "a\thttp://x\nb\n", r"c.tsv, line 2: wrong number of columns"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b\n', r"a.jsonl, line 2: broken JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', r"a.jsonl, line 2: no value"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"a.jsonl, line 2: no value"),
        ("a.jsonl", '{"prompt": 7}\n', r"a.jsonl, line 1: no text \('7'\)"),
        ("a.jsonl", '{"prompt": "a\\ud800b"}\n', r"a.jsonl, line 1: not UTF-8"),
        ("a.json", '["a", null]', r"a.json, item 2: no value"),
    ],
)
def test_a_bad_line_is_named_and_can_be_left_out(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=said) as caught:
        list(read_source(path))
    assert "--skip-bad-lines" in str(caught.value)
    entries = list(read_source(path, skip_bad_lines=True))
    assert sum(bool(entry.flaw) for entry in entries) == 1


@pytest.mark.parametrize("skip_bad_lines", [False, True])
@pytest.mark.parametrize(
    ("closing", "lines"),
    [("", "4 to 5003"), ('say "a", 1\n', "4 to 5004"), (f"{'x' * 200_000},1\n", "4 to 5004")],
    ids=["never", "by another", "too long"],
)
def test_a_quote_that_swallows_lines_is_named_by_its_first(tmp_path, skip_bad_lines, closing, lines):
    good = [f"prompt number {number},1\n" for number in range(5000)]
    path = write(tmp_path / "a.csv", 'prompt,id\n"two\nlines",1\n"' + "".join(good) + closing)
    entries = read_source(path, skip_bad_lines=skip_bad_lines)
    assert next(entries).text == "two\nlines"
    with pytest.raises(ValueError, match=rf"a.csv, lines {lines}: a quote opened in line 4 is not closed"):
        next(entries)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    prompts = [f"prompt number {number}" for number in range(1000)]
    table = pa.table({"prompt": prompts})
    parquet.write_table(table, path, row_group_size=500, use_dictionary=False, compression="gzip")
    whole = path.read_bytes()
    column = parquet.read_metadata(path).row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(ValueError, match=r"a.parquet is damaged behind row \d+ \("):
        list(read_source(path))
    footer = int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[: -8 - footer] + b"\xff" * footer + whole[-8:])
    with pytest.raises(ValueError, match=r"a.parquet is no Parquet file, or is damaged"):
        list(read_source(path))


def test_a_link_alone_makes_conceptual_captions(tmp_path):
    assert recognise_format(write(tmp_path / "a.tsv", "prompt\thttp_status\na cat\t200\n")) == "tsv"


def test_null_and_bad_bytes_in_parquet_are_named(tmp_path):
    parquet.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row 2: no value"):
        list(read_source(tmp_path / "a.parquet"))
    offsets, data = pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")
    broken = pa.StringArray.from_buffers(2, offsets, data)
    parquet.write_table(pa.table({"prompt": broken}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 2: not UTF-8"):
        list(read_source(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.txt", "", {}, "a.txt is empty"),
        ("a.csv", "prompt,id\n", {}, "a.csv is empty, or has a header alone"),
        ("a.csv", "id,caption\n1,a\n", {"column": "prompt"}, "has no column 'prompt'.*there are: 'id', 'caption'"),
        ("a.tsv", "id\turl\n1\ta\n", {}, "has none of the columns prompt, caption.*there are: 'id', 'url'"),
        ("a.jsonl", '{"p": "a"}\n', {}, "has none of the columns.*there are: 'p'"),
        ("a.json", '{"images": []}', {}, "neither a JSON list nor .* its keys are 'images'"),
        ("a.json", '{"annotations": [\n{"caption": "a"},\n}', {}, "a.json, line 3, column 1: broken JSON"),
        ("a.json", "[" * 100_000, {}, "a.json.*(nested too deeply|broken JSON)"),
        ("a.parquet", "PAR1 no more", {}, "is no Parquet file"),
        ("a.dat", "a cat\n", {}, "give --format"),
        ("a.txt", "a cat\n", {"column": "prompt"}, "leave --column out"),
    ],
)
def test_a_source_that_cannot_be_read_says_what_to_do(tmp_path, name, content, options, said):
    with pytest.raises(ValueError, match=said):
        list(read_source(write(tmp_path / name, content), **options))


def test_files_that_are_none_or_cut_off(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        list(read_source(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="name its files"):
        list(read_source(tmp_path))
    whole = gzip.compress("".join(f"prompt number {number}\n" for number in range(20_000)).encode())
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"damaged or cut off behind entry [\d,]+"):
        list(read_source(tmp_path / "cut.txt.gz"))
    parquet.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="holds int64, not text"):
        list(read_source(tmp_path / "numbers.parquet"))


def test_large_files_are_not_held_whole(tmp_path):
    path = write(tmp_path / "a.csv", "prompt\n" + "".join(f"prompt number {number}\n" for number in range(50_000)))
    entries = read_source(path)
    assert next(entries).text == "prompt number 0"
    entries.close()
    bad = write(tmp_path / "bad.jsonl", '"a cat"\n' * 3 + "broken\n")
    entries = read_source(bad)
    assert [next(entries).text for _ in range(3)] == ["a cat"] * 3  # line 4 has not been looked at
    with pytest.raises(ValueError, match="line 4"):
        next(entries)


def test_rejected_and_precanned_captions_of_vizwiz_are_left_out_and_counted(tmp_path):
    marks = [(False, False), (True, False), (False, True), (False, False)]
    annotations = [
        {"caption": f"a can of soup number {number}", "is_rejected": rejected, "is_precanned": precanned}
        for number, (rejected, precanned) in enumerate(marks)
    ]
    path = write(tmp_path / "train.json", json.dumps({"images": [{"id": 1}], "annotations": annotations}))
    report = collection.make_prompts_file([path], tmp_path / "out.tsv", progress=False)
    assert report["read"] == 4 and report["kept"] == 2
    counts = {reason: case["count"] for reason, case in report["dropped"].items()}
    assert counts == {"rejected caption": 1, "precanned caption": 1}


def test_the_command_makes_a_prompts_file_and_a_report(tmp_path, capsys):
    first = write(tmp_path / "first.txt.gz", "A cat on a mat.\na (red:1.2) dog runs\nhi\n")
    second = write(
        tmp_path / "second.csv", 'caption\n"a cat  on a mat"\n"a bird, ""flying"""\nun chat dans le jardin\n'
    )
    output = tmp_path / "out.tsv"
    collection.main([str(first), str(second), "--output", str(output)])
    assert output.read_text(encoding="utf-8") == (
        'prompt\tsource\nA cat on a mat.\tfirst\na red dog runs\tfirst\na bird, "flying"\tsecond\n'
    )
    report = json.loads((tmp_path / "out.tsv.report.json").read_text())
    assert [source["read"] for source in report["sources"]] == [3, 3]
    assert [source["kept"] for source in report["sources"]] == [2, 1]
    counts = {reason: case["count"] for reason, case in report["dropped"].items()}
    assert counts == {"too few words": 1, "duplicate": 1, "another language": 1}
    assert report["read"] == report["kept"] + sum(counts.values())
    assert report["dropped"]["duplicate"]["examples"] == [{"place": "second.csv:2", "prompt": "a cat  on a mat"}]
    change = {"before": "a (red:1.2) dog runs", "after": "a red dog runs"}
    assert report["changed"] == {"attention weights": {"count": 1, "examples": [change]}}
    said = capsys.readouterr().out
    assert "6 read, 3 kept" in said and "second.csv:4  'un chat dans le jardin'" in said


def test_the_same_input_gives_the_same_bytes_and_other_content_is_not_written_over(tmp_path, capsys):
    source = write(tmp_path / "a.txt", "".join(f"a {word} cat\n" for word in ("red", "blue", "green")))
    output = tmp_path / "out.tsv"
    command = [str(source), "--output", str(output)]
    collection.main(command)
    files = [output, tmp_path / "out.tsv.report.json"]
    before = [path.read_bytes() for path in files]
    collection.main(command)
    assert [path.read_bytes() for path in files] == before
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"out\.tsv is there already, with other content"):
        collection.main([*command, "--limit", "2"])
    assert [path.read_bytes() for path in files] == before
    collection.main([*command, "--limit", "2", "--overwrite"])
    assert read_table(output, [])["prompt"].to_pylist() == ["a red cat", "a blue cat"]
    with pytest.raises(ValueError, match="both read and written"):
        collection.main([str(source), "--output", str(source), "--overwrite"])


def test_a_prompts_file_that_has_folds_by_now_stays(tmp_path, capsys):
    source, output = write(tmp_path / "a.txt", "a red cat\na blue cat\n"), tmp_path / "out.tsv"
    collection.main([str(source), "--output", str(output)])
    table = read_table(output, ["prompt", "source"])
    write_table(output, {"prompt": table["prompt"], "source": table["source"], "fold": [1, 2]})
    before = output.read_bytes()
    collection.main([str(source), "--output", str(output)])
    assert output.read_bytes() == before and "up to date" in capsys.readouterr().out
    write_table(output, {"prompt": table["prompt"]})
    with pytest.raises(ValueError, match="with other content"):
        collection.main([str(source), "--output", str(output)])


def test_a_later_set_does_not_repeat_an_earlier_one(tmp_path):
    write_table(tmp_path / "earlier.tsv", {"prompt": ["A red cat!"], "source": ["me"]})
    source = write(tmp_path / "a.txt", "a red cat\na blue cat\n")
    options = ["--exclude", str(tmp_path / "earlier.tsv"), "--name", "mine"]
    collection.main([str(source), "--output", str(tmp_path / "out.tsv"), *options])
    rows = read_table(tmp_path / "out.tsv", ["prompt", "source"]).to_pylist()
    assert rows == [{"prompt": "a blue cat", "source": "mine"}]


def test_bad_lines_are_counted_where_that_is_asked_for(tmp_path):
    source = write(tmp_path / "a.tsv", b"prompt\tid\na red cat\t1\nbroken\ncaf\xe9 at night\t2\n\t3\na blue cat\t4\n")
    command = [str(source), "--output", str(tmp_path / "out.tsv")]
    with pytest.raises(ValueError, match=r"a\.tsv, line 3: wrong number of columns \('broken"):
        collection.main(command)
    assert not (tmp_path / "out.tsv").exists()
    collection.main([*command, "--skip-bad-lines"])
    report = json.loads((tmp_path / "out.tsv.report.json").read_text())
    assert report["read"] == 5 and report["kept"] == 2
    examples = {reason: case["examples"][0]["place"] for reason, case in report["dropped"].items()}
    assert examples == {"wrong number of columns": "a.tsv:3", "not UTF-8": "a.tsv:4", "no value": "a.tsv:5"}


def test_nothing_left_is_an_error_that_shows_why(tmp_path):
    source = write(tmp_path / "a.txt", "hi\n\n")
    with pytest.raises(ValueError, match=r"no prompt is left(.|\n)*1  empty(.|\n)*1  too few words"):
        collection.main([str(source), "--output", str(tmp_path / "out.tsv")])
    assert not (tmp_path / "out.tsv").exists()


def test_what_lies_behind_the_limit_is_not_read(tmp_path):
    source = write(tmp_path / "a.jsonl", '"a cat number one"\n"hi"\n"a cat number two"\n"a cat number three"\n')
    cleaner = Cleaner(CleaningSettings())
    told = collection.gather([source, tmp_path / "missing.txt"], cleaner, limit=2, progress=False)
    assert cleaner.num_read == 3
    assert told == [{"file": str(source), "source": "a", "read": 3, "kept": 2}]
    with pytest.raises(ValueError, match=r"missing\.txt is not there"):
        collection.gather([source, tmp_path / "missing.txt"], Cleaner(), limit=5, progress=False)


def six_data_sets() -> str:
    """The section of a README that says how the six data sets are made."""
    (page,) = [page for page in PAGES if "\n## The six data sets\n" in page]
    return page.split("\n## The six data sets\n")[1].split("\n## ")[0]


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    """On small files of the same names and formats as those that it tells to download."""
    commands = re.findall(r"^kutils sources (.*)$", six_data_sets(), re.MULTILINE)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    lines = [f"a {word} cat on a mat" for word in ("red", "blue", "green")]
    downloads = tmp_path / "downloads"
    (downloads / "lexica").mkdir(parents=True)
    (tmp_path / "input").mkdir()
    write(downloads / "Train_GCC-training.tsv", "".join(f"{line}\thttps://x.com/a.jpg\n" for line in lines))
    parquet.write_table(pa.table({"Prompt": lines}), downloads / "lexica" / "train.parquet")
    metadata = {"image_name": lines, "prompt": lines, "part_id": [1, 1, 1]}
    parquet.write_table(pa.table(metadata), downloads / "metadata.parquet")
    captions = {"info": {}, "annotations": [{"image_id": 1, "id": 2, "caption": line} for line in lines]}
    write(downloads / "captions_train2017.json", json.dumps(captions))
    write(downloads / "mine.csv", "caption\n" + "\n".join(lines))
    for command in commands:
        arguments = [
            part
            for word in shlex.split(command)
            for part in (map(str, sorted(tmp_path.glob(word))) if "*" in word else [word])
        ]
        collection.main(arguments)
        assert read_table(arguments[-1], ["source"])["prompt"].to_pylist() == lines


def test_the_estimates_of_the_readme_follow_from_their_formula():
    section = six_data_sets()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    total_images = total_prompts = 0
    for row in rows[1:]:
        prompts, per_prompt, images = int(row[2].replace(",", "")), int(row[3]), int(row[4].replace(",", ""))
        assert abs(images - prompts * per_prompt) < 5
        assert row[5] == f"{images * 1.5 / 3600:.0f}"
        assert row[6] == f"{images * (50_000 + 1536) / 1e9:.0f}"
        total_images, total_prompts = total_images + images, total_prompts + prompts
    assert (total_images, total_prompts) == (5_059_104, 3_378_588)
    assert (
        f"{total_images * 1.5 / 3600:,.0f} GPU hours" in section and f"{total_images * 51_536 / 1e9:.0f} GB" in section
    )

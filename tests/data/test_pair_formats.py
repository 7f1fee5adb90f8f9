"""Every form of pairs, written by other libraries, is recognised and read as it is; what is wrong is told."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from fixtures import pairs as made
from PIL import Image
from pyarrow import parquet

from kutils.data import pair_formats, pair_tables, pair_tars
from kutils.data.pair_formats import expand, expand_braces, find_parts, read_part
from kutils.data.pairs import Fault, Keys, Pair, parse_condition
from kutils.data.transforms import decode_bytes

FORMS = {
    "tars": lambda root: made.write_tar(root / "a.tar", map(made.sample, range(12))),
    "zipped tars": lambda root: made.write_tar(root / "a.tar.gz", map(made.sample, range(12)), compress=True),
    "hub parquet": lambda root: made.write_hub_parquet(root / "train-00000-of-00001.parquet"),
    "diffusiondb": lambda root: made.write_diffusiondb(root),
    "diffusiondb zips": lambda root: made.write_diffusiondb(root, zipped=True),
    "json": lambda root: made.write_list(root, "json"),
    "jsonl": lambda root: made.write_list(root, "jsonl"),
    "csv": lambda root: made.write_list(root, "csv"),
    "tsv": lambda root: made.write_list(root, "tsv"),
    "metadata.jsonl": lambda root: made.write_imagefolder(root, "jsonl"),
    "metadata.csv": lambda root: made.write_imagefolder(root, "csv"),
    "texts": lambda root: made.write_texts(root / "images"),
    "embedded": lambda root: made.write_embedded(root / "images"),
}
RECOGNISED = {"tars": "webdataset", "zipped tars": "webdataset", "hub parquet": "parquet", "texts": "texts"}
RECOGNISED |= {"diffusiondb": "diffusiondb", "diffusiondb zips": "diffusiondb", "embedded": "embedded"}


def read_all(source, form="", **keys) -> list[Pair | Fault]:
    keys = Keys(**keys)
    return [item for part in find_parts([str(source)], form, keys) for item in read_part(part, keys)]


def content(pair: Pair) -> bytes:
    return pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes()


def shows(pair: Pair, number: int) -> bool:
    return np.array_equal(decode_bytes(content(pair), "it").permute(1, 2, 0).numpy(), np.asarray(made.picture(number)))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognised_and_read_in_order(tmp_path, form):
    source = FORMS[form](tmp_path)
    parts = find_parts([str(source)], "", Keys())
    assert {part.form for part in parts} == {RECOGNISED.get(form, "list")}
    assert sum(part.pairs for part in parts) == 12
    items = read_all(source)
    assert [item.prompt.strip() for item in items] == made.PROMPTS
    assert all(shows(item, number) for number, item in enumerate(items))
    assert len({item.key for item in items}) == 12
    assert read_all(source, RECOGNISED.get(form, "list"))[3].key == items[3].key  # asked for by name


def test_the_twelfth_places_form(tmp_path):
    (item, *_) = read_all(made.write_tar(tmp_path / "a.tar", [made.sample(5)]))
    assert item.key == "sd-00005" and item.fields == {"ntokens": 7, "cluster": 5, "model": "sdxl"}
    assert item.embedding.dtype == np.float16 and np.array_equal(item.embedding, made.embedding(made.PROMPTS[5]))
    assert item.prompt_key == "txt"


def test_two_images_a_row(tmp_path):
    made.write_pandas_parquet(tmp_path / "pickapic.parquet")
    items = read_all(tmp_path)
    assert [item.prompt for item in items] == [prompt for prompt in made.PROMPTS[:6] for _ in range(2)]
    assert all(shows(item, number) for number, item in enumerate(items))
    assert [item.fields["model"] for item in items[:2]] == made.MODELS[:2]
    assert items[3].key == "1/jpg_1" and items[0].prompt_key == "caption"
    assert len(read_all(tmp_path, image="jpg_1")) == 6


def test_fields_of_diffusiondb(tmp_path):
    item = read_all(made.write_diffusiondb(tmp_path))[7]
    assert {key: item.fields[key] for key in ("seed", "cfg", "se")} == {"seed": 17, "cfg": 7.0, "se": 17}


def test_what_a_generator_wrote_into_an_image(tmp_path):
    item = read_all(made.write_embedded(tmp_path))[4]
    assert item.fields == item.fields | {"tool": "AUTOMATIC1111", "model": "sd-2.0", "generator": "sd-2.0", "seed": "4"}


# ---------------------------------------------------------------- names of files


def test_braces():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}{1..0}") == ["x1", "x0", "y1", "y0"]
    assert expand_braces("plain") == ["plain"]


def test_patterns_find_files(tmp_path):
    for name in ("b-000.tar", "b-001.tar", "a-000.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in expand(f"{tmp_path}/{{b,a}}-*.tar")] == ["b-000.tar", "b-001.tar", "a-000.tar"]
    with pytest.raises(ValueError, match=r"b-002.tar is not there \(of .*b-\{000..002\}.tar\)"):
        expand(f"{tmp_path}/b-{{000..002}}.tar")
    with pytest.raises(ValueError, match=r"c\*.tar is not there"):
        expand(f"{tmp_path}/c*.tar")
    (tmp_path / "odd[1].tar").touch()
    assert expand(str(tmp_path / "odd[1].tar")) == [tmp_path / "odd[1].tar"]  # it is there: no pattern


def test_a_folder_of_several_forms(tmp_path):
    """As the 12th place's: tars in folders, and a table beside them that describes them."""
    for name in ("cc", "db"):
        made.write_tar(tmp_path / name / f"sd-4.4M-{name}-000.tar", [made.sample(1)])
    made.write_hub_parquet(tmp_path / "metadata.parquet")
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / ".cache").mkdir()
    made.write_tar(tmp_path / ".cache" / "x.tar", [made.sample(2)])
    parts = find_parts([str(tmp_path)], "", Keys())
    assert [part.name for part in parts] == ["cc/sd-4.4M-cc-000.tar", "db/sd-4.4M-db-000.tar"]
    with pytest.raises(ValueError, match=r"holds nothing of the form list; --format takes:\n  webdataset: tar files"):
        find_parts([str(tmp_path)], "list", Keys())


def test_what_is_no_source(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    Image.new("RGB", (2, 2)).save(tmp_path / "one.png")
    for name in ("notes.txt", "one.png"):
        with pytest.raises(ValueError, match="holds no pairs of a known form"):
            find_parts([str(tmp_path / name)], "", Keys())
    with pytest.raises(ValueError, match=r"notes.txt is no Parquet file"):
        find_parts([str(tmp_path / "notes.txt")], "parquet", Keys())
    with pytest.raises(ValueError, match=r"notes.txt is no zip file"):
        find_parts([str(tmp_path / "notes.txt")], "diffusiondb", Keys())


def test_long_lists_and_row_groups_are_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_formats, "PART_PAIRS", 5)
    for form in ("json", "texts", "hub parquet"):
        (tmp_path / form).mkdir()
        source = FORMS[form](tmp_path / form)
        parts = find_parts([str(source)], "", Keys())
        assert [part.pairs for part in parts] == [5, 5, 2] and sum(part.size for part in parts) > 0
        assert [item.prompt.strip() for part in parts for item in read_part(part, Keys())] == made.PROMPTS
    monkeypatch.setattr(pair_formats, "PART_PAIRS", 6)
    parts = find_parts([str(tmp_path / "hub parquet" / "train-00000-of-00001.parquet")], "", Keys())
    assert [(part.first, part.count, part.pairs) for part in parts] == [(0, 2, 10), (2, 1, 2)]
    keys = [item.key for part in parts for item in read_part(part, Keys())]
    assert keys == [str(row) for row in range(12)]


# ---------------------------------------------------------------- tars


def test_our_reader_of_tars_is_tarfiles(tmp_path):
    """Long names, PAX headers, links, folders, empty files and sizes that fill blocks exactly."""
    path, contents = tmp_path / "a.tar", {}
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=kind) as tar:
            for number, size in enumerate((0, 1, 511, 512, 513, 5000)):
                names = [f"{number}.txt", f"{'folder/' * 25}{number}.txt"]
                names += ["x" * 180 + f"{number}.txt", f"caf\u00e9{number}.txt"] if kind != tarfile.USTAR_FORMAT else []
                for name in names:
                    (tmp_path / "file").write_bytes(bytes([number]) * size)
                    tar.add(tmp_path / "file", name)
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "y" * (100 if kind == tarfile.USTAR_FORMAT else 150)
            tar.addfile(link)
            tar.add(tmp_path, "folder", recursive=False)
        with tarfile.open(path) as tar:
            contents = {item.name: tar.extractfile(item).read() for item in tar if item.isreg()}
        with pair_tars.open_tar(path) as stream:
            found = dict(pair_tars.read_members(stream, lambda name: True))
        assert found == contents and len(contents) >= 12
        with pair_tars.open_tar(path) as stream:
            assert dict(pair_tars.read_members(stream, lambda name: False)) == dict.fromkeys(contents)


def test_a_tar_that_is_cut_or_damaged_anywhere(tmp_path):
    """What is whole before the cut is read, the sample at the cut is named, and nothing else is said."""
    whole = made.write_tar(tmp_path / "a.tar", [made.sample(number) for number in range(3)]).read_bytes()
    expected = [item.key for item in read_all(tmp_path / "a.tar")]
    for length in range(512, len(whole) - 10_240 + 512, 512 * 7 + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        *pairs, fault = pair_tars.read_tar(tmp_path / "cut.tar", Keys())
        assert [pair.key for pair in pairs] == expected[: len(pairs)] and all(isinstance(p, Pair) for p in pairs)
        assert "the tar is cut off or damaged here" in fault.reason
        assert fault.key in ("", *expected[len(pairs) : len(pairs) + 1])
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3] + b"\x01" * (len(whole) - len(whole) // 3))
    *pairs, fault = pair_tars.read_tar(tmp_path / "cut.tar", Keys())
    assert len(pairs) < 3 and "head of a file is none" in fault.reason
    (tmp_path / "cut.tar").write_bytes(whole[:-10_240] if len(whole) % 10_240 == 0 else whole[:-1024])
    items = list(pair_tars.read_tar(tmp_path / "cut.tar", Keys()))
    assert isinstance(items[-1], Fault)
    noise = [made.sample(n, png=np.random.default_rng(n).bytes(50_000), webp=None) for n in range(9)]
    zipped = made.write_tar(tmp_path / "b.tar.gz", noise, compress=True).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(zipped[: len(zipped) * 2 // 3])
    *pairs, fault = pair_tars.read_tar(tmp_path / "cut.tar.gz", Keys())
    assert 4 <= len(pairs) < 7 and "cut off or damaged" in fault.reason


def test_samples_with_something_wrong(tmp_path):
    image, other = made.encode(made.picture(0)), made.encode(made.picture(1))
    files = [
        ("a.txt", b"no image here"),
        ("b.png", image),
        ("c.png", image),
        ("c.jpg", other),
        ("c.txt", b"two images"),
        ("d.png", image),
        ("d.json", b"{broken"),
        ("e.png", image),
        ("e.txt", b"twice"),
        ("e.txt", b"twice"),
        ("f.png", image),
        ("f.txt", b"not a vector"),
        ("f.embs.npy", b"\x93NUMPY\x01\x00"),
        ("g.png", image),
        ("g.txt", "a good one, caf\u00e9".encode()),
        ("h.png", image),
        ("h.json", b'["a list"]'),
    ]
    found = {item.key: item for item in read_all(made.append_files(tmp_path / "a.tar", files))}
    reasons = {key: item.reason for key, item in found.items() if isinstance(item, Fault)}
    assert reasons == {
        "a": "no image (its files: txt)",
        "b": "no text (its files: png)",
        "c": "2 images under one key (png, jpg)",
        "d": "broken JSON in json",
        "e": "a file is there twice (its files: png, txt, txt)",
        "f": "embs.npy: the head of the NumPy file is damaged",
        "h": "no text (its files: png, json)",
    }
    assert found["g"].prompt == "a good one, caf\u00e9"


def test_names_with_several_dots(tmp_path):
    image, other = made.encode(made.picture(0)), made.encode(made.picture(1))
    files = [
        ("./x/photo.v1.png", image),
        ("./x/photo.v1.txt", b"the first"),
        ("./x/photo.v2.png", other),
        ("./x/photo.v2.txt", b"the second"),
        ("y.orig.png", image),
        ("y.txt", b"one text"),
        ("z.thumb.png", other),
        ("z.png", image),
        ("z.txt", b"a small one, too"),
        ("w.v3.png", image),
        ("w.v3.embs.npy", made.as_npy(made.embedding("x"))),
        ("w.v3.txt", b"a vector"),
    ]
    path = made.append_files(tmp_path / "a.tar", files)
    items = read_all(path)
    assert [(item.key, getattr(item, "prompt", None)) for item in items] == [
        ("x/photo.v1", "the first"),
        ("x/photo.v2", "the second"),
        ("y", "one text"),
        ("z", None),
        ("w", "a vector"),
    ]
    assert shows(items[1], 1) and items[4].embedding is not None
    chosen = {item.key: item for item in read_all(path, image="png")}
    assert shows(chosen["z"], 0)


def test_prompts_in_json_and_keys_that_are_asked_for(tmp_path):
    facts = {"Prompt": "from the JSON", "recaption": "by a model"}
    item = made.sample(0, txt=None, json=facts, **{"embs.npy": None, "clip.npy": made.as_npy(np.ones(5, np.float32))})
    path = made.write_tar(tmp_path / "a.tar", [item])
    (found,) = read_all(path)
    assert (found.prompt, found.prompt_key, found.embedding) == ("from the JSON", "Prompt", None)
    (found,) = read_all(path, prompt="recaption", embedding="clip")
    assert found.prompt == "by a model" and len(found.embedding) == 5
    (fault,) = read_all(path, prompt="nothing")
    assert fault.reason == "no text (its files: clip.npy, json, webp; keys of its JSON: Prompt, recaption)"
    path = made.write_tar(tmp_path / "b.tar", [made.sample(0, **{"long.txt": "a long text"})])
    assert read_all(path, prompt="long.txt")[0].prompt == "a long text"
    assert read_all(path)[0].prompt == made.PROMPTS[0]


# ---------------------------------------------------------------- tables


def test_embeddings_in_parquet(tmp_path):
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float16(), 384), pa.large_list(pa.float64())):
        vectors = [made.embedding(prompt, np.float32) for prompt in made.PROMPTS[:3]]
        rows = [vectors[0].tolist(), None, vectors[2].tolist()]
        if pa.types.is_float16(kind.value_type):
            rows = [None if row is None else np.array(row, np.float16) for row in rows]
        table = {"image": [made.encode(made.picture(number)) for number in range(3)], "text": made.PROMPTS[:3]}
        parquet.write_table(pa.table(table | {"embedding": pa.array(rows, kind)}), tmp_path / "a.parquet")
        items = read_all(tmp_path)
        assert items[1].embedding is None
        np.testing.assert_allclose(items[2].embedding, vectors[2], atol=1e-3)


def test_parquet_in_which_columns_cannot_be_told(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"picture": ["x"], "words": ["a b c"]}), path)
    with pytest.raises(
        ValueError, match=r"no column with images; name it by --image-key \(columns: 'picture', 'words'"
    ):
        read_all(path)
    parquet.write_table(pa.table({"image": [b"x"], "words": ["a b c"]}), path)
    with pytest.raises(ValueError, match=r"no column with prompts; name it by --prompt-key"):
        read_all(path)
    assert read_all(path, prompt="words")[0].prompt == "a b c"
    with pytest.raises(ValueError, match=r"no column 'wrong' with texts"):
        read_all(path, prompt="wrong")


def test_rows_without_image_or_text(tmp_path):
    images = [{"bytes": None, "path": None}, {"bytes": b"x", "path": None}, {"bytes": None, "path": "../x.png"}, None]
    parquet.write_table(pa.table({"image": images, "prompt": ["a", None, "c", "d"]}), tmp_path / "a.parquet")
    reasons = [(item.key, item.reason) for item in read_all(tmp_path)]
    assert reasons == [
        ("0", "no image"),
        ("1", "no text"),
        ("2", "the image path '../x.png' leaves the folder"),
        ("3", "no image"),
    ]


def test_a_parquet_file_that_is_damaged_inside(tmp_path):
    path = made.write_hub_parquet(tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    middle = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    items = read_all(path)
    assert [item.prompt for item in items if isinstance(item, Pair)] == made.PROMPTS[:5] + made.PROMPTS[10:]
    assert items[5].key == "5" and "the row group is damaged from here on" in items[5].reason


def test_lists_with_several_images_and_bad_items(tmp_path):
    made.write_images(tmp_path, 3)
    rows = [
        {"prompt": "two pictures", "image_path": ["0000.png", "0001.png"]},
        {"prompt": "no picture"},
        {"image_path": "0002.png"},
        {"prompt": "elsewhere", "image_path": "/etc/passwd"},
        "no object",
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    expected = [
        ("0000.png", "two pictures"),
        ("0001.png", "two pictures"),
        ("1", "no image (keys: 'prompt')"),
        ("0002.png", "no text (keys: 'image_path')"),
        ("/etc/passwd", "the image path '/etc/passwd' leaves the folder"),
        ("4", "no object with keys"),
    ]
    found = read_all(tmp_path / "pairs.json")
    assert [(item.key, getattr(item, "prompt", None) or item.reason) for item in found] == expected
    lines = [json.dumps(rows[0]), "{broken", "", json.dumps(rows[1])]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    found = read_all(tmp_path / "pairs.jsonl")
    assert found[2] == Fault("line 2", "broken JSON") and len(found) == 4
    (tmp_path / "pairs.csv").write_text('file,prompt\n0000.png,"a, ""b"""\n0001.png\n')
    found = read_all(tmp_path / "pairs.csv")
    assert found[0].prompt == 'a, "b"' and found[1] == Fault("line 3", "wrong number of columns")


def test_a_json_list_is_read_item_by_item(tmp_path, monkeypatch):
    rows = [{"prompt": f'p {number}, [x] {{y}} "z" \u00e9', "deep": [[number], {"a": None}]} for number in range(200)]
    path = tmp_path / "a.json"
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(pair_tables, "READ_CHARACTERS", size)
        for indent, ascii_only in ((None, True), (2, False)):
            path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
            assert list(pair_tables.list_items(path)) == rows
    path.write_text(json.dumps(rows)[:-5])
    *items, fault = pair_tables.list_items(path)
    assert items == rows[:-1] and fault.key == "item 199" and "cut off" in fault.reason


# ---------------------------------------------------------------- folders


def test_folders_in_which_something_is_missing(tmp_path):
    folder = made.write_texts(tmp_path / "images")
    (folder / "0003.txt").unlink()
    (folder / "lonely.txt").write_text("no image")
    made.picture(0).save(folder / "0005.jpg")
    reasons = {item.key: item.reason for item in read_all(folder) if isinstance(item, Fault)}
    assert reasons == {
        "lonely.txt": "no image of this name",
        "0003.png": "no text file of this name",
        "0005.jpg": "two images of one name",
        "0005.png": "two images of one name",
    }
    folder = made.write_diffusiondb(tmp_path / "db", parts=1) / "part-000001"
    (folder / "0002.webp").unlink()
    (folder / "zzz.webp").write_bytes(b"x")
    reasons = {item.key: item.reason for item in read_all(folder) if isinstance(item, Fault)}
    assert reasons == {"0002.webp": "there is no such file", "zzz.webp": "no text: the JSON file does not name it"}


def test_images_without_a_prompt_inside(tmp_path):
    made.write_images(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    items = read_all(tmp_path)
    assert items[0].reason == "no text: no generator has written its prompt into it"
    assert items[1].reason == "it is no image of a known format"  # alike in every run


def test_the_packages_name_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sd_parsers", None)
    with pytest.raises(ValueError, match=r"sd-parsers, which is missing: pip install -e '.\[import\]'"):
        read_all(made.write_embedded(tmp_path))


# ---------------------------------------------------------------- which pairs


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("model=SD-2.0", True),
        ("model!=sd-2.0", False),
        ("nsfw=false", True),
        ("nsfw!=true", True),
        ("score<0.3", True),
        ("score >= 0.25", True),
        ("score>0.25", False),
        ("seed=7", True),
        ("absent!=7", False),
        ("none=None", False),
        ("width<=1000", True),
    ],
)
def test_conditions(condition, holds):
    fields = {"model": "sd-2.0", "nsfw": False, "score": 0.25, "seed": "7", "none": None, "width": 90}
    assert parse_condition(condition).holds(fields) is holds


def test_what_is_no_condition():
    for text in ("model", "=x", "~"):
        with pytest.raises(ValueError, match="give KEY=VALUE"):
            parse_condition(text)

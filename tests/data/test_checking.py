"""The check of data sets: every kind of bad row by hand, and what is set apart and what stays."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset, unit_rows
from PIL import Image

from kutils.data import bad_rows, checking, image_files, validation_check
from kutils.data.checking import check_datasets
from kutils.data.datasets import load_datasets
from kutils.data.shards import Encoding, pack
from kutils.prompts import embedding
from kutils.system import paths
from kutils.system.ranks import Ranks
from kutils.system.tables import folds_hash, hash_prompts, read_table, write_table


@pytest.fixture
def inputs(workspace):
    return workspace / "input"


def change(path, **columns):
    """Rewrite some columns of a table; a function gets the list of values and changes it."""
    table = read_table(path, ["image", "prompt", "fold"])
    values = {name: table[name].to_pylist() for name in table.column_names}
    for name, edit in columns.items():
        edit(values[name])
    write_table(path, values)


def setting(row, value):
    return lambda values: values.__setitem__(row, value)


def found(checked):
    """row -> reason of one checked data set."""
    return {int(row): checked.reasons[checked.bad[row]] for row in np.flatnonzero(checked.bad)}


def examine(path, **options):
    (checked,) = check_datasets([path], num_workers=1, progress=False, **options)
    return checked


def run(*arguments):
    """Exit status of the command."""
    return checking.main([str(argument) for argument in arguments])


def facts_of(path):
    facts, reason = image_files.image_facts(path.read_bytes)
    assert not reason
    return facts


# ---------------------------------------------------------------- images


def noise(mode, size=(64, 48)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_facts_about_odd_images(tmp_path):
    noise("CMYK").save(tmp_path / "cmyk.jpg")
    noise("P").save(tmp_path / "palette.png")
    transparent = noise("RGBA")
    transparent.putalpha(99)
    transparent.save(tmp_path / "alpha.webp")
    noise("L").save(tmp_path / "grey.bmp")
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(tmp_path / "deep.png")
    frames = [noise("RGB"), noise("RGB").rotate(90)]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:])
    palette = noise("P")
    palette.save(tmp_path / "transparent.png", transparency=3)
    expected = {  # format, mode, alpha, animated, 16 bits, blank
        "cmyk.jpg": (b"JPEG", b"CMYK", False, False, False, False),
        "palette.png": (b"PNG", b"P", False, False, False, False),
        "alpha.webp": (b"WEBP", b"RGBA", True, False, False, False),
        "grey.bmp": (b"BMP", b"L", False, False, False, False),
        "deep.png": (b"PNG", b"I;16", False, False, True, True),
        "animated.webp": (b"WEBP", b"RGB", False, True, False, False),
        "transparent.png": (b"PNG", b"P", True, False, False, False),
    }
    keys = ["format", "mode", "alpha", "animated", "sixteen_bit", "blank"]
    for name, values in expected.items():
        facts = facts_of(tmp_path / name)
        assert tuple(facts[key].item() for key in keys) == values, name
        assert (facts["width"], facts["height"], facts["bytes"]) == (64, 48, (tmp_path / name).stat().st_size)


def test_sixteen_bits_of_a_colour_png(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))  # 8 x 8 pixels of 3 x 2 bytes
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    facts = facts_of(tmp_path / "a.png")
    assert facts["sixteen_bit"] and facts["mode"] == b"RGB" and not facts["blank"]


def test_nearly_constant_images_are_blank(tmp_path):
    random = np.random.default_rng(0)
    for name, spread, blank in (("constant", 1, True), ("grain", 5, True), ("faint", 12, False)):
        pixels = (100 + random.integers(0, spread, (300, 300, 3))).astype(np.uint8)  # deviations 0, 1.4 and 3.5
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        assert facts_of(tmp_path / f"{name}.png")["blank"] == blank
    half = np.zeros((300, 300, 3), np.uint8)
    half[:, :150, 2] = 200  # one channel is enough
    Image.fromarray(half).save(tmp_path / "half.png")
    assert not facts_of(tmp_path / "half.png")["blank"]


def test_what_pillow_does_not_open_but_decodes_is_unnamed(tmp_path, monkeypatch):
    noise("RGB").save(tmp_path / "a.webp", lossless=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    facts = facts_of(tmp_path / "a.webp")
    assert facts["format"] == b"" and facts["width"] == 64
    assert image_files.summarize_facts(facts[None], 32)["formats"] == {"unknown": 1}


def test_a_summary_counted_by_hand():
    facts = np.zeros(25, image_files.FACTS)
    facts["width"], facts["height"], facts["bytes"] = 512, 512, 1000
    facts["format"], facts["mode"] = "WEBP", "RGB"
    facts["width"][:3], facts["bytes"][0], facts["mode"][7], facts["blank"][:2] = 300, 10, "L", True
    summary = image_files.summarize_facts(facts, 384)
    assert summary["sizes"] == {"512 x 512": 22, "300 x 512": 3}
    assert (summary["formats"], summary["modes"]) == ({"WEBP": 25}, {"RGB": 24, "L": 1})
    assert summary["bytes"] == {"total": 24_010, "smallest": 10, "median": 1000, "largest": 1000}
    assert (summary["blank"], summary["too_small"], summary["alpha"]) == (2, 3, 0)
    facts["width"] = np.arange(25) + 1  # each another size: 20 are named
    sizes = image_files.summarize_facts(facts, 384)["sizes"]
    assert len(sizes) == 21 and sizes["others"] == 5
    assert image_files.summarize_facts(facts[:0], 384)["bytes"] == {"total": 0}


def break_images(folder):
    """Every way in which an image cannot be read; row -> what is said."""
    whole = (folder / "0000_0.png").read_bytes()
    (folder / "0000_0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0000_1.png").write_bytes(b"")
    (folder / "0001_0.png").unlink()
    (folder / "0001_0.png").mkdir()
    (folder / "0001_1.png").unlink()
    (folder / "0002_0.png").write_bytes(b"no image at all")
    return {
        0: "image cannot be decoded: ",
        1: "image is empty (0 bytes)",
        2: "image: Is a directory",
        3: "image: No such file or directory",
        4: "image is no image of a known format (15 bytes)",
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_named_with_their_reason(inputs, num_workers):
    expected = break_images(inputs / "toy_images")
    data = load_datasets(["toy"])
    scan = image_files.scan(data.read_image, np.arange(80)[::-1], num_workers)
    reasons = dict(scan.unreadable())
    assert set(reasons) == set(expected) and all(reasons[row].startswith(text) for row, text in expected.items())
    assert scan.decoded.sum() == 75 and scan.facts["width"][scan.decoded].tolist() == [40] * 75
    assert len(scan.texts) == 6 and scan.texts[0] == ""


def test_training_asks_for_validation_images(inputs):
    alone = Ranks(0, 1, torch.device("cpu"))
    data = load_datasets(["toy"])
    validation_check.check_validation_images(data, np.arange(80), 0, alone)
    break_images(inputs / "toy_images")
    with pytest.raises(ValueError, match=r"(?s)5 of 80 validation .*kutils check input/toy.tsv\n.*0000_1.png is empty"):
        validation_check.check_validation_images(data, np.arange(80), 0, alone)
    validation_check.check_validation_images(data, np.arange(5, 80), 0, alone)


def test_validation_images_found_in_order_are_looked_at_in_part_until_the_data_change(inputs, monkeypatch):
    alone, scan, looked_at = Ranks(0, 1, torch.device("cpu")), image_files.scan, []

    def spy(read, rows, num_workers):
        looked_at.append(rows.tolist())
        return scan(read, rows, num_workers)

    def look(rows=range(40)):
        validation_check.check_validation_images(load_datasets(["toy"]), np.array(rows, np.int32), 0, alone)
        return looked_at[-1]

    monkeypatch.setattr(image_files, "scan", spy)
    monkeypatch.setattr(validation_check, "SAMPLE", 10)
    broken = load_datasets(["toy"]).image_path(3)
    content = broken.read_bytes()
    broken.write_bytes(b"")
    for _ in range(2):  # nothing is remembered of images that are not in order
        with pytest.raises(ValueError, match="1 of 40 validation images"):
            look()
        assert looked_at[-1] == list(range(40))
    broken.write_bytes(content)
    assert look() == list(range(40))
    samples = [look() for _ in range(3)]
    assert all(len(set(rows)) == 10 and set(rows) < set(range(40)) for rows in samples) and samples[0] != samples[1]
    assert look(range(41)) == list(range(41)) and len(look()) == 10  # other rows are remembered apart
    for name in ("toy.tsv", "toy.npy"):
        os.utime(inputs / name)
        assert len(look()) == 40 and len(look()) == 10
    pack(inputs / "toy.tsv", Encoding(32, "png", None), num_workers=1, progress=False)
    assert len(look()) == 40 and len(look()) == 10
    record, _ = validation_check.checked_record(load_datasets(["toy"]), np.arange(40))
    record.write_text("{")
    assert len(look()) == 40 and len(look()) == 10
    shutil.rmtree(inputs / "toy.shards")
    assert len(look()) == 40 and len(look()) == 10
    (inputs / "toy_images").rename(inputs / "elsewhere")
    with pytest.raises(ValueError, match="10 of 10 validation images"):
        look()
    (inputs / "elsewhere").rename(inputs / "toy_images")
    assert len(look()) == 40  # no more known to be in order


def test_ranks_share_the_sample(inputs, monkeypatch):
    """Two ranks after each other; what one gathers is its own."""
    data, scan, looked_at = load_datasets(["toy"]), image_files.scan, []
    monkeypatch.setattr(image_files, "scan", lambda read, rows, workers: looked_at.append(rows) or scan(read, rows))
    monkeypatch.setattr(validation_check, "SAMPLE", 9)
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, value: [value, value])  # as if both had said it
    for _ in range(2):
        for rank in (1, 0):
            validation_check.check_validation_images(data, np.arange(41), 0, Ranks(rank, 2, torch.device("cpu")))
    assert [len(rows) for rows in looked_at] == [20, 21, 5, 5]
    assert all((rows % 2 == rank).all() for rows, rank in zip(looked_at, (1, 0, 1, 0), strict=True))


def test_where_nothing_can_be_written_every_run_looks_at_all(inputs, monkeypatch):
    def refuse(*arguments):
        raise OSError("read-only")

    scan, looked_at = image_files.scan, []
    monkeypatch.setattr(
        image_files, "scan", lambda read, rows, workers: looked_at.append(len(rows)) or scan(read, rows)
    )
    monkeypatch.setattr(paths, "write_json", refuse)
    monkeypatch.setattr(validation_check, "SAMPLE", 3)
    for _ in range(2):
        validation_check.check_validation_images(
            load_datasets(["toy"]), np.arange(8), 0, Ranks(0, 1, torch.device("cpu"))
        )
    assert looked_at == [8, 8]


# ---------------------------------------------------------------- rows


def test_each_kind_of_bad_row(inputs):
    path, folder = inputs / "toy.tsv", inputs / "toy_images"
    expected = break_images(folder)
    change(path, prompt=setting(10, "  "), image=setting(12, "../outside.png"))
    change(path, image=setting(14, "/etc/passwd"))
    change(path, image=setting(16, "toy_images/0009_0.png"))  # of row 18, which has another prompt
    (folder / "0015_0.png").write_bytes((folder / "0020_1.png").read_bytes())  # rows 30 and 41
    reasons = found(examine(path))
    assert all(reasons.pop(row).startswith(text) for row, text in expected.items())
    assert reasons == {
        10: "prompt cannot be used: remove the row or give it a prompt",
        12: "image cannot be used: image paths are relative to input/, without ..",
        14: "image cannot be used: image paths are relative to input/, without ..",
        16: "the same image path as line 20 of toy.tsv, which has another prompt",
        18: "the same image path as line 18 of toy.tsv, which has another prompt",
        30: "an image of the same content as line 43 of toy.tsv, which has another prompt",
        41: "an image of the same content as line 32 of toy.tsv, which has another prompt",
    }


def test_the_same_image_of_the_same_prompt_is_a_warning(inputs):
    path, folder = inputs / "toy.tsv", inputs / "toy_images"
    change(path, image=setting(1, "toy_images/0000_0.png"))  # rows 0 and 1
    (folder / "0003_1.png").write_bytes((folder / "0003_0.png").read_bytes())  # rows 6 and 7
    checked = examine(path, input_size=40)
    assert checked.is_in_order and (checked.report["same_image_path"], checked.report["same_image_content"]) == (2, 2)
    assert "2 rows have the image path of another row, and its prompt" in checked.report["warnings"]
    assert "2 rows have an image of the same content as another row, and its prompt" in checked.report["warnings"]


def test_three_prompts_of_one_image_are_all_bad_and_point_at_another(inputs):
    """Prompts A, B, A: no row may be missed, and none be told that it differs from itself."""
    rows = bad_rows.PooledRows([inputs / "toy.tsv"])  # rows 0 and 1 have one prompt, row 2 another
    same = bad_rows.mark_shared_images(rows, np.array([0, 1, 2, 4, 5]), np.array([0, 0, 0, 1, 1]), "it")
    assert same.tolist() == [False, False, False, True, True]
    texts = {text: number for number, text in enumerate(rows.reasons)}
    assert rows.bad[:3].tolist() == [
        texts["it as line 4 of toy.tsv, which has another prompt"],
        texts["it as line 4 of toy.tsv, which has another prompt"],
        texts["it as line 3 of toy.tsv, which has another prompt"],
    ]
    rows = bad_rows.PooledRows([inputs / "toy.tsv"])
    bad_rows.mark_shared_images(rows, np.array([0, 2, 1]), np.array([0, 0, 0]), "it")
    assert (rows.bad > 0).sum() == 3 and len(set(rows.reasons)) == 3


def test_an_image_is_compared_over_all_data_sets(inputs):
    make_dataset(inputs, "more")
    (inputs / "more_images" / "0001_0.png").write_bytes((inputs / "toy_images" / "0000_0.png").read_bytes())
    toy, more = check_datasets([inputs / "toy.tsv", inputs / "more.tsv"], num_workers=1, progress=False)
    assert found(toy) == {0: "an image of the same content as line 4 of more.tsv, which has another prompt"}
    assert found(more) == {2: "an image of the same content as line 2 of toy.tsv, which has another prompt"}
    assert (toy.report["bad_rows"], more.report["bad_rows"]) == (1, 1)


def test_data_sets_of_two_folders_are_refused(inputs, tmp_path):
    """Equal image paths would be other files."""
    make_dataset(tmp_path / "elsewhere", "more")
    with pytest.raises(ValueError, match=r"more.tsv is not in .*input: data sets that are trained on together"):
        check_datasets([inputs / "toy.tsv", tmp_path / "elsewhere" / "more.tsv"], progress=False)


def test_a_sample_of_images(inputs):
    break_images(inputs / "toy_images")
    report = examine(inputs / "toy.tsv", images=70).report
    assert report["images"]["looked_at"] == 70 and 60 < report["images"]["decoded"] < 70
    assert report["bad_rows"] == 70 - report["images"]["decoded"] > 0


def test_an_image_that_vanishes_meanwhile_is_a_bad_row(inputs, monkeypatch):
    whole = bad_rows.PooledRows.read_image

    def vanishing(rows, row):
        if row == 3:
            (inputs / "toy_images" / "0007_0.png").unlink()
        return whole(rows, row)

    monkeypatch.setattr(bad_rows.PooledRows, "read_image", vanishing)
    assert found(examine(inputs / "toy.tsv")) == {14: "image: No such file or directory"}


def test_a_table_that_changes_meanwhile_is_an_error(inputs, monkeypatch):
    whole = image_files.scan

    def slow(*arguments):
        change(inputs / "toy.tsv", prompt=setting(0, "another one"))
        return whole(*arguments)

    monkeypatch.setattr(image_files, "scan", slow)
    with pytest.raises(ValueError, match=r"toy.tsv has changed while it was checked"):
        examine(inputs / "toy.tsv")


# ---------------------------------------------------------------- prompts, folds, embeddings


def test_coverage_folds_and_control_characters_by_hand(inputs):
    path = inputs / "toy.tsv"
    table = read_table(path, ["image", "prompt", "fold"])
    values = table.to_pydict()
    values["prompt"] = ["a"] * 5 + ["b\x07"] * 2 + ["c\u0085", "d", "e"] + values["prompt"][10:]  # 35 others, twice
    values["fold"] = [1] * 5 + [2] * 2 + [3, -1, -1] + values["fold"][10:]
    write_table(path, values)
    report = examine(path).report
    assert report["prompts"] == 40 and report["images_per_prompt"] == {"1": 3, "2": 36, "5": 1}
    assert report["folds"]["-1"] == 2 and sum(report["folds"].values()) == 80
    assert report["control_characters"] == 3
    assert any(text.startswith("3 rows have control characters") for text in report["warnings"])
    assert any(text.startswith("2 rows have no fold yet") for text in report["warnings"])


def test_a_prompt_in_two_folds_over_two_sets(inputs):
    make_dataset(inputs, "more")
    shared = read_table(inputs / "toy.tsv", ["prompt"])["prompt"][6].as_py()  # fold 3; row 8 of the other has fold 4
    change(inputs / "more.tsv", prompt=lambda values: values.__setitem__(slice(8, 10), [shared] * 2))
    for checked in check_datasets([inputs / "toy.tsv", inputs / "more.tsv"], num_workers=1, progress=False):
        (problem,) = checked.report["problems"]
        assert problem.startswith("1 prompts are in two folds") and repr(shared) in problem
        assert "kutils folds" in problem and not checked.bad.any() and not checked.is_in_order
    assert examine(inputs / "toy.tsv").is_in_order and examine(inputs / "more.tsv").is_in_order
    change(inputs / "more.tsv", fold=lambda values: values.__setitem__(slice(8, 10), [-1] * 2))
    assert all(item.is_in_order for item in check_datasets([inputs / "toy.tsv", inputs / "more.tsv"], progress=False))


def test_embeddings_that_do_not_fit(inputs):
    path, npy = inputs / "toy.tsv", inputs / "toy.npy"
    whole, table = np.load(npy), read_table(path, ["prompt"])
    fitting = {"encoder": "all-MiniLM-L6-v2", "rows": 80, "prompts_sha256": hash_prompts(table["prompt"])}
    paths.write_json(inputs / "toy.npy.json", fitting)
    assert examine(path).report["embeddings"] == "fit" and not examine(path, input_size=8).report["warnings"]
    np.save(npy, whole[:79])
    assert "float32 [79, 384]" in examine(path).report["problems"][0]
    np.save(npy, whole * np.where(np.arange(80) == 33, 1.1, 1)[:, None].astype(np.float32))
    assert "row 33 (line 35 of the TSV) has length 1.1" in examine(path).report["problems"][0]
    np.save(npy, np.where(np.arange(80)[:, None] == 5, np.float32("nan"), whole))
    assert "row 5 (line 7 of the TSV) has length nan" in examine(path).report["problems"][0]
    np.save(npy, whole)
    paths.write_json(inputs / "toy.npy.json", fitting | {"prompts_sha256": "of others"})
    assert "toy.npy is of other prompts" in examine(path).report["problems"][0]
    (inputs / "toy.npy.json").unlink()
    checked = examine(path, input_size=8)
    assert checked.is_in_order and "has no record" in checked.report["warnings"][0]
    npy.unlink()
    checked = examine(path)
    assert checked.is_in_order and checked.report["embeddings"] == "missing"


class LengthEncoder:
    """Embeds a prompt by a random vector that its text seeds."""

    name, max_tokens = "length", 256

    def encode(self, texts, batch_size, dtype="float32"):
        return np.concatenate([unit_rows(1, seed=sum(text.encode())) for text in texts])

    def count_truncated(self, texts):
        return 0


def test_a_sample_is_embedded_again(inputs, monkeypatch):
    asked = []
    monkeypatch.setattr(embedding, "load_encoder", lambda name: asked.append(name) or LengthEncoder())
    path, table = inputs / "toy.tsv", read_table(inputs / "toy.tsv", ["prompt"])
    rows = LengthEncoder().encode(table["prompt"].to_pylist(), 1)
    np.save(inputs / "toy.npy", rows)
    assert examine(path, verify_embeddings=20).report["embeddings"] == "fit"
    rows[50] = 0.6 * rows[50] + 0.8 * unit_rows(1, seed=9)[0]
    rows[50] /= np.linalg.norm(rows[50])
    np.save(inputs / "toy.npy", rows)
    (problem,) = examine(path, verify_embeddings=1000).report["problems"]
    cosine = rows[50] @ LengthEncoder().encode([table["prompt"][50].as_py()], 1)[0]
    assert f"of 80 prompts embedded again 1 differ, most in row 50 (line 52 of the TSV), cosine {cosine:.3f}" in problem
    record = {"encoder": "/my/encoder", "rows": 80, "prompts_sha256": hash_prompts(table["prompt"])}
    paths.write_json(inputs / "toy.npy.json", record)
    examine(path, verify_embeddings=2)
    assert asked == [None, None, "/my/encoder"]


# ---------------------------------------------------------------- what is written


def test_quarantine_and_checked_rows_are_the_original(inputs, capsys):
    path = inputs / "toy.tsv"
    table = read_table(path, ["image", "prompt", "fold"])
    values = {**table.to_pydict(), "seed": [str(number) for number in range(80)]}  # a column more
    values["image"][70] = "/absolute.png"
    write_table(path, values)
    table = read_table(path, ["seed"])
    record = {"encoder": "all-MiniLM-L6-v2", "rows": 80, "prompts_sha256": hash_prompts(table["prompt"])}
    paths.write_json(inputs / "toy.npy.json", record)
    clean = np.arange(80) % 3 > 0
    np.savez(inputs / "toy.clean.npz", clean=clean, folds_hash=folds_hash(table["prompt"], table["fold"].to_numpy()))
    bad = [*break_images(inputs / "toy_images"), 70]
    originals = {file: file.read_bytes() for file in inputs.glob("toy.*")}
    assert run(path, "--workers", 2) == 1
    assert {file: file.read_bytes() for file in originals} == originals
    quarantine = read_table(inputs / "toy.quarantine.tsv", ["image", "prompt", "fold", "seed", "line", "reason"])
    kept = read_table(inputs / "toy.checked.tsv", ["image", "prompt", "fold", "seed"])
    assert [int(line) - 2 for line in quarantine["line"].to_pylist()] == bad
    assert quarantine.drop_columns(["line", "reason"]).equals(table.take(bad).combine_chunks())
    good = np.setdiff1d(np.arange(80), bad)
    assert kept.equals(table.take(good).combine_chunks())
    np.testing.assert_array_equal(np.load(inputs / "toy.checked.npy"), np.load(inputs / "toy.npy")[good])
    data = load_datasets(["toy.checked"])  # a data set by that name
    assert len(data) == 74
    np.testing.assert_array_equal(data.clean, clean[good])
    embedding.embed_table(inputs / "toy.checked.tsv")
    assert "toy.checked.npy is up to date" in capsys.readouterr().out
    report = json.loads((inputs / "toy.check.json").read_text())
    assert (report["rows"], report["bad_rows"], report["images"]["decoded"]) == (80, 6, 74)
    assert run(inputs / "toy.checked.tsv") == 0
    assert not [file for file in inputs.iterdir() if "partial" in file.name]


def test_without_bad_rows_nothing_is_set_apart(inputs, capsys):
    before = set(inputs.iterdir())
    assert run(inputs / "toy.tsv") == 0
    assert set(inputs.iterdir()) - before == {inputs / "toy.check.json"}
    out = capsys.readouterr().out
    assert "80 looked at, 80 decode" in out and "0 bad rows, 0 problems" in out and "nothing is set apart" in out
    (inputs / "toy.quarantine.tsv").write_text("of before")
    assert run(inputs / "toy.tsv") == 0
    assert "toy.quarantine.tsv is of an earlier check" in capsys.readouterr().out
    assert (inputs / "toy.quarantine.tsv").read_text() == "of before"


def test_a_checked_set_that_was_worked_on_stays(inputs, capsys):
    bad = break_images(inputs / "toy_images")
    assert run(inputs / "toy.tsv") == 1
    change(inputs / "toy.checked.tsv", fold=lambda folds: folds.__setitem__(slice(None), [0] * len(folds)))
    np.save(inputs / "toy.checked.npy", unit_rows(80 - len(bad)))
    before = {file: file.read_bytes() for file in inputs.glob("toy.checked.*")}
    assert run(inputs / "toy.tsv") == 1
    assert {file: file.read_bytes() for file in inputs.glob("toy.checked.*")} == before
    assert "toy.checked.tsv has the others already, and stays as it is" in capsys.readouterr().out

    (inputs / "toy.clean.npz").write_bytes(b"damaged")
    next(path for path in sorted((inputs / "toy_images").iterdir(), reverse=True)).unlink()  # one bad row more
    assert run(inputs / "toy.tsv") == 1
    assert read_table(inputs / "toy.checked.tsv", ["fold"])["fold"].to_pylist() != [0] * (79 - len(bad))
    assert len(np.load(inputs / "toy.checked.npy")) == 79 - len(bad) and not (inputs / "toy.checked.clean.npz").exists()


def test_embeddings_that_do_not_fit_are_not_copied(inputs, capsys):
    break_images(inputs / "toy_images")
    np.save(inputs / "toy.npy", unit_rows(10))
    (inputs / "toy.checked.npy").write_bytes(b"of an earlier check")
    assert run(inputs / "toy.tsv") == 1
    assert (inputs / "toy.checked.tsv").is_file() and not (inputs / "toy.checked.npy").exists()
    assert "not embedded yet: python input/gen_prompt_embedding.py" in capsys.readouterr().out


def test_all_rows_bad(inputs, capsys):
    for image in (inputs / "toy_images").iterdir():
        image.unlink()
    assert run(inputs / "toy.tsv") == 1
    assert not (inputs / "toy.checked.tsv").exists()
    out = capsys.readouterr().out
    assert "all rows are bad" in out and "bad: 70 more rows" in out and "0 decode" in out
    assert read_table(inputs / "toy.quarantine.tsv", ["reason"]).num_rows == 80


def test_a_problem_alone_is_exit_status_1_and_errors_are_one_line(inputs, capsys):
    change(inputs / "toy.tsv", fold=setting(0, 5))
    assert run(inputs / "toy.tsv") == 1
    out = capsys.readouterr().out
    assert "problem: 1 prompts are in two folds" in out and "0 bad rows, 1 problems" in out
    assert not (inputs / "toy.quarantine.tsv").exists()
    with pytest.raises(ValueError, match=r"none.tsv is not there$"):
        checking.main([str(inputs / "none.tsv")])
    write_table(inputs / "odd.tsv", {"image": ["a"], "prompt": ["b"], "fold": [0], "reason": ["c"]})
    with pytest.raises(ValueError, match="has a column 'reason', which the quarantine adds"):
        checking.main([str(inputs / "odd.tsv")])
    with pytest.raises(SystemExit) as end:
        checking.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "Exit status: 0 if no set has bad rows or a problem" in shown
    assert "(default: 384)" in shown and "(default: 0)" in shown and f"(default: {os.cpu_count()})" in shown
    with pytest.raises(SystemExit):
        checking.main([str(inputs / "toy.tsv"), "--images", "-1"])

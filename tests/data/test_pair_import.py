"""Downloaded pairs become a data set that trains; a killed import ends with the same bytes; faults are set apart."""

import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from fixtures import pairs as made
from fixtures.datasets import use_folders
from fixtures.forked_python import REAL_PYTHON
from fixtures.prompts import FakeEncoder
from PIL import Image
from pyarrow import parquet

from kutils.__main__ import run
from kutils.data import (
    pair_embeddings,
    pair_images,
    pair_import,
    pair_job,
    pair_parts,
    pair_results,
    shards,
    transforms,
)
from kutils.data.datasets import load_datasets
from kutils.data.pair_formats import find_parts
from kutils.data.pairs import Keys
from kutils.data.transforms import decode_bytes
from kutils.prompts import embedding
from kutils.system import locks
from kutils.system.embedding_files import open_embeddings
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table
from kutils.training.train import train

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """`input/`, where prompts are encoded by hash, and shards have four rows."""
    use_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(embedding, "load_encoder", lambda *arguments, **options: FakeEncoder())
    monkeypatch.setattr(FakeEncoder, "name", "all-MiniLM-L6-v2")
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 4)
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def import_here(source, output, *arguments, **options):
    """The command in this process; returns its record."""
    args = pair_job.make_parser().parse_args([str(source), "--output", str(output), *arguments])
    options = {"embeddings": args.embeddings, "dedup": args.dedup, "overwrite": args.overwrite} | options
    sources = [str(source)]
    return pair_import.import_pairs(
        sources,
        output,
        pair_job.make_job(args),
        form=args.format,
        num_workers=1,
        ranks=ALONE,
        progress=False,
        **options,
    )


def table_of(path):
    return read_table(path, ["image", "prompt", "fold"])


def bytes_below(folder, name) -> dict[str, bytes]:
    """Content of all files of a data set, and of what is hidden."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0].strip(".")[: len(name)] == name
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def reasons(output) -> dict[str, str]:
    table = read_table(output.with_name(output.name + ".faults.tsv"), ["file", "key", "reason"])
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("pack", [(), ("--pack", "keep")])
def test_the_twelfth_places_tars(inputs, tmp_path, pack):
    folder = tmp_path / "sd-4.4M" / "cc"
    for number in range(2):
        made.write_tar(folder / f"sd-4.4M-cc-{number:03d}.tar", map(made.sample, range(6 * number, 6 * number + 6)))
    record = import_here(folder, inputs / "sd", *pack, "--generator", "Stable Diffusion 2.0")
    table = table_of(inputs / "sd.tsv")
    assert table["prompt"].to_pylist() == made.PROMPTS and set(table["fold"].to_pylist()) == {-1}
    assert table["image"][7].as_py() == "sd_images/00001/000/001.webp"
    data = load_datasets(["sd"], need_folds=False)
    for row in range(12):
        pixels = data.decode_image(row).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, np.asarray(made.picture(row)))
    assert bool(data.block_rows) == bool(pack) == (not (inputs / "sd_images").exists())
    expected = np.stack([made.embedding(prompt).astype(np.float32) for prompt in made.PROMPTS])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(open_embeddings(inputs / "sd.npy", 12), expected, atol=1e-7)
    assert record["embeddings"]["compared"] == 12 and record["embeddings"]["encoded"] == 0
    facts = parquet.read_table(inputs / "sd.pairs.parquet").to_pylist()
    assert facts[7] == {
        "image": "sd_images/00001/000/001.webp",
        "generator": "Stable Diffusion 2.0",
        "seed": "",
        "source": "sd-4.4M-cc",
        "file": "sd-4.4M-cc-001.tar",
        "key": "sd-00007",
        "width": 48,
        "height": 40,
    }
    assert embedding.embed_table(inputs / "sd.tsv", FakeEncoder()) == inputs / "sd.npy"  # its record says: up to date
    assert [path for path in inputs.iterdir() if path.name.startswith(".")] == []


def test_all_forms_train_together(inputs, tmp_path, tiny_recipe):
    sources = {
        "tars": (made.write_tar(tmp_path / "a.tar", map(made.sample, range(12))), "--pack", "24"),
        "zipped": (made.write_tar(tmp_path / "b.tar.gz", map(made.sample, range(12)), compress=True), "--pack", "keep"),
        "hub": (made.write_hub_parquet(tmp_path / "c.parquet"), "--pack", "32", "--image-format", "png"),
        "pickapic": (made.write_pandas_parquet(tmp_path / "d.parquet"), "--pack", "24", "--image-format", "jpeg"),
        "diffusiondb": (made.write_diffusiondb(tmp_path / "db"),),
        "zips": (made.write_diffusiondb(tmp_path / "zips", zipped=True),),
        "json": (made.write_list(tmp_path / "json", "json"), "--pack", "keep", "--verify"),
        "csv": (made.write_list(tmp_path / "csv", "csv"),),
        "imagefolder": (made.write_imagefolder(tmp_path / "imagefolder", "jsonl"), "--pack", "keep"),
        "texts": (made.write_texts(tmp_path / "texts"),),
        "embedded": (made.write_embedded(tmp_path / "embedded"), "--pack", "24"),
    }
    for name, (source, *arguments) in sources.items():
        record = import_here(source, inputs / name, *arguments)
        assert (record["pairs"], record["faults"]) == (12, {}), name
        table = table_of(inputs / f"{name}.tsv")
        folds = [made.PROMPTS.index(prompt) % 3 for prompt in table["prompt"].to_pylist()]
        write_table(inputs / f"{name}.tsv", {"image": table["image"], "prompt": table["prompt"], "fold": folds})
    data = load_datasets(list(sources))
    assert len(data) == 12 * len(sources)
    for row in range(len(data)):  # the colours of the quarters outlive any encoding
        number = made.PROMPTS.index(data.prompts[row].as_py())
        number = row % 12 if data.names[row // 12] == "pickapic" else number
        found = data.decode_image(row)
        corners = found[:, 4 :: found.shape[1] - 9, 4 :: found.shape[2] - 9].permute(1, 2, 0).numpy().astype(int)
        expected = np.asarray(made.picture(number)).astype(int)[4::31, 4::39]
        assert np.abs(corners - expected).max() < 12, (data.names[row // 12], number)
    result = train(
        tiny_recipe(datasets=tuple(sources), epochs=1, global_batch_size=4, max_local_batch_size=4), 0, ALONE
    )
    assert (result.updates, result.validation_rows, result.unreadable_images) == (2, 4 * len(sources), 0)


def test_pixels_are_those_of_kutils_shards(inputs, tmp_path, monkeypatch):
    """The same images, packed the other way: the shorter side, and about the same pixels (WebP is written faster)."""
    here = lambda function, jobs, *_, **__: (function(*job) for job in jobs)  # noqa: E731
    monkeypatch.setattr(shards.processes, "run_jobs", here)
    folder = made.write_imagefolder(tmp_path / "a", "csv")
    import_here(folder, inputs / "files")
    shards.pack(inputs / "files.tsv", shards.Encoding(24, "png", None), num_workers=1, progress=False)
    import_here(folder, inputs / "packed", "--pack", "24", "--image-format", "png")
    import_here(folder, inputs / "webp", "--pack", "24")
    files, packed, webp = (load_datasets([name], need_folds=False) for name in ("files", "packed", "webp"))
    assert packed.decode_image(3).shape == (3, 24, 28)
    for row in range(12):
        assert torch.equal(files.decode_image(row), packed.decode_image(row))
        assert (files.decode_image(row).float() - webp.decode_image(row).float()).abs().mean() < 8
    record = json.loads((inputs / "webp.shards" / "record.json").read_text())
    assert [record[key] for key in ("size", "format", "quality", "shard_rows")] == [24, "webp", 90, [4, 4, 4]]
    with pytest.raises(ValueError, match="was imported without image files; to pack otherwise, import with"):
        shards.pack(inputs / "webp.tsv", shards.Encoding(20, "webp", 90))
    assert load_datasets(["webp"], need_folds=False).block_rows  # and it is still there


# ---------------------------------------------------------------- which pairs


def test_where_and_limit(inputs, tmp_path):
    made.write_hub_parquet(tmp_path / "a.parquet")
    record = import_here(tmp_path / "a.parquet", inputs / "a", "--where", "model=sd-2.0", "seed<110")
    assert table_of(inputs / "a.tsv")["prompt"].to_pylist() == [made.PROMPTS[row] for row in (1, 4, 7)]
    assert (record["unwanted"], record["pairs"]) == (9, 3)
    facts = parquet.read_table(inputs / "a.pairs.parquet")
    assert facts["seed"].to_pylist() == ["101", "104", "107"] and set(facts["generator"].to_pylist()) == {"sd-2.0"}
    with pytest.raises(ValueError, match="none of 12 pairs could be imported, 12 of them by --where"):
        import_here(tmp_path / "a.parquet", inputs / "b", "--where", "model=none")


@pytest.mark.parametrize("limit", [3, 6, 7, 11, 30])
@pytest.mark.parametrize("pack", [(), ("--pack", "keep")])
def test_the_first_pairs(inputs, tmp_path, limit, pack):
    for number in range(3):
        made.write_tar(tmp_path / "t" / f"{number}.tar", map(made.sample, range(6 * number, 6 * number + 6)))
    import_here(tmp_path / "t", inputs / "all", *pack)
    import_here(tmp_path / "t", inputs / "some", *pack, "--limit", str(limit))
    count = min(limit, 18)
    every, some = (load_datasets([name], need_folds=False) for name in ("all", "some"))
    assert len(some) == count
    assert some.prompts.to_pylist() == every.prompts.to_pylist()[:count]
    assert all(some.read_image(row) == every.read_image(row) for row in range(count))
    np.testing.assert_array_equal(np.load(inputs / "some.npy"), np.load(inputs / "all.npy")[:count])
    files = list((inputs / "some_images").rglob("*.webp"))
    assert len(files) == (0 if pack else count)


def test_folds_of_an_export(inputs, tmp_path):
    samples = [made.sample(number, json={"fold": fold}) for number, fold in enumerate((3, -1, "0", 12, None))]
    made.write_tar(tmp_path / "a.tar", samples)
    import_here(tmp_path / "a.tar", inputs / "a", "--fold-key", "fold")
    assert table_of(inputs / "a.tsv")["fold"].to_pylist() == [3, -1, 0]
    assert reasons(inputs / "a") == {
        "sd-00003": "fold is '12', not 0 to 9 or -1",
        "sd-00004": "fold is 'None', not 0 to 9 or -1",
    }


def test_near_duplicates_go_with_all_their_images(inputs, tmp_path, monkeypatch):
    prompts = ["a red fox", "a blue car", "a red fox", "a red fox!", "a tall tree", "a blue car"]
    close = {"a red fox!": "a red fox"}

    def row(text):
        other = np.random.default_rng(len(text)).standard_normal(384)
        mixed = FakeEncoder.row(close[text]) + 0.01 * other if text in close else original(text)
        return (mixed / np.linalg.norm(mixed)).astype(np.float32)

    original = FakeEncoder.row
    monkeypatch.setattr(FakeEncoder, "row", staticmethod(row))
    samples = [made.sample(number, prompt, **{"embs.npy": None}) for number, prompt in enumerate(prompts)]
    made.write_tar(tmp_path / "a.tar", samples)
    for name, pack in (("files", ()), ("packed", ("--pack", "keep"))):
        record = import_here(tmp_path / "a.tar", inputs / name, *pack, "--dedup", "0.9")
        assert table_of(inputs / f"{name}.tsv")["prompt"].to_pylist() == prompts[:3] + prompts[4:]
        assert record["left_out"] == 1 and record["embeddings"]["encoded"] == 4
        data = load_datasets([name], need_folds=False)
        assert all(
            np.array_equal(data.decode_image(row).permute(1, 2, 0).numpy(), np.asarray(made.picture(number)))
            for row, number in enumerate((0, 1, 2, 4, 5))
        )
        np.testing.assert_array_equal(np.load(inputs / f"{name}.npy")[2], original("a red fox"))
    assert len(list((inputs / "files_images").rglob("*.webp"))) == 5
    assert (
        run(
            "import",
            [str(tmp_path / "a.tar"), "--output", str(inputs / "c"), "--dedup", "0.9", "--embeddings", "later"],
        )
        == 1
    )


# ---------------------------------------------------------------- prompts and embeddings


def test_prompts_are_cleaned_as_those_of_sources(inputs, tmp_path):
    prompts = [
        "a ((red)) fox,  snow",
        "fox",
        "eine Katze und ein Hund im Garten mit Blumen",
        "x" * 20_000,
        "\0\n\t",
        "a good prompt",
    ]
    made.write_tar(tmp_path / "a.tar", [made.sample(number, prompt) for number, prompt in enumerate(prompts)])
    record = import_here(tmp_path / "a.tar", inputs / "a")
    assert table_of(inputs / "a.tsv")["prompt"].to_pylist() == ["a red fox, snow", "a good prompt"]
    assert reasons(inputs / "a") == {
        "sd-00001": "prompt: too few words",
        "sd-00002": "prompt: another language",
        "sd-00003": "prompt: too many characters",
        "sd-00004": "prompt: empty",
    }
    assert record["faults"] == {"prompt": 4}
    assert {reason: case["count"] for reason, case in record["dropped"].items()} == dict.fromkeys(
        ("too few words", "another language", "too many characters", "empty"), 1
    )
    assert record["changed"]["attention weights"]["examples"] == [{"before": prompts[0], "after": "a red fox, snow"}]
    # the source's embedding is of the former text: this one prompt is encoded
    assert record["embeddings"] == {"compared": 1, "smallest_cosine": 1.0, "why": "", "encoded": 1}
    np.testing.assert_array_equal(np.load(inputs / "a.npy")[0], FakeEncoder.row("a red fox, snow"))
    import_here(tmp_path / "a.tar", inputs / "raw", "--raw-prompts")
    raw = table_of(inputs / "raw.tsv")["prompt"].to_pylist()
    assert raw == ["a ((red)) fox, snow", "fox", prompts[2], "a good prompt"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_sources_embeddings_are_scaled(inputs, tmp_path, dtype):
    vectors = [7 * made.embedding(prompt, dtype) for prompt in made.PROMPTS]
    samples = [made.sample(number, **{"embs.npy": made.as_npy(vector)}) for number, vector in enumerate(vectors)]
    record = import_here(made.write_tar(tmp_path / "a.tar", samples), inputs / "a")
    assert record["embeddings"]["encoded"] == 0 and record["embeddings"]["smallest_cosine"] > 0.999
    lengths = np.linalg.norm(np.load(inputs / "a.npy").astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_embeddings_of_another_encoder_are_not_used(inputs, tmp_path):
    """One prompt of twelve is enough, and all are encoded: the same numbers as without any."""
    other = {"embs.npy": made.as_npy(made.embedding("of something else"))}
    samples = [made.sample(number, **(other if number == 7 else {})) for number in range(12)]
    record = import_here(made.write_tar(tmp_path / "a.tar", samples), inputs / "a")
    told = record["embeddings"]
    assert told["why"].startswith(
        "1 of 12 prompts have other embeddings in the source than by all-MiniLM-L6-v2, cosine "
    )
    assert made.PROMPTS[7] in told["why"] and told["encoded"] == 12
    expected = np.stack([FakeEncoder.row(prompt) for prompt in made.PROMPTS])
    np.testing.assert_array_equal(np.load(inputs / "a.npy"), expected)
    longer = {"embs.npy": made.as_npy(np.ones(768, np.float16))}
    samples = [made.sample(number, **longer) for number in range(12)]
    assert import_here(made.write_tar(tmp_path / "b.tar", samples), inputs / "b")["embeddings"]["encoded"] == 12
    np.testing.assert_array_equal(np.load(inputs / "b.npy"), expected)
    import_here(tmp_path / "b.tar", inputs / "c", "--embeddings", "later")
    assert not (inputs / "c.npy").exists() and (inputs / "c.tsv").exists()


def test_the_sample_that_is_compared(inputs, tmp_path, monkeypatch):
    """Distinct prompts, as many as asked for; and all of one part's or the other's would not do."""
    monkeypatch.setattr(pair_embeddings, "COMPARED_PROMPTS", 5)
    for number in range(2):
        made.write_tar(
            tmp_path / "t" / f"{number}.tar", [made.sample(12 * number + n, made.PROMPTS[n]) for n in range(12)]
        )
    asked = []
    encode = FakeEncoder.encode
    monkeypatch.setattr(
        FakeEncoder, "encode", lambda self, texts, *rest: asked.append(texts) or encode(self, texts, *rest)
    )
    assert import_here(tmp_path / "t", inputs / "a")["embeddings"]["compared"] == 5
    assert len(asked) == 1 and len(set(asked[0])) == 5 and set(asked[0]) <= set(made.PROMPTS)


def test_rows_without_an_embedding_in_the_source(inputs, tmp_path):
    samples = [made.sample(number, **({"embs.npy": None} if number % 4 == 1 else {})) for number in range(24)]
    record = import_here(made.write_tar(tmp_path / "a.tar", samples), inputs / "a")
    assert record["embeddings"]["encoded"] == 3  # distinct prompts of six rows
    rows = np.load(inputs / "a.npy")
    for number in range(24):
        row = FakeEncoder.row(made.PROMPTS[number % 12])
        assert np.array_equal(rows[number], row) == (number % 4 == 1) and rows[number] @ row > 0.999


# ---------------------------------------------------------------- faults


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few hundred bytes that would be gigabytes of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def cut_webp() -> bytes:
    return made.encode(made.picture(3, (300, 300)), "webp")[:-20]


def broken_png() -> bytes:
    content = bytearray(made.encode(made.picture(3, (300, 300))))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def noisy_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return made.encode(Image.fromarray(noise), "jpeg")


@pytest.mark.parametrize("pack", [(), ("--pack", "keep"), ("--pack", "24")])
def test_what_is_wrong_is_set_apart_and_the_rest_imported(inputs, tmp_path, pack):
    vector = {"embs.npy": made.as_npy(np.full(384, np.nan, np.float16))}
    samples = [
        made.sample(0),
        made.sample(1, webp=None),
        made.sample(2, txt=None, json=None),
        made.sample(3, png=made.encode(made.picture(0))),
        made.sample(4, webp=b"no image at all"),
        made.sample(5, webp=b""),
        made.sample(6, webp=cut_webp()),
        made.sample(7, webp=None, png=broken_png()),
        made.sample(8, webp=None, jpg=noisy_jpeg()[:-900]),
        made.sample(9, webp=None, png=bomb(60_000, 60_000)),
        made.sample(10, "\t\n"),
        made.sample(11, "word " * 3000),
        made.sample(12, **{"embs.npy": made.as_npy(np.ones(383, np.float16))}),
        made.sample(13, **vector),
        made.sample(0, "a key that comes twice"),
        made.sample(14, webp=None, gif=made.encode(made.picture(14).quantize(4), "gif")),
        made.sample(15),
    ]
    path = made.write_tar(tmp_path / "a.tar", samples)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 10])  # and the last one is cut off
    record = import_here(path, inputs / "a", *pack)
    found = reasons(inputs / "a")
    assert {key.removeprefix("sd-000"): reason.split(" (")[0] for key, reason in found.items()} == {
        "01": "no image",
        "02": "no text",
        "03": "2 images under one key",
        "04": "image is no image of a known format",
        "05": "image is empty",
        "06": "image is cut off",
        "07": "image is damaged",
        "08": "image is cut off",
        "09": "image has too many pixels",
        "10": "prompt: empty",
        "11": "prompt: too many characters",
        "12": "embedding of another length",
        "13": "embedding is not finite, or all zero",
        "00": "a key that was there before",
        "15": "the tar is cut off or damaged here: it is cut off within a file",
    }
    assert (record["pairs"], sum(record["faults"].values()), record["read"]) == (2, 15, 17)
    assert table_of(inputs / "a.tsv")["prompt"].to_pylist() == [made.PROMPTS[0], made.PROMPTS[2]]
    files = read_table(inputs / "a.faults.tsv", ["file", "key", "reason"])["file"].to_pylist()
    assert set(files) == {"a.tar"}
    data = load_datasets(["a"], need_folds=False)
    assert data.decode_image(1).shape[0] == 3


def test_verify_decodes_what_is_kept_as_it_is(inputs, tmp_path):
    content = bytearray(noisy_jpeg())
    content[300:1500] = bytes(1200)
    content = bytearray(made.encode(made.picture(3, (200, 200)).convert("RGB"), "webp"))
    middle = len(content) // 2
    content[30:middle] = np.random.default_rng(1).bytes(middle - 30)
    with pytest.raises(Exception, match="decode"):
        decode_bytes(bytes(content), "it")
    path = made.write_tar(tmp_path / "a.tar", [made.sample(0), made.sample(1, webp=bytes(content))])
    assert import_here(path, inputs / "a", "--pack", "keep")["pairs"] == 2
    assert import_here(path, inputs / "b", "--pack", "keep", "--verify")["pairs"] == 1
    assert import_here(path, inputs / "c")["pairs"] == 1


def test_nothing_to_import_is_an_error_that_says_why(inputs, tmp_path, capsys):
    path = made.write_tar(tmp_path / "a.tar", [made.sample(number, webp=None) for number in range(3)])
    assert run("import", [str(path), "--output", str(inputs / "a"), "--workers", "1"]) == 1
    told = capsys.readouterr().err
    assert (
        "error: none of 3 pairs could be imported" in told and "a.tar, sd-00001, no image (its files: embs.npy" in told
    )
    assert list(inputs.iterdir()) == []


def test_a_bomb_of_webp_is_not_opened():
    """Pillow would allocate its pixels: 16383 x 16383 are a gigabyte."""
    content = made.encode(made.picture(0), "webp")
    assert content[12:16] == b"VP8L"
    bits = int.from_bytes(content[21:25], "little") | 0x0FFF_FFFF
    tracemalloc.start()
    with pytest.raises(Exception, match=r"too many pixels \(16,384 x 16,384"):
        pair_images.prepare(content[:21] + bits.to_bytes(4, "little") + content[25:], None, True)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("format", "options"),
    [("webp", {"lossless": True}), ("webp", {"lossless": False}), ("webp", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"})]
    + [("png", {}), ("jpeg", {}), ("gif", {}), ("bmp", {}), ("tiff", {}), ("avif", {})],
)
def test_heads_of_images(format, options):
    for size in ((1, 1), (48, 40), (257, 3)):
        content = made.encode(made.picture(0, size), format, **options)
        name, *sides = transforms.read_header(content, "image")
        assert (name, sides) == (format.upper(), list(size))
        pair_images.check_whole(content, name)
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.size == size


# ---------------------------------------------------------------- again, and beyond a kill


def stop_at(monkeypatch, owner, name, call):
    """Let a function raise KeyboardInterrupt at its n-th call."""
    original, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return lambda: monkeypatch.setattr(owner, name, original)


STOPS = [(pair_parts, "write_part", 3), (pair_parts.ChunkFiles, "save", 2), (pair_results, "link_rows", 1)]
STOPS += [(pair_results, "write_faults", 1), (embedding, "embed_table", 1), (shards, "write_images", 4)]
STOPS += [(pair_results, "remove", call) for call in (1, 2, 3, 4, 5, 6, 7, 8)] + [(pair_results, "move_images", 1)]


@pytest.mark.parametrize("pack", [(), ("--pack", "24")])
@pytest.mark.parametrize("owner, name, call", STOPS)
def test_a_killed_import_ends_with_the_same_bytes(inputs, tmp_path, monkeypatch, pack, owner, name, call):
    for number in range(4):
        samples = [
            made.sample(n, **({"embs.npy": None} if n % 5 == 0 else {})) for n in range(5 * number, 5 * number + 5)
        ]
        made.write_tar(tmp_path / "t" / f"{number}.tar", [*samples, made.sample(100, webp=None)])
    arguments = (tmp_path / "t", inputs / "a", *pack, "--limit", "17")
    import_here(*arguments)
    expected = bytes_below(inputs, "a")
    for path in inputs.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    restore = stop_at(monkeypatch, owner, name, call)
    try:
        import_here(*arguments)
    except KeyboardInterrupt:
        restore()
        finished = {path.name for path in inputs.glob(".a.*.partial/*.npz")}
        assert name in ("write_part", "write_images") or owner is not pair_parts or finished
        import_here(*arguments)
    else:
        assert (name, pack) in [("link_rows", ()), ("write_images", ()), ("move_images", ("--pack", "24"))]
    assert bytes_below(inputs, "a") == expected
    assert {path.name[0] for path in inputs.iterdir()} == {"a"}


def test_finished_parts_are_not_read_again(inputs, tmp_path, monkeypatch):
    for number in range(4):
        made.write_tar(tmp_path / "t" / f"{number}.tar", map(made.sample, range(5 * number, 5 * number + 5)))
    restore = stop_at(monkeypatch, pair_parts, "write_part", 3)
    with pytest.raises(KeyboardInterrupt):
        import_here(tmp_path / "t", inputs / "a")
    restore()
    read, write_part = [], pair_parts.write_part
    monkeypatch.setattr(
        pair_parts, "write_part", lambda number, *rest: read.append(number) or write_part(number, *rest)
    )
    import_here(tmp_path / "t", inputs / "a")
    assert read == [2, 3]
    import_here(tmp_path / "t", inputs / "a")  # up to date
    assert read == [2, 3]


def test_what_is_there_is_not_overwritten(inputs, tmp_path, capsys):
    path = made.write_tar(tmp_path / "a.tar", map(made.sample, range(12)))
    import_here(path, inputs / "a")
    table = table_of(inputs / "a.tsv")
    folds = {"image": table["image"], "prompt": table["prompt"], "fold": [1] * 12}
    write_table(inputs / "a.tsv", folds)
    import_here(path, inputs / "a")
    assert "a.tsv is up to date" in capsys.readouterr().out
    assert table_of(inputs / "a.tsv")["fold"].to_pylist() == [1] * 12  # folds stay
    with pytest.raises(ValueError, match="was imported from other files or with other settings; choose another name"):
        import_here(path, inputs / "a", "--limit", "5")
    (inputs / "a.folds.json").write_text("{}")
    assert import_here(path, inputs / "a", "--limit", "5", "--overwrite", "--pack", "keep")["pairs"] == 5
    assert not (inputs / "a_images").exists() and not (inputs / "a.folds.json").exists()
    assert len(load_datasets(["a"], need_folds=False)) == 5
    write_table(inputs / "own.tsv", folds)
    with pytest.raises(ValueError, match=r"own.tsv exists and was not imported; choose another name"):
        import_here(path, inputs / "own", "--overwrite")
    (inputs / "a.npy").unlink()
    with pytest.raises(ValueError, match="is not whole any more"):
        import_here(path, inputs / "a", "--limit", "5", "--pack", "keep")


def test_room_on_the_disk_is_looked_at_first(inputs, tmp_path, monkeypatch, capsys):
    path = made.write_tar(tmp_path / "a.tar", map(made.sample, range(12)))
    usage = shutil.disk_usage(inputs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    assert run("import", [str(path), "--output", str(inputs / "a"), "--workers", "1"]) == 1
    told = capsys.readouterr().err
    assert "GB are needed, 0.0 GB are free; give --pack 448 or a smaller size" in told
    assert "make room, and the same command goes on" in told and list(inputs.iterdir()) == []
    assert import_here(path, inputs / "a", "--limit", "2")["pairs"] == 2  # 2 of 12 fit


def test_a_second_import_of_the_name_waits_for_nobody(inputs, tmp_path):
    path = made.write_tar(tmp_path / "a.tar", map(made.sample, range(12)))
    with locks.locked(inputs / "a.tsv"), pytest.raises(ValueError, match=r"a\.tsv is in use by process \d+ on "):
        import_here(path, inputs / "a")


def test_arguments_that_do_not_go_together(inputs, tmp_path, capsys):
    path = made.write_tar(tmp_path / "a.tar", [made.sample(0)])
    for arguments, told in (
        (["--quality", "80"], "give --pack SIZE"),
        (["--pack", "keep", "--image-format", "png"], "give --pack SIZE"),
        (["--pack", "0"], "give 1 or more"),
        (["--raw-prompts", "--min-words", "1"], "goes without limits"),
        (["--limit", "-1"], "--limit is 0 or more"),
        (["--dedup", "1.5"], "threshold"),
        (["--where", "model"], "give KEY=VALUE"),
    ):
        assert run("import", [str(path), "--output", str(inputs / "a"), *arguments]) == 1
        assert told in capsys.readouterr().err
    for name in ("..", ".hidden", "a b"):
        assert run("import", [str(path), "--output", f"{inputs}/{name}"]) == 1
    assert list(inputs.iterdir()) == []


def test_memory_does_not_grow_with_the_pairs(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 256)
    args = pair_job.make_parser().parse_args(["x", "--output", str(inputs / "a"), "--pack", "keep"])
    job = dataclasses.replace(pair_job.make_job(args), with_embeddings=True)
    peaks = []
    for count in (600, 2400):
        made.write_tar(tmp_path / f"{count}.tar", map(made.sample, range(count)))
        (part,) = find_parts([str(tmp_path / f"{count}.tar")], "", Keys())
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        assert pair_parts.write_part(0, part, job, tmp_path / str(count)).pairs == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0] + 150 * 1800  # keys are remembered within a part


# ---------------------------------------------------------------- processes and ranks


@pytest.mark.slow
def test_processes_and_a_real_kill(tmp_path):
    """Two processes, killed while they work; the second start ends with the bytes of one process in one go."""
    inputs = tmp_path / "input"
    for number in range(6):
        samples = [
            made.sample(n, webp=made.encode(made.picture(n, (400, 400)), "webp"))
            for n in range(20 * number, 20 * number + 20)
        ]
        made.write_tar(tmp_path / "t" / f"{number}.tar", samples)
    command = [REAL_PYTHON, "-m", "kutils", "import", str(tmp_path / "t"), "--pack", "384", "--embeddings", "later"]
    environment = os.environ | {"KUTILS_INPUT": str(inputs), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*command, "--output", str(inputs / "a"), "--workers", "2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(inputs.glob(".a.*.partial/*.npz")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    begun = {path.name for path in inputs.glob(".a.*.partial/*.npz")}
    assert 0 < len(begun) < 6 and not (inputs / "a.tsv").exists()
    for name in "ab":
        import_here(tmp_path / "t", inputs / name, "--pack", "384", "--embeddings", "later")
    first, second = (bytes_below(inputs, name) for name in "ab")
    assert len(first) == len(second) >= 9
    differing = [name for name in first if first[name].replace(b"a_images", b"b_images") != second["b" + name[1:]]]
    assert [name.split(".", 1)[1] for name in sorted(differing)] == [
        "import.json",
        "pairs.parquet",
        "shards/record.json",
    ]
    one, other = (parquet.read_table(inputs / f"{name}.pairs.parquet").drop(["image"]) for name in "ab")
    assert one.equals(other)


@pytest.mark.slow
def test_ranks_share_the_parts(tmp_path):
    inputs = tmp_path / "input"
    for number in range(3):
        made.write_tar(
            tmp_path / "t" / f"{number}.tar",
            [made.sample(n, **{"embs.npy": None}) for n in range(4 * number, 4 * number + 4)],
        )
    arguments = ["--embeddings", "auto", "--dedup", "0.95"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "kutils"]
    command += ["import", str(tmp_path / "t"), "--output", str(inputs / "a"), "--workers", "1", "--device", "cpu"]
    environment = os.environ | {"KUTILS_INPUT": str(inputs), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=300)
    on_ranks = bytes_below(inputs, "a")
    shutil.rmtree(inputs)
    import_here(tmp_path / "t", inputs / "a", *arguments)
    alone = bytes_below(inputs, "a")
    assert on_ranks.keys() == alone.keys() and len(alone) == 6 + 12
    for name in alone:
        if name.endswith(".npy"):  # another number of threads may round differently
            one, other = (np.load(io.BytesIO(content)) for content in (on_ranks[name], alone[name]))
            np.testing.assert_allclose(one, other, atol=1e-6)
        else:
            assert on_ranks[name] == alone[name], name

"""What is exported comes back row for row, and other libraries read it."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
import webdataset
from fixtures import pairs as made
from PIL import Image
from pyarrow import parquet

from kutils.__main__ import run
from kutils.data import pair_export, pair_import, pair_job
from kutils.data.datasets import load_datasets
from kutils.data.pair_export import export_pairs
from kutils.data.pair_facts import read_facts
from kutils.prompts import embedding
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table

ALONE = Ranks(0, 1, torch.device("cpu"))


def import_here(source, output, *arguments):
    args = pair_job.make_parser().parse_args([str(source), "--output", str(output), *arguments])
    job = pair_job.make_job(args)
    return pair_import.import_pairs([str(source)], output, job, num_workers=1, ranks=ALONE, progress=False)


@pytest.fixture
def inputs(workspace, monkeypatch):
    monkeypatch.setattr(embedding, "load_encoder", lambda *arguments, **options: made.FakeEncoder())
    monkeypatch.setattr(made.FakeEncoder, "name", "all-MiniLM-L6-v2")
    return workspace / "input"


@pytest.fixture(params=["keep", "files"])
def exported(request, inputs, tmp_path):
    """An imported set of 30 rows with folds, in shards or in files."""
    samples = [
        made.sample(number, json={"model": made.MODELS[number % 3], "seed": 2**63 + number}) for number in range(30)
    ]
    pack = ("--pack", "keep") if request.param == "keep" else ()
    import_here(made.write_tar(tmp_path / "a.tar", samples), inputs / "sd", *pack)
    table = read_table(inputs / "sd.tsv", ["image", "prompt", "fold"])
    folds = [number % 4 - 1 for number in range(30)]
    write_table(inputs / "sd.tsv", {"image": table["image"], "prompt": table["prompt"], "fold": folds})
    return inputs / "sd.tsv"


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_an_export_comes_back(exported, inputs, tmp_path, form):
    folder = export_pairs(exported, tmp_path / "out", form, pairs_per_file=8, progress=False)
    assert len(list(folder.glob("*.*"))) == 4 + 1
    record = import_here(folder, inputs / "back", "--pack", "keep", "--raw-prompts", "--fold-key", "fold")
    assert record["pairs"] == 30 and record["embeddings"]["encoded"] == 0
    one, other = load_datasets(["sd"], need_folds=False), load_datasets(["back"], need_folds=False)
    assert other.prompts.to_pylist() == one.prompts.to_pylist()
    np.testing.assert_array_equal(other.folds, one.folds)
    assert all(other.read_image(row) == one.read_image(row) for row in range(30))
    first, second = (np.load(inputs / f"{name}.npy") for name in ("sd", "back"))
    np.testing.assert_array_equal(first, second)
    columns = ["generator", "seed", "source"]
    known = [read_facts(inputs / f"{name}.tsv", data.images, columns) for name, data in (("sd", one), ("back", other))]
    assert all(np.array_equal(known[0][name], known[1][name]) for name in columns)
    assert known[0]["seed"][3] == str(2**63 + 3) and set(known[0]["generator"]) == set(made.MODELS)


def test_other_libraries_read_an_export(exported, tmp_path):
    tars = export_pairs(exported, tmp_path / "tars", "webdataset", pairs_per_file=16, progress=False)
    urls = sorted(str(path) for path in tars.glob("*.tar"))
    assert [url.rpartition("/")[2] for url in urls] == ["sd-000000.tar", "sd-000001.tar"]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
    assert [item["txt"] for item in samples] == [made.PROMPTS[row % 12] for row in range(30)]
    rows = np.load(exported.with_suffix(".npy"))
    for row, item in enumerate(samples):
        assert np.array_equal(np.asarray(item["webp"].convert("RGB")), np.asarray(made.picture(row)))
        np.testing.assert_array_equal(item["embs.npy"], rows[row])
        assert item["json"]["fold"] == row % 4 - 1 and item["__key__"] == f"{row:09d}"
    tables = export_pairs(exported, tmp_path / "tables", "parquet", progress=False)
    (path,) = tables.glob("*.parquet")
    assert path.name == "sd-00000-of-00001.parquet"
    frame = parquet.read_table(path).to_pandas()
    assert frame["prompt"].tolist() == [made.PROMPTS[row % 12] for row in range(30)]
    with Image.open(io.BytesIO(frame["image"][7]["bytes"])) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(made.picture(7)))
    np.testing.assert_array_equal(np.stack(frame["embedding"]), rows)
    features = json.loads(parquet.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_killed_export_ends_with_the_same_bytes(exported, tmp_path, monkeypatch, form):
    options = {"pairs_per_file": 7, "progress": False}
    whole = export_pairs(exported, tmp_path / "whole", form, **options)
    read, calls = pair_export.ExportedRows.image, []

    def image(self, row):
        calls.append(row)
        if len(calls) == 64 + 18:  # the first ones tell the size
            raise KeyboardInterrupt
        return read(self, row)

    monkeypatch.setattr(pair_export.ExportedRows, "image", image)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(9):
            export_pairs(exported, tmp_path / "out", form, **options)
            shutil.rmtree(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_pairs(exported, tmp_path / "out", form, **options)
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, tmp_path / "out"))
    assert one == other and not list(tmp_path.glob(".out*"))


def test_files_without_import_and_without_embeddings(inputs, tmp_path, capsys):
    """`toy` is a data set of PNG files whose quotes and commas stay."""
    (inputs / "toy.npy").unlink()
    arguments = ["toy", "--format", "webdataset", "--output", str(tmp_path / "out"), "--no-embeddings"]
    assert run("export", arguments) == 0
    import_here(tmp_path / "out", inputs / "back", "--embeddings", "later", "--raw-prompts", "--fold-key", "fold")
    one, other = (read_table(inputs / f"{name}.tsv", ["image", "prompt", "fold"]) for name in ("toy", "back"))
    assert one.select(["prompt", "fold"]).equals(other.select(["prompt", "fold"]))
    for first, second in zip(one["image"].to_pylist(), other["image"].to_pylist(), strict=True):
        assert (inputs / first).read_bytes() == (inputs / second).read_bytes()
    capsys.readouterr()
    assert run("export", arguments) == 0 and "is up to date (80 pairs)" in capsys.readouterr().out
    assert run("export", ["back", "--format", "webdataset", "--no-embeddings", "--output", str(tmp_path / "out")]) == 1
    assert "is another export or none; choose another --output" in capsys.readouterr().err


def test_what_cannot_be_exported(inputs, tmp_path, capsys):
    arguments = ["toy", "--format", "parquet", "--output", str(tmp_path / "out")]
    (inputs / "toy_images" / "0007_1.png").write_bytes(b"no image")
    assert run("export", arguments) == 1
    assert "0007_1.png" in capsys.readouterr().err
    (inputs / "toy_images" / "0007_1.png").unlink()
    assert run("export", arguments) == 1
    assert "0007_1.png: No such file" in capsys.readouterr().err
    (inputs / "toy.npy.json").write_text(json.dumps({"prompts_sha256": "another"}))
    assert run("export", arguments) == 1
    assert "toy.npy is of other prompts" in capsys.readouterr().err
    assert run("export", ["nothing", "--format", "parquet"]) == 1
    assert "nothing.tsv is not there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

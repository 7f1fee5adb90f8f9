"""A data set whose images are in shards alone trains, is checked and shown as one of image files."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures import pairs as made
from PIL import Image
from pyarrow import parquet

from kutils.__main__ import run
from kutils.data import checking, pair_import, pair_job, preparation, shards
from kutils.data.datasets import TrainingImages, load_datasets
from kutils.prompts import embedding
from kutils.prompts import folds as prompt_folds
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table
from kutils.training import examples, slices
from kutils.training.train import train
from kutils.views import report
from kutils.views.exploration import Exploration

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def packed(workspace, monkeypatch):
    """40 pairs of 40 prompts in shards of 16 rows, with folds; row 7 is a broken image, row 9 has that of row 8."""
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 16)
    monkeypatch.setattr(embedding, "load_encoder", lambda *arguments, **options: made.FakeEncoder())
    monkeypatch.setattr(made.FakeEncoder, "name", "all-MiniLM-L6-v2")
    broken = bytearray(made.encode(made.picture(7), "webp"))
    broken[30:60] = bytes(range(30))
    samples = [made.sample(number, f"{made.PROMPTS[number % 12]}, number {number}") for number in range(40)]
    samples[7]["webp"], samples[9]["webp"] = bytes(broken), samples[8]["webp"]
    output, path = workspace / "input" / "sd", made.write_tar(workspace / "sd.tar", samples)
    args = pair_job.make_parser().parse_args([str(path), "--output", str(output), "--pack", "keep"])
    job = pair_job.make_job(args)
    pair_import.import_pairs([str(path)], output, job, num_workers=1, ranks=ALONE, progress=False)
    prompt_folds.assign_folds([workspace / "input" / "sd.tsv"], num_folds=4, progress=False)
    return workspace / "input" / "sd.tsv"


def test_the_check_reads_shards_and_sets_rows_apart(packed, capsys):
    assert run("check", [str(packed), "--workers", "1", "--verify-embeddings", "9"]) == 1
    told = capsys.readouterr().out
    assert "line 9, sd_images/00000/000/007.webp: image cannot be decoded" in told
    assert "3 bad rows in" in told and "the other 37 are the data set sd.checked" in told
    quarantine = read_table(packed.with_name("sd.quarantine.tsv"), ["line", "reason"])
    assert quarantine["line"].to_pylist() == ["9", "10", "11"]
    data, checked = load_datasets(["sd"]), load_datasets(["sd.checked"])
    rows = [row for row in range(40) if row not in (7, 8, 9)]
    assert len(checked) == 37 and checked.prompts.to_pylist() == [data.prompts[row].as_py() for row in rows]
    assert all(checked.read_image(row) == data.read_image(other) for row, other in enumerate(rows))
    np.testing.assert_array_equal(
        np.load(packed.with_name("sd.checked.npy")), np.load(packed.with_suffix(".npy"))[rows]
    )
    folders = [packed.with_name(name) for name in ("sd.shards", "sd.checked.shards")]
    assert [json.loads((folder / "record.json").read_text())["shard_rows"] for folder in folders] == [
        [16, 16, 8],
        [13, 16, 8],
    ]
    inodes = [[(folder / f"{number:05d}.arrow").stat().st_ino for number in range(3)] for folder in folders]
    assert inodes[0][1:] == inodes[1][1:] and inodes[0][0] != inodes[1][0]  # nothing is copied that need not be
    assert run("check", [str(packed.with_name("sd.checked.tsv")), "--workers", "1"]) == 0
    assert run("check", [str(packed), "--workers", "1"]) == 1  # again: it stays as it is
    assert "has the others already" in capsys.readouterr().out
    labels = slices.label_rows(checked, np.arange(37), 0)
    assert labels["generator"].tolist() == [made.MODELS[row % 3] for row in rows]


def test_the_check_names_shards_that_are_not_whole(packed, capsys):
    (packed.with_suffix(".shards") / "00001.arrow").unlink()
    assert run("check", [str(packed), "--workers", "1"]) == 1
    assert "00001.arrow is not there or not whole: import it again with --overwrite" in capsys.readouterr().err


def test_checking_in_processes(packed):
    (checked,) = checking.check_datasets([packed], num_workers=2, progress=False)
    assert checked.report["images"]["decoded"] == 39 and checked.report["images"]["formats"] == {"WEBP": 39}


def test_a_run_its_report_and_what_is_shown(packed, tiny_recipe, workspace):
    assert run("check", [str(packed), "--workers", "1"]) == 1
    recipe = tiny_recipe(datasets=("sd.checked",), epochs=1)
    result = train(recipe, 0, ALONE)
    assert result.unreadable_images == 0 and result.updates > 0
    folder = recipe.run_folder(0)
    table = examples.validation_table(recipe, 0, folder)
    chosen = examples.choose_extremes(table, recipe, 2)
    data = load_datasets(["sd.checked"])
    for row, image in zip(chosen["row"], chosen["image"], strict=True):
        expected = data.decode_image(int(row)).permute(1, 2, 0).numpy()
        assert isinstance(image, Image.Image) and np.array_equal(np.asarray(image), expected)
    path = report.write_report(folder)
    page = path.read_text(encoding="utf-8")
    assert "By generator" in page and all(model in page for model in made.MODELS)
    images, prompts = preparation.random_examples(["sd.checked"], 4)
    assert all(isinstance(image, Image.Image) for image in images) and len(set(prompts)) == 4
    explored = Exploration.open("sd.checked")
    scores = explored.slice_scores(0, "generator")
    assert set(scores.index) <= set(made.MODELS) and scores["images"].sum() == result.validation_rows
    assert isinstance(explored.examples(0)["image"][0], Image.Image)


def test_generators_and_sources_beside_a_set_of_files(packed, workspace):
    """`toy` has image files and was not imported."""
    data = load_datasets(["toy", "sd"], need_folds=False)
    rows = np.array([len(data) - 1, 3, 80, 82, 0])
    labels = slices.label_rows(data, rows, 0)
    assert list(labels) == [*slices.SLICES, "generator"] == list(slices.slicings(data))
    assert labels["generator"].tolist() == ["sd-1.5", "unknown", "sd-1.5", "sdxl", "unknown"]
    assert labels["source"].tolist() == ["sd", "toy", "sd", "sd", "toy"]
    assert list(slices.label_rows(load_datasets(["toy"]), np.arange(4), 0)) == list(slices.SLICES)
    path = packed.with_suffix(".pairs.parquet")  # in another order, and not of all
    table = parquet.read_table(path).to_pandas().iloc[::-1][:39]
    table["source"] = "elsewhere"
    pd.DataFrame(table).to_parquet(path)
    labels = slices.label_rows(data, rows, 0)
    assert labels["generator"].tolist() == ["sd-1.5", "unknown", "unknown", "sdxl", "unknown"]
    assert labels["source"].tolist() == ["elsewhere", "toy", "sd", "elsewhere", "toy"]


def test_an_epoch_reads_each_row_of_uneven_shards_once(packed, tiny_recipe):
    data = load_datasets(["sd"])
    assert data.shards[0].starts == [0, 16, 32]
    images = TrainingImages(data, data.training_rows(0), tiny_recipe())
    for row in data.training_rows(0):
        example = images[0, int(row)]
        assert (example["row"] == row) == (row != 7) and len(example["bad"]) == (row == 7)

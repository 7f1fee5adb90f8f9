"""Packed images: what training reads from shards is what it would read from files, and an epoch is still an epoch."""

import io
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset
from PIL import Image
from torch.utils.data import DataLoader

from kutils.data import datasets, shards, transforms, validation_check
from kutils.data.datasets import TrainingImages, ValidationImages, load_datasets
from kutils.data.sampler import WINDOW_BLOCKS, EpochSampler
from kutils.data.shards import Encoding, pack
from kutils.runs import folders
from kutils.system import arrow, processes
from kutils.system.ranks import Ranks
from kutils.system.tables import read_table, write_table
from kutils.training import train

LOSSLESS = Encoding(10_000, "png", None)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def inputs(workspace, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 16)  # 80 rows in 5 shards
    monkeypatch.setattr(datasets, "ROWS_PER_SHARD", 16)
    return workspace / "input"


@pytest.fixture
def packed(inputs, monkeypatch):
    """Pack a data set in this process."""
    here = lambda function, jobs, *_, **__: (function(*job) for job in jobs)  # noqa: E731
    monkeypatch.setattr(processes, "run_jobs", here)
    return lambda encoding=LOSSLESS, name="toy": pack(inputs / f"{name}.tsv", encoding, progress=False)


def batches(data, recipe, num_workers=0, epochs=(0, 1), **options):
    """All batches of some epochs as training loads them."""
    options = {"global_batch_size": 8, "local_batch_size": 8, "block_rows": data.block_rows} | options
    rows = data.training_rows(0)
    sampler = EpochSampler(data, rows, recipe.seed, **options)
    for epoch in epochs:
        loader = DataLoader(
            TrainingImages(data, rows, recipe),
            batch_sampler=list(sampler.batches(epoch)),
            num_workers=num_workers,
            collate_fn=datasets.collate,
        )
        yield from loader


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["bad"] == other["bad"] == []
        for key in ("image", "jitter", "target", "row"):
            assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lossless_shards_give_training_the_same_tensors(packed, tiny_recipe, num_workers):
    files = load_datasets(["toy"])
    expected = list(batches(files, tiny_recipe()))
    packed()
    data = load_datasets(["toy"])
    assert files.block_rows == 0 and data.block_rows == 16
    assert_same(batches(data, tiny_recipe(), num_workers), expected)
    rows = data.validation_rows(0)
    for position in range(len(rows)):
        one, other = (ValidationImages(item, rows, 32)[position]["image"] for item in (data, files))
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_shards_are_training_on_the_encoded_files_one_by_one(packed, inputs, tiny_recipe, format):
    """The independent way: Pillow's own writer, files of their own, no shards."""
    make_dataset(inputs, "twin")
    table = read_table(inputs / "toy.tsv", ["image", "prompt", "fold"])
    names = []
    for name in table["image"].to_pylist():
        image = transforms.resize_square(transforms.decode_rgb(inputs / name), 30)
        names.append(f"twin_images/{name.split('/')[1].replace('png', format)}")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(inputs / names[-1], format, quality=70)
    write_table(inputs / "twin.tsv", {"image": names, "prompt": table["prompt"], "fold": table["fold"]})
    (inputs / "twin.npy").write_bytes((inputs / "toy.npy").read_bytes())
    packed(Encoding(30, format, 70))
    recipe = tiny_recipe(input_size=24)
    assert_same(batches(load_datasets(["toy"]), recipe), batches(load_datasets(["twin"]), recipe))


def test_a_run_on_lossless_shards_has_the_same_losses(packed, workspace, tiny_recipe):
    logged = []
    for prefix in ("files", "shards"):
        train.train(tiny_recipe(prefix=prefix, save_dir=prefix, epochs=1), 0, ALONE)
        lines = folders.read_metrics(workspace / "working" / "runs" / f"{prefix}_fold0" / "metrics.jsonl")
        logged.append([(line.get("loss"), line.get("cosine_similarity")) for line in lines])
        packed()
    assert logged[0] == logged[1] and len(logged[0]) > 2


def test_shards_replace_the_files(packed, inputs, tiny_recipe):
    packed(Encoding(20, "webp", 90))
    for path in (inputs / "toy_images").iterdir():
        path.unlink()
    data = load_datasets(["toy"])
    assert ValidationImages(data, np.array([5]), 16)[0]["image"].shape == (3, 16, 16)
    assert data.decode_image(5).shape == (3, 20, 20)
    validation_check.check_validation_images(data, np.arange(80), 0, ALONE)  # of training


def test_sizes_by_hand():
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    for size, expected in ((30, (45, 30)), (60, (90, 60)), (100, (90, 60))):  # Pillow: width x height
        with Image.open(io.BytesIO(Encoding(size, "webp", 90).encode(image))) as picture:
            assert (picture.format, picture.size) == ("WEBP", expected)
    random = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    assert torch.equal(transforms.decode_bytes(LOSSLESS.encode(random), "it"), random)
    assert len(Encoding(60, "jpeg", 50).encode(random)) < len(Encoding(60, "jpeg", 95).encode(random))
    for wrong in ((0, "webp", 90), (9, "gif", 90), (9, "webp", None), (9, "png", 90), (9, "jpeg", 101), (9, "webp", 0)):
        with pytest.raises(ValueError, match=r"give 1 or more|give 1 to 100|leave --quality out"):
            Encoding(*wrong)


# ---------------------------------------------------------------- the epoch


class Rows:
    """40,000 prompts: two images each, far apart for every second one."""

    prompt_codes = np.concatenate([np.arange(20_000) // 2 * 2, np.arange(20_000) + 20_000, np.arange(20_000) | 1])
    prompt_codes = prompt_codes.astype(np.int32)


def sampler_of(block_rows, **options):
    options = {"global_batch_size": 64, "local_batch_size": 64} | options
    return EpochSampler(Rows, np.arange(60_000), 5, block_rows=block_rows, **options)


def test_an_epoch_in_windows_has_the_same_images_in_another_order():
    anywhere, windows = sampler_of(0), sampler_of(100)
    for epoch in range(3):
        rows = windows.epoch_rows(epoch)
        assert rows.dtype == np.int32 and not np.array_equal(rows, anywhere.epoch_rows(epoch))
        np.testing.assert_array_equal(np.sort(rows), np.sort(anywhere.epoch_rows(epoch)))
    np.testing.assert_array_equal(windows.epoch_rows(1), sampler_of(100).epoch_rows(1))
    assert not np.array_equal(windows.epoch_rows(0), windows.epoch_rows(1))


def test_an_epoch_reads_a_window_of_blocks_at_a_time():
    blocks = sampler_of(100).epoch_rows(0) // 100
    first, last = np.full(600, len(blocks)), np.zeros(600, int)
    np.minimum.at(first, blocks, np.arange(len(blocks)))
    np.maximum.at(last, blocks, np.arange(len(blocks)))
    open_at_once = [((first <= position) & (last >= position)).sum() for position in range(0, len(blocks), 97)]
    assert max(open_at_once) == WINDOW_BLOCKS < shards.MOST_OPEN
    inside = blocks[: first[np.argsort(first)[WINDOW_BLOCKS]]]  # the first window
    assert len(set(inside)) == WINDOW_BLOCKS
    assert np.mean(np.diff(inside) == 0) < 0.1  # mixed: 1 / 32 of the neighbours are of one block
    assert (np.diff(np.unique(inside)) > 1).any()  # and of anywhere in the data set


def test_where_one_window_holds_all_rows_the_order_is_that_of_files():
    np.testing.assert_array_equal(sampler_of(0).epoch_rows(2), sampler_of(2000).epoch_rows(2))


def test_any_number_of_ranks_and_a_later_start_deal_the_same_windows():
    whole = list(sampler_of(100).batches(1))
    ranks = [list(sampler_of(100, local_batch_size=16, rank=rank, world_size=4).batches(1, 7)) for rank in range(4)]
    for step, batch in enumerate(whole[7:]):
        assert sorted(batch) == sorted(item for rank in ranks for item in rank[step])
    assert len(whole) - 7 == len(ranks[0])


def test_a_packed_set_beside_one_of_files(packed, inputs, tiny_recipe):
    make_dataset(inputs, "more", num_prompts=30)
    files = load_datasets(["more", "toy"])
    expected = [files.decode_image(row) for row in range(140)]
    packed()
    data = load_datasets(["more", "toy"])
    assert data.shards[0] is None and data.block_rows == 16
    assert all(torch.equal(data.decode_image(row), image) for row, image in enumerate(expected))
    seen = np.concatenate([batch["row"] for batch in batches(data, tiny_recipe(), epochs=[0])])
    assert len(set(data.prompt_codes[seen])) == len(seen) == 63 // 8 * 8


# ---------------------------------------------------------------- writing, and what does not fit


def test_packing_in_processes_of_its_own(workspace, capsys):
    """The command as it is: more than one shard is not needed for that."""
    tsv_path = workspace / "input" / "toy.tsv"
    shards.main([str(tsv_path), "--size", "24", "--quality", "80", "--workers", "2"])
    assert "toy.shards: " in capsys.readouterr().out
    record = json.loads((tsv_path.with_suffix(".shards") / "record.json").read_text())
    assert [record[key] for key in ("rows", "size", "format", "quality")] == [80, 24, "webp", 80]
    data = load_datasets(["toy"])
    image = Image.open(io.BytesIO(data.read_image(79)))
    assert (image.format, image.size) == ("WEBP", (24, 24))
    assert not multiprocessing.active_children()


def test_only_what_is_missing_or_changed_is_packed_again(packed, inputs, monkeypatch):
    folder = packed()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert len(before) == 5
    packed()
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    (folder / "00001.arrow").unlink()
    (folder / "00003.arrow").write_bytes(b"damaged")
    Image.new("RGB", (40, 40)).save(inputs / "toy_images" / "0036_0.png")  # row 72 of shard 4
    packed()
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert [name for name in sorted(before) if before[name] == after[name]] == ["00000.arrow", "00002.arrow"]
    assert load_datasets(["toy"]).decode_image(72).sum() == 0
    with pytest.raises(
        ValueError, match=r"packed with size 10000, not 30, format png, not webp, quality None, not 90; delete"
    ):
        packed(Encoding(30, "webp", 90))


def test_a_shorter_table_and_another_order(packed, inputs):
    folder = packed()
    table = read_table(inputs / "toy.tsv", ["image", "prompt", "fold"])
    write_table(inputs / "toy.tsv", table.slice(0, 40))
    np.save(inputs / "toy.npy", np.load(inputs / "toy.npy")[:40])
    with pytest.raises(ValueError, match=r"toy.shards holds other images than .*toy.tsv names"):
        load_datasets(["toy"])
    packed()
    assert len(list(folder.glob("*.arrow"))) == 3 and len(load_datasets(["toy"])) == 40
    order = np.arange(40)[::-1].copy()
    table = table.take(order)
    write_table(inputs / "toy.tsv", table)
    np.save(inputs / "toy.npy", np.load(inputs / "toy.npy")[order])
    with pytest.raises(ValueError, match="in another order"):
        load_datasets(["toy"])


def test_new_folds_leave_shards_valid(packed, inputs):
    packed()
    table = read_table(inputs / "toy.tsv", ["image", "prompt", "fold"])
    folds = (table["fold"].to_numpy() + 1) % 10
    write_table(inputs / "toy.tsv", {"image": table["image"], "prompt": table["prompt"], "fold": folds})
    assert load_datasets(["toy"]).block_rows == 16


def test_what_is_not_whole_is_refused(packed, inputs):
    folder = packed()
    shard = folder / "00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"00002.arrow is not there or not whole: kutils shards .*toy.tsv"):
        load_datasets(["toy"])
    shard.unlink()
    with pytest.raises(ValueError, match="not there"):
        load_datasets(["toy"])
    (folder / "record.json").unlink()
    with pytest.raises(ValueError, match=r"toy.shards is not finished: .*delete the folder to read image files"):
        load_datasets(["toy"])


def test_a_shard_that_is_damaged_later_names_image_and_shard(packed, inputs):
    folder = packed()
    data = load_datasets(["toy"])
    (folder / "00000.arrow").write_bytes(b"of no use" * 100)
    with pytest.raises(transforms.ImageError, match=r"0001_1.png: .*00000.arrow is damaged"):
        data.decode_image(3)
    assert data.decode_image(16).shape == (3, 40, 40)


def test_another_spelling_of_the_path_packs_nothing_anew(packed, inputs, monkeypatch):
    packed()
    before = {path: path.stat().st_mtime_ns for path in (inputs / "toy.shards").glob("*.arrow")}
    monkeypatch.chdir(inputs.parent)
    pack(Path("input/toy.tsv"), LOSSLESS, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (inputs / "toy.shards").glob("*.arrow")} == before


def test_an_unreadable_image_ends_packing_with_advice(packed, inputs):
    (inputs / "toy_images" / "0030_1.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0030_1.png is no image .*kutils check .*toy.tsv finds"):
        packed()
    assert not (inputs / "toy.shards" / "record.json").exists()
    assert not [path for path in (inputs / "toy.shards").iterdir() if "partial" in path.name]
    (inputs / "toy_images" / "0030_1.png").unlink()
    with pytest.raises(ValueError, match=r"0030_1.png.*kutils check"):
        packed()
    with pytest.raises(ValueError, match=r"none.tsv is not there$"):
        shards.main([str(inputs / "none.tsv")])
    with pytest.raises(ValueError, match="leave --quality out, png loses nothing"):
        shards.main([str(inputs / "toy.tsv"), "--format", "png", "--quality", "90"])


def test_help_has_every_default(capsys):
    with pytest.raises(SystemExit) as end:
        shards.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for default in ("448", "webp", "90", str(os.cpu_count())):
        assert f"(default: {default}" in shown


def test_more_shards_than_a_process_keeps_open(packed, inputs, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    packed()
    data = load_datasets(["toy"])
    count = len(list(Path("/proc/self/fd").iterdir()))
    for row in range(80):
        data.read_image(row)
    assert len(list(Path("/proc/self/fd").iterdir())) <= count + 2


def test_a_killed_pack_goes_on(packed, inputs):
    """Killed once a shard is there: what is written is whole, and the next call makes the rest."""
    make_dataset(inputs, "big", num_prompts=200, images_per_prompt=5, size=100)
    encoding, folder = Encoding(90, "webp", 90), inputs / "big.shards"
    running = multiprocessing.get_context("fork").Process(target=packed, args=(encoding, "big"))
    running.start()
    while not list(folder.glob("0*.arrow")) and running.is_alive():
        time.sleep(0.002)
    running.kill()
    running.join()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("0*.arrow")}
    assert 0 < len(kept) < 63 and not (folder / "record.json").exists()
    assert all(arrow.map_table(path).num_rows == 16 for path in kept)
    packed(encoding, "big")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert json.loads((folder / "record.json").read_text())["rows"] == 1000
    assert len(load_datasets(["big"]).read_image(999)) > 0

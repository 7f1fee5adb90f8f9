"""Data sets: what is refused before training, what an epoch draws, and what happens to images that cannot be read."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from fixtures.datasets import make_dataset, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from kutils.data import datasets
from kutils.data.datasets import TrainingImages, ValidationImages, load_datasets
from kutils.data.sampler import DRAWN_PROMPTS, EpochSampler
from kutils.system.paths import write_json
from kutils.system.tables import folds_hash, read_table, write_table


def test_two_sets_are_one_list_of_rows(workspace):
    make_dataset(workspace / "input", "other", num_prompts=10, images_per_prompt=1)
    data = load_datasets(["toy", "other"])
    assert len(data) == 90
    number, row = data.origin(np.array([0, 79, 80, 89]))
    assert number.tolist() == [0, 0, 1, 1] and row.tolist() == [0, 79, 0, 9]
    assert data.image_path(80) == workspace / "input" / "other_images" / "0000_0.png"
    other = np.load(workspace / "input" / "other.npy")
    toy = np.load(workspace / "input" / "toy.npy")
    np.testing.assert_array_equal(data.targets(np.array([81, 3, 80])), [other[1], toy[3], other[0]])
    assert data.validation_rows(9).tolist() == [18, 19, 38, 39, 58, 59, 78, 79, 89]
    assert len(data.training_rows(9)) == 81
    assert set(data.folds_hashes) == {"toy", "other"}


def spoil(workspace, what):
    """Break the data set `toy` in one way."""
    tsv, npy = workspace / "input" / "toy.tsv", workspace / "input" / "toy.npy"
    table = read_table(tsv, ["fold"]).to_pydict()
    embeddings = np.load(npy)
    if what in ("image", "prompt", "fold"):
        table[what][5] = {"image": "../secret.png", "prompt": "  ", "fold": -1}[what]
    elif what == "absolute":
        table["image"][5] = "/etc/passwd"
    elif what == "nan":
        embeddings[7, 3] = np.nan
    elif what == "length":
        embeddings[7] *= 2
    elif what == "rows":
        embeddings = embeddings[:-1]
    elif what == "dimension":
        embeddings = embeddings[:, :383]
    elif what == "dtype":
        embeddings = embeddings.astype(np.float64)
    write_table(tsv, table)
    np.save(npy, embeddings)
    if what == "truncated":
        npy.write_bytes(npy.read_bytes()[:5000])
    if what == "other prompts":
        write_json(npy.with_suffix(".npy.json"), {"rows": 80, "prompts_sha256": "of other prompts"})
    if what == "missing":
        npy.unlink()
    if what == "header":
        write_table(tsv, {"image": [], "prompt": [], "fold": []})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("image", ["toy.tsv, line 7", "'../secret.png'", "relative to input/"]),
        ("absolute", ["toy.tsv, line 7", "'/etc/passwd'"]),
        ("prompt", ["toy.tsv, line 7", "prompt is '  '"]),
        ("fold", ["toy.tsv, line 7", "fold is -1", "kutils folds"]),
        ("nan", ["toy.npy, row 7 (line 9 of the TSV)", "length nan", "gen_prompt_embedding.py"]),
        ("length", ["toy.npy, row 7", "length 2.0"]),
        ("rows", ["float32 [79, 384]", "needs float32 [80, 384]"]),
        ("dimension", ["float32 [80, 383]"]),
        ("dtype", ["float64 [80, 384]"]),
        ("truncated", ["toy.npy cannot be read"]),
        ("other prompts", ["toy.npy is of other prompts, or in another order", "gen_prompt_embedding.py"]),
        ("missing", ["'toy': toy.npy not in", "gen_prompt_embedding.py input/toy.tsv"]),
        ("header", ["no rows"]),
    ],
)
def test_a_bad_data_set_is_refused(workspace, what, said):
    spoil(workspace, what)
    with pytest.raises(ValueError) as caught:
        load_datasets(["toy"])
    assert all(text in str(caught.value) for text in said), str(caught.value)


def test_the_clean_mark_counts_only_for_the_folds_it_was_made_with(workspace):
    path = workspace / "input" / "toy.clean.npz"
    assert load_datasets(["toy"]).clean is None
    table = read_table(workspace / "input" / "toy.tsv", ["prompt", "fold"])
    now = folds_hash(table["prompt"], table["fold"].to_numpy())
    mark = np.arange(80) % 3 == 0
    np.savez(path, clean=mark, folds_hash=now)
    np.testing.assert_array_equal(load_datasets(["toy"]).clean, mark)
    np.savez(path, clean=mark, folds_hash="of other folds")
    assert load_datasets(["toy"]).clean is None


def sampler_of(data, rows, **changes):
    options = {"global_batch_size": 8, "local_batch_size": 4, "rank": 0, "world_size": 1} | changes
    return EpochSampler(data, rows, 71, **options)


def test_an_epoch_holds_every_prompt_once_over_all_sets(workspace):
    make_dataset(workspace / "input", "other", num_prompts=7, images_per_prompt=1)
    table = read_table(workspace / "input" / "other.tsv", ["fold"])
    repeated = ['toy prompt "3, with a comma'] + table["prompt"].to_pylist()[1:]  # one prompt is in both sets
    folds = [3, *table["fold"].to_pylist()[1:]]
    write_table(workspace / "input" / "other.tsv", {**table.to_pydict(), "prompt": repeated, "fold": folds})
    data = load_datasets(["toy", "other"])
    sampler = sampler_of(data, np.arange(len(data)))
    prompts = np.array(data.prompts.to_pylist())
    drawn = [sampler.epoch_rows(epoch) for epoch in range(200)]
    for rows in drawn:
        assert sorted(prompts[rows]) == sorted(set(prompts)) and len(rows) == 46
    assert not np.array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[5], sampler_of(data, np.arange(len(data))).epoch_rows(5))
    # each of the three images of the shared prompt comes about a third of the time: 200/3 +- 4 standard deviations
    counts = [sum(row in rows for rows in drawn) for row in (6, 7, 80)]
    assert sum(counts) == 200 and all(40 < count < 94 for count in counts)


def test_prompts_that_fill_their_last_update_are_all_dealt():
    data = type("Data", (), {"prompt_codes": np.arange(80, dtype=np.int32) // 2})
    sampler = sampler_of(data, np.arange(80), local_batch_size=8)
    dealt = [row // 2 for batch in sampler.batches(0) for _, row in batch]
    assert sampler.steps_per_epoch == 5 and sorted(dealt) == list(range(40))


@settings(settings.get_profile("ci"), max_examples=25)  # the same each time, without a limit of time
@given(world_size=st.sampled_from([1, 2, 4]), local=st.sampled_from([1, 2]), first=st.integers(0, 3))
def test_any_number_of_ranks_deals_the_same_global_batches(world_size, local, first):
    data = type("Data", (), {"prompt_codes": np.arange(70, dtype=np.int32) // 2})
    rows = np.arange(70)
    whole = sampler_of(data, rows, local_batch_size=8)
    expected = [{row for _, row in batch} for batch in whole.batches(3, first)]
    ranks = [
        sampler_of(data, rows, local_batch_size=local, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    dealt = [list(sampler.batches(3, first)) for sampler in ranks]
    per_update = 8 // (world_size * local)
    assert len(expected) == 35 // 8 - first
    for update, wanted in enumerate(expected):
        found = [
            row for rank in dealt for batch in rank[update * per_update : (update + 1) * per_update] for _, row in batch
        ]
        assert len(found) == 8 and set(found) == wanted


def test_an_epoch_is_the_one_that_a_single_draw_for_all_prompts_gives():
    """More prompts than one block of draws, codes out of order, one to many images each."""
    codes = np.random.default_rng(0).integers(0, 120_000, 400_000).astype(np.int32)
    rows = np.flatnonzero(codes % 7).astype(np.int32)
    sampler = sampler_of(type("Data", (), {"prompt_codes": codes}), rows)
    assert sampler.num_prompts > DRAWN_PROMPTS and sampler.grouped_rows.dtype == sampler.group_starts.dtype == np.int32
    grouped = rows[np.argsort(codes[rows], kind="stable")]
    _, first, counts = np.unique(codes[grouped], return_index=True, return_counts=True)
    random = np.random.default_rng([71, 2])
    expected = random.permutation(grouped[first + random.integers(0, counts)])
    drawn = sampler.epoch_rows(2)
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(drawn, expected)


def test_the_next_epoch_costs_one_number_per_prompt():
    import tracemalloc

    codes = np.arange(600_000, dtype=np.int32) // 3
    sampler = sampler_of(type("Data", (), {"prompt_codes": codes}), np.arange(600_000, dtype=np.int32))
    tracemalloc.start()
    try:
        next(batches := sampler.batches(0))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 800_000 <= held < 900_000 and peak < 4_000_000  # 200,000 prompts in 4 bytes, and a block of draws
    batches.close()


class Keys(torch.utils.data.Dataset):
    """The indices themselves, and the process that gave them."""

    def __getitem__(self, index):
        return (*index, os.getpid())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_loader_deals_every_epoch_that_the_sampler_is_told(num_workers):
    sampler = sampler_of(type("Data", (), {"prompt_codes": np.arange(70, dtype=np.int32) // 2}), np.arange(70))
    loader = torch.utils.data.DataLoader(
        Keys(),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=list,
        persistent_workers=num_workers > 0,
    )
    processes = set()
    for epoch, first in ((1, 2), (2, 0), (0, 3), (3, 0)):
        sampler.set_epoch(epoch, first)
        dealt = list(loader)
        expected = list(sampler.batches(epoch, first))
        assert [[item[:2] for item in batch] for batch in dealt] == expected and len(expected) == 2 * (4 - first)
        processes |= {item[2] for batch in dealt for item in batch}
    assert len(processes) == max(1, num_workers) and (os.getpid() in processes) == (num_workers == 0)


def test_too_few_prompts_for_a_batch(workspace):
    data = load_datasets(["toy"])
    with pytest.raises(ValueError, match="40 training prompts do not fill one global batch of 64"):
        sampler_of(data, np.arange(80), global_batch_size=64)


def test_an_unreadable_image_is_replaced_by_another_of_its_prompt(workspace, tiny_recipe):
    data = load_datasets(["toy"])
    images = TrainingImages(data, data.training_rows(9), tiny_recipe())
    data.image_path(4).write_bytes(b"no image")
    example = images[2, 4]
    assert example["row"] == 5 and data.prompts[4] == data.prompts[5]
    assert example["bad"][0][0] == 4 and "toy_images/0002_0.png is no image" in example["bad"][0][1]
    data.image_path(5).unlink()
    example = images[2, 4]
    assert [row for row, _ in example["bad"]] == [4, 5] and "No such file" in example["bad"][1][1]
    assert data.folds[example["row"]] != 9 and example["row"] == images[2, 4]["row"] != images[3, 4]["row"]
    np.testing.assert_array_equal(example["target"], data.targets(np.array([example["row"]]))[0])


@pytest.mark.parametrize("augment", ["published", "weak"])
def test_augmentation_depends_on_seed_epoch_and_row_alone(workspace, tiny_recipe, augment):
    import torch

    data = load_datasets(["toy"])
    images = TrainingImages(data, np.arange(80), tiny_recipe(augment=augment))
    first = images[0, 10]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = images[0, 10]
    assert torch.equal(torch.get_rng_state(), state), "drop path and augmentation share no random numbers"
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["jitter"], again["jitter"])
    for other in (images[1, 10], TrainingImages(data, np.arange(80), tiny_recipe(augment=augment, seed=72))[0, 10]):
        assert not torch.equal(first["image"], other["image"])
        assert torch.equal(first["jitter"], other["jitter"]) == (augment == "weak")


def test_validation_images_raise(workspace):
    data = load_datasets(["toy"])
    data.image_path(18).write_bytes(data.image_path(18).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"0009_0.png (cannot be decoded|is no image)"):
        ValidationImages(data, np.array([18]), 32)[0]


def test_collate_keeps_bad_images_apart():
    import torch

    one = {"image": torch.zeros(3, 2, 2), "row": 4, "bad": []}
    two = {"image": torch.ones(3, 2, 2), "row": 5, "bad": [(7, "gone")]}
    batch = datasets.collate([one, two])
    assert batch["image"].shape == (2, 3, 2, 2) and batch["row"].tolist() == [4, 5] and batch["bad"] == [(7, "gone")]


def test_real_pairs_are_read_whole(monkeypatch, tmp_path):
    import os
    from pathlib import Path

    if "KUTILS_REAL_DATA" not in os.environ:
        pytest.skip("KUTILS_REAL_DATA is not set")
    pairs = Path(os.environ["KUTILS_REAL_DATA"]) / "pairs"
    table = read_table(pairs / "pairs.tsv", ["image", "prompt"])
    assert table.num_rows == 1015 and len(set(table["prompt"].to_pylist())) == 879
    assert sum('"' in prompt for prompt in set(table["prompt"].to_pylist())) == 4
    (tmp_path / "images").symlink_to(pairs / "images")
    folds = [len(prompt) % 10 for prompt in table["prompt"].to_pylist()]
    write_table(tmp_path / "pairs.tsv", {"image": table["image"], "prompt": table["prompt"], "fold": folds})
    np.save(tmp_path / "pairs.npy", unit_rows(1015))
    monkeypatch.setenv("KUTILS_INPUT", str(tmp_path))
    data = load_datasets(["pairs"])
    assert data.prompts.to_pylist() == table["prompt"].to_pylist()
    assert ValidationImages(data, np.array([1000]), 32)[0]["image"].shape == (3, 32, 32)


def test_a_prompt_in_two_folds_is_refused(workspace):
    root = workspace / "input"
    make_dataset(root, "other")
    table = read_table(root / "other.tsv", ["image", "prompt", "fold"])
    prompts = [text.replace("other", "toy") for text in table["prompt"].to_pylist()]
    folds = table["fold"].to_numpy()
    write_table(root / "other.tsv", {"image": table["image"], "prompt": prompts, "fold": folds})
    assert len(load_datasets(["toy", "other"])) == 160  # the same prompts, in the same folds
    write_table(
        root / "other.tsv", {"image": table["image"], "prompt": prompts, "fold": np.where(folds == 4, 5, folds)}
    )
    with pytest.raises(
        ValueError, match=r"4 prompts are in two folds.*folds 4 and 5.*folds input/toy.tsv input/other.tsv"
    ):
        load_datasets(["toy", "other"])


def test_means_and_hashes_are_those_of_the_rows(workspace):
    make_dataset(workspace / "input", "other", num_prompts=33, images_per_prompt=3)
    data = load_datasets(["toy", "other"])
    embeddings = np.concatenate([np.load(workspace / "input" / f"{name}.npy") for name in ("toy", "other")])
    for fold in (0, 7):
        mean = embeddings[data.folds != fold].astype(np.float64).mean(axis=0)
        mean /= np.linalg.norm(mean)
        np.testing.assert_allclose(data.training_mean(fold), mean, atol=1e-6)
        rows = np.flatnonzero(data.folds == fold)
        assert data.mean_prompt_baseline(fold) == pytest.approx(float((embeddings[rows] @ mean).mean()), abs=1e-6)
        assert data.hash_targets(rows) == hashlib.sha256(embeddings[rows]).hexdigest()


def test_a_worker_that_is_not_forked_gets_names_and_no_rows(workspace):
    data = load_datasets(["toy"])
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    assert copy.prompts.to_pylist() == data.prompts.to_pylist() and copy.image_path(5) == data.image_path(5)
    np.testing.assert_array_equal(copy.targets(np.arange(80)), data.targets(np.arange(80)))

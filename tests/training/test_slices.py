"""Slices of validation rows against plain Python, and their mean scores by hand."""

import numpy as np
import pandas as pd
import pytest
from fixtures.datasets import make_dataset

from kutils.data import datasets
from kutils.system.tables import read_table, write_table
from kutils.training import slices


def test_rows_are_sorted_by_their_prompts(workspace):
    make_dataset(workspace / "input", "other", num_prompts=20, images_per_prompt=1)
    path = workspace / "input" / "other.tsv"
    columns = {name: read_table(path, []).column(name).to_pylist() for name in ("image", "prompt", "fold")}
    columns["prompt"][2] = "castle, stone, moat, night, fog, 4k"
    columns["prompt"][12] = "a castle, which is of stone"
    columns |= {"source": ["", "web"] * 10, "kind": ["", "", "", "caption"] * 5}
    write_table(path, columns)
    data = datasets.load_datasets(["toy", "other"])
    rows = data.validation_rows(2)
    found = slices.label_rows(data, rows, 2)
    prompts = data.prompts.take(rows).to_pylist()
    assert len(found) == len(rows) == 8 + 2 and list(found) == list(slices.SLICES)
    assert found["source"].tolist() == ["toy"] * 8 + ["other"] * 2  # an empty source is none
    assert found["kind"].tolist() == ["phrases"] * 8 + ["tags", "phrases"]
    assert [len(prompt.split()) for prompt in prompts] == [6] * 8 + [6, 6]
    assert set(found["words"]) == {"1 or more"}
    told = slices.label_rows(data, data.validation_rows(3), 3)
    assert told["source"].tolist() == ["toy"] * 8 + ["web"] * 2
    assert told["kind"].tolist() == ["phrases"] * 8 + ["caption", "phrases"]
    assert told["kind"].cat.categories.tolist() == ["sentence", "phrases", "tags", "caption"]


def test_similarity_is_that_of_the_nearest_training_prompt(workspace):
    path = workspace / "input" / "toy.npy"
    embeddings = np.load(path)  # 40 prompts of two images, fold = prompt % 10
    for prompt, other, cosine in ((0, 11, 0.95), (10, 12, 0.65), (20, 30, 0.99)):  # 30 is of fold 0 too
        rest = embeddings[2 * prompt] - (embeddings[2 * prompt] @ embeddings[2 * other]) * embeddings[2 * other]
        rest /= np.linalg.norm(rest)
        mixed = cosine * embeddings[2 * other] + np.sqrt(1 - cosine**2) * rest
        embeddings[2 * prompt : 2 * prompt + 2] = mixed / np.linalg.norm(mixed)
    np.save(path, embeddings)
    data = datasets.load_datasets(["toy"])
    rows = data.validation_rows(0)
    found = slices.label_rows(data, rows, 0)["similarity"]
    assert found.tolist() == ["0.9 or more"] * 2 + ["0.6 to 0.7"] * 2 + ["below 0.5"] * 4
    assert found.cat.ordered and found.cat.categories[0] == "below 0.5"

    training = embeddings[data.folds != 0].astype(np.float64)
    expected = (embeddings[rows].astype(np.float64) @ training.T).max(axis=1)
    np.testing.assert_allclose(slices.nearest_training_cosines(data, rows, 0, 4), expected, atol=1e-6)
    some = slices.nearest_training_cosines(data, rows, 0, most=3)  # of the four prompts
    assert np.isnan(some).sum() == 2 and slices.label_rows(data, rows, 0, most=3)["similarity"].isna().sum() == 2
    np.testing.assert_allclose(some[~np.isnan(some)], expected[~np.isnan(some)], atol=1e-6)


def test_training_prompts_are_looked_at_block_by_block(workspace, monkeypatch):
    data = datasets.load_datasets(["toy"])
    rows = data.validation_rows(4)
    whole = slices.nearest_training_cosines(data, rows, 4, 10)
    monkeypatch.setattr(slices, "BLOCK", 7)
    np.testing.assert_allclose(slices.nearest_training_cosines(data, rows, 4, 10), whole, atol=1e-7)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("a dog on a beach", "sentence"),
        ("a dog on a beach,", "sentence"),
        ("a dog, on a beach", "phrases"),
        ("a, b, c, d, e", "phrases"),
        ("a, b, c, d, e, f", "tags"),
        ("a,, ,b", "phrases"),
    ],
)
def test_kinds_of_prompts(prompt, kind):
    assert slices.prompt_kinds(slices.pa.chunked_array([[prompt]])).tolist() == [kind]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (range(1, 31), ["1 to 5", "6 to 10", "11 to 15", "16 to 20", "21 to 25", "26 or more"]),
        ([3, 4, 5, 6], ["1 to 3", "4", "5", "6 or more"]),
        ([8] * 50 + [70], ["1 or more"]),  # one of 51 is no reason for a bin
        ([20] * 30 + [900] * 30, None),
    ],
)
def test_bins_of_words_hold_every_prompt(words, names):
    words = np.array(words)
    found = slices.bin_words(words)
    assert 1 <= len(found.categories) <= slices.MOST_BINS
    if names:
        assert found.categories.tolist() == names
    for count, name in zip(words, found, strict=True):
        low, _, high = name.partition(" to ") if " to " in name else (name.split()[0], "", name.split()[0])
        assert int(low) <= count and (name.endswith("or more") or count <= int(high))


def test_means_by_hand():
    cosines = pd.DataFrame({"a": [0.1, 0.2, 0.6, 0.9], "b": [0.5, 0.5, 0.5, 0.1]}, dtype=np.float32)
    names = pd.Categorical(["tags", "sentence", "tags", None], slices.KINDS, ordered=True)
    means = slices.slice_means(cosines, pd.Series(names, index=[7, 8, 9, 10], name="kind"))
    assert means.index.tolist() == ["sentence", "tags"] and means.index.name == "kind"
    assert means["images"].tolist() == [1, 2] and list(means) == ["images", "a", "b"]
    np.testing.assert_allclose(means[["a", "b"]], [[0.2, 0.5], [0.35, 0.5]], atol=1e-6)
    with pytest.raises(ValueError, match="3 labels for 4 rows"):
        slices.slice_means(cosines, pd.Series(names[:3]))


def test_few_names_are_told_apart():
    values = np.array([f"s{number:03d}" for number in range(300)] + ["s250"] * 3 + ["s299", "others"], object)
    found = slices.common_names(values, ["s298", "none"])
    kept = ["s298", "none", *(f"s{number:03d}" for number in range(17)), "s250", "s299", "others"]
    assert found.ordered and found.categories.tolist() == kept and len(found) == 305
    assert found.value_counts()[["s250", "s299", "s298", "others"]].tolist() == [4, 2, 1, 305 - 4 - 2 - 1 - 17]
    assert slices.common_names(np.array(["b", "a"], object)).categories.tolist() == ["a", "b"]

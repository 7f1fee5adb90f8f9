"""Preparing data sets: what is missing is made, what is there is kept, and what a look at the data shows is true."""

import json
import shutil

import numpy as np
import pytest
from fixtures.datasets import make_dataset

from kutils.data import preparation
from kutils.data.prompt_bank import PromptBank
from kutils.prompts import embedding
from kutils.prompts import folds as prompt_folds
from kutils.system.tables import read_table, write_table


@pytest.fixture
def inputs(workspace):
    return workspace / "input"


def set_folds(path, folds):
    table = read_table(path, ["image", "prompt", "fold"])
    write_table(path, {"image": table["image"], "prompt": table["prompt"], "fold": folds})


def folds_of(path):
    return read_table(path, ["fold"])["fold"].to_numpy()


def test_what_is_missing_is_made_and_then_kept(inputs):
    path = inputs / "toy.tsv"
    (inputs / "toy.npy").unlink()
    set_folds(path, np.full(80, -1))
    report = preparation.prepare_datasets(["toy"], threshold=0.99, num_folds=4, method="leader")
    assert np.load(inputs / "toy.npy").shape == (80, 384) and sorted(set(folds_of(path))) == [0, 1, 2, 3]
    assert (report["rows"], report["prompts"], report["num_folds"]) == (80, 40, 4)
    before = {item: item.stat().st_mtime_ns for item in inputs.glob("toy.*")}
    assert (
        preparation.prepare_datasets(["toy"], threshold=0.99, num_folds=4, method="leader")["folds"] == report["folds"]
    )
    assert before == {item: item.stat().st_mtime_ns for item in inputs.glob("toy.*")}


def test_folds_made_elsewhere_are_kept_and_measured(inputs, capsys):
    embeddings = np.load(inputs / "toy.npy")
    embeddings[2:4] = embeddings[0]  # prompts 0 and 1, in folds 0 and 1, are the same to the encoder
    np.save(inputs / "toy.npy", embeddings)
    before = {item: item.read_bytes() for item in inputs.glob("toy.*")}
    report = preparation.prepare_datasets(["toy"])
    assert before == {item: item.read_bytes() for item in inputs.glob("toy.*")}
    assert "kept as they are" in capsys.readouterr().out
    assert [fold["rows"] for fold in report["folds"]] == [8] * 10
    assert [fold["leaked"] for fold in report["folds"]] == [1, 1] + [0] * 8
    assert report["leaked_share"] == 2 / 40 and "folds by their maker" in prompt_folds.format_leakage(report)


def test_a_prompt_in_two_folds_is_an_error(inputs):
    folds = folds_of(inputs / "toy.tsv").copy()
    folds[5] = 9  # row 4 has the same prompt and fold 2
    set_folds(inputs / "toy.tsv", folds)
    with pytest.raises(
        ValueError, match=r"1 prompts are in two folds.*toy prompt .*folds 2 and 9.*folds input/toy.tsv"
    ):
        preparation.prepare_datasets(["toy"])


def test_folds_that_are_there_are_not_replaced_unless_asked(inputs):
    path = inputs / "toy.tsv"
    preparation.prepare_datasets(["toy"], num_folds=4, refold=True)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"num_folds 4, not 5; method stratified, not leader.*refold=True"):
        preparation.prepare_datasets(["toy"], num_folds=5, method="leader")
    assert path.read_bytes() == kept
    assert preparation.prepare_datasets(["toy"], num_folds=5, method="leader", refold=True)["num_folds"] == 5
    assert set(folds_of(path)) == set(range(5))
    for former in ("leader", "partition"):  # whatever method made them: none was asked for
        report = preparation.prepare_datasets(["toy"], num_folds=5, method=former, refold=True)
        assert preparation.prepare_datasets(["toy"], num_folds=5)["folds"] == report["folds"]
    folds = folds_of(path).copy()
    folds[:3] = -1
    set_folds(path, folds)
    with pytest.raises(ValueError, match="3 of 80 rows have no fold and the others have one"):
        preparation.prepare_datasets(["toy"], num_folds=5, method="leader")


def test_a_data_set_that_is_not_there_is_named_with_the_nearest(inputs):
    with pytest.raises(ValueError, match=r"tay.tsv is not there; did you mean 'toy'\?; .*--output input/tay"):
        preparation.prepare_datasets(["toy", "tay"])


def test_data_sets_are_folded_together(inputs):
    make_dataset(inputs, "more", num_prompts=30)
    report = preparation.prepare_datasets(["toy", "more"], refold=True)
    assert report["rows"] == 140 and set(report["datasets"]) == {"toy", "more"}
    assert preparation.prepare_datasets(["toy"])["rows"] == 140  # one of them alone: as it was folded
    preparation.prepare_datasets(["toy"], refold=True)
    with pytest.raises(ValueError, match=r"toy alone, not toy, more together"):
        preparation.prepare_datasets(["toy", "more"])


def test_outdated_embeddings_are_made_again(inputs):
    shutil.copy(inputs / "toy.tsv", inputs / "old.tsv")
    (inputs / "old.npy").write_bytes((inputs / "toy.npy").read_bytes())
    (inputs / "old.npy.json").write_text(json.dumps({"encoder": "all-MiniLM-L6-v2", "rows": 80, "prompts_sha256": ""}))
    preparation.prepare_datasets(["old"], refold=True)
    assert not np.array_equal(np.load(inputs / "old.npy"), np.load(inputs / "toy.npy"))


def test_examples_are_of_different_prompts(inputs):
    images, embedding = preparation.random_examples(["toy"], count=8)
    assert len(set(embedding)) == 8
    table = read_table(inputs / "toy.tsv", ["image", "prompt"])
    image_of = dict(zip(table["image"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    assert [image_of[str(path.relative_to(inputs))] for path in images] == embedding
    assert len(preparation.random_examples(["toy"], count=100)[0]) == 40


def test_cosines_between_prompts_against_all_pairs():
    embeddings = np.eye(384, dtype=np.float32)[:5]
    embeddings[4] = 0.8 * embeddings[3] + 0.6 * embeddings[2]
    cosines = preparation.cosines_between(PromptBank(list("abcde"), embeddings))
    np.testing.assert_allclose(np.sort(cosines["nearest other prompt"]), [0, 0, 0.6, 0.8, 0.8], atol=1e-6)
    values, counts = np.unique(cosines["random pairs"].round(3), return_counts=True)
    np.testing.assert_allclose(values, [0, 0.6, 0.8])  # a prompt is never paired with itself
    np.testing.assert_allclose(counts / counts.sum(), [0.8, 0.1, 0.1], atol=0.02)  # two of 20 ordered pairs each
    with pytest.raises(ValueError, match="no other"):
        preparation.cosines_between(PromptBank(["a"], embeddings[:1]))


def test_lists_of_a_name_are_in_input(inputs):
    lists = preparation.prompt_lists("mine")
    assert [path.name for path in lists] == ["mine.all.tsv", "mine.prompts.tsv", "mine_part2.prompts.tsv"]
    assert {path.parent for path in lists} == {inputs}
    with pytest.raises(ValueError, match=r"'\.\./mine' cannot name lists below"):
        preparation.prompt_lists("../mine")


def test_prompts_are_collected_from_files_or_the_grammar(inputs, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,caption\nno,a red boat at sea\nno,a blue boat at sea\n")
    lists = preparation.prompt_lists("mine")
    report = preparation.collect_prompts(lists, f" {tmp_path / 'a.csv'}", column="caption")
    assert (report["read"], report["kept"]) == (2, 2)
    assert read_table(lists.all, ["prompt"])["prompt"].to_pylist() == ["a red boat at sea", "a blue boat at sea"]
    lists = preparation.prompt_lists("grammar")
    assert preparation.collect_prompts(lists, "", num_prompts=50)["kept"] == 50
    assert read_table(lists.all, ["source"])["source"].to_pylist() == ["templates"] * 50


def test_embeddings_of_another_precision_stay(inputs):
    path = inputs / "toy.tsv"
    embedding.embed_table(path, dtype="bfloat16", overwrite=True, progress=False)
    before = (inputs / "toy.npy").read_bytes()
    preparation.prepare_datasets(["toy"], refold=True)
    assert (inputs / "toy.npy").read_bytes() == before

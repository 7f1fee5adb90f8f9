"""Folds that look like each other: parts dealt by hand, distances by their definition, heavy prompts, quiet METIS."""

import numpy as np
import pytest
from fixtures.datasets import unit_rows
from fixtures.prompts import neighbourhoods, pairs_of
from scipy.sparse import csr_array

from kutils.prompts import fold_methods, leakage, partition, stratified
from kutils.prompts.folds import assign_folds, main, read_fold_report
from kutils.prompts.similarity import SimilarPairs
from kutils.system.tables import read_table, write_table

NOTHING = SimilarPairs(*np.empty((3, 0), int))


def rings(count: int = 10, size: int = 200) -> tuple[SimilarPairs, np.ndarray]:
    """Rings of prompts, each similar to the two on either side, and the number of each prompt's ring."""
    starts = np.repeat(np.arange(count) * size, size)
    place = np.tile(np.arange(size), count)
    ends = [np.sort([starts + place, starts + (place + step) % size], axis=0) for step in (1, 2)]
    first, second = np.concatenate(ends, axis=1)
    return SimilarPairs(first, second, np.full(len(first), 0.8, np.float32)), starts // size


def test_every_fold_has_its_share_of_each_source():
    """Five sources, each one neighbourhood as large as two folds: a partition gives two folds to each."""
    pairs, sources = rings(count=5, size=400)
    num_rows = np.random.default_rng(1).integers(1, 6, len(sources))
    tables = {}
    for method in ("stratified", "partition"):
        folds = fold_methods.assign(num_rows, pairs, 10, method, seed=0, sources=sources)
        tables[method] = np.array(
            [[num_rows[(folds == fold) & (sources == source)].sum() for source in range(5)] for fold in range(10)]
        )
        sizes = tables[method].sum(axis=1) / num_rows.sum()
        assert sizes.min() > 0.09 and sizes.max() < (0.12 if method == "stratified" else 0.11)  # a part is 0.02
    assert tables["partition"].max(axis=1).min() > 0.9 * num_rows.sum() / 10  # nearly all rows of a fold: one source
    even = tables["stratified"].sum(axis=0) / 10
    ratio = tables["stratified"] / even
    assert ratio.min() > 0.8 and np.abs(ratio - 1).mean() < 0.15  # a ring of eleven parts gives two to one fold


def test_stratified_folds_leak_little_and_repeat():
    pairs, sources = rings()
    folds = fold_methods.assign(np.ones(2000, int), pairs, 10, "stratified", seed=0, sources=sources)
    again = fold_methods.assign(np.ones(2000, int), pairs, 10, "stratified", seed=0, sources=sources)
    assert np.array_equal(folds, again)
    # parts of 40 prompts in a row have two that leak at either end; of random folds nearly all leak
    assert partition.leaked_prompts(folds, pairs).mean() <= 0.1 + 0.02
    random = np.random.default_rng(0).permutation(2000) % 10
    assert partition.leaked_prompts(random, pairs).mean() > 0.99


def test_topics_come_out_even_without_sources():
    """Forty topics of 25 prompts, none similar to another at 0.7: every fold gets two or three of each."""
    rows = neighbourhoods(num_groups=40, group_size=25, noise=0.9)
    topics = np.repeat(np.arange(40), 25)
    folds = fold_methods.assign(np.ones(1000, int), NOTHING, 10, "stratified", seed=0, embeddings=rows)
    random = np.random.default_rng(0).permutation(1000) % 10
    even, chance = (leakage.distances(each, np.ones(1000, int), topics, 10).mean() for each in (folds, random))
    assert even < 0.6 * chance


def test_parts_are_dealt_by_hand():
    """Two folds; parts of 4 rows of a, 3 of b, 2 of b, 1 of a: a 4 + 1 and b 3 + 2 would be even by size alone."""
    rows = csr_array(np.array([[4, 4, 0], [3, 0, 3], [2, 0, 2], [1, 1, 0]], float))
    assert stratified.deal_parts(rows, 2).tolist() == [0, 1, 1, 0] == greedy(rows.toarray(), 2)


@pytest.mark.parametrize("seed", range(3))
def test_each_part_goes_where_the_folds_become_most_even(seed):
    """Against the sum itself, computed anew for every fold that a part might join."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 5, (60, 3))
    table = np.concatenate([classes.sum(axis=1, keepdims=True) + 1, classes], axis=1).astype(float)
    assert stratified.deal_parts(csr_array(table), 4).tolist() == greedy(table, 4)


def greedy(table: np.ndarray, num_folds: int) -> list[int]:
    totals, held = table.sum(axis=0), np.zeros((num_folds, table.shape[1]))
    weights = np.array([stratified.SIZE_WEIGHT, *[1] * (table.shape[1] - 1)]) / totals
    folds = np.empty(len(table), int)
    for part in np.argsort(-table[:, 0], kind="stable"):
        costs = []
        for fold in range(num_folds):
            after = held.copy()
            after[fold] += table[part]
            costs.append((weights * (after - totals / num_folds) ** 2).sum())
        folds[part] = np.argmin(np.round(costs, 9))
        held[folds[part]] += table[part]
    return folds.tolist()


def test_distances_by_hand():
    """Fold 0 has two rows of source 0 and two of source 1; fold 1 four of source 0; of all rows 6 of 8 are source 0."""
    folds, num_rows, sources = np.array([0, 0, 1], np.int8), np.array([2, 2, 4]), np.array([0, 1, 0])
    assert leakage.distances(folds, num_rows, sources, 3).tolist() == [0.25, 0.25, 0]
    report = leakage.leakage_report(folds, num_rows, NOTHING, 2, {"source": sources, "topic": np.zeros(3, int)})
    assert [fold["source_distance"] for fold in report["folds"]] == [0.25, 0.25]
    text = leakage.format_leakage(report | {"method": "stratified", "threshold": 0.7, "warnings": []})
    assert text.splitlines()[-3:] == [
        "  fold        rows   share     prompts  leaked  sources   topics",
        "     0           4   50.0%           2    0.0%    25.0%     0.0%",
        "     1           4   50.0%           1    0.0%    25.0%     0.0%",
    ]


@pytest.mark.parametrize("method", ["stratified", "partition"])
@pytest.mark.parametrize("num_prompts", [12, 30, 400])
def test_a_prompt_heavier_than_a_fold_gets_one_of_its_own(method, num_prompts, capfd):
    first, second = np.triu_indices(num_prompts, k=1)
    near = second - first <= 3
    pairs = SimilarPairs(first[near], second[near], np.ones(near.sum(), np.float32))
    num_rows = np.ones(num_prompts, int)
    num_rows[3], num_rows[5] = 1000, 150  # without the first, the second is more than a ninth of the rest
    folds = fold_methods.assign(num_rows, pairs, 10, method, seed=0)
    assert set(folds) == set(range(10))
    assert (folds == folds[3]).sum() == (folds == folds[5]).sum() == 1
    sizes = np.sort(np.bincount(folds, num_rows))[:8]  # the others
    assert sizes.max() <= np.ceil((num_prompts - 2) / 8) * 1.5
    assert capfd.readouterr() == ("", "")


def test_metis_never_prints(capfd):
    """What it prints about a part that stays empty comes from C, past Python's own output."""
    graph = partition.similarity_graph(12, pairs_of(*[(n, n + 1, 0.8) for n in range(11)]))
    weights = np.ones(12, int)
    weights[3] = 1000
    print("before")
    partition.cut_graph(graph, weights, 10, 0, recursive=False)
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


@pytest.fixture
def table(tmp_path):
    """A data set of 60 prompts, one of them with 200 rows."""
    numbers = np.concatenate([np.arange(60), np.full(199, 7)])
    columns = {
        "image": [f"one_images/{row}.png" for row in range(len(numbers))],
        "prompt": [f"prompt {number}" for number in numbers],
        "fold": np.full(len(numbers), -1),
        "source": [f"source {number % 4}" for number in numbers],
    }
    write_table(tmp_path / "one.tsv", columns)
    np.save(tmp_path / "one.npy", unit_rows(60)[numbers])
    return tmp_path / "one.tsv"


def test_the_command_names_the_heavy_prompt(table, capfd):
    assert main([str(table), "--folds", "5", "--device", "cpu"]) == 0
    shown = capfd.readouterr()
    assert "warning: fold 4 holds one prompt alone, 'prompt 7': it has 77.2% of the rows" in shown.out
    assert "***" not in shown.out + shown.err
    written = read_table(table, ["prompt", "fold"])
    folds, prompts = written["fold"].to_numpy(), np.array(written["prompt"].to_pylist())
    assert set(prompts[folds == 4]) == {"prompt 7"} and (prompts == "prompt 7").sum() == (folds == 4).sum()
    assert np.bincount(folds)[:4].min() >= 13


def test_sources_are_those_of_the_column(table):
    """Four sources of 15 prompts: a fold of 12 prompts has about three of each, as topics count too."""
    columns = read_table(table, ["image", "prompt", "fold", "source"]).slice(0, 60)
    write_table(table, {name: columns[name] for name in columns.column_names})
    np.save(table.with_suffix(".npy"), unit_rows(60))
    report = assign_folds([table], num_folds=5, progress=False)
    folds = read_table(table, ["fold"])["fold"].to_numpy()
    counts = np.array([np.bincount(folds[source::4], minlength=5) for source in range(4)])
    assert counts.min() >= 2 and counts.max() <= 4
    apart = np.abs(counts / counts.sum(axis=0) - 1 / 4).sum(axis=0) / 2
    assert [fold["source_distance"] for fold in report["folds"]] == pytest.approx(apart.tolist())


def test_folds_of_an_earlier_version_stay_and_are_added_to(table):
    assign_folds([table], num_folds=5, method="partition", progress=False)
    more = table.with_name("two.tsv")
    write_table(more, {"image": list("abcdef"), "prompt": list("abcdef"), "fold": [-1] * 6})
    np.save(more.with_suffix(".npy"), unit_rows(66)[60:])
    before = read_table(table, ["fold"])["fold"].to_pylist()
    report = assign_folds([table, more], keep=True, progress=False)
    assert report["method"] == "partition" == read_fold_report(more)["method"]
    assert read_table(table, ["fold"])["fold"].to_pylist() == before and report["added_prompts"] == 6

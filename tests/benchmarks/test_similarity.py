"""The benchmark's sections on grouping, in little: what they time is right, and what they report is what happened."""

import numpy as np
import pytest
from fixtures.prompts import brute_force, neighbourhoods

from kutils.benchmarks import similarity
from kutils.data import prompt_bank
from kutils.prompts import embedding, fold_methods, partition
from kutils.prompts.similarity import similar_pairs
from kutils.system.tables import read_table, write_table


@pytest.fixture
def rows():
    return neighbourhoods(num_groups=60, group_size=5, noise=0.55)


def by_name(entries) -> dict:
    return {entry.name: entry for entry in entries}


@pytest.mark.slow
def test_similar_pairs_are_timed_beside_faiss_that_finds_the_same(rows, monkeypatch):
    monkeypatch.setattr(similarity, "SIZES", (100, 300, 1000))
    monkeypatch.setattr(similarity, "COMPARED", 100)
    entries = by_name(similarity.measure_similar_pairs(rows, repeats=2))
    sizes = ("similar_pairs_100", "similar_pairs_300")
    assert set(entries) == {
        *(f"{size}{part}" for size in sizes for part in ("", "_float32", "_at_0.9", "_memory")),
        "similar_pairs_exponent",
    }
    assert entries["similar_pairs_100"].reference > 0 and entries["similar_pairs_300"].reference is None
    assert 0 < entries["similar_pairs_300_memory"].ours < 100
    _, count = similarity.time_faiss(rows)
    assert count == len(brute_force(rows, 0.7))


def test_other_pairs_than_faiss_stop_the_benchmark(rows, monkeypatch):
    monkeypatch.setattr(similarity, "time_faiss", lambda embeddings, threshold: (1.0, 7))
    with pytest.raises(AssertionError, match="FAISS finds other pairs"):
        similarity.measure_similar_pairs(rows, repeats=1)


def test_folds_leak_what_they_are_said_to():
    rows = neighbourhoods(num_groups=12, group_size=25, noise=0.62)  # within: about 0.72
    entries = by_name(similarity.measure_leakage(rows, repeats=1))
    pairs = similar_pairs(rows, 0.7)
    leader = fold_methods.assign(np.ones(300, int), pairs, 10, "leader", 0)
    leaked = entries["folds_300_leaked_beside_leader"]
    assert leaked.reference == pytest.approx(100 * partition.leaked_prompts(leader, pairs).mean())
    assert leaked.ours < leaked.reference < entries["folds_300_leaked_beside_random"].reference
    assert 8 <= entries["folds_300_smallest"].ours <= 10 <= entries["folds_300_largest"].ours <= 12


def test_prompts_come_from_the_grammar_or_a_file(workspace, monkeypatch):
    def embed(path, dtype):
        np.save(path.with_suffix(".npy"), np.arange(read_table(path, ["prompt"]).num_rows)[:, None].repeat(384, 1))
        return path.with_suffix(".npy")

    monkeypatch.setattr(embedding, "embed_table", embed)
    texts, rows = similarity.embedded_prompts("", 30)
    assert sorted(rows[:, 0]) == list(range(30)) and list(rows[:, 0]) != list(range(30))
    made = read_table(workspace / "working" / "benchmark" / "prompts_30.tsv", ["prompt"])["prompt"].to_pylist()
    assert len(set(made)) == 30 and texts == [made[int(row)] for row in rows[:, 0]]
    write_table(workspace / "own.tsv", {"prompt": ["a", "b", "c"]})
    assert [len(part) for part in similarity.embedded_prompts(str(workspace / "own.tsv"), 2)] == [2, 2]


def test_nearest_prompts_are_looked_up_beside_faiss(workspace, monkeypatch):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 512)
    entries = by_name(similarity.measure_nearest(2000, repeats=2))
    assert set(entries) == {f"nearest_prompts_2000{part}" for part in ("", "_first", "_256_queries")}
    assert all(entry.ours > 0 and entry.reference > 0 for entry in entries.values())
    assert not list((workspace / "working" / "benchmark").rglob("*.arrow"))
    monkeypatch.setattr(similarity, "search_faiss", lambda path, queries: (np.zeros((256, 10)), [1, 1, 1]))
    with pytest.raises(AssertionError, match="others are nearer"):
        similarity.measure_nearest(2000, repeats=1)


def test_growth_of_a_share_is_that_of_all_blocks(workspace, rows, monkeypatch):
    """Of 300 rows all blocks, of 2,000 an eighth, which is the share that is said."""
    monkeypatch.setattr(similarity, "GROWN", (300, 2000))
    monkeypatch.setattr(similarity, "GROWN_BLOCKS", 60)
    monkeypatch.setitem(similarity.BLOCK_ROWS, "cpu", 64)
    (workspace / "working").mkdir(exist_ok=True)
    entries = by_name(similarity.measure_growth(rows))
    assert entries["similar_pairs_grown_300_searched"].ours == 100
    assert entries["similar_pairs_grown_2000_searched"].ours == pytest.approx(100 / 8, abs=5)
    assert not list((workspace / "working").rglob("*.np?"))
    similarity.write_grown(workspace / "grown.npy", rows, 2000)
    grown = np.load(workspace / "grown.npy")
    np.testing.assert_array_equal(grown[:300], rows)
    cosines = grown[300:].astype(np.float64) @ rows.T
    np.testing.assert_allclose(np.linalg.norm(grown, axis=1), 1, atol=1e-6)
    best = np.sort(cosines, axis=1)[:, -2:]  # of a row and the two that it lies between
    assert (best[:, 1] > 0.6).all()
    searched, search = [], similarity.similar_pairs

    def spied(rows, threshold, **options):
        ranks = options.get("ranks")
        searched.append(similarity.share_strips(list(range(0, len(rows), 64)), ranks) if ranks else [])
        return search(rows, threshold, **options)

    monkeypatch.setattr(similarity, "similar_pairs", spied)
    _, share = similarity.time_share(grown, 8)
    tops, _ = searched  # and once more with nothing left to do
    blocks = sum(len(range(top, 2000, 64)) for top in tops)
    assert share == pytest.approx(blocks / sum(len(range(top, 2000, 64)) for top in range(0, 2000, 64)), abs=0.02)

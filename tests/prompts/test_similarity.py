"""Similar pairs against float64 brute force, in every precision, between two sets, and after a kill."""

import numpy as np
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.prompts import brute_force, cosines, neighbourhoods

from kutils.prompts import similarity
from kutils.prompts.similarity import similar_pairs, strips_folder
from kutils.system.ranks import Ranks

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize("threshold", [0.02, 0.7, 0.78, 0.99])
@pytest.mark.parametrize("block_rows", [64, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_those_of_brute_force(threshold, block_rows, dtype):
    rows = neighbourhoods(num_groups=70, group_size=5, noise=0.55)  # cosines within a group: 0.7 to 0.83
    pairs = similar_pairs(rows, threshold, block_rows=block_rows, dtype=dtype)
    assert list(zip(pairs.first, pairs.second, strict=True)) == brute_force(rows, threshold)
    np.testing.assert_allclose(pairs.cosine, cosines(rows)[pairs.first, pairs.second], atol=1e-6)
    assert pairs.first.dtype == pairs.second.dtype == np.int32 and pairs.cosine.dtype == np.float32
    assert len(pairs.first) > 50 or threshold == 0.99


@pytest.mark.parametrize("threshold", [0.02, 0.7, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_two_sets_are_those_of_brute_force(threshold, dtype):
    rows = neighbourhoods(num_groups=70, group_size=5, noise=0.35)
    left, right = rows[:90], rows[90:]
    pairs = similar_pairs(left, threshold, others=right, block_rows=64, dtype=dtype)
    expected = cosines(rows)[:90, 90:]
    assert list(zip(pairs.first, pairs.second, strict=True)) == list(
        zip(*np.nonzero(expected >= threshold), strict=True)
    )
    np.testing.assert_allclose(pairs.cosine, expected[pairs.first, pairs.second], atol=1e-6)
    assert (pairs.first > pairs.second).any() and len(pairs.first) > 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_rounding_hides_a_pair(dtype):
    """Numbers a little above powers of two all round down, so that the product of equal rows falls far below 1."""
    above = 0.3 * torch.finfo(getattr(torch, dtype)).eps
    left, numbers = (1 + above) ** -2, []  # of the sum of squares
    for power in (1 / 16, 1 / 32, 1 / 64):
        numbers += [power * (1 + above)] * int(left / power**2)
        left -= int(left / power**2) * power**2
    rows = np.tile(np.pad(numbers, (0, 384 - len(numbers))), (2, 1)).astype(np.float32)
    rounded = similarity.put_rows(rows, torch.device("cpu"), dtype).rounded.float()
    assert rounded[0] @ rounded[1] < 1 - above  # a comparison without a margin would miss it
    assert similar_pairs(rows, 0.9999999, dtype=dtype).first.tolist() == [0]


def test_a_search_goes_on_where_it_was_cut(monkeypatch, tmp_path):
    rows = neighbourhoods(num_groups=70, group_size=5, noise=0.55)
    whole = similar_pairs(rows, 0.7, block_rows=64)
    searched, search = [], similarity.pairs_of_block

    def cut(left, right, top, start, *args):
        if len(searched) == 9:
            raise KeyboardInterrupt
        searched.append((top, start))
        return search(left, right, top, start, *args)

    monkeypatch.setattr(similarity, "pairs_of_block", cut)
    with pytest.raises(KeyboardInterrupt), strips_folder(rows, 0.7) as folder:
        similar_pairs(rows, 0.7, block_rows=64, folder=folder)
    assert [path.name for path in folder.iterdir()] == ["000000000-64.npz"]  # six blocks; the second strip has five
    similarity.strip_path(folder, 128, 64).write_bytes(b"")  # damaged
    searched.clear()
    monkeypatch.setattr(similarity, "pairs_of_block", lambda *args: searched.append(args[2:4]) or search(*args))
    with strips_folder(rows, 0.7) as again:
        assert again == folder
        other = similar_pairs(rows, 0.7, block_rows=128, folder=again)  # as on another device: nothing of the above
        assert all(np.array_equal(one, two) for one, two in zip(other, whole, strict=True))
        searched.clear()
        pairs = similar_pairs(rows, 0.7, block_rows=64, folder=again)
    assert sorted(searched) == [(top, start) for top in range(64, 350, 64) for start in range(top, 350, 64)]
    assert all(np.array_equal(one, other) for one, other in zip(pairs, whole, strict=True))
    assert not folder.exists()
    with strips_folder(rows, 0.8) as other, strips_folder(rows[1:], 0.7) as another:
        assert len({folder, other, another}) == 3


def test_pairs_at_the_threshold_are_decided_in_float64():
    rows = neighbourhoods(num_groups=1, group_size=400, noise=0.65)
    values = np.sort(cosines(rows)[np.triu_indices(400, k=1)])
    gaps = np.flatnonzero((np.diff(values) > 2e-8) & (np.diff(values) < 4e-8))[::16]  # float32 products err by 6e-8
    assert len(gaps) > 100
    for gap in gaps:
        threshold = (values[gap] + values[gap + 1]) / 2
        assert len(similar_pairs(rows, threshold).first) == np.sum(values >= threshold)


def test_equal_rows_are_similar_at_every_threshold():
    rows = unit_rows(5)[[0, 1, 2, 1, 3, 1]]
    pairs = similar_pairs(rows, 1.0)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(1, 3), (1, 5), (3, 5)]
    rows = unit_rows(200)  # the cosine of a row with itself is not always 1 in float64
    pairs = similar_pairs(np.concatenate([rows, rows]), 1.0)
    assert list(zip(pairs.first, pairs.second, strict=True)) == [(row, 200 + row) for row in range(200)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_similar(count):
    rows = unit_rows(count)
    assert len(similar_pairs(rows, 0.9).first) == len(similar_pairs(rows, 0.9, others=rows[:0]).first) == 0


def test_a_crowded_block_is_quartered(monkeypatch):
    monkeypatch.setattr(similarity, "CROWDED_ROWS", 64)
    rows = neighbourhoods(num_groups=2, group_size=250, noise=0.3)
    sizes, search = [], similarity.candidates
    monkeypatch.setattr(similarity, "candidates", lambda *args: sizes.append(len(args[0])) or search(*args))
    pairs = similar_pairs(rows, 0.7, block_rows=256)
    assert list(zip(pairs.first, pairs.second, strict=True)) == brute_force(rows, 0.7)
    assert len(pairs.first) == 2 * 250 * 249 // 2 and {256, 128, 64} <= set(sizes)


def test_ranks_are_dealt_what_is_missing_and_the_main_one_joins(tmp_path):
    """Two ranks one after the other, as far as they do not wait for each other."""
    rows = neighbourhoods(num_groups=70, group_size=5, noise=0.55)

    class Alone(Ranks):
        def barrier(self):
            pass

        def gather_objects(self, value):
            return [value]

    device = torch.device("cpu")
    options = {"block_rows": 64, "folder": tmp_path}
    assert len(similar_pairs(rows, 0.7, ranks=Alone(1, 2, device), **options).first) == 0
    assert len(list(tmp_path.iterdir())) == 3  # of six: 64, 128 and 320
    assert {path.name[:9] for path in tmp_path.iterdir()} == {"000000064", "000000128", "000000320"}
    pairs = similar_pairs(rows, 0.7, ranks=Alone(0, 2, device), **options)
    assert all(np.array_equal(one, two) for one, two in zip(pairs, similar_pairs(rows, 0.7), strict=True))
    with strips_folder(rows, 0.7, ranks=Alone(1, 2, device)) as folder:
        folder.mkdir(parents=True)
    assert folder.is_dir()  # the main rank may still read
    with strips_folder(rows, 0.7, ranks=Alone(0, 2, device)):
        pass
    assert not folder.exists()


@pytest.mark.parametrize(("factor", "length"), [(np.nan, "nan"), (np.inf, "inf"), (0, "0.0"), (2, "[12].[90]")])
def test_rows_that_are_no_unit_vectors_are_named(factor, length):
    rows = unit_rows(6)
    rows[4] *= factor
    with pytest.raises(ValueError, match=f"row 4 of the embeddings has length {length}.*embed it again"):
        similar_pairs(rows, 0.7)


def test_rows_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="rows of 384 and of 2 numbers cannot be compared"):
        similar_pairs(unit_rows(3), 0.7, others=np.eye(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"embeddings of shape \[384\] are no rows of numbers"):
        similar_pairs(unit_rows(1)[0], 0.7)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.1, float("nan")])
def test_threshold_is_checked(threshold):
    with pytest.raises(ValueError, match=r"threshold .* is not in \(0, 1\]"):
        similar_pairs(unit_rows(3), threshold)

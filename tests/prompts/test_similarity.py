"""Similar pairs against float64 brute force, in every precision, between two sets, and after a kill."""

import numpy as np
import pytest
import torch
from fixtures.datasets import unit_rows
from fixtures.prompts import brute_force, cosines, neighbourhoods

from kutils.prompts import candidates, shortening, similar_blocks, similarity
from kutils.prompts.similarity import similar_pairs, strips_folder
from kutils.system.ranks import Ranks

DTYPES = ["int8", "bfloat16", "float16", "float32"]


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
    rounded = torch.from_numpy(rows).to(getattr(torch, dtype)).float()
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


@pytest.fixture(params=["int8", "bfloat16", "float32"])
def shortened(request, monkeypatch):
    """Short rows of a given precision and width in every search, however few rows there are."""

    def shorten_to(width):
        def fixed(left, right, threshold, dtype, run):
            rows = torch.cat([part.exact.double() / part.lengths[:, None] for part in (left, right)])
            axes = shortening.principal_axes(rows[:: 1 + len(rows) // 200])
            return shortening.fit_shortening(rows[:50], axes, width, getattr(torch, request.param))

        monkeypatch.setattr(similarity, "fastest_shortening", fixed)

    return shorten_to


def in_a_plane(count):
    """float32 unit rows in one plane, 0.01 apart in angle: nothing is left of them beyond two axes."""
    plane = np.linalg.qr(np.random.default_rng(1).standard_normal((384, 2)))[0]
    angles = 0.01 * np.arange(count)
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T).astype(np.float32)


HARD = {  # rows at which a bound without one of its terms fails, or helps nothing
    "plane": (in_a_plane(300), [0.7, 0.99, 0.9999]),
    "noise": (unit_rows(300), [0.05, 0.1]),
    "duplicates": (unit_rows(150)[np.arange(300) // 2], [0.9, 1.0]),
    "one outlier": (np.concatenate([in_a_plane(299), unit_rows(1, 5)]), [0.7]),
    "lengths": (neighbourhoods(60, 5, 0.55) * np.random.default_rng(2).uniform(0.9991, 1.0009, (300, 1)), [0.7, 0.75]),
    "axis": (np.concatenate([np.eye(384)[:150], -np.eye(384)[:150]]), [0.5, 1.0]),
}


@pytest.mark.parametrize("width", [2, 32, 384])
@pytest.mark.parametrize("kind", HARD)
def test_short_rows_hide_no_pair(shortened, width, kind):
    shortened(width)
    rows, thresholds = HARD[kind][0].astype(np.float32), HARD[kind][1]
    for threshold in thresholds:
        expected = brute_force(rows, threshold - similar_blocks.EXACTLY)
        pairs = similar_pairs(rows, threshold, block_rows=128)
        assert list(zip(pairs.first, pairs.second, strict=True)) == expected
        between = similar_pairs(rows[:100], threshold, others=rows[100:])
        expected = np.nonzero(cosines(rows)[:100, 100:] >= threshold - similar_blocks.EXACTLY)
        assert np.array_equal((between.first, between.second), expected)


@pytest.mark.parametrize("width", [2, 64, 384])
@pytest.mark.parametrize("kind", HARD)
def test_products_of_short_rows_bound_all_products(shortened, width, kind):
    """The proof, number by number: no product of rows exceeds that of their short rows by more than the limit says."""
    shortened(width)
    rows = similar_blocks.put_rows(HARD[kind][0].astype(np.float32), torch.device("cpu"), map)
    how = similarity.fastest_shortening(rows, rows, 0.7, "", map)
    rows = similar_blocks.shorten(rows, how, map)
    values = shortening.products(rows.short[:300], rows.short[:300])
    exact = cosines(HARD[kind][0].astype(np.float32)).ravel()
    for place in np.argsort(values.double().numpy().ravel() / how.scale**2 - exact)[
        :100
    ]:  # the ones nearest to failing
        limit = shortening.smallest_product(exact[place], how, (float(rows.errors.amax()),) * 2)
        assert values.ravel()[place] >= limit


def test_pairs_built_around_the_threshold_are_decided_as_given(shortened):
    """Rows of a length that float32 cannot scale to 1, their cosines within 1e-7 of the threshold."""
    shortened(48)
    random, rows = np.random.default_rng(3), []
    for number in range(400):
        one, other = np.linalg.qr(random.standard_normal((384, 2)))[0].T
        cosine = 0.7 + random.uniform(-1, 1) * 10.0 ** random.uniform(-9, -7)
        rows += [(1 + 0.0009 * (number % 3 - 1)) * one, cosine * one + np.sqrt(1 - cosine**2) * other]
    rows = np.array(rows).astype(np.float32)
    pairs = similar_pairs(rows, 0.7)
    expected = brute_force(rows, 0.7)
    assert list(zip(pairs.first, pairs.second, strict=True)) == expected and 100 < len(expected) < 300


def test_the_width_is_chosen_by_cost(monkeypatch):
    """Rows of 20 axes among 384 are shortened, noise is not, and both searches find what brute force finds."""
    monkeypatch.setattr(similar_blocks, "FEW_PAIRS", 0)
    chosen, choose = [], similarity.fastest_shortening
    monkeypatch.setattr(similarity, "fastest_shortening", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((384, 20)))[0]
    rows = np.random.default_rng(1).standard_normal((2100, 20)) @ basis.T + 0.01 * unit_rows(2100)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    for some, threshold in ((rows, 0.8), (unit_rows(2100), 0.2)):
        pairs = similar_pairs(some, threshold)
        assert list(zip(pairs.first, pairs.second, strict=True)) == brute_force(some, threshold)
        assert len(pairs.first)
    low, noise = chosen
    assert low.axes.shape[1] < 100 and noise.axes is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_by_group_are_those_of_every_product(dtype):
    """What a GPU does, on the CPU."""
    rows = torch.from_numpy(neighbourhoods(num_groups=32, group_size=8, noise=0.5))
    short, _ = shortening.fit_shortening(rows.double(), torch.eye(384), 384, getattr(torch, dtype)).apply(rows.double())
    values = shortening.products(short, short)
    limit = values.flatten().double().quantile(0.97).to(values.dtype)
    row, column = candidates.candidates_by_group(values, limit, 1)
    assert set(zip(row.tolist(), column.tolist(), strict=True)) == set(map(tuple, (values >= limit).nonzero().tolist()))
    assert candidates.candidates_by_group(values, limit, 0.01) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [(64, 24), (48, 320), (320, 7)])
def test_candidates_of_tiles_are_those_of_every_product(monkeypatch, dtype, tile):
    monkeypatch.setattr(candidates, "TILE", tile)
    rows = torch.from_numpy(neighbourhoods(num_groups=32, group_size=10, noise=0.5))
    short, _ = shortening.fit_shortening(rows.double(), torch.eye(384), 384, getattr(torch, dtype)).apply(rows.double())
    values = shortening.products(short, short)
    limit = values.flatten().double().quantile(0.97).to(values.dtype)
    for right in (short[:301], short):  # another block, and the same
        row, column = candidates.candidates(short, right, limit)
        assert (row.diff() >= 0).all()
        found = set(zip(row.tolist(), column.tolist(), strict=True))
        expected = set(map(tuple, (values[:, : len(right)] >= limit).nonzero().tolist()))
        assert len(found) == len(row) and found <= expected
        assert {(i, j) for i, j in expected - found if i <= j or right is not short} == set()
    assert candidates.candidates(short, short, limit, most=0.01) is None


def test_of_ways_that_take_about_as_long_the_fastest_is_timed_again():
    """The first time may be a slow one; one that is far behind is not repeated."""
    times = {"slow once": iter([0.9, 0.7, 0.9]), "steady": iter([1.0, 0.8, 0.8]), "far behind": iter([])}
    ways = [
        similar_blocks.TimedShortening(name, lambda name=name: next(times[name]), seconds)
        for name, seconds in (("steady", 0.8), ("slow once", 0.95), ("far behind", 1.1))
    ]
    assert similar_blocks.fastest(ways).how == "slow once"
    assert similar_blocks.fastest(ways[2:]).how == "far behind"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_crowded_block_is_quartered(monkeypatch, device):
    """On a CPU, and as on a GPU."""
    monkeypatch.setattr(similar_blocks, "CROWDED_ROWS", 64)
    rows = neighbourhoods(num_groups=2, group_size=250, noise=0.3)
    sizes, find = [], similar_blocks.candidates

    def search(left, right, limit, most, fused):
        sizes.append(len(left))
        if device == "cpu":
            return find(left, right, limit, most, fused)
        return candidates.candidates_by_group(shortening.products(left, right), limit, most)

    monkeypatch.setattr(similar_blocks, "candidates", search)
    if device == "cuda":
        monkeypatch.setattr(similar_blocks, "products_of", lambda a, b, row, column: (a @ b.T)[row, column])
    pairs = similar_pairs(rows, 0.7, block_rows=256)
    assert list(zip(pairs.first, pairs.second, strict=True)) == brute_force(rows, 0.7)
    assert len(pairs.first) == 2 * 250 * 249 // 2 and {256, 128, 64} <= set(sizes)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(64, 72), (5, 13), (0, 64)])
@pytest.mark.parametrize("limit", [-3, 0, 5, 20, 30])
def test_places_reached_are_those_of_every_value(dtype, shape, limit):
    values = torch.from_numpy(np.random.default_rng(0).integers(-20, 20, shape, endpoint=True))
    places = candidates.reached(values.to(getattr(torch, dtype)), torch.tensor(limit, dtype=getattr(torch, dtype)))
    assert places.tolist() == np.flatnonzero(values.numpy() >= limit).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [True, False])
def test_a_fused_comparison_leaves_no_product_out(monkeypatch, dtype, rounded):
    """A compiler may compare products before it rounds them to 16 bits, against a limit that has been rounded."""
    rows = torch.from_numpy(neighbourhoods(num_groups=32, group_size=8, noise=0.5))
    short, _ = shortening.fit_shortening(rows.double(), torch.eye(384), 384, getattr(torch, dtype)).apply(rows.double())
    exact = short.double() @ short.double().T
    number = shortening.products(short, short).dtype
    step = 0 if dtype == "int8" else torch.finfo(number).eps
    if not rounded:
        monkeypatch.setattr(candidates, "products", lambda left, right: left.double() @ right.double().T)
    with torch.compiler.set_stance("force_eager"):
        for least in exact.flatten().sort().values[-3000::7]:
            reached = candidates.reaching_products(short, short, least.to(number))
            if dtype != "float32":  # its sums err
                assert reached[exact >= least].all()
            assert (exact[reached] >= least * (1 - 3 * step)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_fused_comparison_finds_the_same_pairs():
    rows = neighbourhoods(num_groups=3277, group_size=5, noise=0.55)  # more than a block
    pairs, fused = (similar_pairs(rows, 0.7, device="cuda", fused=way, block_rows=4096) for way in (False, True))
    assert all(np.array_equal(one, other) for one, other in zip(pairs[:2], fused[:2], strict=True))
    assert len(pairs.first) > 1000


def test_threads_find_what_one_finds_and_leave_torch_as_it_was():
    rows, before = neighbourhoods(num_groups=70, group_size=5, noise=0.55), torch.get_num_threads()
    whole = similar_pairs(rows, 0.7, block_rows=64)
    torch.set_num_threads(3)
    try:
        pairs = similar_pairs(rows, 0.7, block_rows=64)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, other) for one, other in zip(pairs, whole, strict=True))


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

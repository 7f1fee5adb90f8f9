"""A bank of prompts: nearest ones against plain NumPy, its file, and the banks of data sets."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fixtures.datasets import make_dataset, unit_rows

from kutils.data import bank_command, bank_files, nearest, prompt_bank
from kutils.data.prompt_bank import PromptBank
from kutils.system import arrow
from kutils.system.progress import progress_bar
from kutils.system.tables import write_table


def brute_force(embeddings, queries, k):
    """All cosines in float64, sorted."""
    cosines = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    order = np.argsort(-cosines, axis=1)[:, :k]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize(
    ("num_prompts", "num_queries", "k"), [(100, 7, 5), (64, 1, 1), (65, 33, 3), (3, 2, 5), (100, 0, 5)]
)
def test_nearest_is_what_all_cosines_say(monkeypatch, num_prompts, num_queries, k):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 32)  # 65 prompts: a last block of one, smaller than k
    monkeypatch.setattr(prompt_bank, "BLOCK_QUERIES", 4)
    embeddings, queries = unit_rows(num_prompts, seed=1), unit_rows(num_queries, seed=2)
    indices, cosines = PromptBank([f"prompt {n}" for n in range(num_prompts)], embeddings).nearest(queries, k)
    expected_indices, expected_cosines = brute_force(embeddings, queries, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(cosines, expected_cosines, atol=1e-6)
    assert indices.shape == (num_queries, min(k, num_prompts))
    assert indices.dtype == np.int64 and cosines.dtype == np.float32


def like_prompts(count, seed=0):
    """float32 unit rows that have most of their length along few axes, as embeddings of prompts do."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, 384)) * np.arange(1, 385) ** -0.7
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


ROWS = {
    "prompts": like_prompts(700),
    "noise": unit_rows(700),
    "duplicates": like_prompts(100)[np.arange(700) % 100],
    "plane": like_prompts(700) * (np.arange(384) < 2),
    "outlier": np.concatenate([like_prompts(699), np.eye(384, dtype=np.float32)[300:301]]),
}


@pytest.mark.parametrize("width", [2, 64, 384])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ROWS)
def test_short_rows_hide_no_neighbour(tmp_path, monkeypatch, kind, dtype, width):
    """Against all products in float64, of equal float32 ones the first: of queries near rows, and of any."""
    monkeypatch.setattr(bank_files, "SHORTENED", 1)
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 256)
    monkeypatch.setattr(nearest, "WIDTHS", (width,))
    monkeypatch.setattr(nearest, "FEW", 0.4)
    monkeypatch.setattr(nearest, "USELESS", 2)
    rows = ROWS[kind] / np.linalg.norm(ROWS[kind], axis=1, keepdims=True)
    PromptBank(list(map(str, range(700))), rows, np.arange(700)).save(tmp_path / "bank.arrow", dtype)
    bank = PromptBank.load(tmp_path / "bank.arrow")
    assert bank.short.how.width == width
    near = rows[::50] + 0.5 * like_prompts(14, 5)
    queries = np.concatenate([rows[:5], near / np.linalg.norm(near, axis=1, keepdims=True), unit_rows(4, 7)])
    queries = queries.astype(np.float32)
    exclude = np.arange(700) % 7 == 3
    looked, sift = [], nearest.Nearest.sift
    monkeypatch.setattr(nearest.Nearest, "sift", lambda *args: looked.append(len(args[3])) or sift(*args))
    for k, without in ((1, None), (10, None), (300, None), (10, exclude)):
        exact = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
        cosines = (exact @ bank.vectors(np.arange(700)).astype(np.float64).T).astype(np.float32)
        if without is not None:
            cosines[:, without] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        indices, values = bank.nearest(queries, k, exclude=without)
        np.testing.assert_allclose(values, np.take_along_axis(cosines, order, axis=1), atol=2e-7)
        if kind != "duplicates":
            np.testing.assert_array_equal(indices, order)
    assert looked if (kind, width) == ("prompts", 64) else True


def test_rows_are_shortened_where_that_helps():
    """To at most 192 bytes, half of what a row of 384 takes; noise stays as wide as it is."""
    samples = (torch.from_numpy(rows).double() for rows in (like_prompts(2000), unit_rows(2000)))
    prompts, noise = (nearest.choose_shortening(sample).width for sample in samples)
    assert prompts in nearest.WIDTHS and max(nearest.WIDTHS) == 192 and noise == 384


def test_a_cache_of_before_is_made_again(workspace):
    bank = PromptBank.from_datasets(["toy"])
    (path,) = (workspace / "working" / "cache").glob("*.bank.arrow")
    facts = arrow.facts_of(arrow.map_table(path))
    del facts["fingerprint"]["bank"]
    before = PromptBank(bank.prompts, bank.vectors(np.arange(40))[::-1].copy(), bank.rows)
    reader = bank_files.read_batches(before, np.float32, facts)
    arrow.write_batches(path, reader.schema, reader)
    again = PromptBank.from_datasets(["toy"])
    np.testing.assert_array_equal(again.vectors(np.arange(40)), bank.vectors(np.arange(40)))


def test_a_long_look_up_shows_how_far_it_is(monkeypatch):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 32)
    bars = []

    def spied(*arguments, **options):
        bars.append((progress_bar(*arguments, disable=False, file=io.StringIO(), **options), options["delay"]))
        return bars[-1][0]

    monkeypatch.setattr(prompt_bank, "progress_bar", spied)
    PromptBank(["x"] * 70, unit_rows(70)).nearest(unit_rows(3), 2)
    ((bar, delay),) = bars
    assert bar.n == bar.total == 70 and delay == 5


def test_a_prompt_is_nearest_to_itself_and_a_mixture_to_its_larger_part():
    embeddings = np.eye(384, dtype=np.float32)[:3]
    bank = PromptBank(["a cat", "a dog", "a tree"], embeddings)
    indices, cosines = bank.nearest(np.stack([embeddings[1], 0.6 * embeddings[0] + 0.8 * embeddings[2]]), k=2)
    assert bank.texts([indices[0, 0]])[0] == "a dog" and cosines[0].tolist() == [1, 0]
    assert bank.texts(indices[1]) == ["a tree", "a cat"]
    assert cosines[1].tolist() == pytest.approx([0.8, 0.6])


def test_bank_of_data_sets_holds_every_prompt_once(workspace):
    make_dataset(workspace / "input", "other", num_prompts=15)
    bank = PromptBank.from_datasets(["toy", "other"])
    expected = [
        f'{name} prompt "{number}, with a comma'
        for name, count in (("toy", 40), ("other", 15))
        for number in range(count)
    ]
    assert bank.prompts.to_pylist() == expected
    np.testing.assert_array_equal(
        bank.vectors(np.arange(40)), np.load(workspace / "input" / "toy.npy")[::2]
    )  # two images each
    np.testing.assert_array_equal(bank.vectors(np.arange(40, 55)), np.load(workspace / "input" / "other.npy")[::2])


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.zeros((2, 383)), 5, r"\[2, 383\], not \[queries, 384\]"),
        (np.zeros(384), 5, r"\[384\], not"),
        (np.full((1, 384), np.nan), 5, "row 0 of the embeddings has length nan"),
        (np.stack([unit_rows(1)[0], 2 * unit_rows(1)[0]]), 5, "row 1 of the embeddings has length [12]"),
        (unit_rows(1), 0, "k is 0"),
    ],
)
def test_bad_queries_are_refused(queries, k, message):
    with pytest.raises(ValueError, match=message):
        PromptBank(["a", "b"], unit_rows(2)).nearest(queries, k)


@pytest.mark.parametrize(("prompts", "rows"), [(["a"], 2), ([], 0)])
def test_bank_and_embeddings_have_to_fit(prompts, rows):
    with pytest.raises(ValueError, match=r"a bank needs \[prompts, 384\]"):
        PromptBank(prompts, unit_rows(rows))


@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 0), (np.float16, 1e-4)])
def test_a_bank_is_saved_and_read_again(tmp_path, monkeypatch, dtype, error):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 32)
    prompts, embeddings = [f'"{number}" B\u00e4r' for number in range(70)], unit_rows(70)
    PromptBank(prompts, embeddings, np.arange(0, 140, 2)).save(tmp_path / "bank.arrow", dtype)
    bank = PromptBank.load(tmp_path / "bank.arrow")
    assert bank.prompts.to_pylist() == prompts and len(bank) == 70 and bank.texts([69])[0] == prompts[69]
    assert bank.embeddings.type.value_type == pa.from_numpy_dtype(dtype) and bank.embeddings.num_chunks == 3
    assert bank.rows.dtype == np.int64 and bank.rows.tolist() == list(range(0, 140, 2))
    np.testing.assert_allclose(bank.vectors(np.arange(70)), embeddings, atol=error)
    np.testing.assert_array_equal(bank.vectors([[69], [0]])[:, 0], bank.vectors([69, 0]))
    assert bank.nearest(embeddings, k=1)[0].ravel().tolist() == list(range(70))
    for wrong in ([70], [0, -1]):
        with pytest.raises(IndexError, match="of 70, which count from 0"):
            bank.vectors(wrong)
    keep = np.arange(70) % 3 == 0
    keep[32:64] = False  # a block of which nothing stays
    bank.save(tmp_path / "some.arrow", dtype, keep)
    some = PromptBank.load(tmp_path / "some.arrow")
    places = np.flatnonzero(keep)
    assert some.prompts.to_pylist() == [prompts[i] for i in places] and some.rows.tolist() == (2 * places).tolist()
    np.testing.assert_array_equal(some.vectors(np.arange(len(some))), bank.vectors(places))
    assert some.nearest(embeddings[places], k=1)[0].ravel().tolist() == list(range(len(places)))
    PromptBank(prompts, embeddings).save(tmp_path / "bank.arrow")  # replaced
    assert PromptBank.load(tmp_path / "bank.arrow").rows is None


def test_loading_copies_neither_prompts_nor_embeddings(tmp_path):
    PromptBank([f"prompt {number}" for number in range(3000)], unit_rows(3000)).save(tmp_path / "bank.arrow")
    before = pa.total_allocated_bytes()
    bank = PromptBank.load(tmp_path / "bank.arrow")
    assert pa.total_allocated_bytes() - before < 10_000  # of 4.6 MB
    ((_, block),) = bank.blocks()
    (mapped,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if "bank.arrow" in line]
    low, high = (int(number, 16) for number in mapped.split()[0].split("-"))
    for address in (block.data_ptr(), bank.prompts.chunk(0).buffers()[2].address):
        assert low <= address < high


def test_embeddings_of_an_array_are_not_copied():
    rows = unit_rows(10)
    ((_, block),) = PromptBank(["x"] * 10, rows).blocks()
    assert block.data_ptr() == rows.ctypes.data


def test_what_is_no_bank_is_refused(tmp_path):
    path = tmp_path / "bank.arrow"
    path.write_bytes(b"ARROW1 half a file")
    with pytest.raises(ValueError, match=r"bank.arrow holds no prompts"):
        PromptBank.load(path)
    table = pa.table({"prompt": ["a"]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match=r"bank.arrow holds no prompts: it is another Arrow file"):
        PromptBank.load(path)
    with pytest.raises(ValueError, match=r"nothing.arrow holds no prompts .*No such file"):
        PromptBank.load(tmp_path / "nothing.arrow")


def test_of_equal_cosines_the_first_prompts_count(monkeypatch):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 8)
    basis = np.eye(384, dtype=np.float32)
    rows = basis[[0, 1, 1, 0, 0, 1, 2, 2, 0, 1, 1, 0, 1]]  # 0 at 0, 3, 4, 8, 11; 1 at 1, 2, 5, 9, 10, 12
    bank = PromptBank([str(number) for number in range(13)], rows)
    indices, cosines = bank.nearest(basis[[0, 1, 2]], k=4)
    assert indices.tolist() == [[0, 3, 4, 8], [1, 2, 5, 9], [6, 7, 0, 1]]
    assert cosines.tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    indices, _ = bank.nearest(basis[[0]], k=3, exclude=np.isin(np.arange(13), [0, 4]))
    assert indices.tolist() == [[3, 8, 11]]


def test_excluded_prompts_are_never_found(monkeypatch):
    monkeypatch.setattr(prompt_bank, "BLOCK_PROMPTS", 32)
    embeddings, queries = unit_rows(100, seed=1), unit_rows(9, seed=2)
    bank = PromptBank([str(number) for number in range(100)], embeddings)
    exclude = np.arange(100) < 35  # a whole block, and some of the next
    expected, cosines = brute_force(embeddings[35:], queries, 5)
    found = bank.nearest(queries, 5, exclude=exclude)
    np.testing.assert_array_equal(found[0], expected + 35)
    np.testing.assert_allclose(found[1], cosines, atol=1e-6)
    assert bank.nearest(queries, 80, exclude=exclude)[0].shape == (9, 65)
    for wrong in (np.ones(100, bool), np.zeros(99, bool)):
        with pytest.raises(ValueError, match="leaves some of 100 prompts out, not all"):
            bank.nearest(queries, 5, exclude=wrong)


def test_knn_by_hand():
    """Cosines 0.8 and 0.6 at temperature 0.1: weights e^8 and e^6, of sum 1 0.8808 and 0.1192."""
    basis = np.eye(384, dtype=np.float32)
    bank = PromptBank(["a", "b", "c"], basis[:3])
    query = (0.8 * basis[:1] + 0.6 * basis[1:2]).astype(np.float32)
    weights = np.exp([8.0, 6.0]) / np.exp([8.0, 6.0]).sum()
    assert weights == pytest.approx([0.8808, 0.1192], abs=1e-4)
    mean = bank.knn(query, k=2, temperature=0.1)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean[0, :3], [*weights / np.linalg.norm(weights), 0], atol=1e-6)
    np.testing.assert_allclose(bank.knn(query, k=1, temperature=7.0), basis[:1])
    np.testing.assert_allclose(bank.knn(query, k=2, temperature=1e-3), basis[:1], atol=1e-6)
    np.testing.assert_allclose(bank.knn(query, k=1, exclude=np.array([True, False, False])), basis[1:2])
    with pytest.raises(ValueError, match="temperature is 0"):
        bank.knn(query, temperature=0)


def test_knn_of_many_queries_in_blocks(monkeypatch):
    monkeypatch.setattr(prompt_bank, "BLOCK_QUERIES", 4)
    rows, queries = unit_rows(50, seed=1), unit_rows(11, seed=2)
    order, cosines = brute_force(rows, queries, 6)
    weights = np.exp(cosines / 0.05)
    expected = np.einsum("qk,qkd->qd", weights, rows[order])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    bank = PromptBank([str(number) for number in range(50)], rows)
    np.testing.assert_allclose(bank.knn(queries, 6, 0.05), expected, atol=1e-6)


def test_the_bank_of_data_sets_is_built_once(workspace, monkeypatch, capsys):
    first = PromptBank.from_datasets(["toy"])
    (path,) = (workspace / "working" / "cache").glob("*.bank.arrow")
    written = path.stat().st_ino
    assert first.rows.tolist() == list(range(0, 80, 2))
    second = PromptBank.from_datasets(["toy"])
    assert path.stat().st_ino == written and second.prompts.equals(first.prompts)
    assert path.stat().st_size < 20_000  # of 40 prompts; their embeddings, 61 kB, stay in the .npy file
    with pytest.raises(ValueError, match="holds no embeddings: it is a cache of data sets; give --datasets"):
        PromptBank.load(path)
    rows = np.load(workspace / "input" / "toy.npy")
    np.save(workspace / "input" / "toy.npy", rows[::-1].copy())
    np.testing.assert_array_equal(PromptBank.from_datasets(["toy"]).vectors([0]), rows[[79]])
    assert path.stat().st_ino != written and not capsys.readouterr().out


def test_a_bank_that_cannot_be_written_stays_in_memory(workspace, capsys):
    (workspace / "working" / "cache").write_text("a file where the folder should be")
    bank = PromptBank.from_datasets(["toy"])
    assert len(bank) == 40 and bank.rows.tolist() == list(range(0, 80, 2))
    assert "cannot be written" in capsys.readouterr().out


def test_a_bank_of_some_prompts_is_drawn(workspace):
    whole = PromptBank.from_datasets(["toy"])
    some = PromptBank.from_datasets(["toy"], most=10, seed=1)
    prompts = some.prompts.to_pylist()
    assert len(whole) == 40 and len(set(prompts)) == 10
    places = [whole.prompts.to_pylist().index(prompt) for prompt in prompts]
    np.testing.assert_array_equal(some.vectors(np.arange(10)), whole.vectors(places))
    np.testing.assert_array_equal(some.rows, whole.rows[places])
    assert prompts == PromptBank.from_datasets(["toy"], most=10, seed=1).prompts.to_pylist()


def test_the_nearest_prompts_become_a_title():
    bank = PromptBank(["a cat", "a very long prompt of a dog that nobody would want to read to its end"], unit_rows(2))
    (told,) = bank.captions(bank.vectors([1]), k=2, width=24)
    cosine = float(np.prod(bank.vectors([0, 1]), axis=0).sum())
    assert told == f"a very long prompt ... (1.00) / a cat ({cosine:.2f})"
    assert PromptBank(["alone"], unit_rows(1)).captions(unit_rows(1)) == ["alone (1.00)"]


def test_bank_of_a_prompts_file(tmp_path):
    write_table(tmp_path / "p.tsv", {"prompt": ["a cat", "a dog"], "source": ["x", "y"]})
    np.save(tmp_path / "p.npy", unit_rows(2))
    bank = PromptBank.from_table(tmp_path / "p.tsv")
    assert bank.texts([0, 1]) == ["a cat", "a dog"] and np.array_equal(bank.vectors([0, 1]), unit_rows(2))
    np.save(tmp_path / "p.npy", unit_rows(3))
    with pytest.raises(ValueError, match=r"p.npy is float32 \[3, 384\], its TSV needs float32 \[2, 384\]"):
        PromptBank.from_table(tmp_path / "p.tsv")
    for bad in (np.nan, 2.0):
        np.save(tmp_path / "p.npy", unit_rows(2) * np.float32([[1], [bad]]))
        with pytest.raises(ValueError, match=r"p.npy, row 1 \(line 3 of the TSV\) has length (nan|[12])"):
            PromptBank.from_table(tmp_path / "p.tsv")


def test_command_writes_a_bank(workspace, capsys):
    output = workspace / "toy.arrow"
    bank_command.main(["--datasets", "toy", "--output", str(output), "--dtype", "float16"])
    assert "toy.arrow: 40 prompts of toy, 0.0 MB" in capsys.readouterr().out
    bank = PromptBank.load(output)
    assert bank.embeddings.type.value_type == pa.float16() and len(bank) == 40
    for arguments, message in [
        (["--datasets", "toy", "--output", str(output)], "toy.arrow exists; remove it"),
        (["--datasets", "nothing", "--output", str(workspace / "x.arrow")], "data set 'nothing'"),
        (["--prompts", "no.tsv", "--output", str(workspace / "x.arrow")], "no.tsv is not there"),
    ]:
        with pytest.raises(ValueError, match=message):
            bank_command.main(arguments)
    bank_command.main(["--prompts", str(workspace / "input" / "toy.tsv"), "--output", str(workspace / "x.arrow")])
    assert len(PromptBank.load(workspace / "x.arrow")) == 80


def test_a_damaged_prompt_in_the_cache_is_made_again(workspace):
    whole = PromptBank.from_datasets(["toy"])
    prompts = whole.prompts.to_pylist()
    (path,) = (workspace / "working" / "cache").glob("*.bank.arrow")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"toy prompt", b"Toy prompt", 1))
    assert path.read_bytes() != content
    assert PromptBank.from_datasets(["toy"]).prompts.to_pylist() == prompts and path.read_bytes() == content

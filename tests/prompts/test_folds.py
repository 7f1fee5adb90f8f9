"""Folds of small graphs worked out by hand, and what assigning folds leaves on disk, also after a kill."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from fixtures.datasets import unit_rows
from fixtures.prompts import cosines, neighbourhoods, pairs_of

from kutils.data import datasets
from kutils.prompts import fold_methods, leakage, near_duplicates, partition
from kutils.prompts import folds as prompt_folds
from kutils.prompts.folds import assign_folds, read_fold_report
from kutils.prompts.similarity import SimilarPairs, similar_pairs
from kutils.system import paths
from kutils.system.tables import folds_hash, read_table, write_table

BY_PAIRS = ("stratified", "partition", "components", "leader")


@pytest.mark.parametrize("method", BY_PAIRS)
def test_separate_neighbourhoods_stay_whole_and_folds_are_even(method):
    rows = neighbourhoods(num_groups=60, group_size=5, noise=0.3)  # within a group all are similar, between none
    pairs = similar_pairs(rows, 0.7)
    assert len(pairs.first) == 60 * 10
    folds = fold_methods.assign(np.full(300, 3), pairs, 10, method, seed=0)
    assert not partition.leaked_prompts(folds, pairs).any()
    assert np.bincount(folds).tolist() == [30] * 10


def test_kmeans_keeps_topics_whole_and_folds_even():
    rows = neighbourhoods(num_groups=40, group_size=25, noise=0.3)  # as many topics as it makes of 800 to 1,000 prompts
    nothing = SimilarPairs(*np.empty((3, 0), int))
    folds = fold_methods.assign(np.ones(1000, int), nothing, 10, "kmeans", 0, rows)
    topics = np.unique(cosines(rows) > 0.5, axis=0)  # 40 rows: who is of one topic
    assert len(topics) == 40
    torn = sum(len(set(folds[topic])) > 1 for topic in topics)
    assert torn <= 4
    assert np.bincount(folds, minlength=10).min() >= 75 and np.bincount(folds).max() <= 125
    assert np.array_equal(folds, fold_methods.assign(np.ones(1000, int), nothing, 10, "kmeans", 0, rows))


def percolating() -> np.ndarray:
    """1,000 unit rows on a closed curve, each similar to two on either side at 0.7: one component, no groups."""
    angle = 2 * np.pi * np.arange(1000) / 1000
    rows = np.concatenate([[np.cos(n * angle), np.sin(n * angle)] for n in range(1, 101)]).T
    return np.random.default_rng(0).permutation(np.pad(rows, ((0, 0), (0, 184))) / 10).astype(np.float32)


def test_partition_cuts_a_percolating_graph_into_even_folds_at_few_prompts():
    pairs = similar_pairs(percolating(), 0.7)
    neighbours = np.bincount(np.concatenate([pairs.first, pairs.second]))
    assert set(neighbours) == {4}
    num_rows = np.random.default_rng(1).integers(1, 6, 1000)  # images per prompt
    folds = fold_methods.assign(num_rows, pairs, 10, "partition", seed=0)
    sizes = np.bincount(folds, num_rows) / num_rows.sum()
    assert sizes.min() > 0.09 and sizes.max() < 0.11
    # ten cuts of the ring touch at least two prompts on either side: 40 of 1,000
    assert 0.04 <= partition.leaked_prompts(folds, pairs).mean() < 0.06
    leader = fold_methods.assign(num_rows, pairs, 10, "leader", seed=0)
    assert partition.leaked_prompts(leader, pairs).mean() > 0.5
    with pytest.raises(ValueError, match=r"1 groups .* cannot fill 10 folds; .*--method stratified"):
        fold_methods.assign(num_rows, pairs, 10, "components", seed=0)


def test_partition_repeats_and_follows_the_seed():
    pairs = similar_pairs(percolating(), 0.7)
    first, again, other = (fold_methods.assign(np.ones(1000, int), pairs, 10, "partition", seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(("num_prompts", "num_folds"), [(10, 10), (13, 10), (2, 2), (200, 7)])
@pytest.mark.parametrize("method", BY_PAIRS)
def test_every_fold_has_prompts_where_none_are_similar(method, num_prompts, num_folds):
    pairs = similar_pairs(np.eye(384, dtype=np.float32)[:num_prompts], 0.7)
    folds = fold_methods.assign(np.ones(num_prompts, int), pairs, num_folds, method, seed=0)
    sizes = np.bincount(folds, minlength=num_folds)
    assert len(sizes) == num_folds and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def test_partition_fills_every_fold_of_a_small_dense_graph():
    first, second = np.triu_indices(20, k=1)
    near = second - first <= 3  # a band: 54 pairs of 20 prompts
    pairs = SimilarPairs(first[near], second[near], np.ones(near.sum(), np.float32))
    folds = fold_methods.assign(np.ones(20, int), pairs, 10, "partition", seed=0)
    assert set(folds) == set(range(10))


# five prompts similar in a chain of three and a pair, and one alone; 1, 2, 3, 1, 1 and 2 rows
GRAPH = pairs_of((0, 1, 0.8), (1, 2, 0.75), (3, 4, 0.9))
NUM_ROWS = np.array([1, 2, 3, 1, 1, 2])


def test_groups_by_hand():
    assert partition.groups_by_components(6, GRAPH).tolist() == [0, 0, 0, 1, 1, 2]
    folds = fold_methods.assign(NUM_ROWS, GRAPH, 2, "components", seed=0)  # 6 rows against 2 + 2
    assert folds[:3].tolist() == [folds[0]] * 3 and folds[3:].tolist() == [1 - folds[0]] * 3
    folds = fold_methods.assign(NUM_ROWS, GRAPH, 4, "leader", seed=0)  # groups {0, 1}, {2}, {3, 4}, {5}: one to a fold
    assert folds[0] == folds[1] and folds[3] == folds[4] and len(set(folds)) == 4


def test_leakage_by_hand():
    folds = np.array([0, 0, 1, 1, 1, 0], np.int8)  # cuts 1 - 2
    assert partition.leaked_prompts(folds, GRAPH).tolist() == [False, True, True, False, False, False]
    report = leakage.leakage_report(folds, NUM_ROWS, GRAPH, 2)
    assert report == {
        "rows": 10,
        "prompts": 6,
        "edges": 3,
        "edges_cut": 1,
        "edges_cut_share": pytest.approx(1 / 3),
        "neighbour_share": pytest.approx(5 / 6),
        "leaked_share": pytest.approx(2 / 6),
        "largest_component_rows_share": 0.6,
        "folds": [
            {"fold": 0, "rows": 5, "rows_share": 0.5, "prompts": 3, "leaked": 1, "leaked_share": pytest.approx(1 / 3)},
            {"fold": 1, "rows": 5, "rows_share": 0.5, "prompts": 3, "leaked": 1, "leaked_share": pytest.approx(1 / 3)},
        ],
    }
    warnings = leakage.report_warnings(report)
    assert len(warnings) == 1 and warnings[0].startswith("33.3% of the prompts have a similar one in another fold")
    text = leakage.format_leakage(report | {"method": "partition", "threshold": 0.7, "warnings": warnings})
    assert "10 rows, 6 distinct prompts; folds by partition at cosine >= 0.7" in text
    assert "3 similar pairs, 33.3% of them across folds" in text
    assert "83.3% of the prompts have a similar one, 33.3% have one in another fold" in text


def test_uneven_folds_are_warned_about():
    folds = np.array([0, 0, 0, 1, 1, 1], np.int8)
    report = leakage.leakage_report(folds, np.array([4, 4, 4, 1, 1, 1]), GRAPH, 2)
    assert leakage.report_warnings(report) == [
        "the largest connected component holds 80.0% of the rows: folds by components would be uneven",
        "fold sizes are uneven: 0.40 to 1.60 of their mean",
    ]


class Killed(BaseException):
    pass


def make_tables(root: Path) -> list[Path]:
    """Data sets `one` and `two` of 300 prompts, 60 of them in both; up to 3 images per prompt; a column more in `two`.

    Similar prompts, at 0.65 to 0.85, lie in groups of 25, so that ten even folds have to cut some.
    """
    random = np.random.default_rng(0)
    embeddings = neighbourhoods(num_groups=12, group_size=25, noise=0.55)
    prompts = [f"caf\u00e9 \"{number}, 5' tall" for number in range(300)]
    tsv_paths = []
    for name, numbers in (("one", np.arange(180)), ("two", np.arange(120, 300))):
        rows = random.permutation(np.repeat(numbers, random.integers(1, 4, len(numbers))))
        columns = {
            "image": [f"{name}_images/{row:04d}.png" for row in range(len(rows))],
            "prompt": [prompts[row] for row in rows],
            "fold": np.full(len(rows), -1),
        }
        if name == "two":
            columns["source"] = [f"source {row}" for row in rows]
        tsv_paths.append(root / f"{name}.tsv")
        write_table(tsv_paths[-1], columns)
        np.save(root / f"{name}.npy", embeddings[rows])
    return tsv_paths


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("KUTILS_INPUT", str(tmp_path))
    return make_tables(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pooled(tsv_paths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, folds and embeddings of all rows."""
    read = [read_table(path, ["prompt", "fold"]) for path in tsv_paths]
    prompts = np.concatenate([table["prompt"].to_pylist() for table in read])
    folds = np.concatenate([table["fold"].to_numpy() for table in read])
    return prompts, folds, np.concatenate([np.load(path.with_suffix(".npy")) for path in tsv_paths])


@pytest.mark.parametrize("method", BY_PAIRS)
def test_a_prompt_has_one_fold_in_all_data_sets(tables, method):
    report = assign_folds(tables, 0.7, 10, method, progress=False)
    prompts, folds, _ = pooled(tables)
    fold_of = dict(zip(prompts, folds, strict=True))
    assert len(fold_of) == report["prompts"] == 300
    assert [fold_of[prompt] for prompt in prompts] == folds.tolist()
    assert [fold["rows"] for fold in report["folds"]] == np.bincount(folds, minlength=10).tolist()
    assert min(folds) == 0 and max(folds) == 9


@pytest.mark.parametrize(("method", "least"), [("stratified", 0), ("partition", 0.1)])
def test_report_and_clean_mark_are_what_brute_force_finds(tables, method, least):
    report = assign_folds(tables, 0.7, 10, method, progress=False)
    prompts, folds, embeddings = pooled(tables)
    leaks = ((cosines(embeddings) >= 0.7) & (folds[:, None] != folds)).any(axis=1)
    assert least <= leaks.mean() < 0.9  # a group as large as a fold is cut where folds have to be even
    data = datasets.load_datasets(["one", "two"])
    assert data.clean.tolist() == (~leaks).tolist()
    assert report["leaked_share"] == pytest.approx(len(set(prompts[leaks])) / 300)
    assert report["rows"] == len(prompts)
    sizes = np.bincount(folds) / len(folds)
    assert sizes.min() > 0.085 and sizes.max() < 0.115
    for path in tables:
        table = read_table(path, ["prompt", "fold"])
        saved = paths.read_json(path.with_suffix(".folds.json"))
        assert saved["folds_hash"] == folds_hash(table["prompt"], table["fold"].to_numpy())
        assert saved["folds_hash"] == data.folds_hashes[path.stem] == report["datasets"][path.stem]["folds_hash"]
        assert read_fold_report(path) == saved == {"folds_hash": saved["folds_hash"], **report}


def test_only_the_fold_column_changes_and_the_former_table_is_kept(tables):
    former = {path: (path.read_bytes(), read_table(path, [])) for path in tables}
    assign_folds(tables, progress=False)
    for path in tables:
        before, after = former[path][1], read_table(path, [])
        assert after.column_names == before.column_names
        assert after.drop_columns("fold").equals(before.drop_columns("fold"))
        assert path.with_name(path.name + ".bak").read_bytes() == former[path][0]
    assert not list(tables[0].parent.glob(".*"))

    same = contents(tables[0].parent)
    assign_folds(tables, progress=False)
    assert contents(tables[0].parent) == same  # the .bak too: it is still the table before folds

    assigned = tables[0].read_bytes()
    assign_folds(tables, 0.7, 5, progress=False)
    assert tables[0].with_name("one.tsv.bak").read_bytes() == assigned
    assert pooled(tables)[1].max() == 4


def test_another_assignment_makes_the_mark_and_the_report_void(tables):
    assign_folds(tables, progress=False)
    table = read_table(tables[0], [])
    folds = (table["fold"].to_numpy() + 1) % 10
    write_table(tables[0], {"image": table["image"], "prompt": table["prompt"], "fold": folds})
    assert datasets.load_datasets(["one"]).clean is None
    with pytest.raises(ValueError, match=r"one.folds.json describes other folds .* kutils folds"):
        read_fold_report(tables[0])
    tables[1].with_suffix(".folds.json").write_text('{"folds_hash": ')
    with pytest.raises(ValueError, match=r"two.folds.json cannot be read .*; assign folds again"):
        read_fold_report(tables[1])
    tables[1].with_suffix(".folds.json").unlink()
    with pytest.raises(ValueError, match=r"two.folds.json is not there"):
        read_fold_report(tables[1])


@pytest.mark.parametrize("refold", [False, True])
def test_a_kill_between_any_two_files_leaves_whole_ones_and_no_report(tables, monkeypatch, refold):
    folder = tables[0].parent
    if refold:
        assign_folds(tables, num_folds=5, progress=False)
    before = contents(folder)
    assign_folds(tables, progress=False)
    complete, write, num_files = contents(folder), paths.atomic_path, 8  # .bak, .tsv, .clean.npz and .folds.json of two
    for last in range(num_files):
        for path in folder.iterdir():
            path.unlink()
        for name, content in before.items():
            (folder / name).write_bytes(content)
        written = []

        @contextlib.contextmanager
        def killed(path, last=last, written=written):
            if len(written) == last and path.parent == folder:
                raise Killed
            with write(path) as temporary:
                yield temporary
            written += [path] if path.parent == folder else []  # not the strips of similar pairs

        monkeypatch.setattr(paths, "atomic_path", killed)
        with pytest.raises(Killed):
            assign_folds(tables, progress=False)
        monkeypatch.setattr(paths, "atomic_path", write)
        state = contents(folder)
        assert all(content in (before.get(name), complete[name]) for name, content in state.items())
        with pytest.raises(ValueError, match=r"cut off while being made.*assign folds again"):
            read_fold_report(tables[1])
        assign_folds(tables, progress=False)
        assert contents(folder) == complete, f"killed at file {last}"


@pytest.mark.parametrize(("method", "most"), [("partition", 0.25), ("stratified", 0.45)])
def test_new_prompts_join_folds_and_old_ones_stay(tables, method, most):
    assign_folds(tables[:1], method=method, progress=False)
    old = dict(zip(*(read_table(tables[0], [])[name].to_pylist() for name in ("prompt", "fold")), strict=True))
    report = assign_folds(tables, keep=True, progress=False)
    prompts, folds, _ = pooled(tables)
    new = dict(zip(prompts, folds.tolist(), strict=True))
    assert len(new) == 300 and {prompt: new[prompt] for prompt in old} == old
    assert report["added_prompts"] == 300 - len(old) == 120
    sizes = np.bincount(folds) / len(folds)
    assert sizes.min() > 0.07 and sizes.max() < 0.13
    assert read_fold_report(tables[1])["folds_hash"] == report["datasets"]["two"]["folds_hash"]
    written = [path.read_bytes() for path in tables]
    assert assign_folds(tables, keep=True, progress=False)["added_prompts"] == 0
    assert [path.read_bytes() for path in tables] == written
    assert report["leaked_share"] <= most and report["method"] == method  # 0.17 where all are assigned anew


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9])
def test_uneven_folds_are_kept_and_filled(share, seed):
    random = np.random.default_rng(seed)
    folds = random.choice(5, 400, p=[0.6, 0.2, 0.1, 0.05, 0.05]).astype(np.int8)
    first, second = np.sort(random.integers(0, 400, (2, 300)), axis=0)
    apart = first < second
    pairs = SimilarPairs(first[apart], second[apart], np.full(apart.sum(), 0.8, np.float32))
    former = np.where(random.random(400) < share, -1, folds)
    former[[int(np.argmax(folds == fold)) for fold in range(5)]] = range(5)
    extended = partition.extend_folds(former, np.ones(400, int), pairs, 5)
    assert np.array_equal(extended[former >= 0], former[former >= 0]) and extended.min() >= 0
    num_new, sizes = (former < 0).sum(), np.bincount(former[former >= 0], minlength=5)
    level = partition.level_after(sizes, num_new)
    assert np.maximum(level - sizes, 0).sum() == pytest.approx(num_new, abs=5)
    assert (np.bincount(extended) <= np.maximum(sizes, 1.05 * level + 2)).all()
    moved = np.where(former < 0, random.integers(0, 5, 400), former)
    if share == 0.9:  # pairs are kept together more often than by chance
        cuts = [(assigned[pairs.first] != assigned[pairs.second]).sum() for assigned in (extended, moved)]
        assert cuts[0] < 0.9 * cuts[1]


def test_a_kill_between_tables_does_not_change_where_new_prompts_go(tables, monkeypatch):
    third = tables[0].with_name("three.tsv")
    rows, texts = neighbourhoods(num_groups=12, group_size=25, noise=0.55, seed=1)[:90], [f"p{n}" for n in range(90)]
    write_table(third, {"image": texts, "prompt": texts, "fold": [-1] * 90})
    np.save(third.with_suffix(".npy"), rows)
    assign_folds(tables[:1], progress=False)
    before, files = contents(third.parent), [*tables, third]
    report = assign_folds(files, keep=True, progress=False)
    expected = [path.read_bytes() for path in files]
    for name, content in before.items():
        (third.parent / name).write_bytes(content)
    write = prompt_folds.write_table

    def killed(path, columns):
        if path == third:
            raise Killed
        write(path, columns)

    monkeypatch.setattr(prompt_folds, "write_table", killed)
    with pytest.raises(Killed):
        assign_folds(files, keep=True, progress=False)
    monkeypatch.setattr(prompt_folds, "write_table", write)
    again = assign_folds(files, keep=True, progress=False)
    assert [path.read_bytes() for path in files] == expected and again == report


def test_embeddings_of_other_prompts_are_refused(tables):
    record = {"encoder": "x", "rows": 1, "prompts_sha256": "of other prompts"}
    tables[1].with_suffix(".npy.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"two.npy is of other prompts, or in another order; make it again"):
        assign_folds(tables, progress=False)


def test_folds_that_cannot_be_kept_are_refused(tables):
    with pytest.raises(ValueError, match="there are no folds that could be kept; leave out --keep"):
        assign_folds(tables, keep=True, progress=False)
    with pytest.raises(ValueError, match="method leader cannot keep folds"):
        assign_folds(tables, method="leader", keep=True, progress=False)
    assign_folds(tables[:1], num_folds=3, progress=False)
    with pytest.raises(ValueError, match="there are 3 folds, not 10; leave out --folds, or --keep"):
        assign_folds(tables, num_folds=10, keep=True, progress=False)
    assign_folds(tables[1:], num_folds=3, seed=1, progress=False)
    before = contents(tables[0].parent)
    with pytest.raises(ValueError, match=r"(one|two).tsv, line \d+: the prompt .* is in the folds \d and \d"):
        assign_folds(tables, num_folds=3, keep=True, progress=False)
    assert contents(tables[0].parent) == before


def test_prompts_without_images_get_a_column_of_folds(tmp_path):
    rows = neighbourhoods(num_groups=20, group_size=5, noise=0.3)
    write_table(tmp_path / "p.tsv", {"prompt": [f"prompt {n}" for n in range(100)], "source": ["s"] * 100})
    np.save(tmp_path / "p.npy", rows)
    report = assign_folds([tmp_path / "p.tsv"], progress=False)
    table = read_table(tmp_path / "p.tsv", ["prompt", "source", "fold"])
    assert [fold["rows"] for fold in report["folds"]] == [10] * 10 and report["leaked_share"] == 0
    torn = (cosines(rows) >= 0.7) & (table["fold"].to_numpy()[:, None] != table["fold"].to_numpy())
    assert not torn.any()
    assert read_fold_report(tmp_path / "p.tsv")["rows"] == 100
    assert read_table(tmp_path / "p.tsv.bak", []).column_names == ["prompt", "source"]


def break_embeddings(change):
    def apply(tsv_path: Path):
        np.save(tsv_path.with_suffix(".npy"), change(np.load(tsv_path.with_suffix(".npy"))))

    return apply


def break_row(column: str, value: str):
    def apply(tsv_path: Path):
        table = read_table(tsv_path, [])
        columns = {name: table[name].to_pylist() for name in table.column_names}
        columns[column][4] = value
        write_table(tsv_path, columns)

    return apply


def with_nan(rows):
    rows[7, 3] = np.nan
    return rows


BAD_TABLES = {
    "rows": (break_embeddings(lambda rows: rows[:-1]), r"two.npy is float32 \[\d+, 384\], its TSV needs"),
    "NaN": (break_embeddings(with_nan), r"two.npy, row 7 \(line 9 of the TSV\) has length nan, not 1"),
    "dimension": (break_embeddings(lambda rows: rows[:, :256]), r"two.npy is float32 \[\d+, 256\]"),
    "order": (
        break_embeddings(lambda rows: rows[::-1]),
        r"row \d+ \(line \d+ of the TSV\): the same prompt has another",
    ),
    "no file": (lambda path: path.with_suffix(".npy").unlink(), r"two.npy cannot be read .*gen_prompt_embedding.py"),
    "empty prompt": (break_row("prompt", " "), r"two.tsv, line 6: prompt is ' '; remove the row or give it a prompt"),
    "absolute": (break_row("image", "/etc/a.png"), r"two.tsv, line 6: image is '/etc/a.png'"),
    "above": (break_row("image", "two/../../a.png"), r"two.tsv, line 6: image is 'two/../../a.png'"),
    "fold": (break_row("fold", 10), r"two.tsv: line 6 has fold '10'; a fold is 0 to 9"),
    "no table": (lambda path: path.unlink(), r"two.tsv is not there"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_data_sets_are_refused_before_anything_is_written(tables, name):
    damage, message = BAD_TABLES[name]
    damage(tables[1])
    before = contents(tables[0].parent)
    with pytest.raises(ValueError, match=message):
        assign_folds(tables, progress=False)
    assert contents(tables[0].parent) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"threshold 0.0 is not in \(0, 1\]"),
        ((0.7, 11), "11 folds: give 2 to 10"),
        ((0.7, 1), "1 folds: give 2 to 10"),
        ((0.7, 10, "magic"), "method 'magic': choose one of stratified, partition, components, leader"),
    ],
)
def test_bad_settings_are_refused(tables, arguments, message):
    with pytest.raises(ValueError, match=message):
        assign_folds(tables, *arguments, progress=False)
    with pytest.raises(ValueError, match="two data sets have one name"):
        assign_folds([tables[0], tables[0].parent / "." / "one.tsv"], progress=False)


def test_fewer_prompts_than_folds_are_refused(tmp_path):
    write_table(tmp_path / "few.tsv", {"image": list("abc"), "prompt": ["p", "q", "p"], "fold": [-1] * 3})
    np.save(tmp_path / "few.npy", unit_rows(2)[[0, 1, 0]])
    with pytest.raises(ValueError, match="2 distinct prompts cannot fill 10 folds; ask for fewer folds"):
        assign_folds([tmp_path / "few.tsv"], progress=False)
    assert sum(fold["rows"] for fold in assign_folds([tmp_path / "few.tsv"], num_folds=2, progress=False)["folds"]) == 3


@pytest.fixture
def prompts_file(tmp_path, monkeypatch):
    """A prompts file of 40 neighbourhoods of 4, embedded."""
    tsv = tmp_path / "prompts.tsv"
    write_table(tsv, {"prompt": [f'"{row}' for row in range(160)], "source": [f"s{row % 3}" for row in range(160)]})
    np.save(tsv.with_suffix(".npy"), neighbourhoods(num_groups=40, group_size=4, noise=0.2))  # 0.93 to 0.98 within
    monkeypatch.setattr(near_duplicates, "embed_table", lambda path, **options: Path(path).with_suffix(".npy"))
    return tsv


def test_dedup_splits_a_prompts_file(prompts_file, capsys):
    kept, rest = prompts_file.with_name("kept.tsv"), prompts_file.with_name("rest.tsv")
    command = [str(prompts_file), "--kept", str(kept), "--rest", str(rest)]
    near_duplicates.main(command)
    assert "40 prompts kept" in capsys.readouterr().out
    tables = [read_table(path, ["prompt", "source"]) for path in (kept, rest, prompts_file)]
    assert [table.num_rows for table in tables] == [40, 120, 160]
    pairs = [list(zip(table["prompt"].to_pylist(), table["source"].to_pylist(), strict=True)) for table in tables]
    assert sorted(pairs[0] + pairs[1]) == sorted(pairs[2])

    near_duplicates.main(command)  # the same again is no harm
    before = contents(prompts_file.parent)
    with pytest.raises(
        ValueError, match=r"kept.tsv is there already, with other prompts; delete it, or give --overwrite"
    ):
        near_duplicates.main([*command, "--threshold", "0.99"])
    assert contents(prompts_file.parent) == before
    near_duplicates.main([*command, "--threshold", "0.99", "--overwrite"])
    assert read_table(kept, ["prompt"]).num_rows == 160 and read_table(rest, ["prompt"]).num_rows == 0


def test_dedup_leaves_out_what_resembles_an_earlier_list(prompts_file, capsys):
    folder = prompts_file.parent
    embeddings, table = np.load(prompts_file.with_suffix(".npy")), read_table(prompts_file, [])
    for name, rows in {"a": slice(0, 50), "b": slice(50, 160)}.items():
        write_table(folder / f"{name}.tsv", {c: table[c].to_pylist()[rows] for c in ("prompt", "source")})
        np.save(folder / f"{name}.npy", embeddings[rows])

    def dedup(name, *options):
        files = [str(folder / f"{name}.{part}.tsv") for part in ("kept", "rest")]
        near_duplicates.main([str(folder / f"{name}.tsv"), "--kept", files[0], "--rest", files[1], *options])
        return read_table(files[0], ["prompt"])["prompt"].to_pylist()

    first = dedup("a")
    rows = [table["prompt"].to_pylist().index(prompt) for prompt in first]
    np.save(folder / "a.kept.npy", embeddings[rows])
    second = dedup("b", "--against", str(folder / "a.kept.tsv"))
    together = dedup("prompts")
    assert first + second == together and len(together) == 40 and 0 < len(second) < 30
    assert read_table(folder / "a.kept.tsv", ["prompt"])["prompt"].to_pylist() == first

    capsys.readouterr()
    chosen = dedup("prompts", "--priority", "s2", "s1", "--overwrite")
    said = capsys.readouterr().out
    sources = dict(zip(table["prompt"].to_pylist(), table["source"].to_pylist(), strict=True))
    count = {name: sum(sources[prompt] == name for prompt in chosen) for name in ("s0", "s1", "s2")}
    assert sum(count.values()) == 40 and count["s2"] > count["s1"] > count["s0"]
    assert f"  s2: {count['s2']} kept, {53 - count['s2']} not" in said and "resembles" in said
    with pytest.raises(ValueError, match=r"prompts.tsv has no prompts of the source 'lexica'; it has s0, s1, s2"):
        dedup("prompts", "--priority", "lexica")
    with pytest.raises(ValueError, match="have to be different files"):
        dedup("b", "--against", str(folder / "b.tsv"))


def test_dedup_never_writes_over_its_input(prompts_file):
    before = contents(prompts_file.parent)
    with pytest.raises(ValueError, match="have to be different files"):
        near_duplicates.main([str(prompts_file), "--kept", str(prompts_file), "--rest", "rest.tsv", "--overwrite"])
    assert contents(prompts_file.parent) == before


def test_a_new_prompt_moves_to_the_fold_that_attracts_it_where_there_is_room():
    pairs = SimilarPairs(np.array([1, 1]), np.array([2, 3]), np.full(2, 0.8, np.float32))  # 2 and 3 resemble 1
    graph = partition.similarity_graph(4, pairs)
    for free, expected in ((7, [0, 1, 1, 0]), (4, [0, 1, 0, 0])):  # prompt 2 has 5 rows
        folds, room = np.array([0, 1, 0, 0], np.int8), np.array([0, free])
        partition.move_prompts(folds, np.array([2]), graph, np.array([1, 1, 5, 1]), room, seed=0)
        assert folds.tolist() == expected
        assert room.tolist() == ([5, free - 5] if expected[2] else [0, free])


def test_a_pair_weighs_the_more_the_fewer_neighbours_its_prompts_have():
    pairs = SimilarPairs(np.array([0, 0, 1, 2]), np.array([1, 2, 2, 3]), np.full(4, 0.8, np.float32))
    assert partition.edge_weights(4, pairs).tolist() == [500, 500, 500, 1000]  # neighbours: 2, 2, 3, 1


@pytest.mark.parametrize(
    ("main", "defaults"),
    [
        (prompt_folds.main, ["0.7", "10, or as many as there are with --keep", "stratified", "0", "auto"]),
        (near_duplicates.main, ["0.9", "auto"]),
    ],
    ids=["folds", "dedup"],
)
def test_help_shows_every_default(main, defaults, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "None" not in text
    for default in defaults:
        assert f"(default: {default})" in " ".join(text.split())


@pytest.mark.slow
def test_commands_from_a_shell(tables, start_ranks):
    folder = tables[0].parent

    def run(*arguments, num_ranks=1):
        return start_ranks("kutils", *arguments, num_ranks=num_ranks, cwd=folder).run()

    said = run("folds", "one.tsv", "two.tsv", "--threshold", "0.7", "--folds", "10", "--method", "partition")
    assert "300 distinct prompts; folds by partition at cosine >= 0.7" in said
    assert read_fold_report(tables[0])["method"] == "partition"
    alone = [path.read_bytes() for path in tables]
    assert run("folds", "one.tsv", "two.tsv", "--seed", "1", num_ranks=2).count("300 distinct prompts") == 1
    together = [path.read_bytes() for path in tables]
    run("folds", "one.tsv", "two.tsv", "--seed", "1")
    assert [path.read_bytes() for path in tables] == together != alone

    tables[1].with_suffix(".npy").unlink()
    with pytest.raises(ValueError, match=r"two.npy cannot be read"):
        prompt_folds.main([*map(str, tables)])

    prompts = ["a red apple on a table", "a castle on a hill", "a red apple on the table", "a castle on a hill"]
    write_table(folder / "p.tsv", {"prompt": prompts, "source": list("abcd")})
    run("dedup", "p.tsv", "--threshold", "0.9", "--kept", "kept.tsv", "--rest", "rest.tsv")
    assert (folder / "kept.tsv").read_text() == "prompt\tsource\na red apple on a table\ta\na castle on a hill\tb\n"
    assert (folder / "rest.tsv").read_text() == "prompt\tsource\na red apple on the table\tc\na castle on a hill\td\n"

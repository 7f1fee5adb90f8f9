"""The index of data sets: built once, mapped afterwards, built anew whenever a file is another."""

import errno
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from fixtures.datasets import make_dataset

from kutils.data import index
from kutils.data.datasets import load_datasets
from kutils.system.paths import repository_root
from kutils.system.tables import read_table, write_table

ROOT = repository_root()


@pytest.fixture
def reads(monkeypatch):
    """The tables that were parsed, by name."""
    names = []

    def counted(path, columns):
        names.append(path.name)
        return read_table(path, columns)

    monkeypatch.setattr(index, "read_table", counted)
    return names


def index_files(workspace):
    return sorted(path.suffix for path in (workspace / "working" / "cache").iterdir())


def facts(data):
    return data.prompts.to_pylist(), data.images.to_pylist(), data.folds.tolist(), data.folds_hashes, len(data)


def test_the_second_open_parses_nothing_and_sees_the_same(workspace, reads):
    make_dataset(workspace / "input", "other", num_prompts=10, images_per_prompt=1)
    first = load_datasets(["toy", "other"])
    assert reads == ["toy.tsv", "other.tsv"] and index_files(workspace) == [".arrow", ".lock"]
    second = load_datasets(["toy", "other"])
    assert reads == ["toy.tsv", "other.tsv"] and facts(first) == facts(second)
    assert load_datasets(["toy"]).mean_prompt_baseline(0) and reads[2:] == ["toy.tsv"]  # another combination
    assert not second.folds.flags.owndata and not second.prompt_codes.flags.owndata  # mapped, not copied


def test_codes_are_by_prompt_over_all_sets_in_order_of_appearance(workspace):
    make_dataset(workspace / "input", "other", num_prompts=5, images_per_prompt=2)
    table = read_table(workspace / "input" / "other.tsv", ["fold"]).to_pydict()
    table["prompt"][0] = 'toy prompt "3, with a comma'
    table["fold"][0] = 3
    write_table(workspace / "input" / "other.tsv", table)
    codes = load_datasets(["toy", "other"]).prompt_codes
    assert codes.dtype == np.int32
    assert codes.tolist() == [number // 2 for number in range(80)] + [3, 40, 41, 41, 42, 42, 43, 43, 44, 44]


@pytest.mark.parametrize("what", ["table", "embeddings", "same size"])
def test_a_changed_file_is_read_again(workspace, reads, what):
    load_datasets(["toy"])
    tsv, npy = workspace / "input" / "toy.tsv", workspace / "input" / "toy.npy"
    if what == "embeddings":
        embeddings = np.load(npy)
        np.save(npy, embeddings[::-1].copy())
    else:
        table = read_table(tsv, ["fold"]).to_pydict()
        folds = table["fold"][:-2] if what == "table" else [(fold + 1) % 10 for fold in table["fold"]]
        write_table(tsv, {key: values[: len(folds)] for key, values in table.items()} | {"fold": folds})
        np.save(npy, np.load(npy)[: len(folds)])
    data = load_datasets(["toy"])
    assert reads == ["toy.tsv"] * 2
    assert data.folds.tolist() == read_table(tsv, ["fold"])["fold"].to_pylist()


def test_an_arrow_file_of_someone_else_is_replaced(workspace, reads):
    load_datasets(["toy"])
    path = next((workspace / "working" / "cache").glob("*.arrow"))
    table = pa.table({"x": [1]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert len(load_datasets(["toy"])) == 80 and len(reads) == 2


def test_a_full_disk_costs_the_index_and_nothing_else(workspace, reads, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    assert len(load_datasets(["toy"])) == 80
    assert "No space left on device" in capsys.readouterr().out and index_files(workspace) == [".lock"]
    assert reads == ["toy.tsv"]


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0 and then nothing", None])
def test_a_damaged_index_is_built_anew(workspace, reads, content):
    expected = facts(load_datasets(["toy"]))
    path = next((workspace / "working" / "cache").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    assert facts(load_datasets(["toy"])) == expected and len(reads) == 2
    assert facts(load_datasets(["toy"])) == expected and len(reads) == 2


def test_where_nothing_can_be_written_it_stays_in_memory(workspace, reads, capsys):
    (workspace / "working" / "cache").write_text("a file where the folder should be")
    data = load_datasets(["toy"])
    assert "cannot be written" in capsys.readouterr().out and len(data) == 80
    assert load_datasets(["toy"]).mean_prompt_baseline(3) == data.mean_prompt_baseline(3) and len(reads) == 2


def test_bad_data_leaves_no_index(workspace):
    embeddings = np.load(workspace / "input" / "toy.npy")
    embeddings[70, 3] = np.inf
    np.save(workspace / "input" / "toy.npy", embeddings)
    with pytest.raises(ValueError, match="row 70") as caught:
        load_datasets(["toy"])
    assert index_files(workspace) == [".lock"]
    embeddings[70] = embeddings[0]
    np.save(workspace / "input" / "toy.npy", embeddings)
    assert len(load_datasets(["toy"])) == 80 and caught.traceback  # which keeps nothing locked


def test_processes_that_start_together_build_it_once(workspace):
    """Three processes at the same moment; each says how often it parsed a table."""
    code = """
import sys, time
from kutils.data import datasets, index
real, count = index.read_table, []
def slow(path, columns):
    count.append(1)
    time.sleep(1)
    return real(path, columns)
index.read_table = slow
print("ready", flush=True)
sys.stdin.readline()
data = datasets.load_datasets(["toy"])
print(len(count), len(data), data.folds_hashes["toy"])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(3)]
    assert all(child.stdout.readline() == "ready\n" for child in children)  # each has imported what it needs
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    told = [child.communicate(timeout=300)[0].split() for child in children]
    assert sorted(count for count, *_ in told) == ["0", "0", "1"]
    assert {tuple(rest) for _, *rest in told} == {("80", load_datasets(["toy"]).folds_hashes["toy"])}

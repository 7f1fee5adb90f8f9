"""The command `kutils generate`: options, tables, embeddings that are handed on, and errors."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from fixtures.datasets import unit_rows

from kutils.generation import generate, shapes
from kutils.prompts import embedding
from kutils.system.paths import read_record, write_json
from kutils.system.tables import hash_prompts, read_table, write_table

PROMPTS = ["a red apple", 'two "blue" hats, in falling snow', "a cat under a starry night sky"]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def embedded(tmp_path):
    """A prompts file with two rows of one prompt, and embeddings that are as good as an encoder's."""
    table = {"prompt": [*PROMPTS, PROMPTS[0]], "source": ["me"] * 4}
    write_table(tmp_path / "p.tsv", table)
    np.save(tmp_path / "p.npy", unit_rows(3)[[0, 1, 2, 0]])
    record = {"encoder": "all-MiniLM-L6-v2", "rows": 4, "prompts_sha256": hash_prompts(pa.array(table["prompt"]))}
    write_json(tmp_path / "p.npy.json", record)
    return tmp_path / "p.tsv"


def test_embeddings_of_the_prompts_become_those_of_the_data_set(embedded, capsys):
    path, command = embedded.with_name("set.tsv"), [str(embedded), "--output", str(embedded.with_name("set"))]
    command += ["--images-per-prompt", "2", "--size", "32", "--workers", "1"]
    generate.main(command)
    assert "set.npy: embeddings copied from" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 1, 2, 2]])
    embedding.embed_table(path)  # the same encoder has nothing to do
    generate.main(command)
    said = capsys.readouterr().out
    assert "set.npy is up to date (6 rows)" in said and "copied" not in said

    (embedded.parent / "set_images/00000/0000001_0.jpg").unlink()
    generate.main([*command[:-4], "--table-only"])  # five images: another table
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 2, 2]])
    table = read_table(path, [])
    write_table(path, dict(zip(table.column_names, table.columns, strict=True)) | {"fold": [1, 1, 1, 1, 1]})
    path.with_suffix(".npy").unlink()
    generate.main([*command[:-4], "--table-only"])  # the table stays, and gets its embeddings
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), unit_rows(3)[[0, 0, 1, 2, 2]])
    assert set(read_table(path, ["fold"])["fold"].to_pylist()) == {1}


@pytest.mark.parametrize("case", ["of another encoder", "without a record", "bfloat16"])
def test_embeddings_that_are_there_stay_and_rounded_ones_are_not_taken(embedded, case):
    npy, record = (embedded.with_name(f"set{suffix}") for suffix in (".npy", ".npy.json"))
    command = ["--output", str(embedded.with_name("set")), "--images-per-prompt", "1", "--size", "32", "--workers", "1"]
    write_table(embedded.with_name("unembedded.tsv"), {"prompt": PROMPTS, "source": ["me"] * 3})
    generate.main([str(embedded.with_name("unembedded.tsv")), *command])
    if case == "bfloat16":
        source = embedded.with_suffix(".npy.json")
        write_json(source, read_record(source) | {"dtype": "bfloat16"})
    else:
        np.save(npy, unit_rows(3, seed=5))
    if case == "of another encoder":
        write_json(record, {"encoder": "mine", "rows": 3, "prompts_sha256": hash_prompts(pa.array(PROMPTS))})
    before = files_of(embedded.parent)
    generate.main([str(embedded), *command])
    assert files_of(embedded.parent) == before


def test_folds_of_the_prompts_become_those_of_the_images(tmp_path):
    prompts = shapes.generate_prompts(2)
    write_table(tmp_path / "p.tsv", {"prompt": prompts, "fold": [4, 0]})
    command = [str(tmp_path / "p.tsv"), "--output", str(tmp_path / "set"), "--images-per-prompt", "2", "--size", "32"]
    generate.main(command)
    table = read_table(tmp_path / "set.tsv", ["image", "prompt", "fold"])
    assert table["fold"].to_pylist() == [4, 4, 0, 0]

    # a table of some of the images, with nothing but those folds, is replaced; one with other folds is not
    (tmp_path / table["image"][1].as_py()).unlink()
    generate.main([*command[:-2], "--table-only"])
    assert read_table(tmp_path / "set.tsv", ["fold"])["fold"].to_pylist() == [4, 0, 0]
    write_table(tmp_path / "set.tsv", {"image": ["x"], "prompt": prompts[:1], "fold": [5]})
    with pytest.raises(ValueError, match=r"set.tsv has values or columns of its own and 1 rows"):
        generate.main(command)


def test_arguments_that_would_not_count_are_refused(tmp_path, capsys, monkeypatch):
    write_table(tmp_path / "p.tsv", {"prompt": PROMPTS})
    command = [str(tmp_path / "p.tsv"), "--output", str(tmp_path / "set")]
    for arguments, said in (
        ([*command, "--seed", "3"], "--seed is not for --backend shapes with PROMPTS.tsv"),
        ([*command, "--num-prompts", "3"], "--num-prompts is not for"),
        (["--shapes-dataset", "x", "--workers", "3"], "--workers is not for --shapes-dataset"),
        ([*command, "--table-only", "--size", "32"], "leave out what says how to make them: --size"),
        ([*command, "--table-only", "--backend", "diffusers", "--steps", "3"], "how to make them: --steps"),
    ):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options, said in ((["--table-only"], "--table-only goes without torchrun"), ([], "only --backend diffusers")):
        with pytest.raises(ValueError, match=said):
            generate.main([*command, *options])


def test_command(tmp_path):
    write_table(tmp_path / "p.tsv", {"prompt": [*PROMPTS, PROMPTS[0]], "source": ["me"] * 4})
    command = [sys.executable, "-m", "kutils", "generate"]
    options = ["p.tsv", "--output", "set", "--images-per-prompt", "1", "--size", "32"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 images of 3 prompts" in done.stdout
    assert read_table(tmp_path / "set.tsv", ["source"])["source"].to_pylist() == ["me"] * 3
    (tmp_path / "set_images" / "00000" / "0000001_0.jpg").unlink()
    (tmp_path / "set.tsv").unlink()
    done = subprocess.run([*command, *options[:-2], "--table-only"], cwd=tmp_path, capture_output=True, text=True)
    assert "2 of 3 images are there" in done.stdout, done.stderr
    assert read_table(tmp_path / "set.tsv", ["prompt"])["prompt"].to_pylist() == [PROMPTS[0], PROMPTS[2]]
    done = subprocess.run([*command, *options, "--steps", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--steps is not for --backend shapes" in done.stderr
    done = subprocess.run([*command, "p.tsv"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--output" in done.stderr
    write_table(tmp_path / "bad.tsv", {"prompt": ["abstract"], "source": ["me"]})
    done = subprocess.run([*command, "bad.tsv", "--output", "bad"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "names nothing that can be drawn" in done.stderr and "Traceback" not in done.stderr

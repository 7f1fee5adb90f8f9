"""A run that was cut goes on over what it began with alone."""

import numpy as np
import pytest
import torch

from kutils import __main__
from kutils.system import locks
from kutils.system.tables import read_table, write_table
from kutils.training import engine


@pytest.fixture
def cut_run(workspace, tiny_recipe, monkeypatch):
    """A run that was cut in its second epoch; a function that starts it again, with further arguments."""
    path = workspace / "tiny.yaml"
    path.write_text(tiny_recipe().to_yaml())
    real, calls = engine.update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "update", interrupted)
        assert start(path) == 130
    assert (workspace / "working" / "runs" / "tiny_fold0" / "resume.pt").is_file()
    return path


def start(path, *overrides):
    return __main__.run("train", ["--config", str(path), "--fold", "0", *overrides])


def change_table(change):
    def write(root):
        table = read_table(root / "toy.tsv", ["image", "prompt", "fold"]).to_pydict()
        change(table)
        write_table(root / "toy.tsv", table)

    return write


@change_table
def other_folds(table):
    table["fold"] = [(fold + 1) % 10 for fold in table["fold"]]


@change_table
def fewer_rows(table):
    for column in table.values():
        column.pop()


@change_table
def other_order(table):
    for column in table.values():
        column[:2] = column[1::-1]  # of one prompt, so that no embedding changes


def shorter_table_and_embeddings(root):
    fewer_rows(root)
    np.save(root / "toy.npy", np.load(root / "toy.npy")[:-1])


def other_embeddings(root):
    np.save(root / "toy.npy", -np.load(root / "toy.npy"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_folds, "folds of toy; rows of toy"),
        (shorter_table_and_embeddings, "rows of toy; embeddings of toy"),
        (other_order, "changed: rows of toy."),
        (other_embeddings, "changed: embeddings of toy."),
    ],
)
def test_changed_data_are_refused(workspace, cut_run, capsys, change, named):
    folder = workspace / "working" / "runs" / "tiny_fold0"
    before = (folder / "resume.pt").read_bytes()
    change(workspace / "input")
    assert start(cut_run) == 1
    said = capsys.readouterr().err
    assert named in said and "resume=never" in said and said.count("\n") == 1
    assert (folder / "resume.pt").read_bytes() == before and not (folder / "result.json").exists()
    assert start(cut_run, "resume=never") == 0


def test_a_changed_recipe_is_refused_even_where_its_copy_says_otherwise(workspace, cut_run, capsys):
    copy = workspace / "working" / "runs" / "tiny_fold0" / "config.yaml"
    copy.write_text(copy.read_text().replace("seed: 71", "seed: 72"))
    assert start(cut_run, "seed=72") == 1
    assert "the recipe's seed" in capsys.readouterr().err
    copy.write_text(copy.read_text().replace("seed: 72", "seed: 71"))
    assert start(cut_run, "num_workers=1") == 0


@pytest.mark.parametrize("override", ["optimizer=adamw", "ema_decay=0.9"])
def test_another_optimiser_or_average_is_refused(workspace, cut_run, capsys, override):
    """By the copy of the recipe, by the state itself where the copy is gone, and by one from before the key existed."""
    assert start(cut_run, override) == 1
    key = override.partition("=")[0]
    assert f"{key} was " in capsys.readouterr().err
    folder = workspace / "working" / "runs" / "tiny_fold0"
    (folder / "config.yaml").unlink()
    checkpoint = next((workspace / "working" / "models").rglob("*_best_cossim.pth"))
    checkpoint.rename(checkpoint.with_suffix(".aside"))
    assert start(cut_run, override) == 1 and f"the recipe's {key}" in capsys.readouterr().err
    content = torch.load(folder / "resume.pt")
    del content["work"]["recipe"][key]
    torch.save(content, folder / "resume.pt")
    assert start(cut_run, override) == 1 and f"the recipe's {key}" in capsys.readouterr().err


def test_files_that_were_written_again_alike_go_on(workspace, cut_run, capsys):
    change_table(lambda table: None)(workspace / "input")
    np.save(workspace / "input" / "toy.npy", np.load(workspace / "input" / "toy.npy"))
    assert start(cut_run) == 0 and "going on after update 4" in capsys.readouterr().out


def test_a_second_training_in_the_folder_is_told_of_the_first(workspace, cut_run, capsys, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0)
    folder = workspace / "working" / "runs" / "tiny_fold0"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with locks.locked(folder):
        assert start(cut_run) == 1
    assert f"{folder} is in use by process" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_unreadable_training_image_is_said(workspace, cut_run, capsys):
    (workspace / "input" / "toy_images" / "0011_0.png").write_bytes(b"no image")
    (workspace / "input" / "toy_images" / "0011_1.png").write_bytes(b"no image")
    assert start(cut_run, "resume=never") == 0
    said = capsys.readouterr().out
    assert "training images could not be read, and others took their place; they are listed in" in said

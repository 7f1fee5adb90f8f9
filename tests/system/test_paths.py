"""Files appear whole or not at all, and no path leaves its root."""

import errno

import pytest

from kutils.system import paths


def test_a_block_that_raises_leaves_the_former_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with paths.atomic_path(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.suffix == ".txt"
    with pytest.raises(RuntimeError), paths.atomic_path(path) as temporary:
        temporary.write_text("half of the sec")
        raise RuntimeError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    for error, said in (
        (
            OSError(errno.ENOSPC, "No space left on device"),
            f"[Errno 28] No space left on device: '{tmp_path / 'a.txt'}'",
        ),
        (OSError(errno.ENOENT, "No such file", "other.txt"), "[Errno 2] No such file: 'other.txt'"),
        (OSError("cannot identify image"), "cannot identify image"),
    ):
        with pytest.raises(OSError) as caught, paths.atomic_path(tmp_path / "a.txt"):
            raise error
        assert str(caught.value) == said


@pytest.mark.parametrize("path", ["a/b.png", "b.png", "a/b..c/d.png", "./a.png"])
def test_safe(path):
    assert paths.is_safe_relative(path)


@pytest.mark.parametrize("path", ["/a/b.png", "../b.png", "a/../../b.png", "", ".", "C:\\x.png", "a\\b.png", "C:/x"])
def test_unsafe(path):
    assert not paths.is_safe_relative(path)


def test_missing_data_sets_are_told_with_the_commands_that_make_them(workspace):
    assert paths.missing_datasets(["toy"]) == ""
    (workspace / "input" / "toy.npy").unlink()
    told = paths.missing_datasets(["toy", "other"])
    assert "'toy': toy.npy not in" in told and "gen_prompt_embedding.py input/toy.tsv" in told
    assert "'other': other.tsv and other.npy not in" in told and "--output input/other" in told
    assert told.count("kutils folds input/toy.tsv input/other.tsv") == 1


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "new" / "folder"
    with paths.atomic_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"] and list(target.parent.iterdir()) == [target]
    with pytest.raises(RuntimeError), paths.atomic_folder(target) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    with pytest.raises(OSError), paths.atomic_folder(target) as partial:  # nobody took the former one away
        (partial / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["a"] and list(target.parent.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "table.tsv").write_text("before")
    link = tmp_path / "table.tsv"
    link.symlink_to("shared/table.tsv")
    with paths.atomic_path(link) as temporary:
        temporary.write_text("after")
    assert link.is_symlink() and (tmp_path / "shared" / "table.tsv").read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "table.tsv"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    others = [".a.tsv.lock", ".b.0123abcd.partial.pt", "a.pt", ".a.0123abcd.partial.tsv"]
    for name in [*others, ".a.0123abcd.partial.pt"]:
        (tmp_path / name).touch()
    paths.remove_partial(tmp_path / "a.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)

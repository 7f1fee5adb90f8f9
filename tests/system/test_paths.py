"""Files appear whole or not at all, and no path leaves its root."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    """Of this machine by the process, of another one and of names of before by a day without a change."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with paths.atomic_path(tmp_path / "live.pt") as mine, paths.atomic_folder(tmp_path / "new") as folder:
        assert f"-{os.getpid()}-" in mine.name and folder.is_dir()
        mine.touch()
        dead = [Path(str(path).replace(f"-{os.getpid()}-", f"-{gone.pid}-")) for path in (mine, folder)]
        dead[0].touch()
        dead[1].mkdir()
        (dead[1] / "file").touch()
        young, old, chunks = ".a.0123abcd.partial.pt", ".b.0123abcd-7-0123.partial", f".set.npy.{'0' * 16}.partial"
        for name in (young, old, chunks, "a.partial.pt"):
            (tmp_path / name).touch()
        for name in (old, chunks):
            os.utime(tmp_path / name, (0, time.time() - 25 * 3600))
        paths.remove_leftovers(tmp_path)
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {mine.name, folder.name, young, chunks, "a.partial.pt"}
    assert {path.name for path in tmp_path.iterdir()} == {"live.pt", "new", young, chunks, "a.partial.pt"}


def test_a_process_that_has_ended_is_gone_before_its_parent_looks(tmp_path):
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert paths.is_running(os.getpid()) and not paths.is_running(child.pid)
    child.wait()


WRITE = """
import os, signal, sys
from pathlib import Path
from kutils.system import paths
with paths.atomic_path(sys.argv[1]) as temporary:
    temporary.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_or_look_for_room_removes_what_a_kill_left(tmp_path):
    def kill(name: str) -> None:
        assert subprocess.run([sys.executable, "-c", WRITE, tmp_path / name]).returncode == -signal.SIGKILL
        assert [path.stat().st_size for path in tmp_path.iterdir() if ".partial" in path.name] == [1000]

    kill("a.pt")
    paths.check_room(tmp_path, 1, "")
    assert not list(tmp_path.iterdir())
    kill("b.npy")
    assert (
        subprocess.run([sys.executable, "-c", WRITE.replace("os.kill", "id or os.kill"), tmp_path / "c"]).returncode
        == 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
